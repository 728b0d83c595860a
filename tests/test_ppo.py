"""PPO through its command, on a model of 40,000 weights: what it leaves, and that its numbers are the plain ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from plain import Policy, Scorer
from ppo_start import MOST, SAMPLES, TRAIN, UNEVALUATED, make_start, ran, recipe_of, wordy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import align, flat, in_two, lines, metrics, tree

from align import ppo

DOCS = (Path(__file__).parents[1] / "docs" / "ppo.md").read_text("utf-8")
SEED, TEMPERATURE = 17, 0.7
KL_COEF, CLIP, NO_END, PER_TOKEN, BUDGET = 0.1, 0.8, 0.3, 0.01, 0.9


def judged(start) -> dict:
    """Two weighted parts and two judges; every setting that changes the score."""
    return {
        "rewards": [
            {"function": "ppo_start:wordy", "weight": 0.5},
            {"adapter": str(start.reward), "weight": -0.7, "clip": CLIP},
            {"adapter": str(start.reward), "weight": 0.0, "name": "other"},
            {"function": "ppo_start:watching", "weight": 0.0},
        ],
        "generation": {"max_new": MOST, "temperature": TEMPERATURE},
        "eval_samples": SAMPLES,
        "kl_coef": KL_COEF,
        "missing_eos_penalty": NO_END,
        "length_penalty": PER_TOKEN,
        "epochs": 2,
        "minibatches": 2,
        "kl_budget": BUDGET,
    }


LONGER = {"steps": 6, "eval_every": 1, "save_every": 2, "patience": 3}  # it ends after four
STEADY = {"optim": {"learning_rate": 0.02, "schedule": "constant", "warmup": 2}}


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    return make_start(world, cache, tmp_path_factory)


def in_parts(world, folder) -> dict:
    """One held-out prompt, and two, as sources with titles."""
    return {"eval": {"sources": in_two(folder, lines(world.held_pairs)[:3], 1)}}


@pytest.fixture(scope="module")
def finished(world, start, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        return ran(world, start, folder, ppo=judged(start), train=LONGER, data=in_parts(world, folder), **STEADY)


class Heard(NamedTuple):
    """A response by plain transformers."""

    tokens: list[int]
    logprobs: list[float]
    ref_logprobs: list[float]
    entropies: list[float]
    ended: bool


@torch.no_grad()
def heard(model, reference, prompt, drawn, end) -> Heard:
    """Token by token, each forward pass over all there is; a token is where the summed probabilities pass `drawn`."""
    said = Heard([], [], [], [], False)
    for uniform in drawn:
        ids = torch.tensor([[*prompt, *said.tokens]])
        actor, bare = (part(ids).logits[0, -1].double() / TEMPERATURE for part in (model, reference))
        logprobs = actor.log_softmax(-1)
        token = int((logprobs.exp().cumsum(0) <= uniform).sum())
        said.tokens.append(token)
        said.logprobs.append(float(logprobs[token]))
        said.ref_logprobs.append(float(bare.log_softmax(-1)[token]))
        said.entropies.append(float(-(logprobs.exp() * logprobs).sum()))
        if token == end:
            return said._replace(ended=True)
    return said


def evaluated(world, start, adapter=None) -> dict[str, float]:
    """The figures of an evaluation, from the docs' formulas, by plain transformers and peft."""
    tokenizer = AutoTokenizer.from_pretrained(start.base)
    reference = AutoModelForCausalLM.from_pretrained(start.base).eval()
    model = AutoModelForCausalLM.from_pretrained(start.base).eval()
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    scorer = Scorer.load(start.reward, start.base)
    about = json.loads((start.reward / "align.json").read_text())
    end = tokenizer.eos_token_id
    said, scores, raw = [], [], {"wordy": [], "reward": [], "other": [], "watching": []}
    for place, row in enumerate(lines(world.held_pairs)[:3]):
        talk = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        for number in range(SAMPLES):
            drawn = np.random.default_rng([SEED, ppo.SAMPLING, 0, place, number]).random(MOST)
            own = heard(model, reference, prompt, drawn, end)
            with torch.no_grad():
                worth = scorer.model(torch.tensor([[*prompt, *own.tokens]])).logits.item()
            text = tokenizer.decode(own.tokens, skip_special_tokens=True)
            (words,) = wordy([row["prompt"]], [text], [row])
            for name, value in {"wordy": words, "reward": worth, "other": worth, "watching": len(text)}.items():
                raw[name].append(value)
            normal = (worth - about["score_mean"]) / about["score_std"]
            penalty = NO_END * (not own.ended) + PER_TOKEN * len(own.tokens)
            scores.append(0.5 * words - 0.7 * min(max(normal, -CLIP), CLIP) - penalty)
            said.append(own)
    count, tokens = len(said), sum(len(own.tokens) for own in said)
    kl = sum(sum(own.logprobs) - sum(own.ref_logprobs) for own in said)
    found = {
        **{f"score/{name}": sum(values) / count for name, values in raw.items()},
        "kl_per_token": kl / tokens,
        "kl_coef": KL_COEF,
        "reward": (sum(scores) - KL_COEF * kl) / count,
        "entropy": sum(sum(own.entropies) for own in said) / tokens,
    }
    for title, own in ("", slice(count)), ("/few", slice(SAMPLES)), ("/more", slice(SAMPLES, count)):
        found |= figures(scores[own], said[own], title)
    return found


