"""Processes forked off one that has imported the stages already: a server of such forks for all tests of a process.

They have no threads of the tests' own process, whose locks a fork of it would hold for ever.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

PRELOADED = ["align.sft", "align.reward", "align.dpo", "align.ppo", "align.grpo", "align.distill"]


def forked(target: Callable[..., Any], *args: Any) -> BaseProcess:
    """A process that has begun to call `target`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # each time: the server begins with the first fork, and keeps what it has
    process = context.Process(target=target, args=args)
    process.start()
    return process
