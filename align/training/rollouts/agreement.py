"""Whether a server computes what the own trunk computes: log-probabilities of the same tokens, beside each other."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

import numpy as np
import torch

from align.data.trees import plant
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import evaluating
from align.models.sampling.rows import Response
from align.models.trunk import Trunk
from align.objectives.logprobs import linear_logprobs
from align.recipe.engine import Server
from align.recipe.errors import UserError
from align.training.rollouts.remote import Gone, Remote
from align.training.rollouts.rollout import Episodes
from align.training.session import Session

NEW = 16  # tokens of each response that both engines are compared on


class Agreement:
    """Of a server and a trunk; what it does, every process does."""

    def __init__(
        self,
        session: Session,
        trunk: Trunk,
        remote: Remote,
        server: Server,
        how: Sampling,
        prompts: Sequence[np.ndarray],
        key: str,
    ) -> None:
        """`prompts`: some, (l,) int32 each; `key`: what the server is called in the recipe."""
        self.session, self.trunk, self.remote, self.server, self.how = session, trunk, remote, server, how
        self.prompts, self.key = prompts, key
        self.comparable = True  # whether both engines' log-probabilities of a draw mean the same

    def check(self, base: str) -> None:
        """Raises UserError where the server's adapter says something else than the own actor, and tells whether its
        `base` is why; or where its figures cannot weigh what the recipe draws."""
        told, name, allowed = self.remote.told, self.remote.name, self.server.tolerance
        apart = self._apart(name, Sampling(NEW), "default")
        if not apart <= allowed:
            raise UserError(f"{told} {self._why(base, apart)}; {self.key}.tolerance allows {allowed:g}")
        drawn = self.how._replace(max_new=min(NEW, self.how.max_new), min_new=0, stop=())
        rounding = min(allowed, 3 * apart + 0.01)  # else a temperature near 1 would pass for it
        self.comparable = drawn == Sampling(drawn.max_new) or self._apart(name, drawn, "default") <= rounding
        if self.comparable:
            return
        what = "its log-probabilities are not those of the whole distribution at the recipe's temperature"
        if self.server.importance_cap is None:
            self.session.say(f"{told}: {what}, so the run does not tell how far both engines are apart")
            return
        mode = "raw_logprobs" if self.how.temperature == 1 else "processed_logprobs"
        raise UserError(
            f"{told}: {what}, so they cannot weigh what it draws; start vLLM with --logprobs-mode {mode} (none of its "
            f"modes suits a temperature and filters together), or set {self.key}.importance_cap=null"
        )

    def _why(self, base: str, apart: float) -> str:
        """What differs: what lies beneath the adapter, or the adapter."""
        beneath = self._apart(base, Sampling(NEW), None)
        if beneath <= self.server.tolerance:
            return (
                f"computes the adapter otherwise: its log-probabilities are {apart:.2g} nats a token away from the own "
                "actor's, though its base agrees; look at what its log says of loading the adapter"
            )
        first, *merged = [link.name for link in self.trunk.links]
        wanted = f"{first} with {', '.join(merged)} merged in, which align.merge writes" if merged else first
        return (
            f"has another trunk: the log-probabilities of its model {base} are {beneath:.2g} nats a token away from "
            f"those of the run's; serve {wanted}"
        )

    def _apart(self, model: str, how: Sampling, role: str | None) -> float:
        """How far the server's model and a role of the trunk are apart, in nats a token, on what the first draws."""

        async def drawn() -> list[Response]:
            salt = secrets.token_hex(16)
            asked = (self.remote.response(model, how, prompt, salt=salt) for prompt in self.prompts)
            return await asyncio.gather(*asked)

        def ask() -> list[Response]:
            try:
                return self.remote.run(drawn())
            except Gone:
                raise UserError(f"{self.remote.told} names a model {model}, and does not know it") from None

        responses = self.session.decided(ask)
        episodes, trunk = Episodes(self.prompts, [[response] for response in responses]), self.trunk
        forest = plant([episodes.tree(i) for i in range(len(episodes))], multiple=trunk.row_multiple).to(trunk.device)
        with torch.no_grad(), evaluating(trunk), trunk.acting(role):
            states, head = trunk.states(forest), trunk.projection(how.temperature)
            own = linear_logprobs(states, labels=forest.labels, **head).cpu()
        told = torch.cat([torch.from_numpy(response.logprobs) for response in responses])
        return float((own - told).abs().mean())
