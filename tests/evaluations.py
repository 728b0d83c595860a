"""Folders as `align.evaluate` leaves them, and comparisons of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from align.compare import main

EVIL = "</script><script>alert(1)</script><!-- <b>"


def evaluated(folder: Path, shift=0.0, kl=0.0, proxy=0.0, prompts=60, samples=4, longer=0, seed=0, **about) -> Path:
    """An evaluation of a policy whose answers are `shift` better and `longer` longer, at this KL."""
    rng = np.random.default_rng(seed)
    easy = np.random.default_rng(99).normal(2, 1, prompts)  # of the prompts, so the same in every run
    folder.mkdir(parents=True)
    rows = []
    for p in range(prompts):
        for s in range(samples):
            gold = float(easy[p] + shift + rng.normal())
            ref = float(-20 + rng.normal())
            rows.append(
                {
                    "prompt": p,
                    "sample": s,
                    "key": f"key{p}",
                    "prompt_text": f"question {p} {EVIL}",
                    "response": f"{folder.name} answers {p} {EVIL}",
                    "tokens": int(rng.integers(5, 30)) + longer,
                    "ended": True,
                    "logprob": ref + kl + (float(rng.normal()) if kl else 0.0),
                    "ref_logprob": ref,
                    "kl": kl,
                    "scores": {"gold": gold, "proxy": gold + proxy},
                }
            )
    write_rows(folder, rows)
    page = {
        "stage": "evaluate",
        "name": folder.name,
        "policy": f"runs/{folder.name}/final",
        "fingerprint": "trunk1",
        "tokenizer": "tokens1",
        "prompts": "prompts1",
        "sampling": {"temperature": 1.0},
        "metrics": {"distinct_2": {"value": 0.5, "low": 0.4, "high": 0.6, "n": prompts}},
        "judges": {},
        "training": None,
    }
    (folder / "evaluation.json").write_text(json.dumps(page | about))
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(stage: str, run: str = "nowhere", seconds: float | None = 60.0) -> dict:
    cost = {"device_seconds": seconds, "peak_memory_bytes": 3 * 2**30, "tokens_sampled": 5000}
    return {"run": run, "stage": stage, "settings": {"seed": 1}, **cost}


def recipe(path: Path, *runs: dict | str, **section) -> list[str]:
    sources = [{"path": str(run)} if isinstance(run, str | Path) else run for run in runs]
    section = {"runs": sources, "resamples": 300} | section
    content = {"stage": "compare", "run": str(path.with_suffix("")), "compare": section}
    path.write_text(yaml.safe_dump(content))
    return [str(path)]


def result(argv: list[str]) -> tuple[dict, str]:
    """compare.json and the page of a comparison that succeeds."""
    main(argv)
    folder = Path(argv[0]).with_suffix("")
    return json.loads((folder / "compare.json").read_text()), (folder / "report.html").read_text()


def make_sweeps(root: Path) -> dict[str, Path]:
    """A baseline, and two sweeps: dpo gains slowly; ppo gains fast, then loses what its proxy says it gains."""
    folders = {"sft": evaluated(root / "sft", samples=8)}
    for i, (kl, slow, fast) in enumerate([(1, 0.3, 1.2), (4, 0.8, 0.8), (9, 1.2, 0.0)]):
        folders[f"dpo{kl}"] = evaluated(root / f"dpo{kl}", slow, kl, 0.1 * kl, seed=10 + i, training=trained("dpo"))
        cost = trained("ppo", seconds=600.0)
        folders[f"ppo{kl}"] = evaluated(root / f"ppo{kl}", fast, kl * 1.1, 0.3 * kl, seed=20 + i, training=cost)
    return folders


def compare_sweeps(sweeps: dict[str, Path], root: Path) -> tuple[dict, str]:
    """Both sweeps beside their baseline."""
    groups = [{"path": [str(sweeps[f"{g}{kl}"]) for kl in (1, 4, 9)]} for g in ("dpo", "ppo")]
    return result(recipe(root / "c.yaml", *groups, baseline=str(sweeps["sft"]), proxy="proxy", resamples=500))
