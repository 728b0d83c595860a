"""Every row of real conversation files renders, and exactly what its assistant says is trained."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from align.data.formats.formats import Row, read_rows
from align.data.mixture import prepare
from align.data.templates.render import conversations, render_rows
from align.data.templates.templates import chat_tokenizer
from align.recipe.errors import UserError
from align.recipe.schema import Data, Source

SHARED = Path(__file__).parents[3] / "shared"
BASE = SHARED / "models" / "stories260k"
pytestmark = pytest.mark.skipif(not BASE.is_dir(), reason="the shared models and data are not here")

ZH = str(SHARED / "data/sharegpt_zh/sharegpt_zh_1K_format.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(AutoTokenizer.from_pretrained(BASE), None)


def _said(message: dict) -> str:
    """An assistant's turn as the plain template ends it."""
    calls = "".join(
        f"\n<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", [])
    )
    return (f" {message['content']}" if message["content"] else "") + calls + "</s>"


@pytest.mark.parametrize(
    ("file", "limit", "count"),
    [
        ("llamafactory/alpaca_en_demo.json", None, 999),
        ("llamafactory/glaive_toolcall_en_demo.json", None, 300),
        ("llamafactory/v1_sft_demo.jsonl", None, 500),
        ("sharegpt_zh/sharegpt_zh_1K_format.jsonl", 300, 299),
    ],
)
def test_all_rows_render(tokenizer, file, limit, count):
    source = Source(path=str(SHARED / "data" / file), limit=limit)
    rows = [row for row in read_rows(source) if isinstance(row, Row)]
    assert len(rows) == count
    for row, ((ids,), (trained,), *_) in zip(rows, render_rows(rows, tokenizer, "assistant"), strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]))).reshape(-1, 2)
        said = [message for message in row.messages if message["role"] == "assistant"]
        assert len(edges) == len(said), f"{row.file}:{row.line}"
        for (first, last), message in zip(edges, said, strict=True):
            # A decoder drops the blank that a text begins with, so one token of the header goes first.
            header = tokenizer.decode(ids[first - 1 : first])
            assert tokenizer.decode(ids[first - 1 : last]).removeprefix(header) == _said(message)


def test_rows_that_cannot_be_taken_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError) as error:
        prepare(Data(train=[Source(path=ZH)], max_length=1_000_000), tokenizer, conversations("assistant"), 0, tmp_path)
    places = [problem.split(": ")[0] for problem in error.value.problems[:-1]]
    assert places == [f"{ZH}:59", f"{ZH}:781"]
    data = Data(train=[Source(path=ZH)], max_length=2048, overlong="drop", invalid="drop", eval={"fraction": 0.1})
    made = prepare(data, tokenizer, conversations("assistant"), 0, tmp_path)
    assert len(made.train) + len(made.eval) + made.ledger.count("dropped") == 1000
    assert made.ledger.dropped["invalid"] == 2
    assert max(made.train.lengths) <= 2048
