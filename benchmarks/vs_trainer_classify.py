"""Our classifier beside transformers' Trainer with AutoModelForSequenceClassification + peft: messages per second.

    python benchmarks/vs_trainer_classify.py [--data FILE] [--threads 2] [--steps 12]

One run, same rows, LoRA, dtype, threads and messages a step, in training and in prediction. Each side runs in
processes of its own, in turn. The Trainer groups rows by length and gets the fastest of its own settings (tried first):
micro-batches, bfloat16 adapters, autocast; and for prediction the batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = [ROOT.parent / "shared" / "data" / "sms_spam" / "SMSSpamCollection", ROOT / "data_templates" / "spam.csv"]
EXAMPLES, MAX_LENGTH, RANK, ALPHA, SEED, LABELS = 16, 256, 16, 32, 0, ["ham", "spam"]
SPEED, PREDICTED, MEMORY = "messages_per_second", "predicted_per_second", "peak_bytes"

SETTINGS = {
    "16 rows": {"rows": 16},
    "16 rows, bfloat16 adapters": {"rows": 16, "adapters": "bfloat16"},
    "16 rows, autocast": {"rows": 16, "bf16": True},
    "8 rows, bfloat16 adapters": {"rows": 8, "adapters": "bfloat16"},
    "4 rows": {"rows": 4},
}
EVAL_ROWS, TRIED = (8, 32, 128), 512  # the Trainer's prediction: batch sizes, and the messages they are tried on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="label, then text; default: the SMS collection, else a template")
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, the first of which is not counted")
    parser.add_argument("--predict", type=int, help="messages to predict (default: all of the file)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs, in turn")
    parser.add_argument("--setting", choices=SETTINGS, help="use this of the Trainer's settings instead of trying all")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        spec = json.loads(args.arm)
        result = run_align(spec) if spec["arm"] == "align" else run_trainer(spec)
        result[MEMORY] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))
        return
    args.data = args.data or next(path for path in ROWS if path.is_file())
    args.predict = args.predict or len(known_messages(args.data))
    with tempfile.TemporaryDirectory() as work:
        compare(args, work)


def compare(args: argparse.Namespace, work: str) -> None:
    common = {"data": str(args.data), "base": args.base, "dtype": args.dtype, "threads": args.threads, "work": work}

    def measure(arm: str, steps: int, predict: int, name: str = "") -> dict:
        spec = {**common, "arm": arm, "steps": steps, "predict": predict, "setting": SETTINGS.get(name, {})}
        result = measured(spec, args.threads)
        if "error" in result:
            print(f"{arm:8} {name}: {result['error']}", flush=True)
            return {SPEED: 0.0, PREDICTED: 0.0, MEMORY: 0}
        speeds = f"{result[SPEED]:8.2f} trained/s {result[PREDICTED]:8.2f} predicted/s"
        print(f"{arm:8} {name:28} {speeds} {result[MEMORY] / 1e9:6.2f} GB", flush=True)
        return result

    print(f"rows of {args.data.name}, {args.base}, {args.dtype}, {args.threads} threads, {EXAMPLES} messages a step")
    setting = args.setting
    if setting is None:
        print("\nthe Trainer's settings, three steps each:")
        tried = {name: measure("trainer", 3, EXAMPLES, name)[SPEED] for name in SETTINGS}
        setting = max(tried, key=tried.get)
    print(f"\nside by side, {args.steps} steps each, the Trainer with: {setting}")
    pairs = [
        (measure("align", args.steps, args.predict), measure("trainer", args.steps, args.predict, setting))
        for _ in range(args.rounds)
    ]
    if not all(result[SPEED] for pair in pairs for result in pair):
        sys.exit("a side did not run, so there is nothing to compare")
    ours, peer = zip(*pairs, strict=True)
    ratios = {speed: [a[speed] / b[speed] for a, b in pairs] for speed in (SPEED, PREDICTED)}
    line = {
        "benchmark": "vs_trainer classify",
        "ratio": round(mean(ratios[SPEED]), 3),
        "ratios": [round(r, 3) for r in ratios[SPEED]],
        "predict_ratio": round(mean(ratios[PREDICTED]), 3),
        "predict_ratios": [round(r, 3) for r in ratios[PREDICTED]],
        "memory_ratio": round(max(r[MEMORY] for r in ours) / max(r[MEMORY] for r in peer), 3),
        "ours": told(ours),
        "peer": told(peer) | {"setting": setting},
        "date": time.strftime("%Y-%m-%d"),
    }
    print(f"\n{'':8}{'trained/s':>14}{'predicted/s':>14}{'peak memory':>14}")
    for name, side in (("align", line["ours"]), ("Trainer", line["peer"])):
        print(f"{name:8}{side[SPEED]:>14.2f}{side[PREDICTED]:>14.2f}{side[MEMORY] / 1e9:>11.2f} GB")
    print(f"{'ratio':8}{line['ratio']:>14.2f}{line['predict_ratio']:>14.2f}{line['memory_ratio']:>14.2f}")
    print(json.dumps(line))


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def told(results: tuple[dict, ...]) -> dict:
    speeds = {speed: round(mean([r[speed] for r in results]), 3) for speed in (SPEED, PREDICTED)}
    return speeds | {MEMORY: max(r[MEMORY] for r in results)}


def measured(spec: dict, threads: int) -> dict:
    """Run one arm in its own process; its last line is its result."""
    command = [sys.executable, __file__, "--arm", json.dumps(spec)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def recipe_of(spec: dict, run: Path) -> dict:
    columns = {"label": "column1", "text": "column2"}
    return {
        "stage": "classify", "run": str(run), "seed": SEED,
        "model": {"base": spec["base"], "dtype": spec["dtype"]},
        "lora": {"r": RANK, "alpha": ALPHA},
        "data": {
            "train": [{"path": spec["data"], "columns": columns, "limit": spec["steps"] * EXAMPLES}],
            "max_length": MAX_LENGTH, "overlong": "truncate",
        },
        "batch": {"examples": EXAMPLES},
        "train": {"steps": spec["steps"], "save_every": None},
        "log": {"trackers": []},
        "classify": {"labels": LABELS},
    }  # fmt: skip


def known_messages(data: Path) -> list[tuple[str, int]]:
    """Texts and classes in the order of the file."""
    raw = data.suffix != ".csv"
    with data.open(encoding="utf-8", newline="") as file:
        rows = [line.rstrip("\r\n").split("\t") for line in file] if raw else list(csv.reader(file))[1:]
    return [(text, LABELS.index(label)) for label, text in rows]


def messages(spec: dict) -> list[tuple[str, int]]:
    """As many as are asked for, over again where the file is too short."""
    known = known_messages(Path(spec["data"]))
    wanted = max(spec["predict"], spec["steps"] * EXAMPLES)
    return (known * (wanted // len(known) + 1))[:wanted]


def run_align(spec: dict) -> dict:
    import yaml

    from align.classify import main as classify
    from align.training.labelling.classifier import Classifier

    run = Path(tempfile.mkdtemp(dir=spec["work"]))
    recipe = run.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(recipe_of(spec, run)))
    with contextlib.redirect_stdout(io.StringIO()):
        classify([str(recipe)])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_seconds"] for line in lines if line["split"] == "train" and line["step"] > 1]
    classifier = Classifier(run / "final")
    texts = [text for text, _ in messages(spec)[: spec["predict"]]]
    classifier.probabilities(texts[:EXAMPLES])
    started = time.perf_counter()
    classifier.probabilities(texts)
    return {
        SPEED: EXAMPLES * len(seconds) / sum(seconds),
        PREDICTED: len(texts) / (time.perf_counter() - started),
    }


def run_trainer(spec: dict) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from align.classify import Recipe
    from align.models.base import base_folder, load_tokenizer

    torch.set_num_threads(spec["threads"])
    section = Recipe.model_validate(recipe_of(spec, Path(spec["work"]) / "unused")).model
    tokenizer, setting = load_tokenizer(section), spec["setting"]
    texts, classes = zip(*messages(spec), strict=True)
    ids = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, classes, strict=True)]
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_options):
            ends.append(time.perf_counter())

    folder, dtype = base_folder(section), getattr(torch, spec["dtype"])
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS), dtype=dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model, lora, autocast_adapter_dtype=setting.get("adapters") != "bfloat16")

    def trainer(eval_rows: int) -> Trainer:
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=spec["work"],
                use_cpu=True,
                bf16=setting.get("bf16", False),
                train_sampling_strategy="group_by_length",
                max_steps=spec["steps"],
                learning_rate=2e-4,
                per_device_train_batch_size=setting["rows"],
                gradient_accumulation_steps=EXAMPLES // setting["rows"],
                per_device_eval_batch_size=eval_rows,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows[: spec["steps"] * EXAMPLES],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[Clock()],
        )

    trainer(EXAMPLES).train()

    def predicted(size: int, asked: list[dict]) -> float:
        predictor = trainer(size)
        predictor.predict(asked[:EXAMPLES])
        started = time.perf_counter()
        predictor.predict(asked)
        return len(asked) / (time.perf_counter() - started)

    asked = rows[: spec["predict"]]
    fastest = max(EVAL_ROWS, key=lambda size: predicted(size, asked[:TRIED]))
    return {
        SPEED: EXAMPLES * (len(ends) - 1) / (ends[-1] - ends[0]),
        PREDICTED: predicted(fastest, asked),
    }


if __name__ == "__main__":
    main()
