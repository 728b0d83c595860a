"""What a checkpoint is made of does not change with the run."""

from __future__ import annotations

import torch

from align.recipe.schema import Optim
from align.training.runs.state import adamw, capture, gathered, kept_portions, trained_parameters


def test_a_run_that_goes_on_does_not_change_what_was_captured():
    model = torch.nn.Linear(3, 2)
    model.weight = torch.nn.Parameter(torch.randn(3, 2).T)  # not contiguous, which a file cannot hold
    named, optimizer = trained_parameters(model), adamw(model, Optim(), {})

    def step() -> None:
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    step()
    before = {name: tensor.detach().clone() for name, tensor in gathered(named, keep=True).items()}
    found = capture(named, optimizer)
    step()
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in before.items())
    assert {float(value) for name, value in found["optimizer"].items() if name.endswith("/step")} == {1.0}
    tensors = [tensor for part in found.values() for tensor in part.values()]
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors) == 2 + 2 * 3


def test_who_does_not_keep_gets_nothing():
    model = torch.nn.Linear(3, 2)
    optimizer = adamw(model, Optim(), {})
    assert capture(trained_parameters(model), optimizer, keep=False) == {"model": {}, "optimizer": {}}


def test_a_run_that_goes_on_works_in_the_portions_of_before():
    """More memory changes nothing; what there is no room for now is smaller, and that is said. What a former version
    did not write is as it is now."""
    before = {"row_tokens": 512, "cache_tokens": 4096}
    assert kept_portions({"row_tokens": 2048, "cache_tokens": 8192}, before) == (before, "")
    kept, said = kept_portions({"row_tokens": 256, "cache_tokens": 8192, "logits_bytes": 7}, before)
    assert kept == {"row_tokens": 256, "cache_tokens": 4096, "logits_bytes": 7}
    assert "row_tokens 256 in place of 512" in said
    assert "cache_tokens" not in said
