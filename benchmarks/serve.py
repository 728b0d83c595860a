"""align.serve under load: tokens per second and first tokens, beside one request at a time, and beside another server.

    python benchmarks/serve.py [--requests 200] [--new 64] [--dtype bfloat16]
    python benchmarks/serve.py --peer http://127.0.0.1:8001 --peer-model NAME      (vLLM, say, on the same base)
    python benchmarks/serve.py --steps

It starts `python -m align.serve` on the base and three adapters with random updates, sends token ids, greedy,
to answers of one length (`ignore_eos`), and stops it again. The peer is asked the same, after ours has ended; it should
be idle until then. `--steps` measures a step of the batch without a server: all adapters in one pass, and a pass each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil

ADAPTERS = ("red", "green", "blue")
ONE_BY_ONE = 8  # requests
ROUNDS = 20  # steps that are timed


class Heard(NamedTuple):
    """One answer, as the client saw it."""

    first: float  # seconds to its first token
    whole: float  # to its end
    tokens: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--peer", help="URL of another server with the same base")
    parser.add_argument("--peer-model", help="its name there")
    parser.add_argument("--steps", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        finals = [make_adapter(args, Path(folder) / name, seed) for seed, name in enumerate(ADAPTERS)]
        if args.steps:
            print(json.dumps(steps(args, finals)))
            return
        found = {"requests": args.requests, "prompt": args.prompt, "new": args.new, "dtype": args.dtype}
        with Ours(args, finals) as ours:
            found["base"] = measured(args, ours.url, ["base"])
            found["three adapters"] = measured(args, ours.url, [*ADAPTERS])
            found["peak_bytes"] = ours.peak_bytes()
        if args.peer:
            found["peer"] = measured(args, args.peer, [args.peer_model], "peer")
            found["against peer"] = found["base"]["tokens_per_second"] / found["peer"]["tokens_per_second"]
    print(json.dumps(found))


def measured(args: argparse.Namespace, url: str, models: list[str], name: str = "") -> dict[str, Any]:
    """One by one, then all at once."""
    bodies = [request(args, models[i % len(models)], i) for i in range(args.requests)]
    for body in bodies[: len(models)]:  # the first of all compiles and allocates
        asyncio.run(ask(url, body))
    began = time.perf_counter()
    for body in bodies[:ONE_BY_ONE]:
        asyncio.run(ask(url, body))
    alone = ONE_BY_ONE * args.new / (time.perf_counter() - began)
    began = time.perf_counter()
    heard = asyncio.run(crowd(url, bodies))
    together = sum(len(each.tokens) for each in heard) / (time.perf_counter() - began)
    assert all(len(each.tokens) == args.new for each in heard), "an answer is not whole"
    first = sorted(each.first for each in heard)
    median, late = statistics.median(first), first[int(0.99 * (len(first) - 1))]
    print(
        f"{name or ', '.join(models):18} one at a time {alone:7.1f} tokens/s, {args.requests} at once {together:8.1f} "
        f"({together / alone:.1f} times); first token: median {median:.2f} s, p99 {late:.2f} s ({late / median:.2f})",
        flush=True,
    )
    return {
        "one_at_a_time": alone, "tokens_per_second": together, "times": together / alone, "first_median": median,
        "first_p99": late, "first_ratio": late / median,
    }  # fmt: skip


def request(args: argparse.Namespace, model: str, number: int) -> dict[str, Any]:
    """Prompts of tokens that no two share."""
    ids = np.random.default_rng(number).integers(1000, 20000, args.prompt).tolist()
    return {"model": model, "prompt": ids, "max_tokens": args.new, "temperature": 0, "ignore_eos": True}


async def crowd(url: str, bodies: list[dict[str, Any]]) -> list[Heard]:
    """All at once."""
    return await asyncio.gather(*(ask(url, body) for body in bodies))


async def ask(url: str, body: dict[str, Any]) -> Heard:
    """A streamed completion over a connection of its own."""
    place = urlsplit(url)
    data = json.dumps(body | {"stream": True, "return_token_ids": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    writer.write(head.encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{status.decode().strip()}: {(await reader.read()).decode()[:500]}")
    first, tokens = None, []
    async for line in reader:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(event["error"]["message"])
            for choice in event["choices"]:
                tokens += choice.get("token_ids") or []
                first = first or (time.perf_counter() if tokens else None)
    writer.close()
    return Heard(first - began, time.perf_counter() - began, tokens)


class Ours:
    """`python -m align.serve`, while this is entered."""

    def __init__(self, args: argparse.Namespace, finals: list[Path]) -> None:
        words = [f"base={args.base}", *map(str, finals), "--port", "0", "--dtype", args.dtype]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "align.serve", *words], stdout=subprocess.PIPE, text=True
        )
        self.peak = 0

    def __enter__(self) -> Ours:
        told = self.process.stdout.readline()
        if " at http" not in told:
            raise SystemExit(f"the server did not start: {told}")
        self.url = told.split(" at ")[-1].strip()
        return self

    def peak_bytes(self) -> int:
        """The most memory that it had."""
        status = Path(f"/proc/{self.process.pid}/status")
        if status.is_file():
            return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
        return psutil.Process(self.process.pid).memory_info().rss

    def __exit__(self, *_error: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def make_adapter(args: argparse.Namespace, run: Path, seed: int) -> Path:
    """`final/` of a run that never was: its update is random."""
    import torch

    from align.models.base import load_base
    from align.models.trunk import Trunk
    from align.recipe.schema import Lora, Model

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = Model(base=args.base, dtype="float32")
    trunk = Trunk(
        load_base(model, torch.device("cpu"), frozen=True), model, Lora(r=args.rank, alpha=2 * args.rank), seed
    )
    draw = torch.Generator().manual_seed(seed)
    weights = {name: p.detach() for name, p in trunk.named_parameters() if p.requires_grad}
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.normal_(0, 0.01, generator=draw)
    trunk.save(run / "final", weights, {"stage": "dpo"})
    return run / "final"


def steps(args: argparse.Namespace, finals: list[Path]) -> list[dict[str, float]]:
    """CPU milliseconds of a step for so many rows: of the bare trunk, of three adapters in one pass, and in three."""
    from align.models.sampling.choice import Sampling
    from align.models.sampling.requests import Request
    from align.models.sampling.running import Running
    from align.tools.serving.models import load_models

    shelf, _, pairs, _ = load_models([str(final) for final in finals], args.base, args.dtype)
    running = Running(shelf.trunk)
    numbers = [running.adapters.add(shelf.read(*pair).chain) for pair in pairs]
    voice = shelf.base("base").voice._replace(ends=frozenset(), stops=())

    def timed(chosen: list[int], rows: int) -> float:
        """CPU milliseconds of a step of so many rows, of these adapters in turn."""
        for i in range(rows):
            ids = np.random.default_rng(i).integers(1000, 20000, args.prompt).astype(np.int32)
            speaker = voice._replace(adapter=chosen[i % len(chosen)])
            running.join(Request(speaker, ids, Sampling(2 * args.new, temperature=0), (i,)))
        while running.waiting or running.filling:
            running.step()
        taken = []
        for _ in range(ROUNDS):
            began = time.process_time()
            running.step()
            taken.append(time.process_time() - began)
        for row in running.going:
            row.cancelled = True
        running.step()
        return 1000 * statistics.median(taken)

    found = []
    for rows in (3, 12, 48, 192):
        bare, mixed = timed([0], rows), timed(numbers, rows)
        apart = sum(timed([number], rows // 3) for number in numbers)
        found.append({"rows": rows, "bare": bare, "one pass": mixed, "a pass for each": apart})
        print(
            f"{rows:4} rows: bare {bare:7.1f} ms, one pass {mixed:7.1f} ms, a pass for each {apart:7.1f} ms of CPU",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
