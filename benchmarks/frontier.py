"""What recipes/frontier.yaml found, in a table and a figure: gold and proxy reward against KL, by method and setting.

    python -m align.pipeline recipes/frontier.yaml
    python benchmarks/frontier.py [runs/frontier/compared/compare.json] [--figure docs/frontier.svg]

Each line is the mean over seeds, with the lowest and the highest of them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

KNOBS = ("dpo.beta", "ppo.kl_target", "grpo.kl_coef")  # what is swept; the other sweep is over seeds
LOOKS = {
    "dpo": ("#2563c9", "o"),
    "dpo_second": ("#7aa7ea", "P"),
    "ppo_true": ("#c2541b", "s"),
    "ppo_learned": ("#2e8555", "D"),
    "grpo_true": ("#e59a6f", "X"),
    "grpo_learned": ("#7bc49c", "^"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", nargs="?", type=Path, default=Path("runs/frontier/compared/compare.json"))
    parser.add_argument("--figure", type=Path, help="write the frontier as SVG")
    args = parser.parse_args()
    found = json.loads(args.compared.read_text("utf-8"))
    points = settings(found)
    print(f"{'':12}{'':14}{'seeds':>6}{'KL, nats':>24}{'gold':>24}{'proxy':>24}")
    for point in points:
        spread = "".join(f"{told(point[name]):>24}" for name in ("kl", "gold", "proxy"))
        print(f"{point['group']:12}{point['setting']:14}{len(point['kl']):>6}{spread}")
    for best in found["best_of"]:
        print(f"best of {best['n']} by {best['by']:12}{best['kl']:>24.2f}{best['score']['value']:>24.2f}")
    if args.figure:
        draw(points, found, args.figure)
    print(json.dumps({"benchmark": "frontier", "points": points, "date": time.strftime("%Y-%m-%d")}))


def settings(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs that differ in their seed alone as one point, in the order of groups and KL."""
    points: dict[tuple[str, str], dict[str, Any]] = defaultdict(lambda: {"kl": [], "gold": [], "proxy": []})
    for run in found["runs"]:
        if run["baseline"]:
            continue
        knob = next(name for name in KNOBS if run["settings"].get(name) is not None)
        point = points[run["group"], f"{knob.partition('.')[2]} {run['settings'][knob]:g}"]
        point["kl"].append(run["kl_full"]["value"])
        point["gold"].append(run["scores"][found["score"]]["value"])
        point["proxy"].append(run["scores"][found["proxy"]]["value"])
    named = [{"group": group, "setting": setting, **point} for (group, setting), point in points.items()]
    return sorted(named, key=lambda point: (list(LOOKS).index(point["group"]), statistics.mean(point["kl"])))


def told(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(points: list[dict[str, Any]], found: dict[str, Any], path: Path) -> None:
    """Gold filled, proxy hollow; every seed a mark, lines through the means."""
    mpl.rcParams["svg.hashsalt"] = "align"  # the same file for the same numbers
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    for group, (colour, marker) in LOOKS.items():
        if group not in {point["group"] for point in points}:
            continue
        own = sorted((point for point in points if point["group"] == group), key=lambda p: statistics.mean(p["kl"]))
        means = [statistics.mean(point["kl"]) for point in own]
        for name, face, line in (("gold", colour, "-"), ("proxy", "none", ":")):
            at = [(kl, y) for point in own for kl, y in zip(point["kl"], point[name], strict=True)]
            axes.plot(*zip(*at, strict=True), marker, ms=5, mec=colour, mfc=face, ls="none")
            heights = [statistics.mean(point[name]) for point in own]
            label = {"label": group} if name == "gold" else {}
            axes.plot(means, heights, line, color=colour, lw=1, **label)
    best = [best for best in found["best_of"] if best["by"] == found["score"]]
    axes.plot(
        [b["kl"] for b in best],
        [b["score"]["value"] for b in best],
        "v-",
        ms=4,
        lw=1,
        color="#8a6d00",
        label="best of n",
    )
    axes.set_xlabel("KL to the reference, nats a response")
    axes.set_ylabel("mean reward of held-out responses")
    axes.plot([], [], "o-", color="#555555", ms=5, lw=1, label="filled: gold")
    axes.plot([], [], "o:", color="#555555", mfc="none", ms=5, lw=1, label="hollow: proxy")
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
