"""Two sides beside each other, ours and TRL's: the command of a comparison, and what it found.

Each arm runs in a process of its own, which a script starts with `--arm`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from episodes import EPISODES, HH, NEW, TEMPLATE

Arms = dict[str, Callable[[dict], dict]]  # what a process does: by name, from what it is told to what it found


def arguments(doc: str, settings: dict[str, dict]) -> argparse.ArgumentParser:
    """What both commands take; `settings`: TRL's, by name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="default: published rows if they are there, else a template's")
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--updates", type=int, default=3, help="the first of them is not counted")
    parser.add_argument("--rounds", type=int, default=1, help="how often each side runs, in turn")
    parser.add_argument("--setting", choices=settings, help="use this of TRL's settings instead of trying all")
    parser.add_argument("--dtype", help="default: bfloat16 where the CPU has AVX512, else float32")
    parser.add_argument("--before", type=Path, help="another checkout of this project, run in turn with both")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser


def run(parser: argparse.ArgumentParser, arms: Arms, compare: Callable[[argparse.Namespace, Path], None]) -> None:
    """The command: `compare`, with a folder to work in; or, in a process that it starts, one of the arms."""
    args = parser.parse_args()
    if args.arm:
        spec = json.loads(args.arm)
        result = arms[spec["arm"]](spec)
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))
        return
    args.data = args.data or (HH if HH.is_file() else TEMPLATE)
    args.dtype = args.dtype or native_dtype()
    print(f"{args.base}, {args.dtype}, {args.threads} threads, {EPISODES} episodes of up to {NEW} tokens an update")
    with tempfile.TemporaryDirectory() as work:
        compare(args, Path(work))


def native_dtype() -> str:
    """In which both sides are fast here."""
    import torch

    return "bfloat16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "float32"


class Pairs(NamedTuple):
    """What our side and TRL's found, round by round; a third: our side of another checkout."""

    rounds: list[tuple[dict, ...]]

    @property
    def ratios(self) -> list[float]:
        """Of episodes per second."""
        return [round(ours["episodes_per_second"] / peer["episodes_per_second"], 3) for ours, peer, *_ in self.rounds]

    @property
    def ratio(self) -> float:
        """Their mean."""
        return round(sum(self.ratios) / len(self.rounds), 3)

    @property
    def memory_ratio(self) -> float:
        """Of the peaks."""
        return round(self.peak(0) / self.peak(1), 3)

    def mean(self, side: int) -> float:
        """Episodes per second of our side, 0, TRL's, 1, or another checkout's, 2."""
        return round(sum(pair[side]["episodes_per_second"] for pair in self.rounds) / len(self.rounds), 4)

    def peak(self, side: int) -> int:
        """The most memory of a side, in bytes."""
        return max(pair[side]["peak_bytes"] for pair in self.rounds)

    def before(self) -> dict[str, float]:
        """Of another checkout, where there is one: its speed and peak."""
        return {"episodes_per_second": self.mean(2), "peak_bytes": self.peak(2)} if len(self.rounds[0]) == 3 else {}

    def row(self, name: str) -> str:
        """A line of the table under `HEADER`."""
        memory = f"{self.peak(0) / 1e9:>8.2f} /{self.peak(1) / 1e9:>5.2f} GB{self.memory_ratio:>8.2f}"
        then = f"\n{'before':24}{self.mean(2):>10.3f}{self.peak(2) / 1e9:>36.2f} GB" if self.before() else ""
        return f"{name:24}{self.mean(0):>10.3f}{self.mean(1):>10.3f}{self.ratio:>8.2f}{memory}{then}"


HEADER = f"{'episodes per second':24}{'align':>10}{'TRL':>10}{'ratio':>8}{'peak memory':>18}{'ratio':>8}"


class Sides(NamedTuple):
    """Our side and TRL's, each measured in processes of its own."""

    script: str
    args: argparse.Namespace
    settings: dict[str, dict]  # TRL's, by name
    spec: dict  # what each arm is told
    environment: dict[str, str]  # TRL's

    def side_by_side(self, updates: int, *samples: int) -> tuple[str, list[Pairs]]:
        """TRL's setting, the fastest in so many updates where the command names none, and what both sides found with
        each number of samples. Ends the process where a side does not run."""
        setting = self.args.setting or self._fastest(updates, samples[0])
        print(f"\nside by side, {self.args.updates} updates each, TRL with {setting}")
        found = [Pairs([]) for _ in samples]
        for _ in range(self.args.rounds):
            for count, pairs in zip(samples, found, strict=True):
                arms = [("align", ""), ("trl", setting), ("before", "")][: 3 if self.args.before else 2]
                pairs.rounds.append(tuple(self._measured(*arm, self.args.updates, count) for arm in arms))
        if not all(side["episodes_per_second"] for pairs in found for pair in pairs.rounds for side in pair):
            sys.exit("a side did not run, so there is nothing to compare")
        return setting, found

    def _fastest(self, updates: int, samples: int) -> str:
        print(f"\nTRL's settings, {updates} updates each, of which the last counts:")
        tried = {name: self._measured("trl", name, updates, samples) for name in self.settings}
        return max(tried, key=lambda name: tried[name]["episodes_per_second"])

    def _measured(self, arm: str, setting: str, updates: int, samples: int) -> dict:
        told = {"samples": samples, "updates": updates, "setting": self.settings.get(setting)}
        spec = self.spec | told | {"arm": "align" if arm == "before" else arm}
        if arm == "before":
            checkout = self.args.before.resolve()
            result = measured(
                str(checkout / "benchmarks" / Path(self.script).name), spec, {"PYTHONPATH": str(checkout)}
            )
        else:
            result = measured(self.script, spec, self.environment if arm == "trl" else {})
        name = f"{arm:6} x{samples} {setting:52}"
        if "error" in result:
            print(f"{name} {result['error']}", flush=True)
            return {"episodes_per_second": 0.0, "peak_bytes": 0, "response_tokens": 0.0}
        speed = f"{result['episodes_per_second']:8.3f} episodes/s {result['response_tokens']:6.1f} tokens each"
        print(f"{name} {speed} {result['peak_bytes'] / 1e9:6.2f} GB", flush=True)
        return result


def measured(script: str, spec: dict, environment: dict[str, str] | None = None) -> dict:
    """Run one arm of a script in its own process; its last line is its result."""
    given = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1", **(environment or {})}
    command = [sys.executable, script, "--arm", json.dumps(spec)]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])
