"""The tables of docs/scaling.md: plans from 8B to 70B on many devices, and what a budget buys in pre-training.

    python benchmarks/scaling.py [--law]

The plans need no device and no weights: shapes are written as configs into a temporary folder. Last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

from align.plan import arguments, planned

SHAPES = {  # of Llama 3 (arXiv 2407.21783, table 3)
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LIKE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128_256,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
RUNS = [  # shape, what trains, processes, hosts, overrides
    ("8B", "LoRA", 1, 1, []),
    ("8B", "LoRA", 8, 1, []),
    ("8B", "all", 8, 1, ["lora=null", "train.shard=layers"]),
    ("70B", "LoRA", 8, 1, ["train.shard=layers"]),
    ("70B", "LoRA", 64, 8, ["train.shard=layers"]),
    ("70B", "all", 64, 8, ["lora=null", "train.shard=layers"]),
]
COMMON = ["model.gradient_checkpointing=true", "batch.examples=512", "data.max_length=4096"]


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats a token: N weights, D tokens."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, weights: float, tokens: float) -> float:
        """L(N, D)."""
        return self.e + self.a / weights**self.alpha + self.b / tokens**self.beta

    def best(self, flops: float) -> tuple[float, float]:
        """N and D of the least loss for C = 6 N D: N = G (C / 6)^(beta / (alpha + beta)), D = C / (6 N)."""
        both = self.alpha + self.beta
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / both)
        weights = g * (flops / 6) ** (self.beta / both)
        return weights, flops / (6 * weights)


CHINCHILLA = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann et al. 2022, arXiv 2203.15556, equation 10
REFIT = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # Besiroglu et al. 2024, arXiv 2404.10102
PEAK, REACHED = 989.4e12, 0.4  # an H100's dense bfloat16 FLOP/s, and the share of it that large runs reach


def budgets() -> list[dict[str, float]]:
    """What 1 … 10^6 H100 days buy."""
    found = []
    for days in (1, 10, 100, 1_000, 10_000, 100_000):
        flops = days * 86_400 * PEAK * REACHED
        row = {"h100_days": days, "flops": flops}
        for name, law in (("chinchilla", CHINCHILLA), ("refit", REFIT)):
            weights, tokens = law.best(flops)
            row |= {f"{name}_weights": weights, f"{name}_tokens": tokens, f"{name}_loss": law.loss(weights, tokens)}
        found.append(row)
    return found


def plans(folder: Path) -> list[dict[str, object]]:
    """SFT at 4,096 tokens on H100s."""
    found = []
    for shape, trains, processes, hosts, more in RUNS:
        base = folder / shape
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text(json.dumps(LIKE | SHAPES[shape]))
        recipe = {
            "stage": "sft", "run": str(folder / "run"), "model": {"base": str(base)},
            "data": {"train": [{"path": "rows.jsonl"}]},
        }  # fmt: skip
        path = folder / "sft.yaml"
        path.write_text(yaml.safe_dump(recipe))
        where = ["--device", "h100", "--processes", str(processes), "--hosts", str(hosts)]
        report = planned(arguments([str(path), *COMMON, *more, *where]))
        low, high = report.work.seconds or (None, None)
        found.append(
            {"shape": shape, "trains": trains, "devices": processes, "peak_gb": report.plan.peak.bytes / 1e9}
            | {"fits": report.fits, "row": report.plan.load.row, "sent_gb": report.work.sent / 1e9}
            | {"tokens": report.work.tokens, "seconds": [low, high], "changes": [c.words for c in report.changes]}
        )
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--law", action="store_true", help="the scaling law alone")
    asked = parser.parse_args()
    told = {"law": budgets()}
    print("| H100 days | FLOP | weights | tokens | loss | refit: weights | tokens | loss |\n" + "|---" * 8 + "|")
    for row in told["law"]:
        cells = [
            f"{row[f'{n}_weights'] / 1e9:,.2f}B | {row[f'{n}_tokens'] / 1e9:,.0f}B | {row[f'{n}_loss']:.2f}"
            for n in ("chinchilla", "refit")
        ]
        print(f"| {row['h100_days']:,} | {row['flops']:.1e} | {' | '.join(cells)} |")
    if not asked.law:
        with tempfile.TemporaryDirectory() as folder:
            told["plans"] = plans(Path(folder))
        print(
            "\n| model | trains | H100s | peak | row | sent by each | seconds a step |\n|---|---|---|---|---|---|---|"
        )
        for row in told["plans"]:
            low, high = row["seconds"]
            verdict = "" if row["fits"] else " (does not fit)"
            print(
                f"| {row['shape']} | {row['trains']} | {row['devices']} | {row['peak_gb']:.1f} GB{verdict} | "
                f"{row['row']:,} | {row['sent_gb']:,.1f} GB | {low:,.1f} to {high:,.1f} |"
            )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
