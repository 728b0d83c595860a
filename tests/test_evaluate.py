"""align.evaluate through its command: on a task whose responses can be listed, and as align.compare reads it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from enumerable import divergence, every_response, make_base
from peft import PeftModel
from policies import evaluated, evaluation, make_costs, make_policy, results
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import align, lines, metrics, tree, write_rows

from align import compare, evaluate, reward
from align.data.formats.answers import COMPARED
from align.data.formats.formats import read_records
from align.recipe.schema import Source
from align.tools.evaluation.whole_texts import Windows

ASKED = {"a": 3, "b": 4, "c": 5, "ask": 6}  # prompts of one word, and its token
SHORT = {"steps": 2, "eval_every": None, "save_every": None}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A base that knows seven words, prompts, and a policy that has gone some way."""
    folder = tmp_path_factory.mktemp("words")
    write_rows(folder / "prompts.jsonl", [{"text": word} for word in ASKED])
    base = make_base(folder / "base")
    return base, folder / "prompts.jsonl", make_policy(base, folder / "dpo run")


def asking(**section):
    rule = {"function": "enumerable:reward", "name": "gold"}
    return {"samples": 2, "generation": {"max_new": 3}, "scores": [rule]} | section


def test_reward_and_kl_are_the_exact_ones_within_the_intervals(words, here):
    base, data, policy = words
    about, rows = evaluated(here / "run", base, data, policy, evaluate=asking(samples=150))
    listed = {word: (every_response(base, policy, i), every_response(base, None, i)) for word, i in ASKED.items()}
    worth = {word: float((p.logprobs.exp() * p.rewards).sum()) for word, (p, _) in listed.items()}
    kls = {word: divergence(p.logprobs, ref.logprobs) for word, (p, ref) in listed.items()}
    assert min(kls.values()) > 0.05
    for name, truth in (("score/gold", worth), ("kl", kls), ("kl_sequence", kls)):
        found = about["metrics"][name]
        assert found["low"] < np.mean([*truth.values()]) < found["high"], name
        assert found["n"] == 4
    for i, word in enumerate(ASKED):  # and prompt by prompt, where chance is only that of the samples
        own = [row for row in rows if row["prompt"] == i]
        assert own[0]["prompt_text"] == word
        for truth, drawn in (
            (worth[word], [row["scores"]["gold"] for row in own]),
            (kls[word], [row["kl"] for row in own]),
            (kls[word], [row["logprob"] - row["ref_logprob"] for row in own]),
        ):
            assert abs(np.mean(drawn) - truth) < 4 * np.std(drawn) / 150**0.5
        policy_says, reference_says = (side.logprobs.numpy() for side in listed[word])
        for row in own:
            assert np.hypot(policy_says - row["logprob"], reference_says - row["ref_logprob"]).min() < 1e-4


def test_compare_reads_it(words, here):
    base, data, policy = words
    gone = {"openai": {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}, "against": "start"}
    runs = {"start": (None, []), "near": (make_policy(base, here / "near run", 0.1), []), "far": (policy, [gone])}
    for name, (final, judges) in runs.items():
        about, _ = evaluated(here / name, base, data, final, evaluate=asking(judges=judges))
        assert about["name"] == name
        assert re.fullmatch(r"the function enumerable:reward \([0-9a-f]{8}\)", about["scores"]["gold"])
    assert about["judges"]["judge"]["excluded"]["unreachable"] == 4
    assert about["metrics"]["win_rate/judge"] == {"value": None, "low": None, "high": None, "n": 0}
    assert all(row["kl"] == 0 and row["logprob"] == row["ref_logprob"] for row in results(here / "start")[1])
    sides = [{"path": "near"}, {"path": "far", "name": "one"}, {"path": "far", "name": "other"}]
    section = {"runs": sides, "baseline": "start", "resamples": 200, "best_of": [1, 2]}
    (here / "c.yaml").write_text(yaml.safe_dump({"stage": "compare", "run": "page", "compare": section}))
    told = align("c.yaml", stage=compare)
    assert (told.status, told.err) == (0, "")
    page = json.loads((here / "page" / "compare.json").read_text())
    by_name = {run["name"]: run for run in page["runs"]}
    assert by_name["start"]["kl_full"]["value"] == 0 < by_name["near"]["kl_full"]["value"]
    assert by_name["near"]["kl_full"]["value"] < by_name["one"]["kl_full"]["value"]
    (same,) = (p for p in page["pairs"] if {page["runs"][p[side]]["name"] for side in "ab"} == {"one", "other"})
    assert same["win_rate"]["value"] == 0.5
    assert same["win_rate"]["low"] <= 0.5 <= same["win_rate"]["high"]


