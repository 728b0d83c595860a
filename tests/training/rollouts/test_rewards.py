"""The score of a response: its parts, weighed, normalised and clipped; and what a user's function may do wrong."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch
from models.tiny import tiny_trunk
from pydantic import ValidationError

from align.data.formats.prompts import Asked
from align.models.roles import CRITIC, Roles, Scorer
from align.recipe.errors import UserError
from align.recipe.schema import Lora
from align.training import rules
from align.training.borders.foreign import SHARED
from align.training.borders.stops import Signals, Stopped
from align.training.rollouts.parts import Answered, RewardPart
from align.training.rollouts.rewards import Rewards
from align.training.rules import VALENCES, exact_answer, one_sentence, sentiment


@pytest.fixture(scope="module")
def trunk():
    return tiny_trunk("llama", Lora(r=4))


def answered(*responses: str) -> list[Answered]:
    return [
        Answered(Asked({"answer": i}, [{"role": "user", "content": "q"}], None), f"prompt {i}", response)
        for i, response in enumerate(responses)
    ]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own in the working folder."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def write(text: str) -> None:
        (tmp_path / "mine.py").write_text(text)

    return write


def parts(*given: dict) -> list[RewardPart]:
    return [RewardPart(**part) for part in given]


LOW = {"A": (2, 32), "B": (32, 2)}  # shapes of a LoRA's weights on one layer
LENGTH = "def length(prompts, responses, rows):\n    return [len(r) for r in responses]\n"


def test_scores_are_weighed_normalised_and_clipped(trunk, mine):
    """By hand: lengths 1, 5 and 9; (s - 4) / 2 is -1.5, 0.5, 2.5, clipped to 2."""
    mine(LENGTH + "def first(prompts, responses, rows):\n    return [row['answer'] for row in rows]\n")
    rewards = Rewards(
        parts(
            {"function": "mine:length", "weight": 3.0, "mean": 4.0, "std": 2.0, "clip": 2.0},
            {"function": "mine:length", "weight": -0.5, "name": "again"},
            {"function": "mine:first", "weight": 0.0},
        ),
        trunk,
    )
    found = rewards.of_texts(answered("a" * 1, "a" * 5, "a" * 9), 0, 1, Signals())
    assert {name: scores.tolist() for name, scores in found.items()} == {
        "length": [1, 5, 9],
        "again": [1, 5, 9],
        "first": [0, 1, 2],
    }
    assert rewards.total(found).tolist() == [3 * -1.5 - 0.5, 3 * 0.5 - 2.5, 3 * 2.0 - 4.5]
    low = found | {"length": torch.tensor([-100.0, 5, 9])}
    assert rewards.total(low)[0] == 3 * -2.0 - 0.5, "clipped on both sides"


def scorer(mean: float, std: float) -> Scorer:
    layers = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_" for i in range(2)]
    weights = {f"{name}{part}.weight": torch.zeros(size) for name in layers for part, size in LOW.items()}
    return Scorer(None, mean, std, Lora(r=2, targets=["q_proj"]), weights, torch.ones(1, 32))


@pytest.mark.parametrize(
    ("part", "zero", "unit"), [({}, 0.5, 4.0), ({"mean": 1.0}, 1.0, 4.0), ({"mean": 0.0, "std": 2.0}, 0.0, 2.0)]
)
def test_an_adapter_is_normalised_by_its_demonstrations(trunk, monkeypatch, part, zero, unit):
    """Unless the recipe says otherwise; and so is the critic that starts from it."""
    monkeypatch.setattr("align.training.rollouts.rewards.read_scorer", lambda name, key, trunk: scorer(0.5, 4.0))
    rewards = Rewards(parts({"adapter": "a", **part}), trunk)
    assert rewards.total({"reward": torch.tensor([6.5])}).tolist() == [(6.5 - zero) / unit]
    head = Roles(tiny_trunk("llama", Lora(r=4)), Lora(r=4), rewards.scorers, rewards.leading).heads[CRITIC]
    assert torch.allclose(head.weight, torch.full((1, 32), 1 / unit))
    assert head.bias.item() == pytest.approx(-zero / unit)


def test_a_spread_of_0_divides_nothing(trunk, monkeypatch):
    monkeypatch.setattr("align.training.rollouts.rewards.read_scorer", lambda name, key, trunk: scorer(0.5, 0.0))
    rewards = Rewards(parts({"adapter": "a"}), trunk)
    assert rewards.total({"reward": torch.tensor([6.5])}).tolist() == [6.0]


def test_the_critic_starts_from_a_part_that_counts(trunk, monkeypatch):
    """Not from a judge, which is only watched: with nothing else on the trunk it starts at 0."""
    monkeypatch.setattr(
        "align.training.rollouts.rewards.read_scorer", lambda name, key, trunk: scorer(0.0, {"a": 2.0, "b": 4.0}[name])
    )
    judge, counts = {"adapter": "a", "weight": 0.0, "name": "judge"}, {"adapter": "b"}
    rule = {"function": "align.training.rules:one_sentence"}
    for given, expected in (((judge, counts), 0.25), ((judge, rule), 0.0), ((judge, counts, rule), 0.25)):
        rewards = Rewards(parts(*given), trunk)
        roles = Roles(tiny_trunk("llama", Lora(r=4)), Lora(r=4), rewards.scorers, rewards.leading)
        assert "judge" in roles.heads
        assert torch.equal(roles.heads[CRITIC].weight, torch.full((1, 32), expected))


def test_every_process_scores_its_share(trunk, mine):
    """And is given its own rows, prompts and responses."""
    mine(
        "seen = []\n"
        "def told(prompts, responses, rows):\n"
        "    seen.append((prompts, responses, [row['answer'] for row in rows]))\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    rewards = Rewards(parts({"function": "mine:told"}), trunk)
    rewards.of_texts(answered("a", "bb", "ccc"), 0, 1, Signals())
    assert sys.modules["mine"].seen == [(["prompt 0", "prompt 1", "prompt 2"], ["a", "bb", "ccc"], [0, 1, 2])]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('answer')", "failed (KeyError: 'answer')"),
        ("return [1.0]", "gave 1 scores for 2 responses"),
        ("return [1.0, 2.0, 3.0]", "gave more than 2 scores for 2 responses"),
        ("return itertools.repeat(1.0)", "gave more than 2 scores for 2 responses"),
        ("return (float(len(r)) for r in responses[1:])", "gave 1 scores for 2 responses"),
        ("return [1e300, 1.0]", "gave 1e+300, which is more than float32 holds, for the response 'yes'"),
        ("return [10 ** 400, 1.0]", "failed (OverflowError: "),
        ("return {'0': 1.0, '1': 2.0}", "failed (TypeError: it returned the object {'0': 1.0, '1': 2.0}, not a list"),
        (
            "async def late(): return [1.0]\n    return late()",
            "failed (TypeError: it returned a coroutine, which nobody",
        ),
        ("return {1.0, 2.0}", "failed (TypeError: it returned the set {1.0, 2.0}, not a list"),
        ("return '12'", "failed (TypeError: it returned the text '12', not a list of numbers"),
        ("return ['1', '2']", "failed (TypeError: it returned the text '1' among its scores"),
        ("return [b'1', 2]", "failed (TypeError: it returned the bytes b'1' among its scores"),
        ("return [1j, 2]", "failed (TypeError: it returned the complex 1j among its scores"),
        ("return np.array([1j, 2])", "failed (TypeError: it returned the complex128 "),
        ("return 1.0", "failed (TypeError: it returned the number 1.0, not a list"),
        ("sys.exit(0)", "failed (SystemExit: 0)"),
        ("os._exit(0)", "failed (Left: os._exit(0))"),
        ("raise GeneratorExit", "failed (GeneratorExit)"),
        ("raise type('Mine', (BaseException,), {})('two\\nlines')", "failed (Mine: two)"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "failed (Mute)"),
        ("return (sys.exit(3) for _ in rows)", "failed (SystemExit: 3)"),
        ("return score(prompts, responses, rows)", "failed (RecursionError: "),
        ("raise ValueError('\\x1b]0;title\\x07')", "failed (ValueError: \\x1b]0;title\\x07)"),
        ("return [1.0, float('nan')]", "gave nan for the response 'no'"),
        ("return [float('-inf'), 1.0]", "gave -inf for the response 'yes'"),
        ("return [1.0, 'good']", "failed (TypeError: it returned the text 'good' among its scores"),
        ("return None", "failed (TypeError: it returned nothing, not a list of numbers"),
        ("return [1.0, None]", "gave no score for the response 'no'; on_failure: leave_out goes on without"),
        ("return [[1.0], [2.0]]", "failed (TypeError: "),
    ],
)
def test_a_function_that_goes_wrong(trunk, mine, body, said):
    mine(f"import itertools, os, sys\nimport numpy as np\ndef score(prompts, responses, rows):\n    {body}\n")
    rewards = Rewards(parts({"function": "mine:score"}), trunk)
    with pytest.raises(UserError) as error:
        rewards.of_texts(answered("yes", "no"), 0, 1, Signals())
    (problem,) = error.value.problems
    assert problem.startswith(f"the reward function mine:score {said}")
    assert "\n" not in problem


def test_a_signal_ends_a_function_where_it_is(mine):
    """However long it takes; and where it swallows that, what it gives is not gone on with."""
    mine("""
