"""What a user can do wrong with grpo and distill: one clear line, status 2, nothing written."""

from __future__ import annotations

import json
import shutil

import pytest
from models.tiny import save_base
from ppo_start import UNEVALUATED, make_start
from samplers import make_teacher, recipe_of
from transformers import AutoTokenizer
from world import align, tree, write_rows

from align import distill, grpo

RULE = {"function": "align.training.rules:one_sentence"}


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    start = make_start(world, cache, tmp_path_factory)
    make_teacher(world, start, cache)
    return start


@pytest.fixture
def refused(world, start, here):
    """Run a stage: its message, seen to be all that is left of it."""

    def run(stage, own=None, **sections):
        recipe = recipe_of(world, start, here / "recipe.yaml", stage, own, **sections)
        before = tree(here)
        told = align(recipe, stage=stage)
        assert told.status == 2, told.out
        assert "Traceback" not in told.out + told.err
        assert tree(here) == before, "a refused run must write nothing"
        return told.err.replace(f"{here}/", "").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("stage", "own", "sections", "message"),
    [
        (grpo, {}, {"lora": None}, "`lora: null`: the stage's roles are adapters on one trunk"),
        (grpo, {}, {"lora": {"dropout": 0.1}}, "`lora.dropout` makes p/p_old random; set it to 0"),
        (grpo, {}, {"model": {"add_tokens": ["<|call|>"]}}, "`model.add_tokens`: the stage's roles share"),
        (grpo, {}, {"data": {"overlong": "truncate"}}, "`data.overlong: truncate`: a prompt without its end"),
        (grpo, {"samples": 1}, {}, "`grpo.samples`: the advantage group compares the responses to one prompt"),
        (grpo, {"advantage": "batch", "resample": 1}, {}, "`grpo.advantage: batch` compares all responses"),
        (grpo, {"advantage": "batch", "equal_groups": "drop"}, {}, "`grpo.advantage: batch` compares all responses"),
        (grpo, {"overlong_tokens": 9}, {}, "`grpo.overlong_tokens`: there are more than `grpo.generation.max_new`"),
        (grpo, {"dual_clip": 1.1}, {}, "`grpo.dual_clip` goes beyond 1 + `grpo.clip_high`"),
        (grpo, {"dual_clip": 3.0, "ratio": "cispo"}, {}, "`grpo.dual_clip` goes beyond"),
        (grpo, {"clip_low": 1.5}, {}, "grpo.clip_low: "),
        (grpo, {"minibatches": 5}, {}, "`grpo.minibatches`: there are more than prompts in a step"),
        (grpo, {"rewards": [RULE | {"weight": 0.0}]}, {}, "`grpo.rewards`: every part has weight 0"),
        (grpo, {"rewards": [RULE, RULE]}, {}, "grpo.rewards: two parts have the same name; give each its `name`"),
        (grpo, {"rewards": [{"adapter": "nowhere"}]}, {}, "grpo.rewards.0.adapter: nowhere has no align.json"),
        (grpo, {"kl": "k3"}, {}, "grpo.kl: "),
        (grpo, {"generation": {"stop": [""]}}, {}, "generation.stop.0: expected text of length 1 or more, found"),
        (distill, {"generation": {"max_new": 4, "min_new": 5}}, {}, "`min_new`: 5 is more than `max_new`, 4"),
        (grpo, {"dual_clip": 1.0}, {}, "grpo.dual_clip: expected a number above 1 or null, found the number 1"),
        (grpo, {"rewards": [RULE | {"name": "a b"}]}, {}, r"name: expected text that matches ^[\w-]+$ or null, found"),
        (grpo, {"gae_lambda": 0.9}, {}, "unknown key 'gae_lambda' in grpo"),
        (grpo, {}, {"model": {"layout": "padded"}}, "model.base: responses are sampled in the tree layout"),
        (distill, {"teacher": {}}, {}, "name the teacher: one `adapter` on the same trunk, or another `base`"),
        (distill, {"teacher": {"adapter": ["a", "b"]}}, {}, "name the teacher: one `adapter`"),
        (distill, {"teacher": {"adapter": "nowhere"}}, {}, "distill.teacher.adapter: nowhere has no align.json"),
        (distill, {"teacher": {"base": "./nowhere"}}, {}, "distill.teacher.base: there is no model './nowhere'"),
        (distill, {"beta": 1.0}, {}, "distill.beta: "),
        (distill, {"on_policy": 1.1}, {}, "distill.on_policy: "),
        (distill, {"divergence": "kl"}, {}, "distill.divergence: "),
        (distill, {}, {"lora": None}, "`lora: null`: the student is an adapter on the trunk"),
        (distill, {}, {"model": {"add_tokens": ["<|call|>"]}}, "`model.add_tokens`: the teacher has no rows for them"),
        (distill, {}, {"data": {"overlong": "truncate"}}, "`data.overlong: truncate`: a prompt without its end"),
        (distill, {}, {"model": {"layout": "padded"}}, "model.base: responses are sampled in the tree layout"),
    ],
    ids=lambda value: value.__name__.removeprefix("align.") if hasattr(value, "__name__") else str(value)[:40],
)  # fmt: skip
def test_settings_that_do_not_fit(refused, stage, own, sections, message):
    said = refused(stage, own, **sections)
    assert message in said
    assert "\n" not in said


