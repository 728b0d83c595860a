import json
import random

import numpy as np
import pytest

from align.data.formats.rows import Row
from align.data.preparing.decontamination import COMMON, Decontaminate, Index, Measured, items_of
from align.data.preparing.step import Item
from align.data.preparing.texts import normal
from align.recipe.errors import UserError
from align.recipe.source import Source

ITEM = "A farmer has nine red hens and buys four more at the market on Monday, how many hens has he now?"


def index(*items: str, ngram: int = 4) -> Index:
    return Index([Measured(f"test.jsonl:{i}", normal(item)) for i, item in enumerate(items, 1)], ngram)


def text(said: str, number: int = 0) -> Item:
    return Item(number, 0, "text", Row("train.jsonl", number + 1, None, said, None), {})


def test_the_share_is_of_words_in_common_ngrams_by_hand():
    known = index("a b c d e f g h i j", ngram=3)
    assert known.best(normal("a b c d e f g h i j")).share == 1
    assert known.best(normal("x a b c d x")).share == pytest.approx(4 / 10)
    assert known.best(normal("a b c x e f g")).share == pytest.approx(6 / 10)  # d is changed: abc and efg stand
    assert known.best(normal("a b x c d x e f")) is None
    assert known.best([]) is None


def test_case_punctuation_and_width_do_not_count_and_letters_are_words_where_no_blank_parts_them():
    known = index(ITEM, "今天天气很好，我们和朋友一起去海边。")
    assert known.best(normal(ITEM.upper().replace(",", " ;"))).share == 1
    assert known.best(normal("他说：今天天气很好,我们和朋友一起去海边!")) == ("test.jsonl:2", 1.0)


def test_a_short_item_is_found_whole_or_not_at_all():
    known = index("What is the capital of France?", ngram=8)
    assert known.best(normal("Tell me: what is the capital of France, please")).share == 1
    assert known.best(normal("What is the capital of Spain?")) is None
    assert index("Why?", "Who is it?", ngram=8).short == 2


def test_what_all_items_share_says_nothing():
    rng = random.Random(0)
    intro = "Read the question below with care and give the best answer that you can find in the list"
    words = [f"{intro} {' '.join(f'w{rng.randrange(10**6)}' for _ in range(12))}" for _ in range(COMMON + 1)]
    known = index(*words)
    assert known.best(normal(intro)) is None
    assert known.best(normal(words[3])) == ("test.jsonl:4", 1.0)


def test_rows_that_hold_an_item_go_and_the_report_names_its_place_alone():
    step = Decontaminate(index(ITEM), 0.5)
    verdicts = step.look([text("nothing of it"), text(f"Question: {ITEM} Answer: thirteen", 1)])
    assert verdicts[0].item is not None
    assert verdicts[1].item is None
    assert verdicts[1].example == "100% of the words of test.jsonl:1"
    assert "hens" not in str(verdicts[1])


def test_an_item_may_be_spread_over_the_turns_of_a_row():
    first, last = ITEM.split(", ")
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": last}]
    item = Item(0, 0, "messages", Row("f", 1, turns, None, None), {})
    assert Decontaminate(index(ITEM), 1.0).look([item])[0].item is None


def test_test_sets_are_read_in_any_format_and_one_without_items_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": ITEM, "answer": "#### 13"}) + "\n")
    chat = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u v w"},
                         {"role": "assistant", "content": "no"}]}  # fmt: skip
    (tmp_path / "b.jsonl").write_text(json.dumps(chat) + "\n")
    (tmp_path / "c.txt").write_text("one document\n")
    found = list(items_of([Source(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.txt")]))
    assert [item.words for item in found] == [normal(ITEM), ["u", "v", "w"], ["one", "document"]]
    assert found[0].place == f"{tmp_path}/a.jsonl:1"
    (tmp_path / "d.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(UserError, match=r"d\.jsonl"):
        list(items_of([Source(path=str(tmp_path / "d.jsonl"))]))


def test_the_index_is_all_that_is_held():
    rng = np.random.default_rng(0)
    known = index(*(" ".join(f"w{n}" for n in rng.integers(0, 5000, 40)) for _ in range(200)), ngram=6)
    held = sum(array.nbytes for table in known.tables.values() for array in table)
    assert held == 200 * 35 * 24
