"""Distillation through its command, on a model of 40,000 weights: its figures are the plain ones, and it learns."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ppo_start import make_start
from safetensors.torch import load_file
from samplers import make_teacher, recipe_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import align, in_two, lines, metrics, tree, weights

from align import distill

DOCS = (Path(__file__).parents[1] / "docs" / "distill.md").read_text("utf-8")


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    start = make_start(world, cache, tmp_path_factory)
    make_teacher(world, start, cache)
    return start


def ran(world, start, here, own=None, name="run", **sections):
    told = align(recipe_of(world, start, here / f"{name}.yaml", distill, own, **sections), stage=distill)
    assert (told.status, told.err) == (0, ""), told.err
    return here / name


@pytest.fixture(scope="module")
def finished(world, start, cache, tmp_path_factory):
    """Half of the prompts on policy. The KL falls, and the greatest is asked for: that after three steps. So the run
    ends after six."""
    best = {"metric": "kl", "goal": "greatest"}
    train = {"steps": 9, "eval_every": 3, "save_every": 3, "patience": 1, "best": best}
    folder = tmp_path_factory.mktemp("finished")
    data = {"eval": {"sources": in_two(folder, lines(world.held_pairs)[:3], 1)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        return ran(world, start, folder, {"on_policy": 0.5}, train=train, data=data)


def test_exactly_these_files_are_left(finished):
    checkpoint = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    adapter = ("adapter_config.json", "adapter_model.safetensors", "align.json", "generation_config.json")
    tokenizer = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    run = ("recipe.yaml", "environment.json", "data.json", "ledger.jsonl", "metrics.jsonl", "summary.json")
    assert set(tree(finished)) - {"samples.jsonl"} == {
        *run, "report.html",
        *(f"checkpoints/step-{step:06d}/{name}" for step in (3, 6) for name in checkpoint),
        *(f"{result}/{name}" for result in ("best", "final") for name in (*adapter, *tokenizer)),
    }  # fmt: skip
    names = [*load_file(finished / "checkpoints" / "step-000006" / "model.safetensors"), *weights(finished)]
    assert all("teacher" not in name for name in names), "the teacher is not the student's to keep"
    assert '"distill.teacher.adapter ' in (finished / "data.json").read_text(), "another teacher is another run"


def test_every_figure_of_the_docs_is_there(finished):
    table = DOCS.partition("## Numbers")[2].partition("\n## ")[0]
    named = {name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall("`(.*?)`", cell)}
    held, first = lines(finished / "metrics.jsonl")[:2]
    common = {"step", "split", "epoch", "tokens", "tokens_seen", "step_seconds", "elapsed_seconds", "tokens_per_second"}
    of_sources = {f"{name}/{title}" for name in named & set(held) for title in ("few", "more")}
    assert (set(first) | set(held)) - common - {"eval_seconds"} == named | of_sources


def test_the_best_student_is_kept_and_patience_ends_the_run(finished):
    best, last = (json.loads((finished / result / "align.json").read_text()) for result in ("best", "final"))
    held = {record["step"]: record for record in metrics(finished, "eval")}
    assert (best["step"], best["kl"]) == (3, held[3]["kl"])
    assert (last["step"], last["best"]) == (6, {"step": 3, "kl": best["kl"]})
    assert last["ended_by"] == {"patience": 1, "of_steps": 9}
    kept = load_file(finished / "best" / "adapter_model.safetensors")
    there = load_file(finished / "checkpoints" / "step-000003" / "model.safetensors")
    for name, tensor in kept.items():
        (own,) = (there[key] for key in there if key.endswith(name.replace(".weight", ".default.weight")))
        assert torch.equal(tensor, own), name


def test_every_source_has_its_figures(finished):
    """One prompt and two. What the student says to a source's prompts is theirs alone: its KL over responses is that
    over tokens times their mean length."""
    for record in metrics(finished, "eval"):
        for title in ("few", "more"):
            of_tokens = record[f"reverse/sampled/{title}"] * record[f"response_tokens/{title}"]
            assert record[f"kl/{title}"] == pytest.approx(of_tokens, rel=1e-4, abs=1e-6)
        for name in ("kl", "response_tokens", "ended"):
            few, more = record[f"{name}/few"], record[f"{name}/more"]
            assert record[name] == pytest.approx((few + 2 * more) / 3, rel=1e-5, abs=1e-6)
    assert record["kl/few"] != record["kl/more"]


def test_the_student_comes_nearer_and_a_share_is_on_policy(finished):
    held = metrics(finished, "eval")
    assert [record["on_policy"] for record in metrics(finished, "train")] == pytest.approx([1 / 3, 2 / 3] * 3)
    for name in ("loss", "kl", "forward/answers", "reverse/sampled"):
        course = [record[name] for record in held]
        assert course == sorted(course, reverse=True), name
        assert course[-1] < 0.8 * course[0], name


def test_an_evaluation_is_what_plain_transformers_compute(world, start, here):
    """Of the data's own answers, before the first step: KL between teacher and trunk, over the answers' tokens, of all
    and of each source."""
    own = {"on_policy": 0.0, "divergence": "jsd", "beta": 0.3, "generation": {"temperature": 0.7}}
    rows = lines(world.held_pairs)[:3]
    run = ran(world, start, here, own, data={"eval": {"sources": in_two(here, rows, 1)}})
    tokenizer = AutoTokenizer.from_pretrained(start.base)
    model = AutoModelForCausalLM.from_pretrained(start.base).eval()
    teacher = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(start.base), make_teacher(world, start, here)
    )
    of_rows = []
    for row in rows:
        talk = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        before = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(talk, return_dict=False)
        ids = torch.tensor([ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]])
        with torch.no_grad():
            s, t = (
                (m(ids).logits[0, len(before) - 1 : -1].double() / 0.7).softmax(-1) for m in (model, teacher.eval())
            )
        m = 0.3 * t + 0.7 * s
        sums = {
            "forward/answers": float((t * (t / s).log()).sum()),
            "reverse/answers": float((s * (s / t).log()).sum()),
            "loss": float((0.3 * t * (t / m).log() + 0.7 * s * (s / m).log()).sum()),
            "agree/answers": float((s.argmax(-1) == t.argmax(-1)).sum()),
        }
        of_rows.append((sums | {"loss/answers": sums["loss"]}, len(s)))
    found = metrics(run, "eval")[0]
    for title, own in (("", of_rows), ("/few", of_rows[:1]), ("/more", of_rows[1:])):
        tokens = sum(count for _, count in own)
        expected = {f"{name}{title}": sum(sums[name] for sums, _ in own) / tokens for name in own[0][0]}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_another_model_teaches_as_the_same_adapter_does(world, start, here):
    """The teacher merged into a model of its own: the same numbers, but for rounding."""
    final = str(make_teacher(world, start, here))
    beside = ran(world, start, here, name="beside")
    other = ran(world, start, here, {"teacher": {"base": str(start.base), "adapter": final}}, name="other")
    for one, two in zip(metrics(beside), metrics(other), strict=True):
        numbers = {name: x for name, x in one.items() if name != "split"}
        assert numbers == pytest.approx({name: two[name] for name in numbers}, rel=1e-3, abs=1e-4)
    assert metrics(beside, "train")[0]["loss"] > 0.01
