"""Duplicates: groups, keys, MinHash beside exact Jaccard and datasketch, repeated parts."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from data.preparing.items import labelled_text, pair, talk, text

from align.data.preparing.duplicates.groups import Groups, joined_by
from align.data.preparing.duplicates.near import NearDuplicates, alike, bands_of
from align.data.preparing.duplicates.repeated import RepeatedParts, later, paragraph_spans, sentence_spans
from align.data.preparing.duplicates.same import Same, column, everything, normalised, prompt
from align.data.preparing.texts import normal
from align.recipe.preparing.duplicates import Near, Repeated


class Sketched:
    """Sketches of a few items, in memory."""

    def __init__(self, step, items):
        self.items, self.arrays = items, step.sketch(items)
        self.number = np.array([item.number for item in items])
        self.source = np.array([item.source for item in items])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, name):
        return self.arrays[name]

    def ragged(self, name):
        return self[name], np.concatenate([[0], np.cumsum(self[f"{name}/counts"])])


def decided(step, items, alive=None):
    alive = np.ones(len(items), bool) if alive is None else alive
    return step.decide(Sketched(step, items), alive, np.arange(len(items)))


def words(rng: random.Random, n: int) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


def shingles(said: str, n: int = 3) -> set[tuple[str, ...]]:
    found = normal(said)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def jaccard(a: str, b: str) -> float:
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other)


def swapped(rng: random.Random, said: list[str], count: int) -> list[str]:
    said = list(said)
    for i in rng.sample(range(len(said)), count):
        said[i] = f"x{rng.randrange(5000)}"
    return said


def test_groups_are_the_components_of_the_graph():
    rng = np.random.default_rng(0)
    for n, m in ((1, 0), (2, 1), (50, 20), (90, 80), (60, 180)):
        edges, groups, naive = rng.integers(0, n, (m, 2)), Groups(n), list(range(n))
        for part in np.array_split(edges, 3):
            groups.join(part[:, 0], part[:, 1])
        for _ in range(n):  # the least number spreads along the edges
            for a, b in edges:
                naive[a] = naive[b] = min(naive[a], naive[b])
        assert groups.all().tolist() == naive


def test_first_of_each_key():
    leader, again = joined_by(np.array([7, 3, 7, 7, 3, 9]), np.array([2, 5, 6, 8, 10, 11]))
    assert leader.tolist() == [2, 5, 2, 2, 5, 11]
    assert again.tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Hello,  World!", "hello world", True),
        ("ﬁne Ｗords", "fine words", True),
        ("5 - 3", "5 + 3", False),
        ("x = -1", "x = 1", False),
        ("!!!", "???", False),  # without words, the signs count
        ("do not", "donot", False),
    ],
)
def test_what_is_the_same_but_for_its_form(a, b, same):
    assert (normalised(text(a).row) == normalised(text(b).row)) == same
    assert everything(text(a).row) != everything(text(b).row)


def test_roles_labels_and_answers_tell_rows_apart():
    assert normalised(talk("a", "b").row) != normalised(talk("b", "a").row)
    assert normalised(labelled_text("a", "x").row) != normalised(labelled_text("a", "y").row)
    assert normalised(pair("q", "a", "b").row) != normalised(pair("q", "b", "a").row)
    assert normalised(pair("q", "a", "b").row) == normalised(pair("Q!", "A", " b").row)


def test_the_first_of_equal_rows_stays_and_dead_rows_count_for_nothing():
    items = [text(said, i) for i, said in enumerate(["a", "b", "A", "c", "a!", "b"])]
    step = Same("deduplicate.exact", lambda item: normalised(item.row), "the same", True)
    found = decided(step, items)
    assert found.drop.tolist() == [0, 0, 1, 0, 1, 1]
    assert found.because.tolist() == [-1, -1, 0, -1, 0, 1]
    assert found.counts == {"repeated": 3, "groups": 2}
    alive = np.array([False, True, True, True, True, True])
    assert decided(step, items, alive).because.tolist() == [-1, -1, -1, -1, 2, 1]
    only = Same("deduplicate.exact", lambda item: normalised(item.row), "the same", False)
    assert decided(only, items).drop is None
    assert decided(only, items).group.tolist() == [0, 1, 0, 3, 0, 1]


def test_by_column_and_by_prompt():
    items = [text("a", 0, url=" u "), text("b", 1, url="u"), text("c", 2), text("d", 3), text("e", 4, url="")]
    assert decided(Same("by", column("url"), "", True), items).drop.tolist() == [0, 1, 0, 0, 0]
    items = [pair("q", "a", "b", 0), pair(" q", "c", "d", 1), talk("q", "a", number=2), talk("q", "b", number=3)]
    assert decided(Same("prompts", prompt, "", True), items).drop.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7, 0.9])
def test_bands_find_nearly_all_pairs_at_the_threshold(threshold):
    b, r = bands_of(threshold, 128)
    assert b * r <= 128
    assert 1 - (1 - threshold**r) ** b >= 0.99
    more = 128 // (r + 1)
    assert 1 - (1 - threshold ** (r + 1)) ** more < 0.99


def test_signatures_estimate_jaccard():
    rng, near = random.Random(1), NearDuplicates(Near(permutations=256), 3, True)
    pairs = []
    for count in (0, 2, 5, 10, 20, 40):
        said = words(rng, 120)
        pairs.append((" ".join(said), " ".join(swapped(rng, said, count))))
    signature = near.sketch([text(said) for both in pairs for said in both])["signature"]
    for i, (a, b) in enumerate(pairs):
        exact = jaccard(a, b)
        estimate = (signature[2 * i] == signature[2 * i + 1]).mean()
        assert abs(estimate - exact) <= 4 * np.sqrt(exact * (1 - exact) / 256) + 1e-9
    again = near.sketch([text(said) for both in pairs for said in both])["signature"]
    assert (signature == again).all()
    assert (
        NearDuplicates(Near(permutations=256), 4, True).sketch([text(pairs[0][0])])["signature"] != signature[0]
    ).any()


def test_near_duplicates_are_those_that_datasketch_finds():
    datasketch = pytest.importorskip("datasketch")
    rng, rows = random.Random(2), []
    for _ in range(60):
        said = words(rng, 60)
        rows += [" ".join(swapped(rng, said, count)) for count in (0, 1, 2, 6, 15)]
    rows += ["THE " + rows[0].upper().replace(" ", " , "), "too short", "too short"]
    index, hashed = datasketch.MinHashLSH(threshold=0.6, num_perm=128), []
    for i, said in enumerate(rows):
        theirs = datasketch.MinHash(num_perm=128, seed=5)
        theirs.update_batch([" ".join(gram).encode() for gram in shingles(said)])
        hashed.append(theirs)
        index.insert(i, theirs)
    step = NearDuplicates(Near(threshold=0.6), 0, True)
    found = decided(step, [text(said, i) for i, said in enumerate(rows)])
    group = found.group
    sure = 0
    for i, theirs in enumerate(hashed):
        for k in index.query(theirs):
            if k < i and len(normal(rows[i])) >= 5:
                exact = jaccard(rows[i], rows[k])
                if exact >= 0.75:  # three standard errors above the threshold
                    assert group[i] == group[k], (i, k, exact)
                    sure += 1
    assert sure >= 60
    for i in np.flatnonzero(found.drop):
        assert jaccard(rows[i], rows[found.because[i]]) > 0.3, "drift through others, and no more"
    assert found.drop[-1] == found.drop[-2] == 0, "short rows are left alone"
    assert found.drop[-3] == 1, "case and punctuation do not count"


def test_rows_that_are_alike_through_others_and_a_band_of_unlike_rows():
    signature = np.arange(6 * 16, dtype=np.uint32).reshape(6, 16)
    signature[1] = signature[0]
    signature[1, 12:] += 1000  # 12 of 16 agree with row 0
    signature[2] = signature[1]
    signature[2, :4] += 1000  # 12 of 16 with row 1, 8 with row 0
    signature[4, :2] = signature[5, :2] = signature[3, :2]  # one band alike, nothing else
    groups = alike(signature, np.arange(6), 0.7).all()
    assert groups.tolist() == [0, 0, 0, 3, 4, 5]
    assert alike(signature, np.array([0, 2, 5]), 0.7).all().tolist() == [0, 1, 2, 3, 4, 5], "row 1 is not among them"
    assert alike(signature[:0], np.zeros(0, np.int64), 0.7).all().tolist() == []


def test_an_empty_batch_has_the_same_columns():
    near = NearDuplicates(Near(), 0, True)
    full, empty = near.sketch([text("a b c d e f")]), near.sketch([])
    assert {name: (array.dtype, array.shape[1:]) for name, array in full.items()} == {
        name: (array.dtype, array.shape[1:]) for name, array in empty.items()
    }


def test_later_hashes():
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 300, 1000).astype(np.uint64)
    kept = rng.random(1000) < 0.7
    seen, wanted = set(), []
    for value, mine in zip(hashes.tolist(), kept.tolist(), strict=True):
        wanted.append(bool(mine and value and value in seen))
        if mine:
            seen.add(value)
    assert later(hashes, kept).tolist() == wanted


def test_spans_cover_the_text():
    said = "One. Two?  Three!\n\nFour. 五。六。\nSeven"
    for spans in (sentence_spans(said), paragraph_spans(said)):
        assert "".join(said[a:b] for a, b in spans) == said
    assert [said[a:b].strip() for a, b in sentence_spans(said)] == [
        "One.", "Two?", "Three!", "Four.", "五。", "六。", "Seven",
    ]  # fmt: skip


def test_repeated_sentences_go_from_later_texts():
    first = "The first of many words is here. Another sentence of five words follows."
    second = "Something quite new to read now. The first of many words is HERE! Yes."
    items = [text(first, 0), text(second, 1), text("The first of many words is here.", 2), talk("q", first, number=3)]
    step = RepeatedParts("deduplicate.sentences", "sentences", Repeated(), sentence_spans)
    found = decided(step, items)
    values, starts = found.cuts
    cuts = [values[a:b].tolist() for a, b in pairwise(starts)]
    assert cuts == [[], [1], [0], []]
    assert step.edit(items[1], np.array(cuts[1])).item.row.text == "Something quite new to read now. Yes."
    assert step.edit(items[2], np.array(cuts[2])).reason == "every one of its sentences stood in an earlier text"
    spans = RepeatedParts("s", "sentences", Repeated(span=2, min_words=3), sentence_spans)
    twice = [text("A b c. D e f. G h i.", 0), text("X y z. A b c. D e f. Q r s.", 1), text("A b c. Q r s.", 2)]
    values, starts = decided(spans, twice).cuts
    assert (values.tolist(), starts.tolist()) == ([1], [0, 0, 1, 1])
    assert spans.edit(twice[1], values).item.row.text == "X y z. Q r s."
