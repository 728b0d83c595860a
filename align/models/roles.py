"""The roles of PPO and GRPO on one trunk: actor, critic, reward and reference share its weights and differ in an
adapter. And reward models beside whatever else trains on a trunk.

The actor's adapter starts at zero, so that actor and reference are equal; the critic's is a copy of the reward's, and
so is its head, in the units of the normalised score. Without a reward on this trunk, the critic starts at zero. GRPO
has no critic.

Shapes: n labelled tokens, P paths (responses), S = n + P steps: before each token of a path, and after its last.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from align.data.trees import Forest
from align.models.checkpoints.adapters import put, stands_on, stranger
from align.models.checkpoints.results import META, read_result
from align.models.lora import check_targets, lora_config
from align.models.trunk import Trunk
from align.objectives.logprobs import linear_entropy, linear_logprobs
from align.recipe.errors import UserError
from align.recipe.schema import Lora

CRITIC = "critic"
Entropy = Literal["known", "learnt"]  # the latter with a gradient


class Scorer(NamedTuple):
    """A reward model's result, read from its folder."""

    folder: Path
    mean: float  # of its scores on demonstrations
    std: float
    lora: Lora
    weights: dict[str, Tensor]  # of the adapter, under peft's names in a file
    head: Tensor  # (1, d) float32


def read_scorer(name: str, key: str, trunk: Trunk) -> Scorer:
    """A `final/` of align.reward that was trained on this trunk; UserError, which names the `key`, for any other."""
    result = read_result(name, key, "a finished reward run")
    folder, about = result.folder, result.about
    if about.stage != "reward":
        raise UserError(f"{key}: {folder} is a result of stage {about.stage}, and no reward model")
    if not stands_on(result, trunk):
        raise UserError(f"{key}: {stranger(result, trunk, 'the trunk of this run')}; or name it as `model`")
    if result.config.tokens:
        raise UserError(
            f"{key}: {folder} brings rows of added tokens of its own; train them in SFT, and the reward on its result"
        )
    if about.score_mean is None or about.score_std is None:
        raise UserError(f"{key}: {folder / META} has no score_mean and score_std, by which scores are normalised")
    weights = dict(result.weights)
    heads = [name for name in weights if name.endswith("score.weight")]
    if len(heads) != 1 or weights[heads[0]].shape != (1, trunk.width):
        raise UserError(f"{key}: {folder} has no scalar head on {trunk.width} features")
    head = weights.pop(heads[0]).float()
    return Scorer(folder, about.score_mean, about.score_std, result.config.section, weights, head)


class Said(NamedTuple):
    """By actor and critic, all float32."""

    logprobs: Tensor  # (n,) of every label
    values: Tensor | None  # (S,) of every step
    entropy: Tensor | None  # (n,) of the distribution that each label was drawn from, in nats


