"""Token trees by hand: where every token, position and label of a small forest stands in both layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.data.graft import graft
from align.data.packing import pack, pack_padded
from align.data.trees import Forest, Tree, TreeMask, plant

LENGTH = st.integers(1, 6)
TREES = st.lists(
    st.lists(
        LENGTH.flatmap(lambda n: st.tuples(st.just(n), st.lists(st.booleans(), min_size=n, max_size=n))),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=4,
)


def tree(*parts: tuple[list[int], str]) -> Tree:
    """Segments as (tokens, marks), x where the token is trained."""
    tokens, marks = zip(*parts, strict=True)
    assert [len(t) for t in tokens] == [len(m) for m in marks]
    return Tree(
        tuple(np.array(t, np.int32) for t in tokens), tuple(np.array([c == "x" for c in m], bool) for m in marks)
    )


TEXT = tree(([10, 11, 12], ".xx"))
PAIR = tree(([20, 21, 22, 23], "..x."), ([24, 25], "xx"), ([26, 27, 28], "x.x"))
STEM_END = tree(([30, 31], ".x"), ([32], "x"), ([33], "x"))
SHORT_STEM = tree(([40], "x"), ([41, 42], "xx"))


def rows(tensor: torch.Tensor) -> list:
    return tensor.tolist()


def test_a_text_is_a_row_that_predicts_its_next_token():
    forest = plant([TEXT])
    assert rows(forest.tokens) == [[10, 11, 12]]
    assert rows(forest.positions) == [[0, 1, 2]]
    assert rows(forest.where) == [0, 1]
    assert rows(forest.labels) == [11, 12]
    assert rows(forest.path) == [0, 0]
    assert forest.segments == (3,)
    assert forest.paths == 1


def test_the_stem_lends_its_last_token_to_every_branch():
    forest = plant([PAIR])
    assert rows(forest.tokens) == [[20, 21, 22, 23, 24, 25, 23, 26, 27, 28]]
    assert rows(forest.positions) == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6]]
    assert rows(forest.segment) == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert rows(forest.labels) == [22, 24, 25, 26, 28]
    assert rows(forest.where) == [1, 3, 4, 6, 8]
    assert rows(forest.path) == [0, 0, 0, 1, 1]
    assert (forest.segments, forest.parents) == ((3, 3, 4), (-1, 0, 0))
    assert forest.paths == 2


def test_a_label_at_the_stems_end_counts_once():
    forest = plant([STEM_END])
    assert rows(forest.tokens) == [[30, 31, 32, 31, 33]]
    assert rows(forest.labels) == [31, 32, 33]
    assert rows(forest.where) == [0, 1, 3]
    assert rows(forest.path) == [0, 0, 1]


def test_a_stem_of_one_token_stands_in_its_branches_alone():
    forest = plant([SHORT_STEM])
    assert rows(forest.tokens) == [[40, 41, 42]]
    assert rows(forest.labels) == [41, 42]
    assert rows(forest.where) == [0, 1]
    assert (forest.segments, forest.parents) == ((0, 3), (-1, 0))


def test_a_forest_goes_end_to_end_and_is_filled_to_a_multiple():
    forest = plant([TEXT, STEM_END, SHORT_STEM], multiple=4)
    assert rows(forest.tokens) == [[10, 11, 12, 30, 31, 32, 31, 33, 40, 41, 42, 0]]
    assert rows(forest.positions) == [[0, 1, 2, 0, 1, 2, 1, 2, 0, 1, 2, 0]]
    assert rows(forest.tree) == [[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, -1]]
    assert rows(forest.segment) == [[0, 0, 0, 1, 2, 2, 3, 3, 5, 5, 5, 6]]
    assert rows(forest.where) == [0, 1, 3, 4, 6, 8, 9]
    assert rows(forest.labels) == [11, 12, 31, 32, 33, 41, 42]
    assert rows(forest.path) == [0, 0, 1, 1, 2, 3, 3]
    assert (forest.segments, forest.parents) == ((3, 1, 2, 2, 0, 3, 1), (-1, -1, 1, 1, -1, 4, -1))
    assert forest.paths == 4
    assert plant([TEXT], multiple=3).segments == (3,)


def test_padded_rows_are_paths():
    forest = plant([TEXT, PAIR], packed=False, multiple=4)
    assert rows(forest.tokens) == [
        [10, 11, 12, 0, 0, 0, 0, 0],
        [20, 21, 22, 23, 24, 25, 0, 0],
        [20, 21, 22, 23, 26, 27, 28, 0],
    ]
    assert rows(forest.tree) == [[0] * 3 + [-1] * 5, [1] * 6 + [-1] * 2, [1] * 7 + [-1]]
    assert rows(forest.positions) == [list(range(8))] * 3
    assert rows(forest.labels) == [11, 12, 22, 24, 25, 26, 28]
    assert rows(forest.where) == [0, 1, 8 + 1, 8 + 3, 8 + 4, 16 + 3, 16 + 5]
    assert rows(forest.path) == [0, 0, 1, 1, 1, 2, 2]
    assert forest.segments is None
    assert not forest.packed
    assert forest.paths == 3


@given(TREES, st.integers(1, 5))
def test_both_layouts_give_the_same_labels_in_the_same_order(parts, multiple):
    draw = np.random.default_rng(0)
    trees = [
        tree(*((draw.integers(1, 99, n).tolist(), ["."[m:] or "x" for m in marks]) for n, marks in t)) for t in parts
    ]
    packed, padded = plant(trees, multiple=multiple), plant(trees, packed=False, multiple=multiple)
    assert rows(packed.labels) == rows(padded.labels)
    assert rows(packed.path) == rows(padded.path)
    assert packed.paths == padded.paths == sum(len(t.paths()) for t in trees)
    assert len(packed.labels) == sum(t.label_count for t in trees)
    assert packed.tokens.shape[1] % multiple == padded.tokens.shape[1] % multiple == 0
    assert packed.tokens.shape[1] - sum(t.packed_length for t in trees) in range(multiple)
    # Each position has at most one label, and predicts it from the same token at the same place of its path.
    for forest in (packed, padded):
        assert len(set(rows(forest.where))) == len(forest.where)
    for name in ("tokens", "positions"):
        one, other = (getattr(f, name).flatten()[f.where] for f in (packed, padded))
        assert torch.equal(one, other)
    # What a label is predicted from is its path up to it, read through the mask in the order of positions.
    dense = TreeMask(packed).dense[0, 0]
    for where, there in zip(packed.where, padded.where, strict=True):
        seen = torch.nonzero(dense[where])[:, 0]
        assert torch.equal(packed.positions[0, seen], torch.arange(len(seen)))
        row, column = divmod(int(there), padded.tokens.shape[1])
        assert torch.equal(packed.tokens[0, seen], padded.tokens[row, : column + 1])


def test_masks_by_hand():
    mask = TreeMask(plant([TEXT, STEM_END], multiple=9))
    seen = ["".join("x" if cell else "." for cell in row) for row in mask.dense[0, 0]]
    assert seen == [
        "x........",
        "xx.......",
        "xxx......",
        "...x.....",
        "...xx....",
        "...xxx...",
        "...x..x..",
        "...x..xx.",
        "........x",
    ]


def test_a_batch_keeps_its_numbers_on_its_way_to_a_device():
    forest = plant([PAIR])
    moved = forest.to("meta")
    assert {moved.tokens.device.type, moved.labels.device.type} == {"meta"}
    assert (moved.paths, moved.segments) == (forest.paths, forest.segments)


@pytest.mark.parametrize(
    ("lengths", "budget", "rows"),
    [
        ([], 10, 1),
        ([10], 10, 1),
        ([6, 5, 5, 4], 10, 2),  # in the order given, next fit would need three
        ([7, 6, 4, 3], 10, 2),
        ([6, 5, 4, 3, 2], 10, 2),  # the emptiest row that fits, instead of the fullest, would need three
        ([4, 8, 1, 4, 2, 1], 10, 2),
        ([5, 5, 5], 10, 2),
        ([12, 3, 7], 10, 2),  # one item over the budget stands alone
        ([1] * 7, 3, 3),
    ],
)
def test_best_fit_finds_the_fewest_rows(lengths, budget, rows):
    assert len(pack(lengths, budget)) == rows


def test_rows_are_evened_out():
    lengths = [4, 4, 3, 3, 2, 2]
    assert sorted(sum(lengths[i] for i in row) for row in pack(lengths, 12)) == [9, 9]


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(20, 60), st.integers(1, 4))
def test_every_item_once_within_the_budget(lengths, budget, multiple):
    found = pack(lengths, budget, multiple)
    assert sorted(i for row in found for i in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in found)
    assert len(found) % multiple == 0
    assert found
    for row in found:
        total = sum(lengths[i] for i in row)
        assert total <= budget or len(row) == 1
    # Best fit opens a row only when no other has room: no two rows could be one.
    assert len(found) < max(2 * sum(lengths) / budget + 1, 2) + multiple
    assert pack(lengths, budget, multiple) == found


def test_only_what_nobody_has_to_predict_is_shared():
    opening = np.arange(20, dtype=np.int32)

    def example(tail: int, first_trained: int) -> Tree:
        tokens = np.append(opening, np.int32(100 + tail))
        return Tree((tokens,), (np.arange(21) >= first_trained,))

    (one,) = graft([example(1, 20), example(2, 15)])
    assert [len(segment) for segment in one.segments] == [15, 6, 6]
    assert one.label_count == example(1, 20).label_count + example(2, 15).label_count
    apart = [example(1, 20), example(2, 0)]  # all of it has to be predicted
    assert [tree.segments for tree in graft(apart)] == [tree.segments for tree in apart]
    assert [tree.owners for tree in graft(apart)] == [(0,), (1,)]


def test_pairs_that_begin_alike_share_their_beginning():
    opening = list(range(50, 62))
    first = tree(([*opening, 1, 2], "." * 14), ([3], "x"), ([4, 5], "xx"))._replace(targets=(0.5, 0.0))
    other = tree(([9] * 10, "." * 10), ([8], "x"))
    second = tree(([*opening, 6], "." * 13), ([7, 8], "xx"), ([9], "x"))
    one, alone = graft([first, other, second])
    assert [part.tolist() for part in one.segments] == [opening, [1, 2], [3], [4, 5], [6], [7, 8], [9]]
    assert one.parents == (0, 1, 1, 0, 4, 4)
    assert one.owners == (0, 0, 2, 2)
    assert one.targets == (0.5, 0.0, 0.0, 0.0)
    assert alone.owners == (1,)
    forest = plant([one, alone])
    assert rows(forest.owner) == [0, 0, 2, 2, 1]
    assert rows(forest.tokens[0, forest.ends]) == [3, 5, 8, 9, 8]
    assert rows(forest.positions[0, forest.ends]) == [14, 15, 14, 13, 10]
    assert rows(forest.labels) == [3, 4, 5, 7, 8, 9, 8]
    assert rows(forest.path) == [0, 1, 1, 2, 2, 3, 4]
    assert rows(forest.tokens[0]) == [*opening, 1, 2, 3, 2, 4, 5, 6, 7, 8, 6, 9, *[9] * 9, 9, 8]
    assert forest.distinct == 12 + 2 + 1 + 2 + 1 + 2 + 1 + 10 + 1


def test_unlabelled_texts_become_a_tree_of_all_they_share():
    """Every token once, but the last of a text that others continue or repeat."""
    texts = [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8], [1, 2, 3, 6, 7, 9], [1, 2, 3, 6, 7, 9], [1, 2, 9], [1, 2], [5, 5, 5]]
    trees = [Tree((np.array(ids, np.int32),), (np.zeros(len(ids), bool),)) for ids in texts]
    grafted = graft(trees)
    assert [[part.tolist() for part in tree.segments] for tree in grafted] == [
        [[1], [2], [3], [4, 5], [6, 7], [8], [9], [9], [9], [2]],
        [[5, 5, 5]],
    ]
    forest = plant(grafted)
    assert forest.tokens.numel() == forest.distinct == 15
    dense = TreeMask(forest).dense[0, 0]
    for end, owner in zip(forest.ends, forest.owner, strict=True):
        seen = dense[end].nonzero()[:, 0]
        assert rows(forest.tokens[0, seen]) == texts[owner]
        assert rows(forest.positions[0, seen]) == list(range(len(seen)))


@given(TREES, st.integers(0, 3))
def test_grafted_trees_have_the_labels_of_each_alone(parts, kinds):
    """Every label is predicted from the same path, whatever shares its beginning."""
    draw = np.random.default_rng(0)
    openings = [draw.integers(1, 99, 9).tolist() for _ in range(kinds + 1)]
    trees = []
    for number, t in enumerate(parts):
        made = tree(*((draw.integers(1, 9, n).tolist(), ["."[m:] or "x" for m in marks]) for n, marks in t))
        opening = np.array(openings[number % len(openings)], np.int32)
        stem = np.concatenate([opening, made.segments[0]])
        marks = np.concatenate([np.zeros(9, bool), made.trained[0]])
        trees.append(made._replace(segments=(stem, *made.segments[1:]), trained=(marks, *made.trained[1:])))

    def told(forest: Forest) -> list[tuple]:
        dense = TreeMask(forest).dense[0, 0]
        found = []
        for where, label, path in zip(forest.where, forest.labels, forest.path, strict=True):
            seen = torch.nonzero(dense[where])[:, 0]
            assert torch.equal(forest.positions[0, seen], torch.arange(len(seen)))
            found.append((int(forest.owner[path]), rows(forest.tokens[0, seen]), int(label)))
        return sorted(found)

    grafted = graft(trees)
    assert told(plant(grafted)) == told(plant(trees))
    assert len(grafted) == min(len(openings), len(trees))
    apart = plant(grafted, packed=False)
    assert rows(apart.labels) == rows(plant(grafted).labels)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(10, 80), st.integers(1, 4))
def test_padded_rows_hold_their_budget(lengths, budget, multiple):
    rows = pack_padded(lengths, budget, multiple)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert len(rows) % multiple == 0
    assert all(len(row) == 1 or len(row) * max(lengths[i] for i in row) <= budget for row in rows if row)
