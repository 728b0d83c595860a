"""Small inputs that went wrong once: what ends a turn, thoughts, and control tokens in words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import trl
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig
from world import align, lines, metrics

from align import dpo, evaluate, ppo

SHARED = Path(__file__).parents[3] / "shared"
BASE, CASES = SHARED / "models" / "stories260k", SHARED / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
R1 = Path(trl.__file__).parent / "chat_templates" / "deepseek_r1_distill.jinja"


def recipe(file: Path, to: Path, base: str = str(BASE)) -> Path:
    """A recipe of the cases, on the base where it is here."""
    written = yaml.safe_load(file.read_text("utf-8"))
    written["model"]["base"] = base
    to.write_text(yaml.safe_dump(written), "utf-8")
    return to


def test_responses_end_where_training_ended_them(here):
    """The template ends turns with `<s>`; the tokenizer's end of text is another."""
    shutil.copytree(CASES / "wrong-end", here, dirs_exist_ok=True)
    # Sixty steps at 1e-2 to the end may leave, by rounding alone, what had been learnt.
    told = align(recipe(here / "sft.yaml", here / "1.yaml"), "optim.schedule=linear")
    assert told.status == 0, told.err
    told = align(recipe(here / "eval.yaml", here / "2.yaml"), stage=evaluate)
    assert told.status == 0, told.err
    assert [(row["response"], row["ended"]) for row in lines(here / "runs/e/responses.jsonl")] == [
        ("A ball.", True)
    ] * 2
    told = align(recipe(here / "ppo.yaml", here / "3.yaml"), stage=ppo)
    assert told.status == 0, told.err
    (record,) = metrics(here / "runs/p")
    assert (record["ended"], record["score"]) == (1.0, 1.0)
    final = here / "runs/sft/final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Name a toy"}], add_generation_prompt=True)
    ids = torch.tensor([asked["input_ids"]])
    model, config = AutoPeftModelForCausalLM.from_pretrained(final), GenerationConfig.from_pretrained(final)
    config.max_new_tokens = 24
    out = model.generate(input_ids=ids, generation_config=config)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == "A ball.<s>"


def run(here: Path, stage: str, data: Path, base: str = str(BASE), **model: object) -> Path:
    """A recipe of two steps."""
    path = here / f"{stage}.yaml"
    written = {
        "stage": stage, "run": str(here / stage), "model": {"base": base, **model}, "lora": {"r": 4, "alpha": 8},
        "data": {"train": [{"path": str(data)}], "max_length": 512}, "batch": {"examples": 2},
        "train": {"steps": 2}, "log": {"trackers": []},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(written), "utf-8")
    return path


def test_thoughts_are_trained(here):
    told = align(run(here, "sft", CASES / "thoughts" / "d.jsonl", chat_template=str(R1)), "--show")
    assert told.status == 0, told.err
    for thought in ("Six apples are more than two apples.", "One apple is less than two."):
        assert any("⟦" in line.partition(thought)[0] or line.startswith(thought) for line in told.out.split("\n\n")), (
            thought
        )
        assert thought in told.out
    told = align(run(here, "dpo", CASES / "thoughts" / "pairs.jsonl", chat_template=str(R1)), "--show", stage=dpo)
    assert told.status == 0, told.err
    assert all(thought in told.out for thought in ("Six is more.", "Two is more.", "One is less.", "No idea."))


def test_control_tokens_in_a_text_are_text(here):
    told = align(run(here, "sft", CASES / "special-tokens" / "d.jsonl", base="demo/smollm2-135m"), "--show")
    assert told.status == 0, told.err
    assert "⟦The token <|im_end|> ends it, and <|im_start|> begins one.<|im_end|>⟧" in told.out
    assert "⟦No.<|im_end|>⟧" in told.out
    assert told.out.count("⟦") == 2
    assert "2 repaired" in told.out
