"""Servers for tests: real ones, at a port of their own, on a tiny base with three adapters."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models.tiny import save_base, tiny_model, tiny_tokenizer
from peft import PeftModel
from policies import make_policy
from results import KINDS, save_result
from transformers import AutoModelForCausalLM

from align.recipe.schema import Lora
from align.serve import make_engine
from align.tools.serving.app import build_app
from align.tools.serving.desk import Desk
from align.tools.serving.engine import Engine
from align.tools.serving.limits import Limits
from align.tools.serving.listening import bound, listen, listening
from align.tools.serving.models import Opened, load_models
from align.tools.serving.votes import Votes, routes

ADAPTERS = ("red", "green", "blue")


def make_shop(folder: Path) -> dict[str, Path]:
    """A base whose likeliest tokens are letters, three policies on it, a reward model and a classifier."""
    model = tiny_model("qwen3")
    letters = [
        i for i, text in enumerate(map(tiny_tokenizer().decode, range(259))) if text.isascii() and text.isprintable()
    ]
    mute = sorted({*range(259)} - {*letters[3:]})
    with torch.no_grad():
        model.lm_head.weight[mute] = 0
    made = {"base": save_base(folder / "base", model=model)}
    for seed, name in enumerate(ADAPTERS):
        made[name] = make_policy(made["base"], folder / name, seed=seed)
    for stage in ("reward", "classify"):
        made[stage] = save_result(made["base"], folder / stage, stage, *KINDS[stage], Lora(r=2, alpha=4))
    return made


class Service(NamedTuple):
    """A server that answers."""

    url: str
    engine: Engine
    desk: Desk | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path) as reply:
            return reply.read().decode()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and body, which is JSON if it can be read so."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"} | named)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                status, text = reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text


_idle: dict[tuple[Path, ...], Opened] = {}  # trunks that no server uses now


@contextmanager
def serving(
    models: Sequence[Path | str],
    limits: Limits | None = None,
    key: str | None = None,
    adapters: Path | None = None,
    rows: int | None = None,
    tokens: int | None = None,
    votes: Path | None = None,
) -> Iterator[Service]:
    """In a thread of this process."""
    limits = limits or Limits()
    loaded = _idle.pop(tuple(models), None) or load_models([*map(str, models)], None, "float32")
    engine = make_engine(loaded, rows, tokens, limits.waiting)
    listener = bound("127.0.0.1", 0)
    more = routes(votes and Votes(votes), limits)
    server = listening(build_app(engine, desk := Desk(), limits, key, True, adapters, more), 2)
    thread = threading.Thread(target=listen, args=(server, listener, desk), daemon=True)
    engine.start()
    thread.start()
    try:
        yield Service(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, desk)
    finally:
        server.ask()
        thread.join(20)
        engine.stop()
        assert not thread.is_alive()
        _idle[tuple(models)] = loaded


@lru_cache
def plain_model(base: Path, final: Path | None = None) -> torch.nn.Module:
    """What transformers and peft make of an adapter on its base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, final) if final else model).eval()


def generated(model: torch.nn.Module, prompt: Sequence[int], most: int, ends: Sequence[int] = (2,)) -> list[int]:
    """transformers' greedy answer, its end token included."""
    inputs = torch.tensor([[int(i) for i in prompt]])
    with torch.no_grad():
        out = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=most,
            pad_token_id=0, eos_token_id=sorted(ends),
        )  # fmt: skip
    return out[0, inputs.shape[1] :].tolist()
