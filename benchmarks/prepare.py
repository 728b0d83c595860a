"""Near-duplicates that were planted, and what preparing them takes: recall, precision, time, memory.

    python benchmarks/prepare.py planted [--rows 100000] [--workers 2]
    python benchmarks/prepare.py scale [--rows 10000 100000 1000000] [--workers 2]
    python benchmarks/prepare.py beside PYTHON [--rows 100000] [--workers 2]
    python benchmarks/prepare.py bytes [--rows 10000]

`planted` says how many of the planted copies are found, and how many of what is dropped were planted. `scale` does so
with sets of several sizes. `beside` runs text-dedup's MinHash, which PYTHON has installed, on
the same rows with as many processes. `bytes` makes the set by one worker, by four, and by Ray on a cluster of two nodes
of this machine, and compares every file. Rows are drawn words: no text of anybody. Last, one JSON line.

Of 10 rows 6 are originals of 40 to 160 words, and 4 are copies of an earlier original: with 1 to 4 % of the words
exchanged; in capitals; with other punctuation and blanks; or with one of 50 pieces of boilerplate around, which
originals have around them too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import yaml

WORDS = 20_000  # of the language that rows are drawn in
COPIES = ("words", "case", "punctuation", "boilerplate")
MARKS = (", ", "; ", " - ", ".  ", " … ", "\n")


def planted(rows: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`text`; `family`: the number of its original; `copy`: how it differs from that one, or `original`."""
    rng = random.Random(seed)
    weights = [1 / (rank + 10) for rank in range(WORDS)]  # nearly Zipf's law
    stock = rng.choices([f"{rng.choice('bcdfgklmnprstvz')}{rank:x}o" for rank in range(WORDS)], weights, k=2_000_000)
    boilerplate = [" ".join(rng.sample(stock, 16)) for _ in range(50)]
    known: list[tuple[int, list[str]]] = []
    for i in range(rows):
        if i % 5 in (1, 3) and known:
            family, words = rng.choice(known)
            how = rng.choice(COPIES)
            yield {"text": copied(rng, words, how, boilerplate), "family": family, "copy": how}
            continue
        count = rng.randint(40, 160)
        words = rng.choices(stock, k=count)
        if len(known) < 200_000:
            known.append((i, words))
        text = " ".join(words)
        if rng.random() < 0.2 and count >= 100:
            text = around(rng, text, boilerplate)
        yield {"text": text, "family": i, "copy": "original"}


def copied(rng: random.Random, words: list[str], how: str, boilerplate: list[str]) -> str:
    """A copy of a text that differs in one way."""
    if how == "words":
        words = list(words)
        for i in rng.sample(range(len(words)), max(1, round(rng.uniform(0.01, 0.04) * len(words)))):
            words[i] = f"new{rng.randrange(WORDS)}"
        return " ".join(words)
    if how == "case":
        return " ".join(words).upper()
    if how == "punctuation":
        return "".join(word + (rng.choice(MARKS) if rng.random() < 0.3 else " ") for word in words)
    return around(rng, " ".join(words), boilerplate) if len(words) >= 100 else "» " + " ".join(words) + " «"


def around(rng: random.Random, text: str, boilerplate: list[str]) -> str:
    """The text below a piece of boilerplate."""
    return f"{rng.choice(boilerplate)}\n\n{text}"


