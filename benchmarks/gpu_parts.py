"""The parts of `gpu.py`: each builds a model of its own with random weights, and gives rows as it measures them.

Clocks are read when the device has done its work, after a first time that is not counted: it compiles. Peaks are those
of the counted work, with all that is held meanwhile.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from gpu_models import (
    END,
    LORA,
    Drawn,
    Shape,
    adapted,
    conversations,
    pairs,
    prompts,
    random_model,
    random_trunk,
    whole,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from torch import Tensor, nn
from transformers import GenerationConfig

from align import dpo, ppo
from align import reward as reward_stage
from align.data.examples import Ledger
from align.data.mixture import Prepared
from align.data.trees import Forest
from align.models.roles import CRITIC, Roles, Scorer
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.models.trunk import Trunk
from align.training.batches import Batches
from align.training.costs import causal_attended, flops_per_token, matmul_params, mfu, peak_flops, peak_memory
from align.training.loop import Loop
from align.training.reference import Reference
from align.training.rollouts.experience import Experience
from align.training.rollouts.rewards import Rewards
from align.training.rollouts.rollout import check_samples
from align.training.runs.run import Standing
from align.training.screen import Screen
from align.training.session import Session

# LoRA SFT of Llama-3 8B on one H100, tokens/s: NVIDIA NeMo Automodel's performance summary (40.6 % of the peak at 4 N).
PUBLISHED_TOKENS, PUBLISHED_RATE = 4096, 12_473
WARM_STEPS, ENOUGH_SECONDS = 3, 10  # steps at least that are not counted; no further round after so long


class Scale(NamedTuple):
    """How much there is to do."""

    steps: int = 8  # that are counted, in whole rounds over all rows
    conversations: int = 64
    texts: int = 16  # of 4,096 tokens
    pairs: int = 64
    prompts: tuple[int, ...] = (16, 64)  # sampled from at once; PPO takes the first number
    samples: int = 4
    new: int = 128  # tokens of every response: it cannot end before
    updates: int = 2  # of PPO that are counted


class Row(NamedTuple):
    """One measurement."""

    part: str
    what: str
    rate: float
    unit: str  # a second
    peak_bytes: int
    more: dict[str, float]


def sft(shape: Shape, scale: Scale, device: torch.device, checkpointing: bool = False) -> Iterator[Row]:
    """LoRA SFT on all linear layers: forward, backward, optimizer step on one packed row."""
    examples = conversations(shape, scale.conversations)
    yield trained(
        "sft", random_trunk(shape, device, checkpointing), examples, shape, scale, ", checkpointing" * checkpointing
    )


def published(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Row]:
    """The same on texts of 4,096 tokens, beside the figure that others have published for an 8B."""
    length = min(PUBLISHED_TOKENS, shape.row_tokens)
    row = trained("published", random_trunk(shape, device), whole(shape, scale.texts, length), shape, scale, "")
    times = {"times_published": row.rate / PUBLISHED_RATE} if shape.name.startswith("8B") else {}
    yield row._replace(what=f"{row.what}, texts of {length:,}", more=times | row.more)


def trained(part: str, trunk: Trunk, examples: Drawn, shape: Shape, scale: Scale, more: str) -> Row:
    """Steps of SFT in rows that fit; `mfu` counts attention and what a LoRA leaves out, `at_4n` 4 FLOPs a weight."""
    device, size = trunk.device, shape.fitting(trunk.device)
    seconds, rounds, loss = learning(trunk, examples, lambda batch: -trunk(batch).mean(), size, scale.steps)
    rate, lengths = rounds * int(examples.lengths.sum()) / seconds, examples.lengths.tolist()
    weights = matmul_params(trunk.plain)
    flops = flops_per_token(trunk.plain.config, weights, causal_attended(lengths), lora=True)
    peak = peak_flops(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", trunk.dtype)
    shares = {} if peak is None else {"mfu": mfu(rate, flops, peak), "at_4n": mfu(rate, 4 * weights, peak)}
    what = f"{shape.name}, {trunk.layout}, rows of {size:,}{more}"
    return Row(part, what, rate, "tokens", peak_memory(device), shares | {"loss": loss})


def preferences(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Row]:
    """DPO steps, the reference's pass among them: pairs as packed trees, beside the same trunk with padded rows."""
    trunk = random_trunk(shape, device)
    section, reference = dpo.Dpo(), Reference(trunk)
    yield from in_layouts("dpo", trunk, lambda batch: dpo.loss(trunk, batch, section, reference)[0], shape, scale)


