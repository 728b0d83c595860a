"""Small inputs drawn from bug reports: what is learnt of them, as the run's own data."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
from data.voices import SMOLLM, tiny_tokenizer

from align.data.mixture import prepare
from align.data.templates.marking import show
from align.data.templates.render import conversations
from align.recipe.errors import UserError
from align.recipe.schema import Data, Source

CASES = Path(__file__).parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the project")


@pytest.fixture
def learnt(tmp_path, monkeypatch):
    """Of each row of a file its text on a ChatML template, what is trained between marks; and the ledger's lines."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer(SMOLLM)

    def read(path: Path, **source) -> tuple[list[str], list[str]]:
        data = Data(train=[Source(path=str(path), **source)], invalid="drop", max_length=4096)
        made = prepare(data, tokenizer, conversations("assistant"), 0, tmp_path / "cache")
        shown = [str(show(made.train.tree(i), tokenizer, colour=False)) for i in range(len(made.train))]
        return shown, [f"{entry['line']}: {entry['reason']}" for entry in made.ledger.entries]

    return read


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv"])
def test_labels(learnt, name):
    texts, told = learnt(CASES / "labels" / name)
    assert len(texts) == 1
    assert "Honey and wax." in texts[0]
    assert all("marks the answer as undesirable, so it is not learnt" in line for line in told)
    assert len(told) == (3 if name == "d.jsonl" else 2)


def test_turn_marks(learnt):
    texts, told = learnt(CASES / "turn-marks" / "d.jsonl")
    assert told == []
    for text in texts:
        assert "WRONG" in text
        assert "⟦right" in text
        assert "WRONG" not in "".join(part.partition("⟧")[0] for part in text.split("⟦")[1:])


def test_arrow_padding(learnt, tmp_path):
    shutil.copy(CASES / "arrow-padding" / "make.py", tmp_path)
    runpy.run_path(str(tmp_path / "make.py"))
    texts, told = learnt(tmp_path / "same.jsonl")
    assert learnt(tmp_path / "d.parquet") == (texts, told)
    assert len(texts) == 2
    assert "null" not in "".join(texts)


def test_turn_order(learnt):
    texts, told = learnt(CASES / "turn-order" / "d.jsonl")
    assert told == [
        "5: left out messages[0].content: an empty system turn",
        "6: cut 1 turn after the last assistant turn",
    ]
    trained = [text.count("⟦") for text in texts]
    assert trained == [2, 1, 2, 2, 1, 1]
    assert "assistant\n⟦Hello, how can I help?<|im_end|>⟧" in texts[0]
    assert "user\nHi<|im_end|>\n<|im_start|>user\nWhat is ice?" in texts[1]
    assert "system\nIt is noon.<|im_end|>" in texts[2]
    assert "⟦Frozen<|im_end|>⟧\n<|im_start|>assistant\n⟦water.<|im_end|>⟧" in texts[3]


@pytest.mark.parametrize(
    ("name", "mapping", "remedy"),
    [
        ("d.jsonl", {"roles": {"customer": "user", "agent": "assistant"}}, "roles: {customer: user, agent: assistant}"),
        (
            "d2.jsonl",
            {"columns": {"messages": "dialog"}, "turn_keys": {"role": "speaker", "content": "utterance"}},
            "columns: {messages: dialog}, turn_keys: {role: speaker, content: utterance}",
        ),
    ],
)
def test_role_names(learnt, name, mapping, remedy):
    path = CASES / "role-names" / name
    with pytest.raises(UserError, match=remedy):
        learnt(path)
    texts, told = learnt(path, **mapping)
    assert (len(texts), told) == (2, [])
    assert "user\nMy parcel is late.<|im_end|>" in texts[0]
    assert "⟦I will look it up for you.<|im_end|>⟧" in texts[0]