def figures(scores: list[float], said: list[Heard], title: str) -> dict[str, float]:
    """Of all prompts, or of those of a source; where there are several, with the interval over them."""
    found = {
        f"score{title}": fmean(scores),
        f"kl{title}": fmean(sum(own.logprobs) - sum(own.ref_logprobs) for own in said),
        f"response_tokens{title}": fmean(len(own.tokens) for own in said),
        f"ended{title}": fmean(own.ended for own in said),
    }
    by_prompt = [fmean(scores[i : i + SAMPLES]) for i in range(0, len(scores), SAMPLES)]
    if len(by_prompt) > 1:
        reach = 1.959964 * stdev(by_prompt) / len(by_prompt) ** 0.5
        found |= {f"score{title}_low": fmean(scores) - reach, f"score{title}_high": fmean(scores) + reach}
    return found


def test_exactly_these_files_are_left(finished):
    checkpoint = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    adapter = ("adapter_config.json", "adapter_model.safetensors", "align.json", "generation_config.json")
    tokenizer = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    assert set(tree(finished)) == {
        *("recipe.yaml", "environment.json", "data.json", "ledger.jsonl", "metrics.jsonl", "summary.json"),
        *("report.html", "samples.jsonl", "episodes.jsonl"),
        *(f"checkpoints/step-{step:06d}/{name}" for step in (2, 4) for name in checkpoint),
        *(f"{result}/{name}" for result in ("best", "final") for name in (*adapter, *tokenizer)),
    }


@pytest.mark.parametrize("when", ["start", "best", "final"])
def test_an_evaluation_is_what_plain_transformers_compute(world, start, finished, when):
    """Sampling and scoring, before the first step, where actor and reference are one, and of both results."""
    about = None if when == "start" else json.loads((finished / when / "align.json").read_text())
    step = {"start": 0, "best": about and about.get("step"), "final": 4}[when]
    (record,) = (record for record in metrics(finished, "eval") if record["step"] == step)
    expected = evaluated(world, start, None if when == "start" else finished / when)
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (record["kl"] == 0) == (when == "start")
    assert when != "start" or 0 < record["ended"] < 1, "some end by themselves, some by their length"


def test_every_figure_of_the_docs_is_there(finished):
    """All of the table's, but that of a loss which this run has not."""
    table = DOCS.partition("## Numbers")[2].partition("## When")[0]
    named = {name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall("`(.*?)`", cell)}
    parts = {f"score/{name}" for name in ("wordy", "reward", "other", "watching")}
    interval = {"score_low", "score_high"}
    expected = (named - {"score/<name>", "failures/<name>", "loss/ptx"} - interval) | parts
    held, first = lines(finished / "metrics.jsonl")[:2]
    common = {"step", "split", "epoch", "tokens", "tokens_seen", "step_seconds", "elapsed_seconds", "tokens_per_second"}
    assert set(first) - common == expected
    sampled = {"kl", "kl_per_token", "kl_coef", "entropy", "response_tokens", "ended", "score", "reward"}
    of_sources = {
        f"{name}/{title}" for name in ("score", "kl", "response_tokens", "ended") for title in ("few", "more")
    }
    of_sources |= {"score/more_low", "score/more_high"}
    assert set(held) - {"step", "split", "eval_seconds"} == sampled | parts | interval | of_sources


def test_the_best_actor_is_the_best_within_the_budget(finished):
    """And patience ends the run, though a better one is there that went too far."""
    held = [record for record in metrics(finished, "eval") if record["step"]]
    within = max((r for r in held if r["kl"] <= BUDGET), key=lambda record: record["score"])
    assert max(held, key=lambda record: record["score"])["kl"] > BUDGET, "a better one went too far"
    best, last = (json.loads((finished / name / "align.json").read_text()) for name in ("best", "final"))
    told = {name: within[name] for name in ("step", "score", "kl")}
    assert {name: best[name] for name in told} == told == last["best"]
    assert (last["step"], last["ended_by"]) == (4, {"patience": LONGER["patience"], "of_steps": 6})


