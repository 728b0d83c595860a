"""Answers measured while training, the best evaluation, patience, and figures of each source: through the commands."""

from __future__ import annotations

import json
import shutil
import signal
from statistics import fmean, stdev

import pytest
import torch
from peft import PeftModel
from plain import Scorer
from ppo_start import make_start
from safetensors.torch import load_file
from samplers import make_teacher, recipe_of
from test_processes import free_port
from test_resume import records
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import Child, align, flat, in_two, lines, metrics, tree, weights, write_rows

from align import distill, dpo, grpo, merge, ppo, reward
from align.training.meters import interval

MOST = 6
GENERATE = {
    "measures": ["exact_match", "contains"],
    "scores": [{"function": "test_generated:letters"}],
    "max_rows": 5,
    "every": 2,
    "generation": {"max_new": MOST},
}
TRAIN = {"steps": 12, "eval_every": 2, "save_every": 2, "keep": 20}


def letters(prompts, responses, rows):
    """Of the response, and of the row that it answers."""
    return [len(response) + len(row["messages"]) / 10 for response, row in zip(responses, rows, strict=True)]


def first_alone(prompts, responses, rows):
    return [3.0] + [None] * (len(responses) - 1)


@pytest.fixture(scope="module")
def whole(world, cache, tmp_path_factory):
    """A run of 12 steps that overshoots, so that the best evaluation is not the last; and its recipe."""
    folder = tmp_path_factory.mktemp("whole")
    train = TRAIN | {"generate": GENERATE, "best": {"metric": "loss/few", "goal": "least"}}
    sections = {"train": train, "data": {"eval": {"sources": in_two(folder, lines(world.held), 3)}}}
    recipe = world.recipe(folder / "run.yaml", run=str(folder / "run"), **sections, **OVERSHOOTING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(recipe)
    assert (told.status, told.err) == (0, ""), told.err
    return folder / "run", recipe, told


OVERSHOOTING = {"optim": {"learning_rate": 0.1, "warmup": 0, "schedule": "constant"}}


@torch.no_grad()
def greedy(model, prompt, end):
    """The answer of plain transformers to the tokens of a prompt, its end token included."""
    out = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=MOST, do_sample=False, eos_token_id=end, pad_token_id=end,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_answers_are_the_greedy_ones_of_plain_transformers(whole, world):
    """Before the first step by the base, after the last by the result; and figures are means over the prompts."""
    run, _, told = whole
    assert "5 of 7 held-out prompts are answered" in told.out
    rows = lines(run / "answers.jsonl")
    assert [row["step"] for row in rows] == [step for step in (0, 4, 8, 12) for _ in range(5)]
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    base = AutoModelForCausalLM.from_pretrained(world.base)
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), run / "final")
    by_question = {row["messages"][0]["content"]: row["messages"] for row in lines(world.held)}
    for step, model in ((0, base), (12, after.eval())):
        own = [row for row in rows if row["step"] == step]
        expected = {"exact_match": [], "contains": [], "letters": [], "response_tokens": [], "ended": []}
        for row in own:
            (talk,) = [talk for question, talk in by_question.items() if question in row["prompt"]]
            ids = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
            end = tokenizer.eos_token_id
            out = greedy(model, ids, end)
            text = tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert (row["response"], row["reference"]) == (text, talk[1]["content"])
            assert (row["tokens"], row["ended"]) == (len(out), out[-1] == end)
            expected["exact_match"].append(float(text.split() == talk[1]["content"].split()))
            expected["contains"].append(float(talk[1]["content"].lower() in text.lower()))
            expected["letters"].append(len(text) + len(talk) / 10)
            expected["response_tokens"].append(len(out))
            expected["ended"].append(float(out[-1] == end))
        (record,) = (record for record in metrics(run, "eval") if record["step"] == step)
        for name, values in expected.items():
            assert record[f"generate/{name}"] == pytest.approx(sum(values) / 5, rel=1e-6), name
        low, high = interval(sum(expected["exact_match"]), 5)
        assert (record["generate/exact_match_low"], record["generate/exact_match_high"]) == (low, high)


