"""The reference of DPO: the policy as it was before its first step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from align.data.examples import Examples, cut
from align.data.mixture import Prepared
from align.data.trees import Forest, Tree
from align.models.demo import cache_folder
from align.models.trunk import Trunk
from align.objectives.logprobs import linear_kl, linear_logprobs
from align.objectives.losses import path_sums
from align.training.batches import Batches
from align.training.runs.durable import write_atomic
from align.training.screen import Screen
from align.training.session import Session
from align.training.shards import let_go


class Reference:
    """log p of whole answers under the policy's starting point: the trunk with its adapter off, or a frozen copy."""

    def __init__(self, policy: Trunk, copy: Trunk | None = None) -> None:
        self.policy, self.copy = policy, copy
        self.baseline = 0.0  # of KTO, for the step at hand
        self._states: Tensor | None = None

    def __call__(self, forest: Forest) -> Tensor:
        """(P,) float32, without gradient."""
        keep = not torch.is_grad_enabled()
        with torch.no_grad(), self._model() as model:
            states = model.states(forest)
            logprobs = linear_logprobs(states, labels=forest.labels, **model.projection())
        self._states = states if keep else None
        if self.copy and not keep:
            let_go(self.copy)
        return path_sums(logprobs, forest.path, forest.paths)

    def divergence(self, forest: Forest) -> dict[str, tuple[Tensor | float, float]]:
        """KL(policy || reference) over the whole vocabulary, summed over the labels of the batch last asked for."""
        assert self._states is not None, "the reference is asked for its log-probabilities first"
        with self._model() as model:
            head = model.projection()["weight"], model.projection()["bias"]
        kl = linear_kl(self.policy.states(forest), self._states, **self.policy.projection(), other_head=head)
        self._states = None
        if self.copy:
            let_go(self.copy)
        return {"kl_per_token": (kl.sum(), len(kl))}

    @contextmanager
    def _model(self) -> Iterator[Trunk]:
        if self.copy is not None:
            yield self.copy
        else:
            with self.policy.acting(None) as bare:
                yield bare


class KnownReference:
    """Numbers that were computed ahead of time and now stand in the batch's targets."""

    baseline = 0.0

    def __call__(self, forest: Forest) -> Tensor:
        """(P,) float32."""
        return forest.targets

    def divergence(self, forest: Forest) -> dict[str, tuple[Tensor | float, float]]:
        """Nothing: the reference itself is not there."""
        return {}


def with_known_reference(session: Session, trunk: Trunk, data: Prepared) -> Prepared:
    """The data with the reference's log p of every answer as its target, from the cache or computed now.

    `trunk` is still at its start, so it is the reference.
    """
    batches = Batches(trunk, session.accelerator, session.recipe.batch.row_tokens)
    return data._replace(
        train=_known(session, trunk, batches, data.train, "training"),
        eval=_known(session, trunk, batches, data.eval, "eval"),
    )


def _known(session: Session, trunk: Trunk, batches: Batches, examples: Examples, side: str) -> Examples:
    if not len(examples):
        return examples
    path, flat = session.decided(lambda: _found(trunk, examples))
    session.say(f"reference log-probabilities of the {side} rows: {'found' if flat is not None else 'computed once'}")
    if flat is None:
        with Screen(session.console) as screen:
            lines = batches.each(examples, np.arange(len(examples)), _paths, screen, "reference")
        flat = torch.cat(lines)
        if session.first:
            write_atomic(path, save({"logprobs": flat}))
    parts = torch.split(flat, examples.paths.tolist())
    return examples.with_targets([tuple(part.tolist()) for part in parts])


def _paths(trunk: Trunk, forest: Forest) -> Tensor:
    return path_sums(trunk(forest), forest.path, forest.paths)


def _found(trunk: Trunk, examples: Examples) -> tuple[Path, Tensor | None]:
    """Where the cache keeps the numbers, and what is there."""
    path = cache_folder() / "reference" / f"{_key(trunk, examples)}.safetensors"
    return path, _read(path, int(examples.paths.sum()))


def _read(path: Path, paths: int) -> Tensor | None:
    try:
        flat = load_file(path)["logprobs"]
    except (OSError, SafetensorError, KeyError):
        return None
    return flat if flat.shape == (paths,) else None


def _key(trunk: Trunk, examples: Examples) -> str:
    """Of all that the numbers depend on: weights, architecture, dtype, and the tokens after any cut."""
    digest = sha256()
    config = json.dumps(trunk.plain.config.to_diff_dict(), sort_keys=True, default=str)
    digest.update(f"{trunk.fingerprint} {trunk.dtype} {trunk.adapted} {config}".encode())
    for i in range(len(examples)):
        tree = examples.tree(i)
        for ids, trained in zip(tree.segments, tree.trained, strict=True):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes() + trained.tobytes())
    return digest.hexdigest()[:32]


class Mismatched:
    """Each of the chosen examples' prompts with the answer of the next one, cut to what an example may have: what KTO
    takes its baseline from."""

    def __init__(self, examples: Examples, chosen: np.ndarray) -> None:
        trees = [examples.tree(int(i)) for i in chosen]
        self.trees = [
            cut(Tree((own.segments[0], *other.segments[1:]), (own.trained[0], *other.trained[1:])), examples.max_length)
            for own, other in zip(trees, trees[1:] + trees[:1], strict=True)
        ]
        self.lengths = self.longest = np.array([sum(map(len, tree.segments)) for tree in self.trees])
        self.paths = np.ones(len(trees), np.int64)
        self.room = self.lengths

    def __len__(self) -> int:
        return len(self.trees)

    def tree(self, i: int) -> Tree:
        """Example `i`."""
        return self.trees[i]
