"""GRPO through its command, on a model of 40,000 weights: what it leaves, its figures, and what its settings do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from ppo_start import MOST, TRAIN, UNEVALUATED, make_start
from safetensors.torch import load_file
from samplers import recipe_of
from world import align, flat, in_two, lines, metrics, tree

from align import grpo
from align.grpo import Grpo, token_weights
from align.models.roles import Roles
from align.training.rollouts.rollout import texts

DOCS = (Path(__file__).parents[1] / "docs" / "grpo.md").read_text("utf-8")
SAMPLES = 3


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    return make_start(world, cache, tmp_path_factory)


def ran(world, start, here, own=None, name="run", **sections):
    told = align(recipe_of(world, start, here / f"{name}.yaml", grpo, own, **sections), stage=grpo)
    assert (told.status, told.err) == (0, ""), told.err
    return here / name


@pytest.fixture(scope="module")
def finished(world, start, cache, tmp_path_factory):
    """A reward model, a rule and a judge; clips that decide."""
    rewards = [
        {"adapter": str(start.reward), "weight": 0.5},
        {"function": "ppo_start:wordy"},
        {"function": "ppo_start:watching", "weight": 0.0},
    ]
    own = {"rewards": rewards, "epochs": 2, "minibatches": 2, "overlong_tokens": 2, "overlong_penalty": 0.5}
    train = {"steps": 2, "eval_every": 1, "save_every": 1}
    folder = tmp_path_factory.mktemp("finished")
    data = {"eval": {"sources": in_two(folder, lines(world.held_pairs)[:3], 1)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        return ran(world, start, folder, own, train=train, data=data)


def test_exactly_these_files_are_left(finished):
    checkpoint = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    adapter = ("adapter_config.json", "adapter_model.safetensors", "align.json", "generation_config.json")
    tokenizer = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    assert set(tree(finished)) == {
        *("recipe.yaml", "environment.json", "data.json", "ledger.jsonl", "metrics.jsonl", "summary.json"),
        *("report.html", "samples.jsonl", "episodes.jsonl"),
        *(f"checkpoints/step-{step:06d}/{name}" for step in (1, 2) for name in checkpoint),
        *(f"{result}/{name}" for result in ("best", "final") for name in (*adapter, *tokenizer)),
    } - ({"samples.jsonl"} - set(tree(finished)))
    names = load_file(finished / "checkpoints" / "step-000002" / "model.safetensors")
    assert all("critic" not in name for name in names), "nobody learns values"


def test_every_figure_of_the_docs_is_there(finished):
    """All of the table's, but for a loss which this run has not."""
    table = DOCS.partition("## Numbers")[2].partition("\n## ")[0]
    named = {name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall("`(.*?)`", cell)}
    parts, interval = {f"score/{name}" for name in ("reward", "wordy", "watching")}, {"score_low", "score_high"}
    expected = (named - {"score/<name>", "failures/<name>", "loss/ptx"} - interval) | parts
    held, first = lines(finished / "metrics.jsonl")[:2]
    common = {"step", "split", "epoch", "tokens", "tokens_seen", "step_seconds", "elapsed_seconds", "tokens_per_second"}
    assert set(first) - common == expected
    sampled = {"kl", "kl_per_token", "kl_coef", "entropy", "response_tokens", "ended", "score", "reward"}
    of_sources = {f"{name}/{title}" for name in OF_SOURCES for title in ("few", "more")}
    of_sources |= {"score/more_low", "score/more_high"}
    assert set(held) - {"step", "split", "eval_seconds"} == sampled | parts | interval | of_sources
    assert held["kl"] == 0
    assert metrics(finished, "eval")[-1]["kl"] != 0


OF_SOURCES = ("score", "kl", "response_tokens", "ended")


def test_every_source_has_its_figures(finished):
    """One prompt and two, with one response to each."""
    said = lines(finished / "episodes.jsonl")
    for record in metrics(finished, "eval"):
        first, *rest = (row["score"] for row in said if row["step"] == record["step"])
        assert (record["score/few"], record["score/more"]) == pytest.approx((first, fmean(rest)))
        for name in OF_SOURCES:
            few, more = record[f"{name}/few"], record[f"{name}/more"]
            assert record[name] == pytest.approx((few + 2 * more) / 3, rel=1e-5, abs=1e-6)


ALIKE = ("Name",)  # words of prompts whose responses all score alike