def test_every_second_evaluation_answers_and_every_source_has_its_figures(whole):
    run, _, _ = whole
    held = metrics(run, "eval")
    assert [record["step"] for record in held] == [0, 2, 4, 6, 8, 10, 12]
    assert [record["step"] for record in held if "generate/exact_match" in record] == [0, 4, 8, 12]
    shares = [(record["loss"] - record["loss/more"]) / (record["loss/few"] - record["loss/more"]) for record in held]
    assert max(shares) - min(shares) < 1e-3, "the loss of all is that of each, by its share of the tokens"
    assert 0.3 < shares[0] < 0.6
    assert all(record["perplexity/few"] == pytest.approx(2.718281828459045 ** record["loss/few"]) for record in held)


def test_the_best_evaluation_is_kept(whole):
    run, _, _ = whole
    held = [record for record in metrics(run, "eval") if record["step"]]
    best = min(held, key=lambda record: record["loss/few"])
    assert 0 < best["step"] < 12, "it is not the last one"
    about, last = (json.loads((run / name / "align.json").read_text()) for name in ("best", "final"))
    assert (about["step"], about["loss/few"]) == (best["step"], best["loss/few"])
    assert last["best"] == {"step": best["step"], "loss/few": best["loss/few"]}
    assert "ended_by" not in last
    kept = load_file(run / "best" / "adapter_model.safetensors")
    there = load_file(run / "checkpoints" / f"step-{best['step']:06d}" / "model.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(tensor, there[f"causal.{name}".replace(".weight", ".default.weight")])
    assert {path.name for path in (run / "best").iterdir()} == {path.name for path in (run / "final").iterdir()}


def test_a_merged_result_tells_its_own_recipe_and_figures(whole, world, here):
    """Of `best/` those of its step, although the run went on; and what was checked."""
    run, _, _ = whole
    for name in ("final", "best"):
        told = align(run / name, here / name, stage=merge)
        assert (told.status, told.err) == (0, "")
        page = (here / name / "README.md").read_text("utf-8").replace("\\", "")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
        step = json.loads((run / name / "align.json").read_text())["step"]
        (record,) = (record for record in metrics(run, "eval") if record["step"] == step)
        figures = {
            "loss",
            "loss/few",
            "loss/more",
            "perplexity",
            *(key for key in record if key.startswith("generate/")),
        }
        found = {key: value for key, value in (row for row in rows if len(row) == 2) if key in record}
        assert f"Held-out rows, at step {step}:" in page
        assert found.keys() >= figures, name
        assert {key: float(value) for key, value in found.items()} == pytest.approx(
            {key: record[key] for key in found}, rel=1e-5
        )
        assert found.keys().isdisjoint({"eval_seconds", "step"})
        assert ["lora.r", "4"] in rows
        assert ["optim.learning_rate", "0.1"] in rows
        assert f"Data: {world.talks.name}" in page
        checked = json.loads((here / name / "merge.json").read_text())
        for key, part in ((str(run / name), checked["steps"][0]), ("files, float32", checked["on_disk"])):
            (row,) = (row for row in rows if row[0] == key and len(row) == 5)
            assert row[1:3] == [f"{part['largest']:.2g}", f"{part['scale']:.3g}"]
        assert "A language model after supervised fine-tuning" in page


def test_the_report_shows_answers_and_says_that_the_run_is_finished(whole):
    page = (whole[0] / "report.html").read_text("utf-8")
    assert "The run is finished: 12 steps." in page
    assert "The row&#39;s answer" in page or "The row's answer" in page
    assert "Answers: exact match" in page
    assert "After step 12" in page


@pytest.mark.slow  # sampling stages are, with answers and a best one, in the default run
def test_killed_and_gone_on_with_it_ends_equal(whole, here):
    reference, recipe, _ = whole
    run = here / "run"
    child = Child(here, recipe, f"run={run}")
    assert child.send_when(signal.SIGTERM, lambda: records(run) >= 5)
    assert child.wait().status == 0
    child = Child(here, recipe, f"run={run}")
    assert child.send_when(signal.SIGKILL, lambda: records(run) >= 12)
    child.wait()
    assert not (run / "final").exists()
    assert align(recipe, f"run={run}").status == 0
    assert metrics(run) == metrics(reference)
    assert lines(run / "answers.jsonl") == lines(reference / "answers.jsonl")
    for name in ("best", "final"):
        assert (run / name / "align.json").read_text() == (reference / name / "align.json").read_text()
        one, two = (load_file(of / name / "adapter_model.safetensors") for of in (run, reference))
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


PATIENT = {"steps": 12, "eval_every": 1, "save_every": 1, "patience": 2, "best": {"metric": "loss", "goal": "greatest"}}


def test_patience_ends_a_run_which_can_be_extended(world, here):
    """The loss falls from the first step on, and the greatest is asked for: the run ends two evaluations later."""
    recipe = world.recipe(
        here / "run.yaml", train=PATIENT, run=str(here / "run"), log={"samples": ["Say"], "sample_tokens": 2}
    )
    run = here / "run"
    told = align(recipe)
    assert told.status == 0, told.err
    assert "no gain in loss in 2 evaluations (since step 1, the best): it ended after step 3 of 12" in told.out
    assert [record["step"] for record in metrics(run, "train")] == [1, 2, 3]
    about = json.loads((run / "final" / "align.json").read_text())
    assert (about["step"], about["ended_by"]) == (3, {"patience": 2, "of_steps": 12})
    assert about["best"]["step"] == 1
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["planned_steps"]) == (3, 12)
    assert "it ended after step 3 of 12" in (run / "report.html").read_text("utf-8")
    told = align(recipe)
    assert "is already there: nothing to do" in told.out

    before, held, said = tree(run), metrics(run), lines(run / "samples.jsonl")
    shutil.rmtree(run / "final")
    assert align(recipe).status == 0, "killed before its result stood"
    assert (metrics(run), lines(run / "samples.jsonl")) == (held, said)
    assert {name: tree(run)[name] for name in before if "final/" in name} == {
        name: content for name, content in before.items() if "final/" in name
    }

    told = align(recipe, "train.patience=4")
    assert told.status == 2
    assert "--extend goes on with it to the new end" in told.err
    told = align(recipe, "train.patience=4", "--extend")
    assert told.status == 0, told.err
    assert "it ended after step 5 of 12" in told.out
    assert [record["step"] for record in metrics(run, "eval")] == list(range(6))
    assert "nothing to do" in align(recipe, "train.patience=4").out


