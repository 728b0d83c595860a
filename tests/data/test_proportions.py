import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.formats.rows import Row
from align.data.preparing.mixing import Mixing
from align.data.preparing.step import Item
from align.data.proportions import amounts, passes_of, tempered, times
from align.recipe.errors import UserError
from align.recipe.preparing.mixing import Mix

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def test_temperature_by_hand():
    np.testing.assert_allclose(tempered([9, 1], 1), [0.9, 0.1])
    np.testing.assert_allclose(tempered([9, 1], 2), [0.75, 0.25])  # 3 : 1
    np.testing.assert_allclose(tempered([9, 1, 0], 1e9), [0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(tempered([9, 1], 0.5), [81 / 82, 1 / 82])
    for wrong in ([0, 0], [-1, 2], [float("nan")]):
        with pytest.raises(ValueError, match="weights"):
            tempered(wrong, 1)


def test_amounts_by_hand():
    shares = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(amounts(shares, np.array([100.0, 90, 10])), [25, 15, 10])  # the third binds
    np.testing.assert_allclose(amounts(shares, np.array([100.0, 90, 90]), 100), [50, 30, 20])
    # The third gives its 10, and 90 are shared as 5 : 3.
    np.testing.assert_allclose(amounts(shares, np.array([100.0, 90, 10]), 100), [56.25, 33.75, 10])
    np.testing.assert_allclose(amounts(shares, np.array([1.0, 2, 3]), 100), [1, 2, 3])
    np.testing.assert_allclose(amounts(np.array([1.0, 0]), np.array([5.0, 7])), [5, 0])


@settings(max_examples=30)
@given(WEIGHTS, st.data())
def test_amounts_keep_within_limits_and_reach_the_total(weights, data):
    shares = tempered(weights, 1)
    limits = np.array(data.draw(st.lists(st.floats(1, 1000), min_size=len(weights), max_size=len(weights))))
    total = data.draw(st.floats(1, 5000))
    taken = amounts(shares, limits, total)
    assert (taken <= limits * (1 + 1e-9)).all()
    assert taken.sum() == pytest.approx(min(total, limits.sum()))
    free = taken < limits * (1 - 1e-9)
    ratio = taken[free] / shares[free]
    assert not len(ratio) or np.ptp(ratio) <= 1e-6 * ratio.max(), "those with enough keep their shares"


def test_how_often_rows_come():
    sizes = np.array([10, 20, 30, 40])
    for amount in (0, 35, 100, 250, 299):
        often = times(sizes, amount, np.random.default_rng(1))
        assert set(often) <= {amount // 100, amount // 100 + 1}
        assert abs((often * sizes).sum() - amount) <= 20
        np.testing.assert_array_equal(often, times(sizes, amount, np.random.default_rng(1)))
    np.testing.assert_array_equal(times(np.ones(5, int), 7, np.random.default_rng(0)).sum(), 7)
    assert len(times(np.zeros(0, int), 3, np.random.default_rng(0))) == 0


@settings(max_examples=30)
@given(WEIGHTS, st.data())
def test_passes_give_the_shares_and_an_epoch_as_large_as_the_data(weights, data):
    sizes = data.draw(st.lists(st.integers(0, 10_000), min_size=len(weights), max_size=len(weights)))
    passes = passes_of(weights, sizes)
    seen = passes * sizes
    assert seen.sum() == pytest.approx(sum(sizes))
    there = np.array(sizes) > 0
    assert (passes[~there] == 0).all()
    if there.any():
        wanted = np.array(weights)[there] / np.array(weights)[there].sum()
        np.testing.assert_allclose(seen[there] / seen.sum(), wanted)


def mixed(section: Mix, tokens: dict[str, list[int]], alive=None):
    """The step on rows with so many tokens, by source."""
    names = list(tokens)
    rows = [(place, count) for place, name in enumerate(names) for count in tokens[name]]
    step = Mixing(section, names, lambda row: len(row.text), 7)
    items = [Item(i, place, "text", Row("f", i + 1, None, "x" * n, None), {}) for i, (place, n) in enumerate(rows)]
    sketch = step.sketch(items)
    sketches = type("S", (dict,), {"source": np.array([place for place, _ in rows], np.int16)})(sketch)
    alive = np.ones(len(rows), bool) if alive is None else alive
    return step.decide(sketches, alive, np.arange(len(rows)))


def test_a_mixture_by_tokens_by_hand():
    # 200 tokens in 20 rows, and 200 in 2: three quarters of the first and one of the second make 200 + 66.7.
    tokens = {"short": [10] * 20, "long": [100, 100]}
    found = mixed(Mix(weights=[3, 1]), tokens)
    short, long = found.counts["sources"]
    assert (short["wanted"], long["wanted"]) == (0.75, 0.25)
    assert (short["amount"], long["amount"]) == (200, pytest.approx(66.667))
    assert (short["rows"], short["passes"], long["rows"]) == (20, 1, 1)
    assert (short["tokens"], long["tokens"]) == (200, 100), "a row is whole: 100 is nearer to 66.7 than 0"
    assert long["share_of_tokens"] == pytest.approx(1 / 3, abs=1e-5)
    assert long["share_of_rows"] == pytest.approx(1 / 21, abs=1e-5)
    rows = mixed(Mix(weights=[3, 1], by="rows"), tokens).counts["sources"]
    assert [source["rows"] for source in rows] == [6, 2]


def test_caps_epochs_and_a_total_by_hand():
    tokens = {"a": [10] * 10, "b": [10] * 10}
    total = [source["tokens"] for source in mixed(Mix(weights=[1, 1], total=60), tokens).counts["sources"]]
    assert total == [30, 30]
    capped = mixed(Mix(weights=[1, 1], total=120, caps=[40, None]), tokens).counts["sources"]
    assert [source["tokens"] for source in capped] == [40, 80]
    often = mixed(Mix(weights=[3, 1], epochs=[3, 1]), tokens)
    assert [source["tokens"] for source in often.counts["sources"]] == [300, 100]
    assert set(often.times[:10]) == {3}
    natural = mixed(Mix(), {"a": [10] * 9, "b": [10]}).counts["sources"]
    assert [source["rows"] for source in natural] == [9, 1]
    hot = mixed(Mix(temperature=2, epochs=[1, 3]), {"a": [10] * 9, "b": [10]}).counts["sources"]
    assert [source["tokens"] for source in hot] == [90, 30]


def test_rows_that_are_dropped_do_not_count():
    alive = np.array([True] * 4 + [False] * 6 + [True] * 10)
    found = mixed(Mix(weights=[1, 1], by="rows"), {"a": [1] * 10, "b": [1] * 10}, alive)
    assert [source["rows"] for source in found.counts["sources"]] == [4, 4]
    assert not found.times[4:10].any()


def test_lists_of_another_length_and_sources_without_rows():
    with pytest.raises(UserError, match=r"mix\.weights: expected one for each of the 2 sources, found 3"):
        mixed(Mix(weights=[1, 1, 1]), {"a": [1], "b": [1]})
    with pytest.raises(UserError, match="no row is left"):
        mixed(Mix(weights=[0, 1]), {"a": [1], "b": [1]}, np.array([True, False]))
