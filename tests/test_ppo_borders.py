"""PPO with a reward function of any kind: a run without held-out rows that warns, and functions that do not return."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from often import REPEATS
from ppo_start import MOST, UNEVALUATED, make_start, recipe_of
from world import align

from align import ppo
from align.data.formats.prompts import Asked
from align.recipe.errors import UserError
from align.training.borders.stops import Signals
from align.training.rollouts.functions import Function
from align.training.rollouts.parts import Answered, RewardPart
from align.training.rollouts.rewards import Rewards


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    return make_start(world, cache, tmp_path_factory)


def restless(prompts, responses, rows):
    """The same for all; it goes elsewhere, and takes what it is given."""
    os.chdir("/")
    rows[0].clear()
    prompts.clear()
    return (1.0 for _ in responses)


def leaving(prompts, responses, rows):
    raise SystemExit(0)


def test_a_run_without_held_out_rows_warns(world, start, here):
    """Of responses that do not end. With the shortest horizon the KL coefficient stays positive; and where returns do
    not vary, how much of them is explained is not known."""
    section = {
        "rewards": [{"function": "test_ppo_borders:restless"}],
        "generation": {"max_new": 1, "min_new": 1},
        "gae_lambda": 1.0,
        "kl_target": 50.0,
        "kl_horizon": 1,
        "epochs": 1,
    }
    train = {"steps": 6, "eval_every": None, "save_every": None}
    recipe = recipe_of(world, start, here / "run.yaml", ppo=section, train=train, data=UNEVALUATED, run="run")
    told = align(recipe, stage=ppo)
    assert (told.status, told.err) == (0, ""), told
    assert os.getcwd() == str(here)
    assert told.out.count("warning, step 5: 0% of responses come to an end") == 1
    records = [json.loads(line, parse_constant=pytest.fail) for line in (here / "run" / "metrics.jsonl").open()]
    assert len(records) == 6
    assert records[0]["explained_variance"] is None
    assert all(0 < after["kl_coef"] < before["kl_coef"] for before, after in pairwise(records))
    assert "0% of responses come to an end" in (here / "run" / "report.html").read_text("utf-8")


def test_a_function_that_ends_the_process_ends_the_run_with_a_word(world, start, here):
    """Status 2 and one line with its name; nothing looks finished."""
    section = {"rewards": [{"function": "test_ppo_borders:leaving"}], "generation": {"max_new": MOST}}
    told = align(recipe_of(world, start, here / "run.yaml", ppo=section, data=UNEVALUATED), stage=ppo)
    assert (told.status, told.err) == (2, "the reward function test_ppo_borders:leaving failed (SystemExit: 0)\n")
    assert not (here / "run" / "final").exists()


# -- functions that do anything --------------------------------------------------------------------------------

STEPS = [  # statements of a function's body
    "os.chdir('/')", "sys.exit()", "os._exit(0)", "raise KeyError", "raise SystemExit('\\x1b[2J')", "1 / 0",
    "raise type('E', (BaseException,), {})", "print('\\x1b[2J')", "sys.stdout = None", "rows.clear()", "del prompts[:]",
    "responses.append('x')", "torch.set_grad_enabled(False)", "torch.set_default_dtype(torch.float16)",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "warnings.warn('w')",
    "os.environ['ANY'] = 'x'", "random.seed(0)", "score(prompts, responses, rows)", "import no_such_module",
    "assert False, 'a\\nb'", "rows[0]['text'] = 3", "gc.collect()", "sys.setrecursionlimit(200)", "exec('x = (')",
    "raise UnicodeError('\\ud800')", "raise StopIteration", "raise GeneratorExit", "os.umask(os.umask(0))",
    "os.rename = shutil.rmtree = None", "builtins.len = builtins.open = None", "sys.modules.clear()", "del os.getcwd",
    "os.execv('/bin/true', ['true'])",
]  # fmt: skip
SCORE = [
    "1.0", "True", "None", "'1'", "b'1'", "float('nan')", "float('inf')", "1e300", "10 ** 400", "[1.0]", "1j",
    "np.float32(1)", "np.array([1.0])", "torch.tensor(2.0)", "torch.zeros(2, 2)", "Fraction(1, 2)", "object()", "rows",
    "type('F', (), {'__float__': lambda self: 1 / 0})()", "type('R', (), {'__repr__': lambda self: 1 / 0})()",
]  # fmt: skip
SHAPES = [
    "[{0}] * len(responses)", "({0},) * len(responses)", "[{0}]", "({0} for _ in responses)", "{0}", "[]", "{{0: {0}}}",
    "itertools.repeat({0})", "np.array([{0}] * len(responses))", "torch.tensor([{0}] * len(responses))",
    "map(lambda _: {0}, responses)", "dict.fromkeys(responses, {0})", "str({0})", "iter([{0}, 1 / 0])",
]  # fmt: skip
IMPORTS = """
import builtins, gc, itertools, os, random, shutil, signal, sys, torch, warnings
import numpy as np
from fractions import Fraction
"""
BODIES = st.builds(
    lambda steps, shape, score: [*steps, f"return {shape.format(score)}"],
    st.lists(st.sampled_from(STEPS), max_size=2),
    st.sampled_from(SHAPES),
    st.sampled_from(SCORE),
)
FUZZ = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def check_any(body: list[str]) -> None:
    """It gives finite scores of the right count, or one line with its name; and all is as it was."""
    lines = "".join(f"    {line}\n" for line in body)
    names: dict = {}
    exec(f"{IMPORTS}def score(prompts, responses, rows):\n{lines}", names)
    rewards = Rewards.__new__(Rewards)
    part = RewardPart(function="mine:score")
    rewards.parts, rewards.failed, rewards.judges, rewards.scorers = {"score": part}, {}, {}, {}
    rewards.functions = {"score": Function(part, names["score"], "ppo.rewards.0")}
    answered = [Answered(Asked({"text": "a"}, None, "a"), "a", response) for response in ("x", "y")]
    before = os.getcwd()
    try:
        scores = rewards.of_texts(answered, 0, 1, Signals())["score"]
    except UserError as error:
        (problem,) = error.problems
        assert problem.startswith("the reward function mine:score ")
        assert problem.isprintable() or "\t" in problem
    else:
        assert scores.shape == (2,)
        assert scores.isfinite().all()
    assert os.getcwd() == before
    assert answered == [Answered(Asked({"text": "a"}, None, "a"), "a", response) for response in ("x", "y")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@settings(max_examples=300, **FUZZ)
@given(body=BODIES)
def test_any_function(body):
    check_any(body)


@pytest.mark.slow
@pytest.mark.timeout(1800 * REPEATS)
@settings(max_examples=3000 * REPEATS, **FUZZ)
@given(body=BODIES)
def test_any_function_at_length(body):
    check_any(body)