def test_the_same_prompts_are_answered_at_every_evaluation(world, finished):
    rows = lines(finished / "episodes.jsonl")
    asked = [row["prompt"] for row in lines(world.held_pairs)[:3]]
    assert [row["step"] for row in rows] == [step for step in range(5) for _ in asked]
    assert all(question in row["prompt"] for row, question in zip(rows, asked * 5, strict=True))


def test_a_judge_changes_nothing(world, start, here, finished):
    """Every number to the bit, whether two judges look on or none."""
    section = judged(start)
    alone = section | {"rewards": section["rewards"][:2]}
    run = ran(world, start, here, ppo=alone, train=LONGER | {"steps": 2}, data=in_parts(world, here), **STEADY)
    named = ("score/other", "score/watching")
    watched = [{k: v for k, v in record.items() if k not in named} for record in metrics(finished)]
    assert metrics(run) == watched[:5]
    first, second = (load_file(of / "checkpoints" / "step-000002" / "model.safetensors") for of in (run, finished))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_before_the_warm_up_is_over_the_critic_learns_alone(world, start, here):
    """Whatever else would move the actor: its B stays 0; and neither step nor evaluation depends on the rows."""
    ptx = {"sources": [{"path": str(world.talks)}], "examples": 2}
    section = {"critic_warmup": 1, "ptx": ptx, "entropy_coef": 0.1, "epochs": 2}
    runs = [
        ran(world, start, here, f"{room}", ppo=section, batch={"examples": 2, "row_tokens": room}) for room in (1, 512)
    ]
    narrow, wide = (load_file(run / "checkpoints" / "step-000001" / "model.safetensors") for run in runs)
    actor = [tensor for name, tensor in narrow.items() if "lora_B.default" in name]
    assert len(actor) == 14
    assert all(tensor.abs().max() == 0 for tensor in actor)
    for name, tensor in load_file(start.reward / "adapter_model.safetensors").items():
        learnt = f"trunk.causal.{name}".replace(".weight", ".critic.weight")
        assert "score" in name or not torch.equal(narrow[learnt], tensor), name
    for name, tensor in wide.items():
        torch.testing.assert_close(narrow[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for record, other in zip(*map(metrics, runs), strict=True):
        assert flat(record) == pytest.approx(flat(other), rel=1e-4, abs=1e-4)


def test_a_step_breaks_off_where_it_has_gone_too_far(world, start, here):
    """One of its eight updates at a high rate is enough."""
    optim = {"learning_rate": 0.5, "warmup": 0}
    run = ran(world, start, here, ppo={"stop_kl": 0.01, "minibatches": 2}, optim=optim, data=UNEVALUATED)
    (record,) = metrics(run, "train")
    assert 1 <= record["updates"] < 8


def test_ptx_learns_its_texts(world, start, here):
    """From the very loss that plain transformers compute."""
    sources = [{"path": str(world.talks), "limit": 6}]
    section = {"ptx": {"sources": sources, "examples": 6, "weight": 5.0}, "epochs": 1}
    few = {"train": TRAIN | {"steps": 4}, "batch": {"examples": 1}, "data": UNEVALUATED}
    run = ran(world, start, here, ppo=section, **few)
    policy = Policy.load(run / "final", start.base)
    talks = [[turn["content"] for turn in row["messages"]] for row in lines(world.talks)[:6]]
    said = [policy.says(question, answer) for question, answer in talks]
    tokens = sum(own.tokens for own in said)
    before, after = (-sum(getattr(own, side) for own in said) / tokens for side in ("reference", "policy"))
    assert metrics(run, "train")[0]["loss/ptx"] == pytest.approx(before, rel=1e-5)
    assert after < before - 0.3


def test_weights_that_overflow_stop_the_run(world, start, here):
    """A rate of 1e30: the next step is not learnt from, and the state before it stays."""
    optim = {"learning_rate": 1e30, "warmup": 0, "max_grad_norm": 0.0}
    few = {"ppo": {"epochs": 1}, "train": TRAIN | {"steps": 2}, "data": UNEVALUATED}
    recipe = recipe_of(world, start, here / "run.yaml", optim=optim, **few)
    told = align(recipe, stage=ppo)
    assert told.status == 2, told.err
    assert told.err.startswith("step 2: the loss is not finite")
    assert "Traceback" not in told.err