def test_a_response_depends_on_seed_prompt_and_number_alone(words, here):
    base, data, policy = words
    _, rows = evaluated(here / "one", base, data, policy, evaluate=asking())
    write_rows(here / "more.jsonl", [{"text": word} for word in ("ask", "b", "a b", "ask", "c", "a", "b")])
    about, others = evaluated(
        here / "other", base, here / "more.jsonl", policy, evaluate=asking(samples=3), batch={"row_tokens": 12}
    )
    assert about["metrics"]["kl"]["n"] == 5  # each prompt once
    assert [row["prompt_text"] for row in others[::3]] == ["ask", "b", "a b", "c", "a"]
    again = {(row["key"], row["sample"]): row for row in others}
    for row in rows:
        twin = again[row["key"], row["sample"]]
        assert row | {"prompt": 0, **dict.fromkeys(NUMBERS, 0)} == twin | {"prompt": 0, **dict.fromkeys(NUMBERS, 0)}
        assert [row[name] for name in NUMBERS] == pytest.approx([twin[name] for name in NUMBERS], abs=1e-5)
    _, reseeded = evaluated(here / "reseeded", base, data, policy, evaluate=asking(), seed=4)
    assert [row["response"] for row in reseeded] != [row["response"] for row in rows]


def test_a_search_finds_the_likeliest_responses(words, here):
    base, data, policy = words
    how = {"max_new": 3, "beams": 40, "length_penalty": 0.0}
    _, rows = evaluated(here / "run", base, data, policy, evaluate=asking(samples=3, generation=how))
    for word, i in ASKED.items():
        found = [row["logprob"] for row in rows if row["prompt_text"] == word]
        best = every_response(base, policy, i).logprobs.topk(3).values.tolist()
        assert found == pytest.approx(best, abs=1e-4)
    drawn = {"beams": 3, "preferences": {"score": "gold"}}
    for wrong in ({"beams": 2, "temperature": 0.5}, {"length_penalty": 2.0}, {"beams": 2, "max_new": 3}, drawn):
        more = {"preferences": wrong.pop("preferences")} if "preferences" in wrong else {}
        section = asking(samples=3, generation=wrong, **more)
        told = align(evaluation(here / "no", base, data, policy, evaluate=section), stage=evaluate)
        assert told.status == 2
        assert "beams" in told.err


NUMBERS = ("logprob", "ref_logprob", "kl", "entropy")


def test_what_training_was_and_cost(words, here):
    base, data, policy = words
    run = here / "ppo run"
    shutil.copytree(policy, run / "final")
    about = json.loads((run / "final" / "align.json").read_text())
    (run / "final" / "align.json").write_text(json.dumps(about | {"stage": "ppo"}))
    ppo = {"rewards": [{"function": "m:f"}], "samples": 5, "kl_coef": 0.3}
    records = [{"step": i, "split": split, "sampled_tokens": 50} for i in (1, 2) for split in ("train", "eval")][:-1]
    make_costs(run, {"stage": "ppo", "seed": 8, "ppo": ppo, "batch": {"examples": 4}}, records[:1] + records[2:])
    found = evaluated(here / "one", base, data, run / "final", evaluate=asking())[0]["training"]
    assert found["settings"]["ppo.kl_coef"] == 0.3
    assert (found["settings"]["optim.learning_rate"], found["settings"]["seed"]) == (2e-4, 8)
    assert "ppo.rewards" not in found["settings"]
    cost = {"device_seconds": 60.0, "peak_memory_bytes": 123, "tokens_sampled": 100}
    assert {name: found[name] for name in cost} == cost
    assert (found["stage"], found["run"]) == ("ppo", str(run))
    # A step that was not logged is not guessed.
    (run / "metrics.jsonl").write_text(json.dumps(records[0]) + "\n")
    assert (
        evaluated(here / "two", base, data, run / "final", evaluate=asking())[0]["training"]["tokens_sampled"] is None
    )


