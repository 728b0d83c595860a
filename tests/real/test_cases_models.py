"""Small inputs of kinds that went wrong once: models that are short of positions or rows, chains, tied embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from world import align, metrics

from align import chat, classify, dpo, evaluate, ppo, sft

SHARED = Path(__file__).parents[3] / "shared"
BASE, CASES = SHARED / "models" / "stories260k", SHARED / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")


def recipe(name: str, stage: str, data: Path, base: Path = BASE, **sections) -> str:
    """Two steps of a small LoRA; the path of its file."""
    made = {
        "stage": stage,
        "run": name,
        "seed": 1,
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": [{"path": str(data)}]},
        "batch": {"examples": 2},
        "train": {"steps": 2},
        "log": {"trackers": []},
    }
    for key, section in sections.items():
        made[key] = made.get(key, {}) | section if isinstance(section, dict) else section
    if stage == "evaluate":
        made = {key: made[key] for key in ("stage", "run", "seed", "model", "data", "policy", "evaluate")}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(made))
    return f"{name}.yaml"


def test_long_rows(here):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
        AutoModelForCausalLM.from_config(config).save_pretrained("gpt2")
    AutoTokenizer.from_pretrained(BASE).save_pretrained("gpt2")
    rows = CASES / "long-rows" / "d.jsonl"
    told = align(recipe("s", "sft", rows, here / "gpt2"), stage=sft)
    assert (told.status, len(told.err.splitlines())) == (2, 1)
    assert told.err.startswith(f"{rows}:3: ")
    assert (
        "gpt2 has 64 positions, and 1 of 3 rows do not fit; set data.max_length=64 with data.overlong=drop" in told.err
    )
    told = align("s.yaml", "data.max_length=64", "data.overlong=truncate", "run=t", stage=sft)
    assert (told.status, told.err) == (0, "")
    texts = here / "c.csv"
    texts.write_text((CASES / "long-rows" / "c.csv").read_text() + "the red ball " * 40 + ",good\n")
    told = align(recipe("c", "classify", texts, here / "gpt2"), stage=classify)
    assert told.status == 2
    assert "gpt2 has 64 positions, and 1 of 5 rows do not fit" in told.err


def test_unknown_token(here):
    shutil.copytree(BASE, here / "base")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens(["<|call|>"])
    tokenizer.save_pretrained(here / "base")
    for stage, file, line in ((sft, "d.jsonl", 1), (classify, "c.csv", 2)):
        rows, kind = CASES / "unknown-token" / file, stage.__name__.removeprefix("align.")
        told = align(recipe(kind, kind, rows, here / "base"), stage=stage)
        assert (told.status, len(told.err.splitlines())) == (2, 1)
        assert told.err.startswith(f"{rows}:{line}: the token '<|call|>' has the number 512, but ")
    told = align("sft.yaml", "model.add_tokens=['<|call|>']", "run=taught", stage=sft)
    assert (told.status, told.err) == (0, "")


def test_chain(here):
    rows, pairs = CASES / "chain" / "s.jsonl", CASES / "chain" / "p.jsonl"
    assert align(recipe("sft", "sft", rows), stage=sft).status == 0
    assert align(recipe("dpo", "dpo", pairs, model={"adapter": "sft/final"}), stage=dpo).status == 0
    told = align(recipe("again", "dpo", pairs, model={"adapter": "dpo/final"}), stage=dpo)
    assert told.status == 2
    assert told.err.endswith("; give model.adapter: [sft/final, dpo/final]\n")
    told = align(recipe("again", "dpo", pairs, model={"adapter": ["sft/final", "dpo/final"]}), stage=dpo)
    assert (told.status, told.err) == (0, "")
    generation, whole = {"generation": {"max_new": 4}}, ["sft/final", "dpo/final", "again/final"]
    rewards = generation | {"rewards": [{"function": "cases_rewards:length"}]}
    Path("cases_rewards.py").write_text(
        "def length(prompts, responses, rows):\n    return [len(r) for r in responses]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(here)
        told = align(recipe("ppo", "ppo", pairs, model={"adapter": whole}, ppo=rewards), stage=ppo)
    assert (told.status, told.err) == (0, "")
    measured = recipe("e", "evaluate", pairs, model={"adapter": whole}, policy="ppo/final", evaluate=generation)
    assert align(measured, stage=evaluate).status == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
        assert align("ppo/final", stage=chat).status == 0
        told = align(BASE, *(word for name in [*whole, "ppo/final"] for word in ("--adapter", name)), stage=chat)
        assert (told.status, told.err) == (0, "")


def test_merge_tied(here):
    made = yaml.safe_load((CASES / "merge-tied" / "recipe.yaml").read_text())
    made["model"]["base"] = str(BASE)
    made["data"]["train"] = made["data"]["eval"]["sources"] = [{"path": str(CASES / "merge-tied" / "s.jsonl")}]
    Path("r.yaml").write_text(yaml.safe_dump(made))
    assert align("r.yaml", "run=a", stage=sft).status == 0
    end = metrics(here / "a", "eval")[-1]["loss"]
    assert end == pytest.approx(2.955, abs=0.01)
    told = align("r.yaml", "run=b", "model.adapter=a/final", "train.steps=1", stage=sft)
    assert (told.status, told.err) == (0, "")
    assert metrics(here / "b", "eval")[0]["loss"] == pytest.approx(end, rel=1e-5)