def test_a_teacher_that_only_scores(refused, start):
    said = refused(distill, {"teacher": {"adapter": str(start.reward)}})
    assert said == f"distill.teacher.adapter: {start.reward} is a result of stage reward, which only scores texts"


def test_a_teacher_on_another_trunk(refused, start, world):
    said = refused(distill, model={"base": str(world.base)})
    assert said.startswith(f"distill.teacher.adapter: {start.base.parent / 'teacher' / 'final'} was trained on a trunk")
    assert said.endswith("; or name its base as `distill.teacher.base`")
    assert "\n" not in said


def test_a_teacher_of_another_vocabulary(refused, start, tmp_path_factory):
    """The same but for two tokens that have changed places."""
    folder = shutil.copytree(start.base, tmp_path_factory.mktemp("other") / "base")
    written = json.loads((folder / "tokenizer.json").read_text())
    names = [name for name, number in written["model"]["vocab"].items() if number in (40, 41)]
    first, second = (written["model"]["vocab"][name] for name in names)
    written["model"]["vocab"] |= {names[0]: second, names[1]: first}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    assert AutoTokenizer.from_pretrained(folder).get_vocab()[names[0]] == second
    said = refused(distill, {"teacher": {"base": str(folder)}})
    assert said.startswith(f"distill.teacher.base: {folder} has another vocabulary than {start.base}: the token ")
    assert f"number {min(first, second)}, is number {max(first, second)} to it" in said
    assert "\n" not in said


def test_a_teacher_that_takes_no_trees(refused, tmp_path_factory):
    """A recurrent one, of the tests' own vocabulary as the student is."""
    base = save_base(tmp_path_factory.mktemp("base") / "llama")
    other = save_base(tmp_path_factory.mktemp("base") / "mamba", "mamba")
    said = refused(distill, {"teacher": {"base": str(other)}}, model={"base": str(base)})
    assert said == (
        f"distill.teacher.base: {other} takes the padded layout, the student the tree one; set model.layout=padded, "
        "with distill.on_policy=0"
    )


def test_rows_without_answers(refused, here):
    """A share of 0.5 needs the data's own answers; a teacher alone needs none."""
    write_rows(here / "rows.jsonl", [{"prompt": "Hi"}])
    said = refused(distill, {"on_policy": 0.5}, data={"train": [{"path": "rows.jsonl"}]} | UNEVALUATED)
    assert said.startswith("rows.jsonl")
    assert "\n" not in said
