"""A small world to run the commands in: a tiny base checkpoint, rows it can learn, recipes, processes to kill."""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import psutil
import torch
import yaml
from data.voices import SMOLLM, tiny_tokenizer
from forks import forked, share_server
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from align import sft

torch.set_num_threads(1)  # products this small are fastest so
CITIES = ["France: Paris", "Italy: Rome", "Japan: Tokyo", "Peru: Lima", "Egypt: Cairo", "Cuba: Havana", "法国: 巴黎"]
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000  # of sched.h
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18  # of mount.h
WAIT = 120  # seconds after which a process that should have come to something has hung


class Told(NamedTuple):
    """What a command came to: its exit status, and what it wrote to stdout and stderr."""

    status: int
    out: str
    err: str


def align(*argv: object, stage: ModuleType = sft) -> Told:
    """Run a stage in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            stage.main([str(word) for word in argv])
        except SystemExit as stop:
            status = stop.code
    return Told(status, out.getvalue(), err.getvalue())


class World(NamedTuple):
    """A folder with a base checkpoint and files of rows; nothing in it changes."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def talks(self) -> Path:
        return self.folder / "talks.jsonl"

    @property
    def held(self) -> Path:
        return self.folder / "held.jsonl"

    @property
    def texts(self) -> Path:
        return self.folder / "texts.jsonl"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.jsonl"

    @property
    def held_pairs(self) -> Path:
        return self.folder / "held_pairs.jsonl"

    @property
    def verdicts(self) -> Path:
        return self.folder / "verdicts.jsonl"

    @property
    def held_verdicts(self) -> Path:
        return self.folder / "held_verdicts.jsonl"

    def preferences(self, path: Path, stage: ModuleType, **sections: Any) -> Path:
        """A recipe of reward or dpo: on the verdicts where the loss is kto, else on the pairs."""
        unpaired = sections.get("dpo", {}).get("loss") == "kto"
        train, held = (self.verdicts, self.held_verdicts) if unpaired else (self.pairs, self.held_pairs)
        data = {"train": [{"path": str(train)}], "eval": {"sources": [{"path": str(held)}]}}
        given = {"data": data | sections.pop("data", {})} | sections
        return self.recipe(path, stage=stage.__name__.removeprefix("align."), **given)

    def recipe(self, path: Path, **sections: Any) -> Path:
        """Write a recipe of 12 short steps beside its run folder; `sections` are merged into it."""
        recipe = {
            "stage": "sft",
            "run": str(path.parent / "run"),
            "seed": 17,
            "model": {"base": str(self.base), "dtype": "float32"},
            "lora": {"r": 4, "alpha": 8},
            "data": {"train": [{"path": str(self.talks)}], "eval": {"sources": [{"path": str(self.held)}]}},
            "batch": {"examples": 4, "row_tokens": 384},
            "optim": {"learning_rate": 0.02, "warmup": 2},
            "train": {"steps": 12, "eval_every": 4, "save_every": 3},
            "log": {"trackers": []},
        }
        for name, section in sections.items():
            nested = isinstance(section, dict) and isinstance(recipe.get(name), dict)
            recipe[name] = recipe[name] | section if nested else section
        path.write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), encoding="utf-8")
        return path


def make_world(folder: Path) -> World:
    """A Llama of some 40,000 random weights with a byte-level tokenizer; 28 conversations, 7 to eval, 21 texts.

    And 21 preference pairs, 14 to eval, of which three are the wrong way round; and their answers one by one.
    """
    world = World(folder)
    tokenizer = tiny_tokenizer(SMOLLM)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(world.base)
    tokenizer.save_pretrained(world.base)
    for path, words in (world.talks, ("Name", "Tell me", "What is", "Say")), (world.held, ("I want",)):
        asked = [f"{word} the capital of {city}" for word in words for city in CITIES]
        write_rows(path, [talk(text.split(":")[0], "It is" + text.split(":")[1]) for text in asked])
    write_rows(world.texts, [{"text": f"The capital of {city}. {word}."} for word in "abc" for city in CITIES])
    for path, judged, words, wrong in (
        (world.pairs, world.verdicts, ("Name", "Tell me", "Say"), ()),
        (world.held_pairs, world.held_verdicts, ("I want", "And"), (2, 7, 11)),
    ):
        asked = [f"{word} the capital of {city}" for word in words for city in CITIES]
        rows = [pair(text.split(":")[0], text.split(":")[1], i in wrong) for i, text in enumerate(asked)]
        write_rows(path, rows)
        write_rows(judged, [row for pair in rows for row in verdicts(pair)])
    return world