@pytest.mark.slow
def test_an_extended_patience_equals_one_that_was_longer_from_the_start(world, here):
    recipe = world.recipe(here / "run.yaml", train=PATIENT, run=str(here / "run"))
    for words in ((), ("train.patience=4", "--extend"), ("train.patience=4", f"run={here / 'whole'}")):
        told = align(recipe, *words)
        assert told.status == 0, told.err
    assert metrics(here / "run") == metrics(here / "whole")
    assert all(torch.equal(tensor, weights(here / "run")[name]) for name, tensor in weights(here / "whole").items())


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"best": {"metric": "los", "goal": "least"}}, "no figure of an evaluation is 'los'; did you mean 'loss'?"),
        ({"best": {"metric": "accuracy", "goal": "greatest"}}, "'accuracy'; there are loss, perplexity"),
        ({"patience": 3}, "`patience` needs `best`: {metric: loss, goal: least}"),
        (
            {"patience": 3, "best": {"metric": "loss", "goal": "least"}},
            "`patience` counts evaluations: give `eval_ever",
        ),
        (
            {"generate": GENERATE, "best": {"metric": "generate/exact_mach", "goal": "greatest"}},
            "is not measured by `generate`; did you mean 'generate/exact_match'?",
        ),
        ({"best": {"metric": "generate/ended", "goal": "greatest"}}, "is a figure of answers: give `generate`"),
        ({"generate": {"samples": 2}}, "at temperature 0 all answers to a prompt are alike"),
        ({"generate": {"scores": [{"function": "test_generated:letters", "weight": 2.0}]}}, "`scores` are raw"),
        ({"generate": {"measures": ["ended"]}}, "train.generate.measures.0: expected 'exact_match'"),
        ({"generate": {"measures": ["contains", "contains"]}}, "two figures are called contains"),
        (
            {"generate": {"scores": [{"function": "test_generated:nothing"}]}},
            "test_generated has no function 'nothing'",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_what_cannot_be_is_said_before_the_first_step(world, here, train, told):
    recipe = world.recipe(here / "run.yaml", run=str(here / "run"), train={"steps": 1, "eval_every": None} | train)
    found = align(recipe)
    assert found.status == 2, found.out
    assert told in found.err
    assert "Traceback" not in found.err
    assert not (here / "run" / "final").exists()
    assert not (here / "run" / "checkpoints").exists()


def test_without_held_out_rows_there_is_nothing_to_answer_or_to_choose_by(world, here):
    data = {"eval": {"sources": []}}
    for train in ({"generate": GENERATE}, {"best": {"metric": "loss", "goal": "least"}}):
        told = align(world.recipe(here / "run.yaml", data=data, train=train))
        assert told.status == 2
        assert "held-out rows" in told.err or "no row of data.eval" in told.err


def test_prompts_of_their_own_need_no_eval_rows_and_another_file_is_another_run(world, here):
    own = write_rows(here / "own.jsonl", [{"question": f"Is it {i}?", "answer": i} for i in range(3)])
    generate = {
        "sources": [{"path": str(own)}],
        "measures": ["contains"],
        "generation": {"max_new": 3, "temperature": 1.0},
    }
    train = {"steps": 2, "eval_every": 1, "save_every": 1, "generate": generate | {"samples": 2}}
    train["best"] = {"metric": "generate/response_tokens", "goal": "greatest"}
    recipe = world.recipe(here / "run.yaml", run=str(here / "run"), data={"eval": {"sources": []}}, train=train)
    told = align(recipe)
    assert told.status == 0, told.err
    rows = lines(here / "run" / "answers.jsonl")
    assert [(row["step"], row["sample"]) for row in rows] == [
        (step, i) for step in range(3) for _ in range(3) for i in (0, 1)
    ]
    assert all("loss" not in record for record in metrics(here / "run", "eval"))
    assert json.loads((here / "run" / "best" / "align.json").read_text())["step"] in (1, 2)
    write_rows(own, [{"question": f"Is it {i}?", "answer": i + 1} for i in range(3)])
    told = align(recipe)
    assert told.status == 2
    assert "the prompts of train.generate, or the answers that their rows have, have changed" in told.err


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    start = make_start(world, cache, tmp_path_factory)
    make_teacher(world, start, cache)
    return start


SCORED = {"max_rows": 3, "generation": {"max_new": MOST}}


@pytest.mark.parametrize(
    ("stage", "own"),
    [
        pytest.param(dpo, {"loss": "kto"}, marks=pytest.mark.slow),
        (ppo, {"rewards": [{"function": "ppo_start:wordy"}]}),
        *(pytest.param(stage, {}, marks=pytest.mark.slow) for stage in (dpo, grpo, distill)),
    ],
    ids=["kto", "ppo", "dpo", "grpo", "distill"],
)
def test_other_stages_answer_too_and_a_reward_on_the_trunk_scores(world, start, here, stage, own):
    """What trains answers: before the step as the base does, after it as the result. The adapter's score of each answer
    is what plain transformers compute, and training does not change it."""
    generate = SCORED | {"scores": [{"adapter": str(start.reward), "name": "gold"}]}
    train = {"steps": 1, "eval_every": None, "save_every": None, "generate": generate}
    sections = {"train": train, "optim": {"learning_rate": 0.1, "warmup": 0}}
    if stage is dpo:
        sections |= {"run": str(here / "run"), "model": {"base": str(start.base)}, "dpo": own}
        recipe = world.preferences(here / "run.yaml", dpo, **sections)
    else:
        recipe = recipe_of(world, start, here / "run.yaml", stage, own, **sections)
    told = align(recipe, stage=stage)
    assert told.status == 0, told.err
    rows = lines(here / "run" / "answers.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["response"] for row in rows[:3]] != [row["response"] for row in rows[3:]]
    scorer, tokenizer = Scorer.load(start.reward, start.base), AutoTokenizer.from_pretrained(start.base)
    base, after = (AutoModelForCausalLM.from_pretrained(start.base) for _ in range(2))
    models = {0: base, 1: PeftModel.from_pretrained(after, here / "run" / "final").eval()}
    for row in rows:
        (pair,) = [pair for pair in lines(world.held_pairs) if f"\n{pair['prompt']}" in row["prompt"]]
        asked = [{"role": "user", "content": pair["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        said = greedy(models[row["step"]], prompt, tokenizer.eos_token_id)
        text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert (row["response"], row["reference"], row["tokens"]) == (text, pair["chosen"], len(said))
        with torch.no_grad():
            worth = scorer.model(torch.tensor([[*prompt, *said]])).logits.item()
        assert row["scores"]["gold"] == pytest.approx(worth, rel=1e-4, abs=1e-4)
    held = metrics(here / "run", "eval")
    for record in held:
        own = [row["scores"]["gold"] for row in rows if row["step"] == record["step"]]
        assert record["generate/gold"] == pytest.approx(sum(own) / 3, rel=1e-6)


def test_answers_without_a_score_are_left_out_counted_and_told_of(world, here):
    score = {"function": "test_generated:first_alone", "on_failure": "leave_out"}
    train = {"steps": 1, "eval_every": None, "save_every": None, "generate": GENERATE | {"scores": [score]}}
    told = align(world.recipe(here / "run.yaml", run=str(here / "run"), train=train))
    assert (told.status, told.err) == (0, "")
    assert told.out.count("the reward function of first_alone gave no score for the response") == 1
    for record in metrics(here / "run", "eval"):
        assert (record["generate/failures/first_alone"], record["generate/first_alone"]) == (4, 3.0)
    rows = lines(here / "run" / "answers.jsonl")
    assert [row["scores"]["first_alone"] for row in rows] == [3.0, None, None, None, None] * 2


def test_an_adapter_cannot_score_where_the_trunk_itself_trains(world, start, here):
    train = {"steps": 1, "generate": SCORED | {"scores": [{"adapter": str(start.reward)}]}}
    told = align(world.recipe(here / "run.yaml", model={"base": str(start.base)}, lora=None, train=train))
    assert told.status == 2
    assert "reward is an adapter on a frozen trunk, which `lora: null` trains; give a `model` instead" in told.err


def test_a_reward_keeps_its_best_with_the_mean_and_spread_of_those_weights(world, here):
    """The loss falls, and the greatest is asked for: that after the first step. The run ends an evaluation later."""
    recipe = world.preferences(here / "run.yaml", reward, run=str(here / "run"), train=PATIENT | {"patience": 1})
    told = align(recipe, stage=reward)
    assert told.status == 0, told.err
    best, last = (json.loads((here / "run" / name / "align.json").read_text()) for name in ("best", "final"))
    assert (best["step"], last["step"]) == (1, 2)
    assert last["ended_by"] == {"patience": 1, "of_steps": 12}
    for about, name in ((best, "best"), (last, "final")):
        scorer = Scorer.load(here / "run" / name, world.base)
        scores = [scorer.score(pair["prompt"], pair["chosen"]) for pair in lines(world.pairs)]
        assert about["score_mean"] == pytest.approx(fmean(scores), rel=1e-4)
        assert about["score_std"] == pytest.approx(stdev(scores), rel=1e-4)
    assert best["score_mean"] != pytest.approx(last["score_mean"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_answer_as_one(whole, here):
    """At a lower rate: at the other's, rounding grows from step to step."""
    _, recipe, _ = whole
    words = ("optim.learning_rate=0.005", "train.steps=4")
    assert align(recipe, f"run={here / 'one'}", *words).status == 0
    for child in Child.pair(here, free_port(), recipe, f"run={here / 'two'}", *words):
        told = child.wait()
        assert (told.status, told.err) == (0, "")
    for found, record in zip(metrics(here / "two"), metrics(here / "one"), strict=True):
        assert flat(found) == pytest.approx(flat(record), rel=1e-3, abs=1e-4)
    assert lines(here / "two" / "answers.jsonl") == lines(here / "one" / "answers.jsonl")
    about = [json.loads((here / name / "best" / "align.json").read_text())["step"] for name in ("one", "two")]
    assert about[0] == about[1]
