"""What a user can do wrong with ppo: one clear line, status 2, nothing written."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from models.tiny import save_base
from ppo_start import make_start, recipe_of
from world import align, tree, write_rows

from align import ppo

RULE = {"function": "align.training.rules:one_sentence"}


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    return make_start(world, cache, tmp_path_factory)


@pytest.fixture
def refused(world, start, here):
    """Run ppo: its message, seen to be all that is left of it."""

    def run(*argv, **sections):
        recipe = recipe_of(world, start, here / "recipe.yaml", **sections)
        before = tree(here)
        told = align(recipe, *argv, stage=ppo)
        assert told.status == 2, told.out
        assert "Traceback" not in told.out + told.err
        assert tree(here) == before, "a refused run must write nothing"
        return told.err.replace(f"{here}/", "").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": None}, "`lora: null`: the stage's roles are adapters on one trunk"),
        ({"lora": {"dropout": 0.1}}, "`lora.dropout` makes p/p_old random; set it to 0"),
        ({"data": {"overlong": "truncate"}}, "`data.overlong: truncate`: a prompt without its end asks something else"),
        ({"ppo": {"rewards": []}}, "ppo.rewards: "),
        ({"ppo": {"rewards": [RULE | {"weight": 0.0}]}}, "every part has weight 0; a judge alone rewards nothing"),
        ({"ppo": {"rewards": [RULE | {"adapter": "a"}]}}, "is one of `adapter`, `model` and `function`"),
        ({"ppo": {"rewards": [{"weight": 1.0}]}}, "is one of `adapter`, `model` and `function`"),
        ({"ppo": {"rewards": [{"funktion": "a:b"}]}}, "unknown key 'funktion'"),
        ({"ppo": {"minibatches": 5}}, "`ppo.minibatches`: there are more than prompts in a step (batch.examples)"),
        ({"ppo": {"generation": {"temperature": 0.0}}}, "ppo.generation.temperature: "),
        ({"ppo": {"generation": {"max_new": 0}}}, "ppo.generation.max_new: "),
        ({"model": {"add_tokens": ["<|call|>"]}}, "`model.add_tokens`: the stage's roles share the embedding"),
        ({"lora": {"init": "pissa"}}, "lora.init: pissa does not start at the base as it is"),
        ({"ppo": {"dual_clip": 1.0}}, "ppo.dual_clip: "),
        ({"ppo": {"kl_coef": -0.1}}, "ppo.kl_coef: "),
        ({"ppo": {"kl_estimator": "k4"}}, "ppo.kl_estimator: "),
        ({"ppo": {"ptx": {"sources": []}}}, "ppo.ptx.sources: "),
        ({"ppo": {"vf_coef": 0.1}}, "unknown key 'vf_coef' in ppo"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(refused, sections, message):
    said = refused(**sections)
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"adapter": "nowhere"},
            "ppo.rewards.0.adapter: nowhere has no align.json; give the `final/` folder of a finished reward run",
        ),
        ({"model": "./nowhere"}, "ppo.rewards.0.model: there is no model './nowhere'"),
        ({"function": "nowhere:at_all"}, "ppo.rewards.0.function: nowhere cannot be imported (ModuleNotFoundError"),
        ({"function": "ppo_start:no_such"}, "ppo.rewards.0.function: ppo_start has no function 'no_such'"),
    ],
)
def test_a_reward_that_cannot_be_had(refused, part, message):
    assert refused(ppo={"rewards": [part]}).startswith(message)


def test_two_parts_of_one_name(refused):
    said = refused(ppo={"rewards": [RULE, RULE]})
    assert said == "ppo.rewards: two parts have the same name; give each its `name`"


def altered(start, folder, **about):
    """The reward's result with another word in its align.json."""
    final = shutil.copytree(start.reward, folder)
    told = json.loads((final / "align.json").read_text()) | about
    (final / "align.json").write_text(json.dumps(told))
    return str(final)


def test_a_result_of_another_stage(refused, start, tmp_path_factory):
    final = altered(start, tmp_path_factory.mktemp("other") / "final", stage="dpo")
    said = refused(ppo={"rewards": [{"adapter": final}]})
    assert said == f"ppo.rewards.0.adapter: {final} is a result of stage dpo, and no reward model"


def test_a_reward_on_another_trunk(refused, start, world):
    """It is the world's base here, and the reward's own is another one: both fingerprints are told."""
    own = json.loads((start.reward / "align.json").read_text())["fingerprint"]
    said = refused(model={"base": str(world.base)})
    assert said.startswith(f"ppo.rewards.0.adapter: {start.reward} was trained on a trunk with fingerprint {own} (")
    other = re.search(r"the trunk of this run has ([0-9a-f]{16}) \(", said)[1]
    assert other != own
    assert "\n" not in said


def test_a_base_that_takes_no_trees(refused, tmp_path_factory):
    """A recurrent one; and any, where the recipe asks for the other layout."""
    base = save_base(tmp_path_factory.mktemp("base") / "mamba", "mamba")
    why = "model.base: responses are sampled in the tree layout, which is not to be had: "
    said = refused(model={"base": str(base)}, lora={"targets": ["in_proj"]}, ppo={"rewards": [RULE]})
    assert said.startswith(why + "its ")
    assert "\n" not in said
    said = refused(model={"layout": "padded"}, ppo={"rewards": [RULE]})
    assert said == why + "model.layout is padded"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "rows.jsonl:2: prompt: expected one of the columns prompt, "),
        ({"sentence": "Hi", "label": 1}, "rows.jsonl:2: prompt: expected one of the columns prompt, "),
        ({"prompt": "Say " * 900}, "1 row longer than data.max_length = 1,024 tokens"),
    ],
)
def test_a_row_that_is_no_prompt(refused, here, row, message):
    write_rows(here / "rows.jsonl", [{"prompt": "Hi"}, row])
    said = refused(data={"train": [{"path": "rows.jsonl"}], "eval": {"sources": []}})
    assert said.startswith(message)


def test_a_missing_ptx_source(refused):
    said = refused(ppo={"ptx": {"sources": [{"path": "none.jsonl"}]}})
    assert said == "none.jsonl: no such file or folder"


CALLS: list[int] = []


def failing(prompts, responses, rows):
    """Once, in the third step."""
    CALLS.append(len(rows))
    if len(CALLS) == 3:
        raise ValueError("no network")
    return [0.0] * len(rows)


def test_a_function_that_fails_in_the_middle(world, start, here):
    """It is said whose fault it was, and what was learnt before is not lost."""
    CALLS.clear()
    few = {"ppo": {"rewards": [{"function": "test_ppo_input:failing"}], "epochs": 1}, "batch": {"examples": 1}}
    train = {"steps": 3, "eval_every": None, "save_every": 1}
    recipe = recipe_of(world, start, here / "run.yaml", data={"eval": {"sources": []}}, train=train, **few)
    told = align(recipe, stage=ppo)
    assert (told.status, told.err) == (
        2, "the reward function test_ppo_input:failing failed (ValueError: no network); the state after step 2 is "
        "saved: run the same command again to resume\n",
    )  # fmt: skip
    told = align(recipe, stage=ppo)
    assert told.status == 0, told.err
    assert "going on from" in told.out


def test_show_prints_prompts_and_trains_nothing(world, start, here):
    told = align(recipe_of(world, start, here / "recipe.yaml"), "--show", stage=ppo)
    assert told.status == 0, told.err
    assert told.out.count("<|im_start|>user\nName the capital of") + told.out.count("<|im_start|>user\nTell me") > 0
    assert "⟦" not in told.out
    assert set(tree(here)) == {"recipe.yaml"}