def rewards(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Row]:
    """Steps of a reward model, in both layouts too."""
    trunk, section = random_trunk(shape, device, outputs=1), reward_stage.Reward()
    yield from in_layouts("reward", trunk, lambda batch: reward_stage.loss(trunk, batch, section)[0], shape, scale)


def in_layouts(part: str, trunk: Trunk, loss: Callable, shape: Shape, scale: Scale) -> Iterator[Row]:
    """Pairs a second of steps on the mean of `loss`, which sums over a batch's pairs."""
    examples, rates, size = pairs(shape, scale.pairs), {}, shape.fitting(trunk.device)
    for layout in dict.fromkeys(("padded", trunk.layout)):
        with laid_out(trunk, layout):
            seconds, rounds, last = learning(
                trunk, examples, lambda batch: loss(batch) / (batch.paths // 2), size, scale.steps
            )
        rates[layout] = rounds * len(examples) / seconds
        more = {"loss": last} if layout == "padded" else {"times_padded": rates[layout] / rates["padded"], "loss": last}
        what = f"{shape.name}, {layout}, rows of {size:,}"
        yield Row(part, what, rates[layout], "pairs", peak_memory(trunk.device), more)


def sampling(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Row]:
    """Responses from a policy, trunk and LoRA, beside transformers' `generate` from the same under plain peft, on
    left-padded prompts."""
    model, examples = random_model(shape, device), prompts(shape, max(scale.prompts))
    plain = get_peft_model(model, LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear")).eval()
    theirs = yield from generation(plain, examples, shape, scale)
    trunk = adapted(plain.unload(), shape)
    check_samples(trunk)
    how, ids = Sampling(scale.new, min_new=scale.new), [tree.segments[0] for tree in examples.trees]
    for count in scale.prompts:
        keys = [(0, i) for i in range(count)]
        work = partial(sample, trunk, ids[:count], how, keys, scale.samples)
        seconds, peak = second_time(work, device)
        rate = count * scale.samples * scale.new / seconds
        what = f"{shape.name}, {count} prompts x {scale.samples}, align"
        yield Row("sampling", what, rate, "tokens", peak, {"times_transformers": rate / theirs[count]})


def static(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Row]:
    """transformers' `generate` with its static cache, for which it compiles the model on a GPU."""
    model = random_model(shape, device).eval()
    yield from generation(model, prompts(shape, max(scale.prompts)), shape, scale, "static")


def generation(
    model: nn.Module, examples: Drawn, shape: Shape, scale: Scale, cache: str = "dynamic"
) -> Generator[Row, None, dict[int, float]]:
    """Tokens a second of transformers' `generate`; returns them by the number of prompts."""
    kept = {} if cache == "dynamic" else {"cache_implementation": cache}
    config = GenerationConfig(
        max_new_tokens=scale.new, min_new_tokens=scale.new, do_sample=True, temperature=1.0, top_k=0,
        eos_token_id=END, pad_token_id=END, **kept,
    )  # fmt: skip
    rates = {}
    for count in scale.prompts:
        rows = [tree.segments[0] for tree in examples.trees[:count] for _ in range(scale.samples)]
        longest = max(map(len, rows))
        tokens = np.stack([np.pad(row, (longest - len(row), 0), constant_values=END) for row in rows])
        mask = np.stack([np.arange(longest) >= longest - len(row) for row in rows])
        tokens, mask = (torch.from_numpy(grid.astype(np.int64)).to(model.device) for grid in (tokens, mask))
        work = partial(model.generate, tokens, attention_mask=mask, generation_config=config)
        seconds, peak = second_time(work, model.device)
        rates[count] = count * scale.samples * scale.new / seconds
        what = f"{shape.name}, {count} prompts x {scale.samples}, transformers, {cache} cache"
        yield Row("sampling", what, rates[count], "tokens", peak, {})
    return rates


def update(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Row]:
    """PPO's step as `align.ppo` takes it, four roles on one trunk; without its eval, logs and checkpoints."""
    trunk, count = random_trunk(shape, device), scale.prompts[0]
    with tempfile.TemporaryDirectory() as folder:
        recipe = ppo.Recipe.model_validate(
            {
                "stage": "ppo", "run": folder, "model": {"base": shape.name}, "lora": LORA.model_dump(),
                "data": {"train": [{"path": "random"}]},
                "batch": {"examples": count, "row_tokens": shape.fitting(device, roles=2)},
                "optim": {"learning_rate": 1e-5, "schedule": "constant", "warmup": 0},
                "train": {"steps": 1 + scale.updates},
                "ppo": {
                    "rewards": [{"adapter": "random"}], "samples": scale.samples,
                    "generation": {"max_new": scale.new, "min_new": scale.new},
                },
            }
        )  # fmt: skip
        loop = ppo_loop(recipe, trunk, prompts(shape, count))
        took = np.zeros(4)  # seconds: sampling, scoring, epochs, all
        for number in range(1 + scale.updates):
            if number == 1:
                forget_peak(device)
            synchronize(device)
            begun = time.perf_counter()
            metrics = loop.algorithm.learn(loop, loop.plan.batch(number + 1), recipe.optim.learning_rate).metrics
            synchronize(device)
            seconds = time.perf_counter() - begun
            loop.step += 1
            said, scored = metrics["sample_seconds"], metrics["score_seconds"]  # both end with numbers on the CPU
            if number:
                took += said, scored, seconds - said - scored, seconds
            if took[-1] > ENOUGH_SECONDS:
                break
    updates, episodes = number, count * scale.samples
    more = {f"{name}_seconds": float(took[i]) / updates for i, name in enumerate(("sampling", "scoring", "epochs"))}
    what = f"{shape.name}, {count} prompts x {scale.samples}, {scale.new} new tokens, {recipe.ppo.epochs} epochs, align"
    yield Row("ppo", what, updates * episodes / float(took[-1]), "episodes", peak_memory(device), more)


def ppo_loop(recipe: ppo.Recipe, trunk: Trunk, examples: Drawn) -> Loop:
    """What `ppo.train` builds, with a random reward model on the trunk."""
    check_samples(trunk)
    head = torch.randn(1, trunk.plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
    start = get_peft_model_state_dict(trunk.causal, adapter_name="default", save_embedding_layers=False)
    scorer = Scorer(None, 0.0, 1.0, recipe.lora, start, head / head.shape[1] ** 0.5)
    scores = Rewards([], trunk)
    scores.parts, scores.scorers = {"reward": recipe.ppo.rewards[0]}, {"reward": scorer}
    roles = Roles(trunk, recipe.lora, scores.scorers, scores.leading, recipe.ppo.generation.temperature, recipe.seed)
    session = Session(recipe, process(trunk.device), Console(quiet=True), fresh=True, show=False)
    run = SimpleNamespace(  # it saves and records nothing
        checkpoints=recipe.folder / "checkpoints", standing=Standing(), records=lambda name: []
    )
    data = Prepared(examples, examples, Ledger(), [])
    algorithm = ppo.Algorithm(recipe, Experience(session, data, roles, scores, recipe.ppo, "ppo"), None)
    loop = Loop(session, run, trunk, data, algorithm, roles, {CRITIC: recipe.ppo.critic_rate(recipe.optim)})
    loop.screen = Screen(session.console, loop.plan.steps)
    loop.learner.model.train()
    return loop


def learning(
    trunk: Trunk, examples: Drawn, loss: Callable[[Forest], Tensor], row_tokens: int, steps: int
) -> tuple[float, int, float]:
    """Seconds and number of whole rounds, one optimizer step a row, until `steps` are taken; and the last loss."""
    device = trunk.device
    optimizer = torch.optim.AdamW([p for p in trunk.parameters() if p.requires_grad], lr=1e-4)
    batches = Batches(trunk, process(device), row_tokens)
    rows = [batches.plant(examples, row) for row in batches.rows(examples, np.arange(len(examples)))]
    warm, rounds = (-(-least // len(rows)) for least in (WARM_STEPS, steps))
    seconds = 0.0
    for number in range(warm + rounds):
        if number == warm:
            forget_peak(device)
        synchronize(device)
        begun = time.perf_counter()
        for row in rows:
            value = loss(row)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)
        seconds += (time.perf_counter() - begun) * (number >= warm)
        if seconds > ENOUGH_SECONDS:
            break
    return seconds, number + 1 - warm, float(value.detach())


def second_time(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds and peak bytes of the second of two runs."""
    for _ in range(2):
        forget_peak(device)
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - begun
    return seconds, peak_memory(device)


@contextmanager
def laid_out(trunk: Trunk, layout: str) -> Iterator[None]:
    """The same trunk with its batches in this layout for a while."""
    before = trunk.layout
    trunk.layout = layout
    try:
        with trunk.attending(trunk.own_attention if layout == "padded" else trunk.plain.config._attn_implementation):
            yield
    finally:
        trunk.layout = before


def process(device: torch.device) -> Accelerator:
    """This process alone."""
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def forget_peak(device: torch.device) -> None:
    """Peak memory counts from here; not so on a CPU, where it is the process's."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