def test_again_it_has_nothing_to_do_and_after_a_kill_it_starts_again(words, here):
    base, data, policy = words
    recipe = evaluation(here / "run", base, data, policy, evaluate=asking())
    assert align(recipe, stage=evaluate).status == 0
    whole = tree(here / "run")
    told = align(recipe, stage=evaluate)
    assert (told.status, "nothing to do" in told.out) == (0, True)
    assert tree(here / "run") == whole
    told = align(recipe, "evaluate.samples=3", stage=evaluate)
    assert told.status == 2
    assert "differs in evaluate.samples: 2 there, 3 here" in told.err
    assert tree(here / "run") == whole
    (here / "run" / "evaluation.json").unlink()
    (here / "run" / "responses.jsonl").write_text("torn")
    assert align(recipe, stage=evaluate).status == 0
    kept = {name: text for name, text in tree(here / "run").items() if name != "environment.json"}
    assert kept == {name: whole[name] for name in kept}
    assert align(recipe, "evaluate.samples=3", "--fresh", stage=evaluate).status == 0
    assert len(results(here / "run")[1]) == 12


def test_preferences_are_pairs_of_its_own_responses_that_training_reads(words, here):
    write_rows(here / "asked.jsonl", [{"prompt": word} for word in ASKED])
    section = asking(samples=41, generation={"max_new": 8}, preferences={"score": "gold"})
    about, rows = evaluated(here / "run", words[0], here / "asked.jsonl", evaluate=section)
    scores = {(row["prompt_text"], row["response"]): row["scores"]["gold"] for row in rows}
    left_out, whole = Counter(), []
    for a, b in ((rows[41 * i + k], rows[41 * i + k + 1]) for i in range(4) for k in range(0, 40, 2)):
        said = a["response"].strip(), b["response"].strip()
        if not (a["ended"] and b["ended"]):
            left_out["cut off"] += 1
        elif not all(said) or said[0] == said[1]:
            left_out["equal" if all(said) else "empty"] += 1
        else:
            whole.append((a["prompt_text"], {a["response"], b["response"]}))
    pairs = lines(here / "run" / "preferences.jsonl")
    asked_in = {word: rows[41 * i]["prompt_text"] for i, word in enumerate(ASKED)}
    found = [(asked_in[pair["messages"][0]["content"]], {pair["chosen"], pair["rejected"]}) for pair in pairs]
    assert found == whole
    assert len(whole) > 2
    told = about["preferences"]
    assert told["pairs"] == len(whole)
    assert Counter({why: n for why, n in told["left_out"].items() if n}) == left_out
    assert left_out["cut off"]
    margins = [
        scores[prompt, pair["chosen"]] - scores[prompt, pair["rejected"]]
        for (prompt, _), pair in zip(found, pairs, strict=True)
    ]
    assert about["metrics"]["preferences/gold"]["value"] == pytest.approx(
        np.mean([(1 + np.sign(m)) / 2 for m in margins])
    )
    read = [row for _, row in read_records(Source(path=str(here / "run" / "preferences.jsonl")), COMPARED)]
    assert [[answer["content"] for answer in row.answers] for row in read] == [
        [p["chosen"], p["rejected"]] for p in pairs
    ]
    before = tree(here / "run")
    (here / "run" / "evaluation.json").unlink()
    (here / "run" / "preferences.jsonl").write_text("torn")
    assert align(here / "run.yaml", stage=evaluate).status == 0
    assert tree(here / "run")["preferences.jsonl"] == before["preferences.jsonl"]
    assert align(here / "run.yaml", "evaluate.preferences=null", "--fresh", stage=evaluate).status == 0
    assert {*tree(here / "run")} == {*before} - {"preferences.jsonl"}