class Roles(nn.Module):
    """Actor and critic behind one forward pass, which trains both; rewards and reference beside them."""

    def __init__(
        self,
        trunk: Trunk,
        lora: Lora,
        scorers: dict[str, Scorer],
        leading: str | None,
        temperature: float = 1.0,
        seed: int = 0,
        *,
        critic: bool = True,
    ) -> None:
        """`scorers` by role name; the critic, if there is one, starts as the `leading` one, at 0 without one."""
        super().__init__()
        self.trunk, self.temperature = trunk, temperature
        self.heads = nn.ModuleDict()
        for role, scorer in scorers.items():
            add_role(trunk, role, scorer.lora, seed, scorer)
            self.heads[role] = _head(scorer.head, trunk)
        if critic and leading is None:
            add_role(trunk, CRITIC, lora, seed)
            self.heads[CRITIC] = _head(torch.zeros(1, trunk.width), trunk)
        elif critic:
            first = scorers[leading]
            add_role(trunk, CRITIC, first.lora, seed, first)
            spread = first.std or 1.0
            self.heads[CRITIC] = _head(first.head / spread, trunk, -first.mean / spread)
        trunk.take_in()
        for name, parameter in self.named_parameters():
            part = name.split(".")
            parameter.requires_grad_(CRITIC in part or ("default" in part and "lora" in name))

    @property
    def valued(self) -> bool:
        """Whether there is a critic."""
        return CRITIC in self.heads

    def forward(self, forest: Forest, valued: bool = True, entropy: Entropy | None = None) -> Said:
        """What actor and critic say of a batch, the latter only if `valued`."""
        states, head = self.trunk.states(forest), self.trunk.projection(self.temperature)
        known = states.new_empty(len(states), dtype=torch.float32) if entropy == "known" else None
        return Said(
            linear_logprobs(states, labels=forest.labels, **head, entropies=known),
            self.scores(CRITIC, forest, steps(forest)) if valued and self.valued else None,
            linear_entropy(states, **head) if entropy == "learnt" else known,
        )

    def reference(self, forest: Forest) -> Tensor:
        """The bare trunk's log-probability of every label, (n,) float32, at the same temperature."""
        with self.trunk.acting(None):
            states = self.trunk.states(forest)
        return linear_logprobs(states, labels=forest.labels, **self.trunk.projection(self.temperature))

    def scores(self, role: str, forest: Forest, where: Tensor) -> Tensor:
        """A role's score of the given positions, flat indices (m,) -> (m,) float32."""
        return _scores(self.trunk, role, self.heads[role], forest, where)

    def saved(self) -> dict[str, nn.Parameter]:
        """What a result holds, by name: the actor."""
        own = {name: p for name, p in self.named_parameters() if p.requires_grad and name.startswith("trunk.")}
        return {name: p for name, p in own.items() if CRITIC not in name.split(".")}

    def save(self, folder: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        """The actor, as `Trunk.save` writes it."""
        self.trunk.save(folder, {name.removeprefix("trunk."): tensor for name, tensor in weights.items()}, about)


class Scorers:
    """Reward models on a trunk that something else trains: frozen adapters, each with its head."""

    def __init__(self, trunk: Trunk, scorers: dict[str, Scorer], seed: int) -> None:
        """What trained before trains after."""
        self.trunk = trunk
        self.heads = {role: _head(scorer.head, trunk).requires_grad_(False) for role, scorer in scorers.items()}
        learnt = {name for name, parameter in trunk.named_parameters() if parameter.requires_grad}
        for role, scorer in scorers.items():
            add_role(trunk, self._adapter(role), scorer.lora, seed, scorer)
        if scorers:
            trunk.take_in()
            for name, parameter in trunk.named_parameters():
                parameter.requires_grad_(name in learnt)

    def scores(self, role: str, forest: Forest, where: Tensor) -> Tensor:
        """A score of the given positions, flat indices (m,) -> (m,) float32."""
        return _scores(self.trunk, self._adapter(role), self.heads[role], forest, where)

    @staticmethod
    def _adapter(role: str) -> str:
        return f"scorer_{role}"  # a run may have a role of the same name


def add_role(trunk: Trunk, role: str, lora: Lora, seed: int, start: Scorer | None = None) -> None:
    """Another adapter on the trunk, which begins as `start`; `Trunk.take_in` is to follow."""
    check_targets(trunk.plain, lora)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        with trunk.whole() if lora.dora else nullcontext():  # DoRA starts at the length of each weight's rows
            trunk.causal.add_adapter(role, lora_config(lora, trunk.plain))
    if start:
        put(trunk.causal, start.weights, role, f"the adapter {start.folder}")


def steps(forest: Forest) -> Tensor:
    """Flat indices (S,) of a forest's steps, path by path: what predicts each label, then the path's last token."""
    places = torch.cat([forest.where, forest.ends])
    path = torch.cat([forest.path, torch.arange(forest.paths, device=forest.path.device)])
    return places[path.argsort(stable=True)]


def _scores(trunk: Trunk, adapter: str, head: nn.Module, forest: Forest, where: Tensor) -> Tensor:
    with trunk.acting(adapter), trunk.autocast():
        states = trunk.hidden(forest, where)
    return head(states.float())[:, 0]


def _head(weight: Tensor, trunk: Trunk, bias: float = 0.0) -> nn.Linear:
    head = nn.Linear(weight.shape[1], 1)
    head.weight.data, head.bias.data = weight.clone(), torch.full((1,), bias)
    return head.to(trunk.device)
