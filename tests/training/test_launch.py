"""What is set before a stage runs."""

from __future__ import annotations

import os

import pytest
import torch
from world import align


@pytest.mark.parametrize("own", [None, ":16:8"])
def test_cublas_is_told_to_sum_in_one_order_before_cuda_starts(own, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", own or "")
    if not own:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert align("--help").status == 0
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (own or ":4096:8")
    assert not torch.cuda.is_initialized()
