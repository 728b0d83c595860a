"""What is equal as mathematics, for the reward `exact_answer` and the measure `math` alike."""

from __future__ import annotations

import pytest

from align.training.answers.measures import measured
from align.training.rules import exact_answer

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("response", "reference", "same"),
    [
        ("It is 1/2.", "0.5", True),
        ("So it is $\\frac{1}{2}$.", "0.5", True),
        (r"The answer is $\frac{1}{2}$.", "Of 3 eggs it is a half.\n#### 0.5", True),
        (r"It is $\frac{3}{4}$", r"\frac{3}{4}", True),  # LaTeX without its signs
        (r"It is 0.75", "9 parts of 12\n#### \\frac{3}{4}", True),
        (r"\boxed{\{1, 2\}}", r"$\{2, 1\}$", True),
        ("The answer is 7, not 8.", "7", True),
        ("The answer is 18.", "9 + 9 = 18\n#### 18", True),
        ("$x^2$", "$x^3$", False),
        ("I get $x^3$", r"\frac{1}{2}", False),
        ("ten", "ten", False),
        ("no number", "3", False),
        pytest.param("$9^{9^{9^9}}$", "5", False, marks=pytest.mark.slow),  # which nobody can compute, nor in 2 s
    ],
)
def test_reward_and_measure_say_the_same(response, reference, same):
    assert measured("math", response, reference, {}) == same
    assert exact_answer(["q"], [response], [{"answer": reference}]) == [same]
