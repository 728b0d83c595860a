"""What a model cannot take is told before its weights load: positions and tokens, in every stage."""

from __future__ import annotations

import io
import json
import shutil
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from models.tiny import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM
from world import align, make_world, metrics, write_rows

from align import chat, classify, dpo, evaluate, ppo, reward, sft
from align.models import base
from align.models.base import load_base
from align.models.judge import read_judge
from align.models.limits import positions_of
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Model

POSITIONS = 200
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
TABLES = {
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300},
    "opt": {"max_position_embeddings": 64, "word_embed_proj_dim": 32, "ffn_dim": 48} | SMALL,
    "bert": {"max_position_embeddings": 64} | SMALL,
    "roberta": {"max_position_embeddings": 66} | SMALL,  # two of them are never reached
    "distilbert": {"max_position_embeddings": 64, "dim": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 300},
    "gptj": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 300},
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_positions_are_found_without_weights(kind):
    assert positions_of(AutoConfig.for_model(kind, **TABLES[kind])) == 64


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_positions_that_are_computed_have_no_end(family):
    assert positions_of(tiny_model(family).config) is None


# -- in every stage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The world on a GPT-2 of few positions, and beside it a BERT."""
    world = make_world(tmp_path_factory.mktemp("short"))
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    config = AutoConfig.for_model("gpt2", n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, vocab_size=512)
    config.update({"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(world.base)
        bert = BertConfig(max_position_embeddings=POSITIONS, intermediate_size=48, **SMALL | {"vocab_size": 512})
        BertForMaskedLM(bert).save_pretrained(world.folder / "bert")
    tokenizer.save_pretrained(world.folder / "bert")
    return world


@pytest.fixture
def never(monkeypatch):
    """Loading weights fails the test."""
    monkeypatch.setattr(base, "_load_model", lambda *_: pytest.fail("weights were loaded"))


def recipe(world, here, stage: ModuleType, rows: list, name: str = "r", **sections):
    """A recipe of a stage on rows of its kind."""
    path, kind = write_rows(here / f"{name}.jsonl", rows), stage.__name__.removeprefix("align.")
    own = {"ppo": {"rewards": [{"function": "world:lines"}], "generation": {"max_new": 64}}} if stage is ppo else {}
    data = {"train": [{"path": str(path)}], "eval": {"sources": []}}
    common = {"stage": kind, "train": {"steps": 1, "eval_every": None, "save_every": None}}
    made = world.recipe(here / f"{name}.yaml", data=data, **common, **own, **sections)
    if stage is evaluate:
        text = made.read_text().split("lora:")[0]
        made.write_text(f"{text}data: {json.dumps(data)}\nevaluate: {{generation: {{max_new: 64}}}}\n")
    return made


class Told(NamedTuple):
    messages: list | None
    text: str


class Said(NamedTuple):
    asked: Told
    prompt: str
    response: str


LONG = "so " * POSITIONS  # in the second row
PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
ROWS = {
    sft: lambda text: [{"prompt": "Hi", "completion": "Yes."}, {"prompt": "Hi", "completion": f"Ha {text}"}],
    reward: lambda text: [PAIR, PAIR | {"prompt": f"Hi {text}"}],
    dpo: lambda text: [PAIR, PAIR | {"chosen": f"a {text}"}],
    classify: lambda text: [{"text": "sun", "label": "a"}, {"text": f"rain {text}", "label": "b"}],
    ppo: lambda text: [{"prompt": "Hi"}, {"prompt": f"Hi {text}"}],
    evaluate: lambda text: [{"prompt": "Hi"}, {"prompt": f"Hi {text}"}],
}  # fmt: skip


@pytest.mark.parametrize("stage", ROWS, ids=lambda stage: stage.__name__)
def test_a_row_beyond_the_positions_is_refused(stage, short, here, never):
    told = align(recipe(short, here, stage, ROWS[stage](LONG)), stage=stage)
    assert told.status == 2, told.out
    (line,) = told.err.splitlines()
    assert line.startswith(f"{here / 'r.jsonl'}:2: ")
    assert f"has {POSITIONS} positions, and 1 of 2 rows do not fit" in line
    assert "data.overlong=drop" in line
    assert not (here / "run" / "final").exists()


@pytest.mark.parametrize("stage", [ppo, evaluate], ids=["ppo", "evaluate"])
def test_the_room_of_a_response_counts(stage, short, here, never):
    """Two prompts that fit by themselves."""
    told = align(recipe(short, here, stage, ROWS[stage]("so " * 32)), stage=stage)
    assert told.status == 2, told.out
    assert f"generation.max_new: 64 is to fit after it, but {short.base} has {POSITIONS} positions" in told.err


def test_what_is_cut_or_dropped_fits(short, here):
    for name, overlong in (("cut", "truncate"), ("drop", "drop")):
        made = recipe(short, here, sft, ROWS[sft](LONG), name=name)
        told = align(made, f"data.overlong={overlong}", f"data.max_length={POSITIONS}", f"run={here / name}")
        assert (told.status, told.err) == (0, ""), told.err


def test_an_encoder_too(short, here, never):
    told = align(
        recipe(short, here, classify, ROWS[classify](LONG)), f"model.base={short.folder / 'bert'}", stage=classify
    )
    assert told.status == 2
    assert f"bert has {POSITIONS} positions" in told.err


def test_a_prompt_of_the_log_too(short, here, never):
    told = align(recipe(short, here, sft, ROWS[sft]("")), f"log.samples=[{LONG}]")
    assert told.status == 2
    assert told.err.startswith("log.samples.0: ")
    assert "lower log.sample_tokens" in told.err


def test_answers_put_to_other_prompts_are_cut_to_the_positions(short, here):
    """Of rows that fit, a long prompt before a long answer: KTO's baseline."""
    part = "so " * 22
    rows = [
        {"prompt": "Hi", "completion": f"a {part}", "label": True},
        {"prompt": f"Hi {part}", "completion": "a", "label": False},
    ]
    told = align(recipe(short, here, dpo, rows, dpo={"loss": "kto"}, batch={"examples": 2}), stage=dpo)
    assert (told.status, told.err) == (0, "")
    assert metrics(here / "run")[0]["kl_baseline"] == 0  # policy and reference are equal


def test_beyond_the_training_of_rotary_positions_a_remark(world, here):
    made = recipe(world, here, sft, ROWS[sft]("so " * 300))
    told = align(made, "data.max_length=2048")
    assert (told.status, told.err) == (0, "")
    assert f"{here / 'r.jsonl'}:2 take " in told.out
    assert f"{world.base} was trained on 512, and may be worse beyond them" in told.out


@pytest.fixture(scope="module")
def without_row(world, tmp_path_factory):
    """The world with a token that its model has no row for."""
    other = type(world)(tmp_path_factory.mktemp("token"))
    shutil.copytree(world.base, other.base)
    tokenizer = AutoTokenizer.from_pretrained(other.base)
    tokenizer.add_tokens(["<|call|>"])
    tokenizer.save_pretrained(other.base)
    return other


@pytest.mark.parametrize("stage", ROWS, ids=lambda stage: stage.__name__)
def test_a_token_without_a_row_is_refused(stage, without_row, here, never):
    told = align(recipe(without_row, here, stage, ROWS[stage]("<|call|>")), stage=stage)
    assert told.status == 2, told.out
    (line,) = told.err.splitlines()
    number = AutoTokenizer.from_pretrained(without_row.base).convert_tokens_to_ids("<|call|>")
    assert line.startswith(
        f"{here / 'r.jsonl'}:2: the token '<|call|>' has the number {number}, but {without_row.base} has "
    )
    assert 'model.add_tokens: ["<|call|>"]' in line


def test_with_a_row_of_its_own_it_is_trained(without_row, here):
    made = recipe(without_row, here, sft, ROWS[sft]("<|call|>"), model={"add_tokens": ["<|call|>"]})
    told = align(made)
    assert (told.status, told.err) == (0, "")


def test_a_token_without_a_row_in_a_talk_or_a_text_to_be_judged(without_row, here, monkeypatch):
    number = len(AutoTokenizer.from_pretrained(without_row.base)) - 1
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\nsay <|call|>\n")))
    told = align(without_row.base, "--max-new", 2, stage=chat)
    assert told.status == 2
    assert told.err == "standard input:2: the turn has the token '<|call|>', which the model has no embedding row for\n"
    section = Model(base=str(without_row.base), dtype="float32")
    trunk = Trunk(load_base(section, torch.device("cpu"), frozen=True, outputs=2), section, None, outputs=2)
    about = {"stage": "classify", "labels": ["a", "b"], "threshold": None, "max_length": 64}
    trunk.save(here / "final", {name: p.detach() for name, p in trunk.named_parameters()}, about)
    write_rows(here / "texts.jsonl", [{"text": "sun"}, {"text": "<|call|>"}, {"text": "rain"}])
    told = align("--predict", here / "final", here / "texts.jsonl", stage=classify)
    assert told.status == 0
    assert [line.split(",")[1] != "" for line in told.out.splitlines()[1:]] == [True, False, True]
    assert told.err.startswith(f"{here / 'texts.jsonl'}:2: has the token '<|call|>', which ")
    judge = read_judge(str(here / "final"), "a", "ppo.rewards.0", torch.device("cpu"), torch.float32)
    assert number == len(judge.model.get_input_embeddings().weight)
    with pytest.raises(UserError, match=r"what it is to judge has the token '<.call.>'"):
        judge([Said(Told(None, "say "), "", "<|call|>")])