def write(path: Path, rows: int) -> None:
    """As JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in planted(rows))


def prepared(folder: Path, data: Path, workers: int, **more: Any) -> dict[str, float]:
    """Run `align.prepare` on the rows in a process of its own: seconds, and peak memory in MB."""
    recipe = {
        "stage": "prepare",
        "run": str(folder / "set"),
        "sources": [{"path": str(data)}],
        "prepare": {"deduplicate": {"exact": "off", "near": {"threshold": 0.7}}},
        "output": {"keep": ["family", "copy"]},
        "workers": workers,
        "card": False,
        **more,
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(recipe))
    return measured([sys.executable, "-m", "align.prepare", str(folder / "data.yaml")], folder / "log")


def measured(command: list[str], log: Path) -> dict[str, float]:
    """A command's seconds, those of the processor in all its processes, and the peak of their memory in MB, each page
    counted once: all of it, and without pages of files, which the system takes back where memory is short."""
    started, peak, held, busy = time.monotonic(), 0, 0, dict[int, float]()
    with log.open("wb") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ)
        while process.poll() is None:
            pages, own, seconds = usage(process)
            peak, held, busy = max(peak, pages), max(held, own), busy | seconds
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
    cpu = round(sum(busy.values()), 1)
    seconds = round(time.monotonic() - started, 1)
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak // 1024, "peak_held_mb": held // 1024}


def usage(process: psutil.Process) -> tuple[int, int, dict[int, float]]:
    """Of a process and all below it: proportional set sizes together, in kB, those that are no file's, and seconds of
    the processor by process."""
    total, held, busy = 0, 0, {}
    try:
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0, {}
    for one in processes:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1:]
            sizes = dict(line.split()[:2] for line in lines)
            total += int(sizes["Pss:"])
            held += int(sizes["Pss_Anon:"]) + int(sizes["Pss_Shmem:"])
            busy[one.pid] = sum(one.cpu_times()[:2])
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError, KeyError):
            continue
    return total, held, busy


def found(folder: Path, data: Path) -> dict[str, Any]:
    """Recall: planted copies that are dropped, of each kind. Precision: what is dropped for a row of its family."""
    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    dropped, right = [], 0
    for line in (folder / "set" / "ledger.jsonl").open(encoding="utf-8"):
        entry = json.loads(line)
        if entry["reason"].startswith("deduplicate.near"):
            row, of = rows[entry["line"] - 1], rows[int(entry["reason"].rpartition(":")[2]) - 1]
            dropped.append(row["copy"])
            right += row["family"] == of["family"]
    recall = {}
    for how in COPIES:
        recall[how] = dropped.count(how) / max(sum(row["copy"] == how for row in rows), 1)
    copies = sum(row["copy"] != "original" for row in rows)
    return {
        "rows": len(rows),
        "planted": copies,
        "dropped": len(dropped),
        "recall": sum(how != "original" for how in dropped) / copies,
        "recall_of": recall,
        "precision": right / max(len(dropped), 1),
    }


def beside(python: str, folder: Path, data: Path, workers: int) -> dict[str, float]:
    """text-dedup's MinHash on the same rows, n-grams, permutations and threshold."""
    command = [
        python, "-m", "text_dedup.minhash", "--path", "json", "--data_files", str(data), "--split", "train",
        "--cache_dir", str(folder / "cache"), "--output", str(folder / "theirs"), "--column", "text",
        "--ngram", "3", "--num_perm", "128", "--threshold", "0.7", "--min_length", "5", "--num_proc", str(workers),
    ]  # fmt: skip
    return measured(command, folder / "theirs.log")


def same_bytes(folder: Path, data: Path) -> dict[str, Any]:
    """Every step that workers take, and a set by each way of working: seconds, and whether all files are the same."""
    steps = {
        "prepare": {"filter": {"min_words": 3, "gopher_repetition": {}}, "privacy": {}, "deduplicate": {"near": {}}},
        "output": {"shard_rows": 1000, "split": {"eval": 0.1}},
        "card": True,
    }
    made, result = {}, dict[str, Any]()
    for name, nodes, more in (("1_worker", 0, {}), ("4_workers", 0, {"workers": 4}), ("ray", 2, {"engine": "ray"})):
        if nodes and importlib.util.find_spec("ray") is None:
            result[name] = "ray is not installed"
            continue
        here = folder / name
        here.mkdir()
        with cluster(nodes):
            result |= {
                f"{name}_{key}": value for key, value in prepared(here, data, **{"workers": 1} | steps | more).items()
            }
        files = sorted(path for path in (here / "set").rglob("*") if path.is_file())
        own = ("recipe.yaml", "report.html")  # they name the folder, and how it was worked
        made[name] = {
            str(path.relative_to(here / "set")): sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.name not in own
        }
    first = made["1_worker"]
    return result | {"files": len(first), "same": {name: files == first for name, files in made.items()}}


@contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """A Ray cluster of so many nodes on this machine, one processor each; 0: none."""
    if not nodes:
        yield
        return
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(nodes - 1):
        made.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = made.address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        made.shutdown()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("planted", "scale", "beside", "bytes"))
    parser.add_argument("python", nargs="?", help="with `beside`: the Python that has text-dedup")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    sizes = asked.rows or {"scale": [10_000, 100_000, 1_000_000], "bytes": [10_000]}.get(asked.what, [100_000])
    results = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as beneath:
            folder, data = Path(beneath), Path(beneath) / "rows.jsonl"
            write(data, rows)
            result: dict[str, Any] = {"rows": rows, "mb": round(data.stat().st_size / 2**20), "workers": asked.workers}
            if asked.what == "bytes":
                result |= same_bytes(folder, data)
            else:
                result |= prepared(folder, data, asked.workers)
            if asked.what in ("planted", "scale"):
                result |= found(folder, data)
            if asked.what == "beside":
                theirs = beside(asked.python, folder, data, asked.workers)
                result |= {f"text_dedup_{name}": value for name, value in theirs.items()}
                result["text_dedup_log"] = (folder / "theirs.log").read_text()[-2000:]
        results.append(result)
        print("\n".join(f"{name}: {value}" for name, value in result.items()), "\n", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