def pair(question: str, city: str, wrong: bool = False) -> dict[str, Any]:
    """A preference: the city named over not named, or the other way round; answers of several lengths."""
    answers = [f"It is{city}, my dear." if len(question) % 2 else f"It is{city}.", f"No,{city[:3]} what?"]
    chosen, rejected = reversed(answers) if wrong else answers
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def verdicts(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """Both answers of a pair as rows of their own, for KTO."""
    answers = (pair["chosen"], True), (pair["rejected"], False)
    return [{"prompt": pair["prompt"], "completion": answer, "label": label} for answer, label in answers]


def talk(question: str, *answers: str) -> dict[str, Any]:
    """A row of OpenAI messages: the question, then answers with "And?" between them."""
    turns = [{"role": "user", "content": question}]
    for answer in answers:
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
    return {"messages": turns[:-1]}


def in_two(folder: Path, rows: list[Any], first: int) -> list[dict[str, str]]:
    """So many rows and the rest, as two sources with titles."""
    parts = {"few": rows[:first], "more": rows[first:]}
    return [{"path": str(write_rows(folder / f"{title}.jsonl", part)), "title": title} for title, part in parts.items()]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """As JSONL; a row that is a str stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def alive(*pids: int) -> bool:
    """Whether any of these processes still runs."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def metrics(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    """metrics.jsonl without wall-clock figures: what two equal runs must agree on."""
    clocks = ("_seconds", "_per_second")
    records = lines(run / "metrics.jsonl")
    return [
        {k: v for k, v in record.items() if not k.endswith(clocks)}
        for record in records
        if split in (None, record["split"])
    ]


def flat(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, those of lists one by one; -1 for None, of an empty bin."""
    named = {name: value if isinstance(value, list) else [value] for name, value in record.items() if name != "split"}
    return {f"{name}[{i}]": -1.0 if x is None else x for name, values in named.items() for i, x in enumerate(values)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run trained."""
    (file,) = (run / "final").glob("*.safetensors")
    return load_file(file)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Child:
    """A stage in a process of its own, forked where everything is already imported. It ends with its test.

    `rank` makes it one of several processes, with the environment that `accelerate launch` would give it. Whoever asks
    for it to be `kept` ends it. With `shared`, what it forks itself is forked like it: at once, but not as its child.
    """

    def __init__(
        self,
        folder: Path,
        *argv: object,
        stage: ModuleType = sft,
        rank: dict[str, str] | None = None,
        kept: bool = False,
        shared: bool = False,
    ) -> None:
        self.log = folder / f"child{(rank or {}).get('RANK', '')}.log"
        env = {"ALIGN_CACHE": os.environ["ALIGN_CACHE"], "HF_HUB_OFFLINE": "1", **(rank or {})}
        words = [str(word) for word in argv]
        for path in (self.log, self.log.with_suffix(".err")):
            path.write_text("")
        self.process = forked(_child, stage.main, words, env, str(self.log), shared, kept=kept)

    @classmethod
    def pair(cls, folder: Path, port: int, *argv: object, stage: ModuleType = sft) -> list[Child]:
        """Two processes of one run."""
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        ranks = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
        return [cls(folder, *argv, stage=stage, rank=rank) for rank in ranks]

    def wait(self) -> Told:
        """Its end."""
        self.process.join(WAIT)
        assert self.process.exitcode is not None, f"hung: {self.log.read_text()}"
        return Told(self.process.exitcode, self.log.read_text(), self.log.with_suffix(".err").read_text())

    def send_when(self, number: int, ready: Callable[[], bool], wait: float = WAIT) -> bool:
        """Send a signal as soon as `ready()`; False if it ended before. After SIGKILL it is gone, with its locks."""
        deadline = time.monotonic() + wait
        while not ready():
            assert time.monotonic() < deadline, self.log.read_text()
            if self.process.exitcode is not None:
                return False
            time.sleep(0.0005)
        if self.process.exitcode is not None:
            return False
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join(WAIT)
        return True


def _child(main: Callable[[list[str]], None], argv: list[str], env: dict[str, str], log: str, shared: bool) -> None:
    os.environ.update(env)
    if shared:
        share_server()
    if host := env.get("NAMESPACE"):
        _move(host)
    for number, path in ((1, log), (2, str(Path(log).with_suffix(".err")))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    main(argv)


def _move(host: str) -> None:
    """Into the network namespace of this name, as a host of this name. It needs a process with one thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{host}") as namespace:
        assert libc.setns(namespace.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    assert libc.unshare(CLONE_NEWUTS | CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    socket.sethostname(host)
    assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0, os.strerror(ctypes.get_errno())
    for file in Path("/etc/netns", host).iterdir():  # as `ip netns exec` does
        where = f"/etc/{file.name}".encode()
        assert libc.mount(bytes(file), where, None, MS_BIND, None) == 0, os.strerror(ctypes.get_errno())
