"""The parts of `gpu.py` but PPO: each builds a model of its own with random weights, and gives rows as it measures
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from gpu_clock import ENOUGH_SECONDS, WARM_STEPS, Row, Scale, forget_peak, process, second_time, synchronize
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
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig

from align import dpo
from align import reward as reward_stage
from align.data.trees import Forest
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.models.trunk import Trunk
from align.training.batches import Batches
from align.training.costs import causal_attended, flops_per_token, matmul_params, mfu, peak_flops, peak_memory
from align.training.reference import Reference
from align.training.rollouts.rollout import check_samples

# LoRA SFT of Llama-3 8B on one H100, tokens/s: NVIDIA NeMo Automodel's performance summary (40.6 % of the peak at 4 N).
PUBLISHED_TOKENS, PUBLISHED_RATE = 4096, 12_473


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