import signal, time
def f(prompts, responses, rows):
    try:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)
    finally:
        if "swallow" in responses:
            return [0.0]
""")
    rewards = Rewards(parts({"function": "mine:f"}), None)
    for response in ("x", "swallow"):
        with Signals() as signals, signals.deferred(), pytest.raises(Stopped):
            rewards.of_texts(answered(response), 0, 1, signals)


def test_what_a_function_changes_is_put_back(trunk, mine, here, monkeypatch):
    """The folder, streams, signals and settings of torch, whether it returns or fails; and rows are its own copies."""
    (here / "below").mkdir()
    mine(
        "import os, random, signal, sys, torch\n"
        "def score(prompts, responses, rows):\n"
        "    os.chdir('below'); sys.stdout = open(os.devnull, 'w'); sys.setrecursionlimit(400)\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "    torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64); torch.set_num_threads(3)\n"
        "    torch.set_default_device('meta'); torch.set_autocast_enabled('cpu', True)\n"
        "    signal.signal(signal.SIGALRM, lambda *_: 1 / 0); signal.setitimer(signal.ITIMER_REAL, 60)\n"
        "    prompts.clear(); rows[0]['answer'] = 'changed'\n"
        "    return [float(r) for r in responses]\n"
    )
    rewards = Rewards(parts({"function": "mine:score"}), trunk)
    rows = answered("1", "2")
    before = [read() for read, _ in SHARED]
    assert rewards.of_texts(rows, 0, 1, Signals())["score"].tolist() == [1, 2]
    assert [read() for read, _ in SHARED] == before
    with pytest.raises(UserError, match="could not convert"):
        rewards.of_texts(answered("x"), 0, 1, Signals())
    assert [read() for read, _ in SHARED] == before
    assert rows == answered("1", "2")


@pytest.mark.parametrize("signal", ["KeyboardInterrupt", "Stopped"])
def test_a_signal_passes_through(trunk, mine, signal):
    mine(
        f"from align.training.borders.stops import Stopped\ndef score(prompts, responses, rows):\n    raise {signal}\n"
    )
    rewards = Rewards(parts({"function": "mine:score"}), trunk)
    with pytest.raises(BaseException) as error:  # noqa: PT011
        rewards.of_texts(answered("yes"), 0, 1, Signals())
    assert type(error.value).__name__ == signal


def test_a_process_that_it_forks_is_not_the_run(trunk, mine, capfd):
    mine(
        "import os\n"
        "def score(prompts, responses, rows):\n"
        "    child = os.fork()\n"
        "    if child: assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1\n"
        "    return [1.0]\n"
    )
    rewards = Rewards(parts({"function": "mine:score"}), trunk)
    assert rewards.of_texts(answered("yes"), 0, 1, Signals())["score"].tolist() == [1]


def test_a_module_that_leaves_while_it_is_imported(trunk, mine, here):
    for text, said in (
        ("import sys\nsys.exit(0)\n", "mine cannot be imported (SystemExit: 0)"),
        ("import os\nos.chdir('/')\n1 / 0\n", "mine cannot be imported (ZeroDivisionError: division by zero)"),
        ("def __getattr__(name): raise SystemExit(5)\n", "mine has no function 'score' (SystemExit: 5)"),
        ("import mine\nmine.score\n", "mine cannot be imported (AttributeError: "),
        ("def score(:\n", "mine cannot be imported (SyntaxError: "),
    ):
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()
        mine(text)
        with pytest.raises(UserError) as error:
            Rewards(parts({"function": "mine:score"}), trunk)
        (problem,) = error.value.problems
        assert problem.startswith(f"ppo.rewards.0.function: {said}")
        assert os.getcwd() == str(here)


@pytest.mark.parametrize("score", ["True", "1", "Fraction(1, 2)", "torch.tensor(1.5)", "np.float32(2)"])
def test_whatever_is_a_number_counts(trunk, mine, score):
    mine(
        "import numpy as np\nimport torch\nfrom fractions import Fraction\n"
        f"def score(prompts, responses, rows):\n    return [{score}] * len(rows)\n"
    )
    rewards = Rewards(parts({"function": "mine:score"}), trunk)
    value = {"True": 1, "1": 1, "Fraction(1, 2)": 0.5, "torch.tensor(1.5)": 1.5, "np.float32(2)": 2}[score]
    assert rewards.of_texts(answered("yes"), 0, 1, Signals())["score"].tolist() == [value]


def test_every_part_that_cannot_be_had_is_told(trunk, mine):
    mine("raise RuntimeError('not today')\n")
    given = parts(
        {"function": "mine:score"},
        {"function": "nowhere.at.all:score", "name": "b"},
        {"function": "align.training.rules:no_such"},
        {"function": "align.training.rules:NUMBER"},
        {"adapter": "none/final"},
        {"model": "./none"},
    )
    with pytest.raises(UserError) as error:
        Rewards(given, trunk)
    problems = error.value.problems
    starts = [
        "ppo.rewards.0.function: mine cannot be imported (RuntimeError: not today)",
        "ppo.rewards.1.function: nowhere.at.all cannot be imported (ModuleNotFoundError: ",
        "ppo.rewards.2.function: align.training.rules has no function 'no_such'",
        "ppo.rewards.3.function: align.training.rules has no function 'NUMBER'",
        "ppo.rewards.4.adapter: none/final has no align.json; give the `final/` folder of a finished reward run",
        "ppo.rewards.5.model: ",
    ]
    assert len(problems) == len(starts)
    assert all(problem.startswith(start) for problem, start in zip(problems, starts, strict=True)), problems


def test_two_parts_of_one_name(trunk):
    rule = {"function": "align.training.rules:one_sentence"}
    with pytest.raises(UserError, match=r"ppo\.rewards: two parts have the same name; give each its `name`"):
        Rewards(parts(rule, rule), trunk)
    assert set(Rewards(parts(rule, rule | {"name": "other"}), trunk).functions) == {"one_sentence", "other"}


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({}, "give exactly one"),
        ({"adapter": "a", "function": "b:c"}, "give exactly one"),
        ({"function": "b.c"}, "expected package.module:function, found 'b.c'"),
        ({"function": ":c"}, "expected package.module:function"),
        ({"adapter": "a", "label": "happy"}, "`label` goes with `model`"),
        ({"adapter": "a", "timeout": 1.0}, "`timeout` goes with `function`"),
        ({"model": "a", "on_failure": "leave_out"}, "`on_failure` goes with `function`"),
        ({"function": "a:b", "timeout": 0.0}, "greater than 0"),
        ({"function": "a:b", "processes": -1}, "greater than or equal to 0"),
        ({"function": "a:b", "std": 0.0}, "greater than 0"),
        ({"adapter": "a", "name": "critic"}, "`name`: critic is another role on the trunk"),
        ({"adapter": "a", "name": "v1.5"}, "should match pattern"),
    ],
)
def test_a_part_is_of_one_kind(part, said):
    with pytest.raises(ValidationError, match=said):
        RewardPart(**part)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("It is Paris.", 1),
        ("  Is it?\n", 1),
        ("It is Paris", 0),
        ("It is. It was.", 0),
        ("...", 0),
        ("", 0),
        ("It is\nParis.", 0),
        (" ".join(["so"] * 25) + ".", 1),
        (" ".join(["so"] * 26) + ".", 0),
    ],
)
def test_one_sentence(response, score):
    assert one_sentence(["q"], [response], [{}]) == [score]


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("3 + 4 = 7", "So 7.\n#### 7", 1),
        ("It is 1,000.", "#### 1000", 1),
        ("7.0", 7, 1),
        ("-7", "7", 0),
        ("7 or 8", "7", 0),
        ("none", "7", 0),
        ("none", "no number", 0),
        ("None", "", 0),
    ],
)
def test_exact_answer(response, answer, score):
    assert exact_answer(["q"], [response], [{"answer": answer}]) == [score]


def test_a_row_without_an_answer_has_no_score():
    """And a file that calls its answers otherwise is no file of wrong answers."""
    assert exact_answer(["q"] * 3, ["7", "7", "None"], [{"answer": 7}, {}, {"answer": None}]) == [1, None, None]
    with pytest.raises(ValueError, match="no row has a column `answer`"):
        exact_answer(["q"], ["7"], [{"solution": 7}])


def test_exact_answer_without_math_verify(monkeypatch, capsys):
    """Numbers alone are compared, as is said once, by the first process."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        rules._knows_mathematics.cache_clear()
        for _ in range(2):
            assert exact_answer(["q"] * 2, ["1/2", "so 7"], [{"answer": "0.5"}, {"answer": 7}]) == [0, 1]
        assert capsys.readouterr().err.count("pip install math-verify") == lines
    rules._knows_mathematics.cache_clear()


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("The plot was dull.", -1.0),
        ("The plot was very dull, but the music was quite clever.", -2.0 + 1.0),
        ("The cast was not awful, and the songs were not good.", 1.5 - 0.5),
        ("Superb, superb, SUPERB!", 1.5),  # only where it comes first
        ("A dull plot. Not dull, very dull.", -1.0),
        ("A very dull plot, but not awful, not awful at all.", -2.0 + 1.5),
        ("very very superb", 3.0),
        ("not very superb", 3.0),  # the word before it decides
        ("The plot was long.", 0.0),
        ("", 0.0),
    ],
)
def test_sentiment(response, score):
    assert sentiment(["q"], [response], [{}]) == [score]


def test_as_much_blame_as_praise():
    assert len(VALENCES) == 42
    assert sum(VALENCES.values()) == 0