@pytest.fixture(scope="module")
def runs(world, cache, tmp_path_factory):
    """Real runs of two steps: an SFT adapter, and a reward model."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        (folder / "sft").mkdir()
        assert align(world.recipe(folder / "sft" / "sft.yaml", train=SHORT)).status == 0
        (folder / "reward").mkdir()
        assert align(world.preferences(folder / "reward" / "r.yaml", reward, train=SHORT), stage=reward).status == 0
    return folder / "sft" / "run", folder / "reward" / "run"


@torch.no_grad()
def plainly(base, adapter, text: str, width: int) -> float:
    """The perplexity of a whole text by plain transformers: its own loss where one window takes it, else every token
    after the first by the window, half a width on from the one before, that holds it first."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.shape[1] <= width:
        return float(model(ids, labels=ids).loss.exp())
    nll, done = 0.0, 1
    for begin in range(0, ids.shape[1], width // 2):
        window = ids[:, begin : begin + width]
        logprobs = model(window).logits.double().log_softmax(-1)[0, :-1].gather(1, window[0, 1:, None])[:, 0]
        new = len(logprobs) - (min(begin + width, ids.shape[1]) - done)
        nll, done = nll - float(logprobs[new:].sum()), min(begin + width, ids.shape[1])
        if done == ids.shape[1]:
            break
    return math.exp(nll / (ids.shape[1] - 1))


@pytest.mark.parametrize(
    ("length", "width"), [(2, 2), (2, 9), (9, 9), (10, 9), (50, 8), (50, 7), (51, 50), (13, 2), (9, 3)]
)
def test_every_token_of_a_whole_text_but_the_first_is_scored_once(length, width):
    """In a window that holds half a width before it, or all there is."""
    windows, seen = Windows(np.arange(length, dtype=np.int32), width), []
    for i in range(len(windows)):
        (ids,), (new,) = windows.tree(i)[:2]
        assert len(ids) == windows.lengths[i] <= width
        assert not new[0], "nothing stands before it"
        first = int(np.flatnonzero(new)[0])
        assert i == 0 or first >= width - max(width // 2, 1)
        seen += ids[new].tolist()
    assert seen == list(range(1, length))


def test_perplexity_and_accuracy_are_those_that_training_saw(world, runs, here):
    tuned, judge = runs
    section = {
        "scores": [{"adapter": str(judge / "final"), "name": "proxy"}],
        "perplexity": [{"path": str(world.held)}],
        "pairs": [{"path": str(world.held_pairs)}],
        "samples": 1,
        "whole_texts": ["short.txt", "long.txt"],
    }
    (here / "short.txt").write_text("One paragraph,\r\nof two lines.\n\nAnd another: 你好.\n", "utf-8", newline="")
    (here / "long.txt").write_text("\n\n".join(f"Paragraph {i} of many." for i in range(12)), "utf-8")
    data = {"train": [{"path": str(world.held)}], "max_length": 128}
    about, rows = evaluated(here / "run", world.base, world.held, tuned / "final", evaluate=section, data=data)
    found = about["metrics"]
    for name in ("short", "long"):
        expected = plainly(world.base, tuned / "final", (here / f"{name}.txt").read_bytes().decode(), 128)
        assert found[f"perplexity/{name}"]["value"] == pytest.approx(expected, rel=1e-5)
        assert (found[f"perplexity/{name}"]["low"], found[f"perplexity/{name}"]["n"]) == (None, 1)
    assert found["perplexity/held"]["value"] == pytest.approx(metrics(tuned, "eval")[-1]["perplexity"], rel=1e-5)
    assert found["perplexity/held"]["low"] < found["perplexity/held"]["value"] < found["perplexity/held"]["high"]
    assert found["accuracy/proxy/held_pairs"]["value"] == pytest.approx(metrics(judge, "eval")[-1]["accuracy"])
    assert found["accuracy/proxy/held_pairs"]["n"] == 14
    assert len({row["scores"]["proxy"] for row in rows}) > 1
    assert found["kl"]["value"] > 0
    assert about["training"]["stage"] == "sft"


def test_what_a_user_can_mend_is_told_before_anything_is_written(world, words, runs, here, monkeypatch):
    base, data, policy = words
    monkeypatch.delenv("NO_KEY", raising=False)
    evaluated(here / "done", base, data, policy, evaluate=asking())
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("dear")
    (here / "mine" / "empty.txt").write_text("")
    write_rows(here / "others.jsonl", [{"text": "c"}])
    endpoint = {"url": "http://localhost:9", "model": "m"}
    judge = {"openai": endpoint, "against": "done"}
    reward_model = str(runs[1] / "final")
    before = tree(here)
    for wrong, word in (
        (
            {"evaluate": asking(whole_texts=["none.txt", "mine/empty.txt"])},
            "evaluate.whole_texts: mine/empty.txt has 0",
        ),
        ({"policy": "nowhere"}, "policy: nowhere has no align.json"),
        ({"policy": reward_model}, "stage reward, which only scores"),
        ({"policy": str(runs[0] / "final")}, "was trained on a trunk with fingerprint"),
        ({"evaluate": asking(scores=[{"adapter": reward_model}])}, "evaluate.scores.0.adapter"),
        ({"evaluate": asking(scores=[{"function": "enumerable:reward", "clip": 5.0}])}, "leave `weight`"),
        ({"evaluate": asking(pairs=[{"path": "p.jsonl"}])}, "no score is an `adapter`"),
        ({"evaluate": asking(side="eval")}, "needs held-out rows"),
        ({"evaluate": asking(preferences={"score": "proxy"})}, "'proxy' is none of gold"),
        ({"evaluate": asking(preferences={"score": "gold"}, samples=1)}, "two responses to a prompt"),
        ({"evaluate": asking(preferences={"score": "gold"})}, "4 of 4 prompts are beginnings of texts"),
        ({"evaluate": asking(judges=[judge | {"against": "nowhere"}])}, "nowhere: no such folder"),
        ({"evaluate": asking(judges=[judge]), "data": {"train": [{"path": "others.jsonl"}]}}, "on other prompts"),
        ({"evaluate": asking(judges=[judge | {"openai": endpoint | {"api_key_env": "NO_KEY"}}])}, "NO_KEY is not set"),
        ({"evaluate": asking(lm_eval={"tasks": ["arc_easy"]})}, "pip install lm-eval"),
        ({"run": "mine"}, "holds files but no evaluation"),
        ({"run": str(runs[0])}, "holds no evaluation"),
    ):
        given = {"policy": str(policy), "evaluate": asking()} | wrong
        recipe = evaluation(here / "new", base, data, **given)
        told = align(recipe, "--fresh", stage=evaluate)
        assert told.status == 2, (wrong, told.out)
        assert word in told.err, (wrong, told.err)
        assert "Traceback" not in told.err
        recipe.unlink()
        assert tree(here) == before, wrong


def test_a_task_of_the_harness(words, here):
    """Of two answers to each prompt the likelier is taken, as the reference has it."""
    pytest.importorskip("lm_eval")
    base, data, _ = words
    write_rows(here / "questions.jsonl", [{"question": word, "right": i % 2} for i, word in enumerate(ASKED)])
    (here / "tasks").mkdir()
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(here / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["a", "b"],
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    }
    (here / "tasks" / "words.yaml").write_text(yaml.safe_dump(task))
    section = asking(lm_eval={"tasks": ["words"], "folder": str(here / "tasks")})
    assert align(evaluation(here / "run", base, data, None, evaluate=section), stage=evaluate).status == 0
    about, _ = results(here / "run")
    model = AutoModelForCausalLM.from_pretrained(base).double().eval()
    right = []
    for i, token in enumerate(ASKED.values()):
        with torch.no_grad():
            logits = model(torch.tensor([[token]])).logits[0, -1]
        right.append(float(logits[4] > logits[3]) == i % 2)
    assert about["metrics"]["lm_eval/words/acc"]["value"] == np.mean(right)
