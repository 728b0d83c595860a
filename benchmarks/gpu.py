"""What one GPU does, on models of real shapes with random weights. Under 9 minutes on one H200.

    python benchmarks/gpu.py            # on a GPU: prints a table and adds it to benchmarks/results/gpu-DATE.md
    python benchmarks/gpu.py --tiny     # on a CPU: proves every part on tiny shapes, writes nothing
    python benchmarks/gpu.py --only ppo grpo --shapes 8B

LoRA SFT, also beside TRL's and beside the figure that NVIDIA published; sampling from a policy beside transformers'
`generate`; a PPO update beside a step of TRL's GRPO; DPO and reward steps on packed trees beside the same trunk with
padded rows. Random weights have the speed and the memory of trained ones, and need no model hub.

Each part's figures are written down when it is done. The same command measures what is missing, and prints all. A part
that there is no time or memory for is named, and so is one that fails; the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import gpu_parts
import gpu_peers
import gpu_ppo
import torch
import transformers
from gpu_clock import Row, Scale
from gpu_models import Shape

RESULTS = Path(__file__).parent / "results"
BUDGET_SECONDS, LEAST_SECONDS = 8.5 * 60, 20  # the latter must be left for a part to begin
TINY = [Shape("tiny", 64, 128, 2, 4, 2, 256, 256)]
TINY_SCALE = Scale(steps=2, conversations=8, texts=2, pairs=4, prompts=(2, 4), samples=2, new=6, updates=1)
SHAPES = [
    Shape("8B (Llama 3)", 4096, 14336, 32, 32, 8, 128256, 16_384),
    Shape("1.7B (SmolLM2)", 2048, 8192, 24, 32, 32, 49152, 16_384),
    Shape("135M (SmolLM2)", 576, 1536, 30, 9, 3, 49152, 32_768),
]
PARTS: dict[str, Callable[[Shape, Scale, torch.device], Iterator[Row]]] = {
    "published": gpu_parts.published,
    "ppo": gpu_ppo.update,
    "sampling": gpu_parts.sampling,
    "sft": gpu_parts.sft,
    "trl": gpu_peers.sft,
    "grpo": gpu_peers.grpo,
    "dpo": gpu_parts.preferences,
    "reward": gpu_parts.rewards,
    "checkpointing": partial(gpu_parts.sft, checkpointing=True),
    "static": gpu_parts.static,
}
LAST = ("checkpointing", "static")  # for every shape after all others


class OutOfTime(BaseException):
    """Of the alarm; not an `Exception`, so that nothing on the way takes it for a fault of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a machine without a GPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", default=[], help="only shapes whose names begin so, such as 135M 8B")
    parser.add_argument("--steps", type=int, help="optimizer steps that are timed, in whole rounds over the rows")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="what is not measured by then is not")
    parser.add_argument("--record", type=Path, help="where figures are kept; default: benchmarks/results/gpu.jsonl")
    parser.add_argument("--again", action="store_true", help="measure also what the record has")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU here: not measured (--tiny proves the script on a CPU)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    scale = TINY_SCALE if args.tiny else Scale()
    scale = scale._replace(steps=args.steps or scale.steps)
    shapes = [s for s in (TINY if args.tiny else SHAPES) if s.name.startswith(tuple(args.shapes or [""]))]
    if not shapes:
        parser.error("--shapes: there is no such shape")
    plan = [(shape, part) for shape in shapes for part in PARTS if part in args.only]
    plan.sort(key=lambda item: item[1] in LAST)  # stable
    signal.signal(signal.SIGALRM, _ring)
    warnings.filterwarnings("ignore", category=FutureWarning)
    record = args.record or (None if args.tiny else RESULTS / "gpu.jsonl")
    known = {} if args.again else recorded(record)
    started, rows, missing = time.monotonic(), [], {}
    for shape, part in plan:
        key = " ".join([part, shape.name, name, f"torch {torch.__version__}", *map(str, scale)])
        if key in known:
            rows += known[key]
            print(f"{part} {shape.name}: as the record has it", flush=True)
            continue
        left, before, own = args.seconds - (time.monotonic() - started), time.monotonic(), []
        why = tried(partial(PARTS[part], shape, scale, device), left, own)
        told = f"not measured, {why}" if why else f"{time.monotonic() - before:.0f} s"
        print(f"{part} {shape.name}: {told}", flush=True)
        rows += own
        if why:
            missing[f"{part} {shape.name}"] = why
        elif record:
            record.parent.mkdir(parents=True, exist_ok=True)
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "rows": [row._asdict() for row in own]}) + "\n")
        release(device)
    report(rows, missing, name, write=not args.tiny)
    if any(why.startswith("failed") for why in missing.values()):
        sys.exit(1)


def recorded(record: Path | None) -> dict[str, list[Row]]:
    """Figures of parts that were measured whole."""
    if record is None or not record.exists():
        return {}
    parts = map(json.loads, record.read_text("utf-8").splitlines())
    return {part["key"]: [Row(**row) for row in part["rows"]] for part in parts}


def tried(part: Callable[[], Iterator[Row]], seconds: float, rows: list[Row]) -> str | None:
    """Add a part's rows as they come; why some are missing."""
    if seconds < LEAST_SECONDS:
        return "out of time"
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for row in part():
            rows.append(row)
            print("  " + "  ".join(cells(row)), flush=True)
    except OutOfTime:
        return "out of time"
    except ImportError as error:
        return f"{error.name} is not installed"
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # whatever it is, the other parts are still to be measured
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def release(device: torch.device) -> None:
    """What a part held. What was compiled stays: attention is one function for all shapes of rows."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # of a device that has failed for good
            torch.cuda.empty_cache()


def report(rows: list[Row], missing: dict[str, str], name: str, write: bool) -> None:
    """The table, and last the JSON line; `name` is the device's."""
    date = time.strftime("%Y-%m-%d")
    table = ["| part | what | speed | peak memory | |", "|---|---|---:|---:|---|"]
    table += [f"| {' | '.join(cells(row))} |" for row in rows]
    lacking = [f"- {what}: not measured, {why}" for what, why in missing.items()]
    text = "\n".join(table + [""] * bool(lacking) + lacking) + "\n"
    print(f"\n{text}")
    if write:
        RESULTS.mkdir(exist_ok=True)
        command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        with (RESULTS / f"gpu-{date}.md").open("a", encoding="utf-8") as file:
            file.write(f"`{command}` on one {name}, {versions}, {date}\n\n{text}\n")
    line = {
        "benchmark": "gpu", "device": name, "date": date, "rows": [row._asdict() for row in rows], "missing": missing,
    }  # fmt: skip
    print(json.dumps(line))


def cells(row: Row) -> list[str]:
    """A row as the table has it."""
    speed = f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.2f}"
    more = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in row.more.items())
    return [row.part, row.what, f"{speed} {row.unit}/s", f"{row.peak_bytes / 1e9:.1f} GB", more]


def _ring(_signal: int, _frame: object) -> None:
    raise OutOfTime


if __name__ == "__main__":
    main()
