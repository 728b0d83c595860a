"""Measures of an answer beside its row's: by hand-worked numbers, and by the libraries that define them."""

from __future__ import annotations

import numpy as np
import pytest

from align.data.prompt_set import PromptSet
from align.recipe.errors import UserError
from align.training.answers.answers import estimated
from align.training.answers.measures import check_measures, chosen, measured
from align.training.meters import interval


def of(name: str, response: str, reference: str, **record) -> float:
    return measured(name, response, reference, record)


def test_exact_match_is_letter_by_letter_but_for_blanks():
    assert of("exact_match", " It is\nParis. ", "It is Paris.") == 1
    assert of("exact_match", "it is Paris.", "It is Paris.") == 0
    assert of("exact_match", "It is Paris", "It is Paris.") == 0
    assert of("exact_match", "<think>It may be Rome.</think>It is Paris.", "It is Paris.") == 1


def test_contains_is_blind_to_case_and_blanks():
    assert of("contains", "I say PARIS  is it", "Paris is") == 1
    assert of("contains", "I say Pari", "Paris") == 0
    assert of("contains", "anything", "") == 0, "nothing stands in every text"
    assert of("contains", "Die Straße", "STRASSE") == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", 1), ("(C)", 2), ("D.", 3), ("**A**", 0), ("The answer is B.", 1), ("Answer: no, (D)", 3),
        ("I choose (B) over (A)", 1), ("\\boxed{C}", 2), ("Cats are nice", None), ("A cat is nice", None),
        ("", None), ("the option C, I think", 2), ("Beta it is", 1), ("alpha or beta", None), ("gamma", 2),
    ],
)  # fmt: skip
def test_the_choice_that_a_text_makes(text, wanted):
    assert chosen(text, ["Alpha", "Beta", "Gamma"]) == wanted


def test_multiple_choice_takes_letters_places_and_words():
    choices = ["Alpha", "Beta", "Gamma"]
    for reference in ("B", "1", "Beta", "(B)"):
        assert of("multiple_choice", "The answer is B", reference, choices=choices) == 1
        assert of("multiple_choice", "It is beta.", reference, options=choices) == 1
        assert of("multiple_choice", "The answer is C", reference, choices=choices) == 0
    assert of("multiple_choice", "who knows", "B") == 0
    assert of("multiple_choice", "who knows", "nobody") == 0, "neither chooses"


def test_rouge_l_is_the_librarys_and_counts_letters_of_all_languages():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    pairs = [("the cat sat on the mat", "the cat on a mat"), ("A b c", "c b a"), ("one", "two"), ("x_y 3", "x y 3")]
    for response, reference in pairs:
        wanted = scorer.score(reference, response)["rougeL"].fmeasure
        assert of("rouge_l", response, reference) == pytest.approx(wanted, abs=1e-12)
    # the longest common subsequence of 5 and 5 words is 4 (the cat on mat)
    assert of("rouge_l", "the cat sat on mat", "the cat on a mat") == pytest.approx(4 / 5)
    assert of("rouge_l", "巴黎是法国的首都", "法国的首都是巴黎") == pytest.approx(2 * 5 / (8 + 8))  # 法国的首都
    assert of("rouge_l", "très élevé", "très bas") == pytest.approx(1 / 2)


def prompts(*references: str | None) -> PromptSet:
    stems = [np.array([i], np.int32) for i in range(len(references))]
    return PromptSet(stems, [None] * len(stems), list(references), [f"q.jsonl:{i}" for i in range(len(stems))], [])


def test_rows_without_an_answer_are_refused_where_something_compares_with_it():
    check_measures([], prompts(None, None))
    check_measures(["exact_match"], prompts("a", ""))
    with pytest.raises(UserError, match=r"2 of 3 prompts have no answer to compare with \(q\.jsonl:0, q\.jsonl:2\)"):
        check_measures(["exact_match"], prompts(None, "b", None))


def test_a_library_that_is_missing_is_one_message(monkeypatch):
    monkeypatch.setattr("align.training.answers.measures.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        check_measures(["rouge_l", "math", "contains"], prompts("a"))
    assert caught.value.problems == (
        "train.generate.measures: rouge_l needs rouge-score; run: pip install 'align[rouge]'",
        "train.generate.measures: math needs math-verify; run: pip install 'align[math]'",
    )


def test_intervals_are_wilsons_of_right_and_wrong_and_the_bootstraps_of_all_else():
    right = np.array([1.0, 0.0, 1.0, 1.0, np.nan])
    assert estimated(right, 0, share=True) == (0.75, *interval(3, 4), 4)
    assert estimated(right, 0, share=False)[1:3] != interval(3, 4), "a score may be 0 and 1 by chance"
    assert (interval(0, 7)[0], interval(7, 7)[1]) == (0, 1), "a share is not below 0 by rounding"
    assert estimated(np.ones(20), 0, share=True).low == pytest.approx(20 / (20 + 1.959964**2))  # n / (n + z²)
    assert np.isnan(estimated(np.ones(20), 0, share=False).low), "equal scores say nothing of their spread"
    scores = np.random.default_rng(0).normal(2, 1, 400)
    found = estimated(scores, 0, share=False)
    reach = 1.96 * scores.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((scores.mean() - reach, scores.mean() + reach), abs=0.02)
    assert np.isnan(estimated(np.array([0.3]), 0, share=False).low)
    assert np.isnan(estimated(np.array([np.nan, np.nan]), 0, share=True).value)