def letters(prompts, responses, rows):
    """How many a response has."""
    return [float(sum(map(str.isalpha, response))) for response in responses]


def tied(prompts, responses, rows):
    """By its letters, but 1 for all responses to some prompts."""
    return [
        1.0 if any(word in prompt for word in ALIKE) else score
        for prompt, score in zip(prompts, letters(prompts, responses, rows), strict=True)
    ]


asked = []  # what `late` was asked and what it said, call by call: prompt, response and score of each


def late(prompts, responses, rows):
    """As `tied` in its first call, then as `letters`."""
    scores = (letters if asked else tied)(prompts, responses, rows)
    asked.append([*zip(prompts, responses, scores, strict=True)])
    return scores


@pytest.fixture
def learnt(monkeypatch):
    """What each step learns from: prompts and responses, and how many tokens these have."""
    asked.clear()
    found, own = [], grpo.in_epochs

    def watched(loop, chosen, rate, rollout, episodes, *more):
        found.append((texts(loop.trunk, episodes), episodes.said.tolist()))
        return own(loop, chosen, rate, rollout, episodes, *more)

    monkeypatch.setattr(grpo, "in_epochs", watched)
    return found


def policy_loss(advantages, lengths):
    """Before the first update: the mean of -A over tokens."""
    return -sum(a * n for a, n in zip(advantages, lengths, strict=True)) / sum(lengths)


def standardised(scores):
    return [(score - fmean(scores)) / (stdev(scores) + 1e-4) for score in scores]


def test_groups_that_differ_when_they_are_sampled_anew_are_learnt_from(world, start, here, learnt):
    """From their new responses and the scores of these; the other groups keep theirs."""
    own = {"rewards": [{"function": "test_grpo:late"}], "kl": "none", "equal_groups": "drop", "resample": 3}
    run = ran(world, start, here, own, data=UNEVALUATED, batch={"examples": 6})
    (record,), (first, anew) = metrics(run, "train"), asked
    groups, others = ([call[i : i + SAMPLES] for i in range(0, len(call), SAMPLES)] for call in (first, anew))
    again = [i for i, group in enumerate(groups) if len({score for *_, score in group}) == 1]
    assert 0 < len(again) < len(groups) == 6
    for i, group in zip(again, others, strict=True):
        groups[i] = group
    ((said, lengths),) = learnt
    assert said == [(prompt, response) for group in groups for prompt, response, _ in group]
    assert (record["equal_groups"], record["learnt_groups"]) == (pytest.approx(len(again) / 6), 1)
    new = sum(sum(lengths[SAMPLES * i : SAMPLES * (i + 1)]) for i in again)
    assert record["sampled_tokens"] == pytest.approx(record["response_tokens"] * len(first) + new)
    advantages = [a for group in groups for a in standardised([score for *_, score in group])]
    assert record["loss/policy"] == pytest.approx(policy_loss(advantages, lengths), rel=1e-4)
    trained = load_file(run / "final" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)


def test_equal_groups_are_counted_sampled_anew_and_dropped(world, start, here):
    """Sampling anew spends tokens; what is dropped is not learnt from; with nothing left no weight moves."""
    own = {"rewards": [{"function": "test_grpo:tied"}], "kl": "none"}
    sections = {"data": UNEVALUATED, "batch": {"examples": 6}}
    runs = {
        name: ran(world, start, here, own | more, name, **sections)
        for name, more in {
            "dropped": {"equal_groups": "drop"},
            "again": {"equal_groups": "drop", "resample": 2},
        }.items()
    }
    dropped, again = (metrics(run, "train")[0] for run in runs.values())
    share = dropped["equal_groups"]
    assert 0 < share < 1
    assert again["equal_groups"] == share
    assert dropped["learnt_groups"] == pytest.approx(1 - share)
    assert dropped["sampled_tokens"] < again["sampled_tokens"]
    constant = own | {"rewards": [{"function": "align.training.rules:sentiment"}], "equal_groups": "drop"}
    run, train = here / "nothing", {"train": TRAIN | {"steps": 5}}
    told = align(recipe_of(world, start, here / "nothing.yaml", grpo, constant, **train, **sections), stage=grpo)
    assert told.out.count("warning, step 5: 5 steps in a row learnt nothing") == 1, told.err
    for record in metrics(run, "train"):
        assert (record["equal_groups"], record["learnt_groups"], record["updates"]) == (1, 0, 0)
    trained = load_file(run / "final" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in trained.items() if "lora_B" in name)


