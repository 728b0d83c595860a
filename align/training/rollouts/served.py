"""Rollouts by an inference server: it loads the actor's adapter anew for each step, and draws; the own trunk scores.

A step saves the adapter where the server can read it and has it loaded under one name, and every process asks for its
share of the responses, one request each. What came back is read by the own trunk like any other rollout, so p / p_old
begins at 1 exactly. The server's own log-probabilities tell how far the two engines are apart, and weigh each token in
the policy loss (`objectives/importance.py`).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np

from align.data.mixture import Prepared
from align.models.sampling.choice import Sampling
from align.models.sampling.rows import Response
from align.models.trunk import Trunk
from align.objectives.advantages import k3
from align.objectives.importance import truncated_importance
from align.recipe.engine import Server
from align.recipe.errors import UserError
from align.training.borders.processes import gathered
from align.training.loop import Loop
from align.training.rollouts.agreement import Agreement
from align.training.rollouts.client import Client
from align.training.rollouts.completions import Ends, seed_of
from align.training.rollouts.remote import Adapter, Remote
from align.training.rollouts.rollout import Episodes, Rollout
from align.training.session import Session

PROBES, PROMPT = 4, 256  # prompts that both engines are compared on, and most tokens of each
FAR = 10  # tolerances: so far apart, the server draws from something else than the actor


class Served:
    """A server that has the run's trunk."""

    def __init__(self, session: Session, trunk: Trunk, data: Prepared, server: Server, how: Sampling, key: str) -> None:
        """Raises UserError for a server that is not there or takes too few tokens."""
        self.session, self.server, self.how = session, server, how
        place = session.recipe.folder
        self.folder = Path(server.adapters or place / "engine")
        plain = re.sub(r"[^A-Za-z0-9]+", "-", place.name).strip("-")[:50] or "run"
        self.name = f"{plain}-{sha256(os.fsencode(place.resolve())).hexdigest()[:8]}"
        if server.adapters:
            session.decided(lambda: self._made(f"{key}.adapters"))
        client = Client(server, key, session.say)
        self.remote = Remote(client, self.name, Ends.of(trunk, how), session.signals.heed)
        self.adapter: Adapter | None = None  # that the server has
        prompts = [data.train.tree(i).segments[0][:PROMPT] for i in range(min(PROBES, len(data.train)))]
        self.agreement = Agreement(session, trunk, self.remote, server, how, prompts, key)
        self.base, most = session.decided(lambda: self.remote.run(self.remote.base()))
        longest = max(int((side.lengths - side.labels).max()) for side in (data.train, data.eval) if len(side))
        if most is not None and longest + how.max_new > most:
            raise UserError(
                f"{client.told} takes {most:,} tokens, but a prompt has {longest:,} and a response up to "
                f"{how.max_new:,}; raise vLLM's --max-model-len, or lower data.max_length or generation.max_new"
            )
        session.say(
            f"{client.told} draws the responses, from its model {self.base}. A run that is resumed has the weights and "
            "prompts of its checkpoint; its responses are drawn again, and may be others"
        )

    def sampled(
        self, loop: Loop, prompts: Sequence[np.ndarray], keys: Sequence[tuple[int, ...]], samples: int
    ) -> Episodes:
        """See `Engine`. Where the server can be asked no more, the run ends with its state saved."""
        wanted = [(i, number) for i in range(len(prompts)) for number in range(samples)]
        mine = wanted[loop.batches.rank :: loop.batches.world]
        seeds = [seed_of((*keys[i], number)) if self.server.seeds else None for i, number in mine]
        asked = [(prompts[i], seed) for (i, _), seed in zip(mine, seeds, strict=True)]

        def own() -> tuple[dict[tuple[int, int], Response], int]:
            before = self.remote.reloads
            with loop.screen.counting(len(asked), "sampling") as one_more:
                said = self.remote.run(self.remote.drawn(self.adapter, self.how, asked, one_more))
            return dict(zip(mine, said, strict=True)), self.remote.reloads - before

        try:
            first = self.adapter is None
            self._load(loop)
            if first:
                self.agreement.check(self.base)
            parts = gathered(own)
            if any(anew for _, anew in parts):  # the server was started again, perhaps with something else
                self.agreement.check(self.base)
        except UserError as error:
            loop.give_up(*error.problems)
        found = {place: response for part, _ in parts for place, response in part.items()}
        return Episodes(prompts, [[found[i, number] for number in range(samples)] for i in range(len(prompts))])

    def weighed(self, loop: Loop, rollout: Rollout) -> Rollout:
        """See `Engine`; and how far both engines are apart. A server that draws from something else ends the run."""
        told, own, mask = rollout.engine_logprobs, rollout.logprobs, rollout.tokens
        assert told is not None, "a response of the server has no log-probabilities"
        if not self.agreement.comparable:
            return rollout
        apart = float((own - told)[mask].abs().mean())
        if not apart <= FAR * self.server.tolerance:
            loop.give_up(
                f"{self.remote.told} draws from something else than this run's actor: its log-probabilities are "
                f"{apart:.2g} nats a token away from the own trunk's; start it again, with {self.base}, and run the "
                "same command again to go on"
            )
        cap = self.server.importance_cap
        weights, figures = (
            truncated_importance(own, told, mask, cap),
            {"mismatch_kl": float(k3(told, own)[mask].mean())},
        )
        if cap is not None:
            figures["importance"] = float(weights[mask].mean())
            figures["importance_capped"] = float((weights[mask] >= cap).float().mean())
        return rollout._replace(importance=weights, mismatch=figures)

    def _made(self, key: str) -> None:
        """The folder of the adapters is there. Raises UserError, which names the recipe's `key`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{key}: {self.folder} cannot be made ({error.strerror})") from None

    def _load(self, loop: Loop) -> None:
        """Have the server draw from the actor as it is now; every process comes by here."""
        if self.adapter and self.adapter.step == loop.step:
            return
        folder = self.folder / f"{self.name}-{loop.step:06d}"
        loop.publish(folder, {})

        def load() -> Adapter:
            if self.adapter is None:
                self.session.held.callback(self._leave)
            there = self.server.adapters_there or str(self.folder.resolve())
            new = Adapter(loop.step, f"{there.rstrip('/')}/{folder.name}", secrets.token_hex(16))
            self.remote.run(self.remote.load(new))
            self._remove(but=folder)
            return new

        self.adapter = self.session.decided(load)

    def _leave(self) -> None:
        """Take the adapter out of the server, and its files away."""
        self.remote.unload()
        self._remove()
        if not self.server.adapters:  # else it may be somebody's
            with suppress(OSError):  # it was never written, or something is kept there
                self.folder.rmdir()

    def _remove(self, but: Path | None = None) -> None:
        """Adapters that were written for the server. The newest stays: a server reads it again after making room."""
        for old in self.folder.glob(f"*{self.name}-*"):
            if old != but:
                shutil.rmtree(old, ignore_errors=True)
