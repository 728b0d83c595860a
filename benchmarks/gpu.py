"""What one GPU does: SFT steps on models of real shapes with random weights. Under 9 minutes on one H200.

    python benchmarks/gpu.py            # on a GPU: prints a table and writes benchmarks/results/gpu-DATE.md
    python benchmarks/gpu.py --tiny     # on a CPU: proves the script on tiny shapes, writes nothing

Random weights have the speed and the memory of trained ones, and need no model hub.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from align.data.packing import pack
from align.data.trees import Tree, graft, plant
from align.models.base import Base
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model
from align.training.meters import causal_attended, flops_per_token, matmul_params, mfu, peak_flops, peak_memory

RESULTS = Path(__file__).parent / "results"
BUDGET_SECONDS = 9 * 60
MEAN_LENGTH, MAX_LENGTH = 400, 2048


class Shape(NamedTuple):
    """A model's size, and the tokens of one packed row."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    row_tokens: int


TINY = [Shape("tiny", 64, 128, 2, 4, 2, 256, 512)]
SHAPES = [
    Shape("135M (SmolLM2)", 576, 1536, 30, 9, 3, 49152, 32_768),
    Shape("1.7B (SmolLM2)", 2048, 8192, 24, 32, 32, 49152, 16_384),
    Shape("8B (Llama 3)", 4096, 14336, 32, 32, 8, 128256, 16_384),
]


class Row(NamedTuple):
    """One measurement."""

    what: str
    tokens_per_second: float
    mfu: float | None
    peak_bytes: int
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a machine without a GPU")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed, after three that are not")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU here: not measured (--tiny proves the script on a CPU)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, rows = time.monotonic(), []
    for shape in TINY if args.tiny else SHAPES:
        for checkpointing in (False, True):
            if time.monotonic() - started > BUDGET_SECONDS * 0.8:
                print(f"sft {shape.name}: not measured, out of time")
                continue
            rows.append(sft(shape, device, args.steps, checkpointing))
            print(rows[-1], flush=True)
    table = [
        "| what | tokens/s | MFU | peak memory |",
        "|---|---:|---:|---:|",
        *(
            f"| {r.what} | {r.tokens_per_second:,.0f} | {'–' if r.mfu is None else f'{r.mfu:.1%}'} "
            f"| {r.peak_bytes / 1e9:.1f} GB |"
            for r in rows
        ),
    ]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    date = time.strftime("%Y-%m-%d")
    print("\n".join(table))
    if not args.tiny:
        RESULTS.mkdir(exist_ok=True)
        head = f"`python benchmarks/gpu.py` on one {name}, torch {torch.__version__}, {date}\n\n"
        (RESULTS / f"gpu-{date}.md").write_text(head + "\n".join(table) + "\n")
    print(json.dumps({"benchmark": "gpu", "device": name, "date": date, "rows": [r._asdict() for r in rows]}))


def sft(shape: Shape, device: torch.device, steps: int, checkpointing: bool) -> Row:
    """LoRA SFT, r = 16 on all linear layers: forward, backward, optimizer step on one packed row."""
    trunk = random_trunk(shape, device, checkpointing)
    trained = [p for p in trunk.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    examples = conversations(shape, 64)
    lengths = [tree.packed_length for tree in examples]
    rows = [row for row in pack(lengths, shape.row_tokens) if row]
    multiple = 128 if device.type == "cuda" else 1
    batches = [plant(graft([examples[i] for i in row]), packed=trunk.packed, multiple=multiple) for row in rows]
    seconds = tokens = 0.0
    for step in range(steps + 3):
        batch = batches[step % len(batches)].to(device)
        synchronize(device)
        begun = time.perf_counter()
        loss = -trunk(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        if step >= 3:
            seconds += time.perf_counter() - begun
            tokens += int((batch.tree >= 0).sum())
    rate = tokens / seconds
    flops = flops_per_token(trunk.plain.config, matmul_params(trunk.plain), causal_attended(lengths), lora=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = peak_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    what = f"sft {shape.name}, {trunk.layout}, rows of {shape.row_tokens:,}{', checkpointing' * checkpointing}"
    return Row(what, rate, mfu(rate, flops, peak_flops(name, trunk.dtype)), peak, float(loss))


def random_trunk(shape: Shape, device: torch.device, checkpointing: bool) -> Trunk:
    """A Llama of this shape in bfloat16 with a LoRA."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.hidden < 2048,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    section = Model(base=shape.name, gradient_checkpointing=checkpointing)
    return Trunk(Base(model, None, "random", shape.name, shape.name), section, Lora(r=16, alpha=32)).train()


def conversations(shape: Shape, count: int) -> list[Tree]:
    """Random token trees with the lengths of a chat set: log-normal, a quarter of each the prompt."""
    draw = np.random.default_rng(0)
    longest = min(MAX_LENGTH, shape.row_tokens // 2)
    lengths = np.clip(draw.lognormal(np.log(MEAN_LENGTH), 0.7, count), 16, longest).astype(int)
    return [Tree((draw.integers(0, shape.vocabulary, n).astype(np.int32),), (np.arange(n) >= n // 4,)) for n in lengths]


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
