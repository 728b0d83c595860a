"""What preparing a dirty set is worth: a spam filter trained on it before and after, on held-out messages.

    python benchmarks/prepare_pays.py SMSSpamCollection [--base demo/smollm2-135m] [--seeds 3]

The set, drawn anew for each seed: 600 messages with their labels; 400 copies of 20 of them, with a word exchanged and
the wrong label; 300 lines of signs and digits with a label by chance; and 150 of the held-out messages, reworded in a
word, with their labels. `align.prepare` filters, deduplicates and decontaminates it against all held-out messages. Both
sets train as many steps. Held-out messages are of two kinds: `unseen`, and `leaked`, with a copy in the dirty set.
Last, one JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from align.data.preparing.texts import normal

CLEAN, COPIED, TIMES, NOISE, LEAKED, UNSEEN = 600, 20, 20, 300, 150, 1000
STEPS = 150
Rows = list[dict[str, str]]


def messages(path: Path) -> Rows:
    """Every message once."""
    lines = (line.split("\t", 1) for line in path.read_text("utf-8").splitlines() if "\t" in line)
    known = {" ".join(normal(text)): {"text": text, "label": label} for label, text in lines}
    return [row for words, row in known.items() if len(words.split()) >= 6]


def reworded(rng: random.Random, text: str) -> str:
    """With one word exchanged."""
    words = text.split()
    words[rng.randrange(len(words))] = rng.choice(["really", "well", "then", "now", "ok", "so", "just", "please"])
    return " ".join(words)


def dirty(rows: Rows, seed: int) -> dict[str, Rows]:
    """The dirty set, and the held-out messages of both kinds."""
    rng = random.Random(seed)
    rng.shuffle(rows)
    clean, leaked, unseen = rows[:CLEAN], rows[CLEAN : CLEAN + LEAKED], rows[CLEAN + LEAKED :][:UNSEEN]
    other = {"ham": "spam", "spam": "ham"}
    train = list(clean)
    for row in rng.sample([row for row in clean if len(row["text"].split()) >= 12], COPIED):
        train += [{"text": reworded(rng, row["text"]), "label": other[row["label"]]} for _ in range(TIMES)]
    for _ in range(NOISE):
        signs = "".join(rng.choice("#$%^&*@~|<>{}[]0123456789 ") for _ in range(rng.randint(40, 160)))
        train.append({"text": f"x{signs}", "label": rng.choice(["ham", "spam"])})
    train += [{"text": reworded(rng, row["text"]), "label": row["label"]} for row in leaked]
    rest = train[CLEAN:]
    rng.shuffle(rest)
    return {"train": train[:CLEAN] + rest, "leaked": leaked, "unseen": unseen}


def trained(folder: Path, name: str, train: Path, base: str, seed: int) -> dict[str, float]:
    """Accuracy on both kinds of held-out messages, and F1 on those that are unseen."""
    held = {"leaked": folder / "leaked.jsonl", "unseen": folder / "unseen.jsonl"}
    recipe = {
        "stage": "classify",
        "run": str(folder / name),
        "seed": seed,
        "model": {"base": base},
        "data": {
            "train": [{"path": str(train)}],
            "eval": {"sources": [{"path": str(held["leaked"])}], "overlap": "keep"},
            "max_length": 128,
            "overlong": "truncate",
        },
        "classify": {"labels": ["ham", "spam"], "test": {"sources": [{"path": str(held["unseen"])}]}},
        "batch": {"examples": 16},
        "optim": {"learning_rate": 1e-3},
        "train": {"steps": STEPS, "epochs": 1, "save_every": None},
        "log": {"trackers": []},
    }
    run(folder / f"{name}.yaml", "classify", recipe)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    by_split = {record["split"]: record for record in records}
    return {
        "leaked/accuracy": by_split["eval"]["accuracy"],
        "unseen/accuracy": by_split["test"]["accuracy"],
        "unseen/f1": by_split["test"]["f1"],
    }


def prepared(folder: Path, seed: int) -> dict[str, Any]:
    """The set that `align.prepare` makes of the dirty one, and what each step took."""
    recipe = {
        "stage": "prepare",
        "run": str(folder / "set"),
        "seed": seed,
        "sources": [{"path": str(folder / "train.jsonl"), "format": "classes"}],
        "prepare": {
            "filter": {"min_words": 3, "max_symbols": 0.3},
            "decontaminate": {
                "against": [
                    {"path": str(folder / f"{kind}.jsonl"), "format": "text", "columns": {"label": None}}
                    for kind in ("leaked", "unseen")
                ]
            },
            "deduplicate": {"near": {"threshold": 0.5, "ngram": 2}},
        },
        "card": False,
        "workers": 1,
    }
    run(folder / "data.yaml", "prepare", recipe)
    manifest = json.loads((folder / "set" / "manifest.json").read_text())
    took = {step["name"]: sum(step["dropped"].values()) for step in manifest["steps"]}
    return took | {"left": sum(file["rows"] for files in manifest["sides"].values() for file in files)}


def run(path: Path, tool: str, recipe: dict[str, Any]) -> None:
    """One command, in this process."""
    path.write_text(yaml.safe_dump(recipe))
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            import_module(f"align.{tool}").main([str(path)])
    except SystemExit as end:
        if end.code:
            raise SystemExit(said.getvalue()[-2000:]) from None


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("messages", type=Path)
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    results = []
    for seed in range(asked.seeds):
        with tempfile.TemporaryDirectory() as beneath:
            folder = Path(beneath)
            for name, rows in dirty(messages(asked.messages), seed).items():
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            before = trained(folder, "before", folder / "train.jsonl", asked.base, seed)
            took = prepared(folder, seed)
            after = trained(folder, "after", folder / "set" / "train", asked.base, seed)
        results.append({"seed": seed, "took": took, "before": before, "after": after})
        print(json.dumps(results[-1], indent=1), flush=True)
    for name in results[0]["before"]:
        ways = {way: [result[way][name] for result in results] for way in ("before", "after")}
        told = {way: f"{np.mean(x):.4f} ({', '.join(f'{one:.4f}' for one in x)})" for way, x in ways.items()}
        print(f"{name:18} before {told['before']}   after {told['after']}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
