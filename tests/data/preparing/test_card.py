import json

import numpy as np
import pytest

from align.data.formats.rows import Fault, Row
from align.data.preparing.card.card import Card, kind_of, spread
from align.data.preparing.card.oddities import MEASURES, histogram, measures, middle
from align.data.preparing.privacy import Privacy
from align.data.preparing.step import Item

WORDS = [
    "the",
    "weather",
    "is",
    "nice",
    "today",
    "and",
    "we",
    "are",
    "going",
    "to",
    "the",
    "beach",
    "with",
    "our",
    "old",
    "friends",
    "from",
    "school",
]


def text(number: int, said: str, source: int = 0, label: str | None = None) -> Item:
    return Item(
        number, source, "text" if label is None else "classes", Row("f", number + 1, None, said, None, label=label), {}
    )


def items() -> list[Item]:
    rng = np.random.default_rng(0)
    return [text(i, " ".join(rng.permutation(WORDS)), i % 2, label=("ham", "spam")[i % 4 == 0]) for i in range(40)]


def card(rows: list[Item], faults: list[Fault] = (), size: int = 7, private=None) -> dict:
    counter = Card(["a", "b"], None, private)
    parts = [counter.observe(rows[i : i + size], faults if i == 0 else []) for i in range(0, len(rows), size)]
    return counter.merge(json.loads(json.dumps(parts)))


def test_counts_by_hand():
    talk = Row("f", 41, [{"role": "user", "content": "hi you"}, {"role": "assistant", "content": "yes"}], None, None)
    pair = talk._replace(
        line=42, messages=talk.messages[:1], answers=({"role": "assistant", "content": "a b c d"},) * 2
    )
    rows = [*items(), Item(40, 0, "messages", talk, {}), Item(41, 1, "pairs", pair, {}), text(42, WORDS[0])]
    faults = [
        Fault("f", 9, "turns[3]: expected text, found the number 5"),
        Fault("f", 8, "turns[12]: expected text, found the number 77"),
    ]
    made = card(rows, faults)
    assert (made["rows"], made["invalid"], made["unit"]) == (43, 2, "words")
    assert made["kinds"] == {"classes": 40, "messages": 1, "pairs": 1, "text": 1}
    assert made["turns"] == {"0": 41, "2": 2}
    assert made["labels"] == {"ham": 30, "spam": 10}
    assert made["faults"] == {"turns[N]: expected text, found the number N": 2}
    assert made["sources"] == [
        {"source": "a", "rows": 22, "length": 20 * 18 + 3 + 1},
        {"source": "b", "rows": 21, "length": 20 * 18 + 10},
    ]
    lengths = made["lengths"]
    assert (lengths["min"], lengths["median"], lengths["p90"], lengths["max"]) == (1, 18, 18, 18)
    assert (lengths["total"], sum(lengths["counts"])) == (40 * 18 + 14, 43)
    assert made["languages"]["en"] >= 40
    assert [row["length"] for row in made["longest"]] == [18] * 10
    assert made["longest"][0]["line"] == 1


@pytest.mark.parametrize("size", [1, 5, 40, 1000])
def test_the_card_does_not_depend_on_the_batches(size):
    assert card(items(), size=size) == card(items(), size=13)


def test_duplicates_are_counted_over_all_batches():
    rows = items()[:6]
    again = [row._replace(number=6 + i) for i, row in enumerate(rows[:3] + rows[:1])]
    loud = text(20, rows[4].row.text.upper() + "!", label=rows[4].row.label)
    made = card([*rows, *again, loud], size=4)["duplicates"]
    assert made == {"exact": {"rows": 4, "most": 3}, "normalised": {"rows": 5, "most": 3}}


def test_the_oddest_rows_are_found_and_it_is_said_what_is_odd():
    odd = [
        "!@#$%^&*()" * 20,
        "0123 4567 " * 30,
        "LOUD WORDS ARE SAID HERE ",
        "x" * 900,
        "again and again " * 40,
        "broken � text �� here �",
    ]
    rows = items() * 5
    rows = [row._replace(number=i, row=row.row._replace(line=i + 1)) for i, row in enumerate(rows)]
    rows += [text(len(rows) + i, said, label="ham") for i, said in enumerate(odd)]
    made = card(rows, size=30)["oddest"]
    assert {row["line"] for row in made} == {len(rows) - i for i in range(len(odd))}
    for row in made:
        assert row["what"] in MEASURES.values()
        assert row["value"] > row["typical"]
    assert card(items())["oddest"] == []


def test_measures_are_shares():
    for said in ("", " ", "a", "A1!", "x" * 100_000, "今天天气很好" * 20, "\x00\x1b[31m" * 50):
        for name, value in measures(said).items():
            assert 0 <= value <= 1, (name, said[:20])
    assert measures("ab 12 !?")["digits"] == pytest.approx(2 / 8)
    assert measures("ab 12 !?")["symbols"] == pytest.approx(2 / 8)
    assert measures("今天天气很好" * 20)["longest_word"] == 0


def test_the_middle_of_a_histogram():
    values = np.random.default_rng(0).uniform(0.2, 0.6, 1000)
    median, spread_ = middle(histogram(values))
    assert median == pytest.approx(np.median(values), abs=0.01)
    assert spread_ == pytest.approx(np.quantile(values, 0.95) - np.median(values), abs=0.01)


def test_lengths_of_one_and_of_none():
    assert spread({})["total"] == 0
    one = spread({7: 3})
    assert (one["min"], one["max"], one["mean"], sum(one["counts"])) == (7, 7, 7, 3)
    far = spread({10: 990, 20: 9, 10**9: 1})
    assert far["edges"][-1] <= 21
    assert sum(far["counts"]) == 1000


def test_what_is_shown_is_masked_and_printable():
    made = card(
        [text(0, "mail ann@example.org \x1b[31m now " + "word " * 200)],
        [Fault("f", 3, "found 'bo@example.org'")],
        private=Privacy(),
    )
    shown = json.dumps(made)
    assert "ann@" not in shown
    assert "bo@" not in shown
    assert "\\x1b" in made["longest"][0]["text"]
    assert kind_of("row 12: found 'a' and \"b\"") == "row N: found '…' and '…'"
