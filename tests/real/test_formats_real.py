"""Published data sets, byte for byte: every row is taken, or told with its line and the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.data.formats.formats import Fault, Row, describe, read_rows
from align.recipe.schema import Source

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the published data sets are not beside the project")

NO_ANSWER = "conversations: expected an assistant turn to learn from, found none"
EMPTY = "conversations[2].value: expected text, found an empty text"
NO_CALL = "conversations[2].from: this tool turn answers no call: there are more results than calls"

SETS = {  # file: (format, rows, faults by line, turns, calling turns); counted apart from this package
    "llamafactory/alpaca_en_demo.json": ("alpaca", 999, {}, 1998, 0),
    "llamafactory/alpaca_zh_demo.json": ("alpaca", 1000, {}, 2000, 0),
    "sharegpt_zh/sharegpt_zh_1K_format.jsonl": ("sharegpt", 998, {59: EMPTY, 781: NO_ANSWER}, 8686, 0),
    "llamafactory/v1_sft_demo.jsonl": ("messages", 500, {}, 1000, 0),
    "llamafactory/glaive_toolcall_en_demo.json": ("sharegpt", 300, {}, 1914, 211),
    "llamafactory/glaive_toolcall_zh_demo.json": ("sharegpt", 298, {5819: NO_CALL, 8763: NO_CALL}, 1868, 216),
    "llamafactory/reason_tool_use_demo_50.jsonl": ("messages", 50, {}, 274, 53),
    "sharegpt_dummy/dummy_conversation.json": ("sharegpt", 500, {}, 2000, 0),
    "instruction/instruction-data.json": ("alpaca", 1100, {}, 2200, 0),
    "gsm8k/train.jsonl": ("prompt_completion", 7473, {}, 14946, 0),
    "llamafactory/c4_demo.jsonl": ("text", 300, {}, 0, 0),
    "llamafactory/wiki_demo.txt": ("text", 30, {}, 0, 0),
}


@pytest.mark.parametrize("file", SETS)
def test_rows_faults_and_turns_are_counted_exactly(file):
    format, count, faults, turns, calls = SETS[file]
    columns = {"prompt": "question", "completion": "answer"} if file.startswith("gsm8k") else {}
    source = Source(path=str(DATA / file), columns=columns)
    assert describe(source).startswith(f"{source.path}: {format} (")
    out = list(read_rows(source))
    rows = [row for row in out if isinstance(row, Row)]
    assert {fault.line: fault.reason for fault in out if isinstance(fault, Fault)} == faults
    assert len(rows) == count
    messages = [message for row in rows for message in row.messages or ()]
    assert len(messages) == turns
    assert sum("tool_calls" in message for message in messages) == calls
    assert {message["role"] for message in messages} <= {"system", "user", "assistant", "tool"}


def test_conversations_that_end_on_the_human_are_cut_and_told():
    rows = read_rows(Source(path=str(DATA / "sharegpt_zh/sharegpt_zh_1K_format.jsonl")))
    repaired = [row for row in rows if isinstance(row, Row) and row.repairs]
    assert len(repaired) == 6
    assert {row.repairs for row in repaired} == {("cut 1 turn after the last assistant turn",)}
    assert all(row.messages[-1]["role"] == "assistant" for row in repaired)
