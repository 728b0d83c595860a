"""What a step computes and sends, and how long it may take.

FLOPs are those of `costs.flops_per_token`: products and attention, not norms. A range of time comes from a range of
how much of its peak a device reaches; what is sent is taken to overlap with nothing, so that the upper end is no hope.
"""

from __future__ import annotations

from typing import NamedTuple

from align.models.memory import cached_token_bytes
from align.training.costs import causal_attended, flops_per_token
from align.training.planning.devices import NETWORK
from align.training.planning.load import Load, sampling_of
from align.training.planning.memory import Memory
from align.training.planning.parts import Setting, asks_reference, policies, teacher_bytes, trained, trunk_bytes

REACHED = {"cuda": (0.25, 0.55), "cpu": (0.3, 0.9)}  # share of the peak in training
READ = (0.3, 0.8)  # share of the memory's bandwidth while sampling


class Work(NamedTuple):
    """Of one step, over all processes unless told otherwise."""

    tokens: int  # of the step's examples, or of its prompts and responses
    episodes: int  # responses that are sampled; 0 without sampling
    flops: float
    sent: float  # bytes that each device sends to others
    seconds: tuple[float, float] | None  # fastest and slowest; None where the device's speed is not known


def work(at: Setting, plan: Memory, hosts: int = 1) -> Work:
    """Of a plan."""
    load, recipe = plan.load, at.recipe
    flops = _flops(at, load)
    drawn = sampling_of(recipe)
    episodes = recipe.batch.examples * drawn.samples if drawn else 0
    sent = traffic(at, load)
    return Work(load.tokens, episodes, flops, sent, _seconds(at, load, flops, sent, hosts))


def traffic(at: Setting, load: Load) -> float:
    """Bytes that each device sends in a step.

    A ring reduces or gathers n bytes over P devices in (P - 1) / P * n sent by each; an all-reduce is both. Gradients
    of an adapter are reduced once an update, in float32; where the trunk is sharded, each process then sends the part
    that it has stepped. A sharded trunk is gathered for each forward and each backward pass of a row, and once more
    where activations are computed again.
    """
    share = (at.processes - 1) / at.processes
    updates = load.passes * getattr(sampling_of(at.recipe), "minibatches", 1)
    learnt = share * 4 * trained(at)  # what trains, sent once
    if at.shards == 1:
        return 2 * learnt * updates
    whole = trunk_bytes(at)
    rows, beside = load.rows * updates, load.beside.rows * updates if load.beside else 0
    sent = learnt * (3 * updates if at.adapted else rows)  # the latter reduced to the shards, row by row
    passes = (rows * policies(at) + beside) * (3 if at.recipe.model.gradient_checkpointing else 2)
    sent += share * whole * passes
    sent += share * (whole * _read(at) + teacher_bytes(at)) * rows / load.passes
    if load.episodes:
        sent += share * whole  # whole while it samples
    return sent


def _read(at: Setting) -> int:
    """Passes of the trunk over a step's rows that nothing is learnt from: reference, rewards, roles before they train,
    and a teacher that is an adapter."""
    match at.recipe.stage:
        case "ppo" | "grpo":
            rewards = sampling_of(at.recipe).rewards
            return policies(at) + 1 + sum(part.adapter is not None for part in rewards)
        case "distill":
            return int(at.teacher is None)
        case "dpo":
            return int(asks_reference(at.recipe))
    return 0


def _flops(at: Setting, load: Load) -> float:
    recipe, n, drawn = at.recipe, at.skeleton.sizes.multiplied, sampling_of(at.recipe)
    attended = causal_attended([load.prompt + load.answer or max(load.segment, 1)])
    again = recipe.model.gradient_checkpointing

    def a_token(lora: bool) -> float:
        try:
            return flops_per_token(at.skeleton.text, n, attended, lora=lora, gradient_checkpointing=again)
        except AttributeError:  # layers of another kind than attention
            return (4 if lora else 6) * n

    learning, flops = policies(at) * a_token(at.adapted) * load.passes, 0.0
    if load.beside:
        flops += load.beside.tokens * a_token(at.adapted) * load.passes * drawn.minibatches
    read = 2 * (n * _read(at) + (at.teacher.sizes.multiplied if at.teacher else 0))
    flops += load.tokens * (learning + read)
    if drawn is None:
        return flops
    if load.episodes:
        flops += 2 * n * recipe.batch.examples * (drawn.samples * load.answer + load.prompt)
    return flops + 2 * _judged(at) * recipe.batch.examples * drawn.samples * (load.prompt + load.answer)


def _judged(at: Setting) -> int:
    """Weights of the models beside the trunk that each response of a step is put to."""
    asked = sum(part.model is not None for part in getattr(sampling_of(at.recipe), "rewards", ()))
    return sum(judge.sizes.multiplied for judge in at.judges[:asked])


def _seconds(at: Setting, load: Load, flops: float, sent: float, hosts: int) -> tuple[float, float] | None:
    if not at.device.flops:
        return None
    low, high = REACHED.get(at.device.type, REACHED["cuda"])
    devices = hosts if at.device.type == "cpu" else at.processes  # processes on a CPU share its cores
    own = flops / devices / at.device.flops
    sampling = _sampling(at, load)
    link = NETWORK if hosts > 1 else at.device.link
    waiting = sent / link if link and at.processes > 1 else 0.0
    return own / high + sampling / READ[1], own / low + sampling / READ[0] + waiting


def _sampling(at: Setting, load: Load) -> float:
    """Seconds at the memory's full bandwidth: every token of a response reads the weights and what is kept so far."""
    if not load.episodes or not at.device.bandwidth:
        return 0.0
    kept = load.episodes * (load.prompt + load.answer / 2) * cached_token_bytes(at.skeleton.text, at.dtype)
    return load.answer * (trunk_bytes(at) + kept) / at.device.bandwidth