def test_with_the_advantage_of_the_batch_the_step_is_the_group(world, start, here, learnt):
    """One response has none to be equal to; and a group whose responses are all masked is not learnt from. A response
    that comes near to the most tokens has a penalty."""
    own = {"advantage": "batch", "samples": 1, "kl": "none", "rewards": [{"function": "test_grpo:letters"}]}
    near = {"overlong_tokens": MOST - 1, "overlong_penalty": 3.0}
    run = ran(world, start, here, own | near, "one", data=UNEVALUATED, batch={"examples": 6})
    (record,), ((said, lengths),) = metrics(run, "train"), learnt
    assert (record["equal_groups"], record["learnt_groups"]) == (0, 1)
    penalties = [3.0 * (n - 1) / (MOST - 1) for n in lengths]
    assert 0 < min(penalties) < max(penalties) == 3.0
    scores = [s - less for s, less in zip(letters(*zip(*said, strict=True), None), penalties, strict=True)]
    assert record["score"] == pytest.approx(fmean(scores))
    assert record["loss/policy"] == pytest.approx(policy_loss(standardised(scores), lengths), rel=1e-4)
    own |= {"unended": "mask", "generation": {"max_new": 1}}
    (record,) = metrics(ran(world, start, here, own, "masked", data=UNEVALUATED), "train")
    assert (record["ended"], record["learnt_groups"], record["updates"]) == (0, 0, 0)


def test_without_kl_no_step_asks_the_reference(world, start, here, monkeypatch):
    """An evaluation still does: it says how far the actor has gone. Where that is too far, no actor is kept, and
    patience ends the run."""
    asked = []
    reference = Roles.reference
    monkeypatch.setattr(Roles, "reference", lambda self, forest: asked.append(1) or reference(self, forest))
    patient = TRAIN | {"steps": 3, "eval_every": 1, "patience": 1}
    run = ran(world, start, here, {"kl": "none", "kl_budget": 1e-9}, train=patient)
    assert [record["kl"] == 0 for record in metrics(run, "eval")] == [True, False]
    about = json.loads((run / "final" / "align.json").read_text())
    assert (about["step"], about["ended_by"], "best" in about) == (1, {"patience": 1, "of_steps": 3}, False)
    assert not (run / "best").exists()
    assert len(asked) == 2, "two evaluations of one row each"
    assert not {"kl", "reward", "loss/kl"} & set(metrics(run, "train")[0])
    run = ran(world, start, here, {"kl": "reward", "kl_coef": 0.2}, "rewarded", data=UNEVALUATED)
    (record,) = metrics(run, "train")
    assert (len(asked) > 2, record["kl"]) == (True, 0)
    assert "loss/kl" not in record


def test_rows_change_nothing(world, start, here):
    """Neither does a ptx loss that shares a step; every response still learns its share."""
    ptx = {"sources": [{"path": str(world.talks)}], "examples": 2}
    own = {"ptx": ptx, "ratio": "sequence", "unended": "mask", "epochs": 2, "entropy_coef": 0.1}
    batch = {"examples": 2}
    narrow, wide = (
        ran(world, start, here, own, f"{room}", batch=batch | {"row_tokens": room}, data=UNEVALUATED)
        for room in (1, 512)
    )
    (one,), (other,) = metrics(narrow, "train"), metrics(wide, "train")
    assert one["loss/ptx"] > 0
    assert flat(one) == pytest.approx(flat(other), rel=1e-4, abs=1e-4)
    assert json.loads((narrow / "final" / "align.json").read_text())["stage"] == "grpo"


def test_weights_of_tokens_by_hand():
    """Responses of 1, 3 and 4 tokens, of which the second is not learnt from; the minibatch has the first two."""
    lengths, learnt = torch.tensor([1, 3, 4]), torch.tensor([True, False, True])
    of = {
        name: token_weights(
            Grpo(rewards=[{"function": "a:b"}], mean_over=name, generation={"max_new": MOST}),
            lengths, learnt, torch.tensor([0, 1]),
        ).tolist()
        for name in ("tokens", "responses", "length_free")
    }  # fmt: skip
    assert of["tokens"] == [1.0, 0.0, 0.0]
    assert of["responses"] == [0.5, 0.0, 0.0]
    assert of["length_free"] == pytest.approx([1 / (2 * MOST), 0.0, 0.0])
