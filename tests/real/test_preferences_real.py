"""Published preferences, byte for byte: every row is taken, or told with its line and the reason; and what the trees
hold is what the template writes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.data.formats.formats import Fault, Row, find, read_rows
from align.data.templates.preferences import labelled, preferences
from align.data.templates.render import conversations
from align.data.templates.templates import chat_tokenizer
from align.models.demo import cache_folder
from align.recipe.schema import Source

SHARED = Path(__file__).parents[3] / "shared"
DATA, STORIES, SMOLLM2 = SHARED / "data", SHARED / "models" / "stories260k", cache_folder() / "demo" / "smollm2-135m"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the published data sets are not beside the project")

SAME = "rejected: expected another answer than chosen, found the same"
EMPTY = "{}: expected text, found an empty text"

SETS = {  # file: (format, rows, faults by line, answers); counted apart from this package
    "hh_harmless/rows_0_1499.jsonl": (
        "transcripts",
        1495,
        {
            87: EMPTY.format("chosen, turn 4"),
            517: EMPTY.format("chosen, turn 2"),
            926: EMPTY.format("chosen, turn 2"),
            1104: EMPTY.format("chosen, turn 2"),
            1255: "rejected: expected the same turns as chosen before the last, found them to part at turn 4 of 5",
        },
        2990,
    ),
    "ultrafeedback/train_clean.jsonl": (
        "pairs",
        994,
        {
            307: SAME,
            479: EMPTY.format("rejected"),
            656: SAME,
            834: EMPTY.format("chosen"),
            911: SAME,
            998: SAME,
        },
        1988,
    ),
    "llamafactory/dpo_en_demo.json": ("pairs", 300, {}, 600),
    "llamafactory/dpo_zh_demo.json": ("pairs", 300, {}, 600),
    "llamafactory/v1_dpo_demo.jsonl": ("pairs", 10, {}, 20),
    "llamafactory/kto_en_demo.json": ("labelled", 300, {}, 300),
    "instruction/instruction-data-with-preference.json": (
        "pairs",
        1094,
        dict.fromkeys((856, 1584, 2802, 3964, 4398, 4734), SAME),
        2188,
    ),
}


def _rows(file: str) -> list[Row | Fault]:
    reading = labelled() if SETS[file][0] == "labelled" else preferences()
    return list(read_rows(Source(path=str(DATA / file)), reading.formats))


@pytest.mark.parametrize("file", SETS)
def test_rows_and_faults_are_counted_exactly(file):
    format, count, faults, answers = SETS[file]
    reading = labelled() if format == "labelled" else preferences()
    assert [found.format for found in find(Source(path=str(DATA / file)), reading.formats)] == [format]
    out = _rows(file)
    rows = [row for row in out if isinstance(row, Row)]
    assert {fault.line: fault.reason for fault in out if isinstance(fault, Fault)} == faults
    assert (len(rows), sum(len(row.answers) for row in rows)) == (count, answers)
    assert not any(row.repairs for row in rows)
    assert {row.messages[-1]["role"] for row in rows} == {"user"}


def test_verdicts_are_read():
    assert sum(row.targets == (1.0,) for row in _rows("llamafactory/kto_en_demo.json")) == 150


@pytest.mark.parametrize("file", [file for file, (format, *_) in SETS.items() if format != "labelled"])
def test_sft_learns_the_best_answers_of_these_files(file):
    format, count, *_ = SETS[file]
    source = Source(path=str(DATA / file))
    formats = conversations("last").formats
    (found,) = find(source, formats)
    assert (found.format, "the best answer is learnt" in found.why) == (format, True)
    best = [row.messages[-1]["content"] for row in read_rows(source, formats) if isinstance(row, Row)]
    assert best == [row.answers[0]["content"] for row in _rows(file) if isinstance(row, Row)]
    assert len(best) == count


@pytest.fixture(scope="module", params=[STORIES, SMOLLM2], ids=["stories260k", "smollm2"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    if not request.param.is_dir():
        pytest.skip(f"{request.param.name} is not here")
    return chat_tokenizer(AutoTokenizer.from_pretrained(request.param), None)


@pytest.mark.parametrize("file", SETS)
def test_trees_hold_what_the_template_writes(tokenizer, file):
    rows = [row for row in _rows(file) if isinstance(row, Row)][:400]
    render = (labelled() if SETS[file][0] == "labelled" else preferences()).render
    for row, tree in zip(rows, render(rows, tokenizer), strict=True):
        assert tree.targets == row.targets
        for answer, (tokens, trained) in zip(row.answers, tree.paths(), strict=True):
            # The same calls that a user of transformers would make.
            whole = tokenizer.apply_chat_template([*row.messages, answer], tokenize=False)
            prompt = tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
            if tree.notes:  # words that look like control tokens are text here: other tokens, which say the same
                assert "stays text" in tree.notes[0]
                said, theirs = ("".join(tokenizer.decode(each).split()) for each in (tokens, ids))
                assert theirs.startswith(said)  # but for blanks, which decoders leave out after control tokens
                continue
            assert tokens.tolist() == ids[: len(tokens)]
            stop = tokenizer.eos_token_id
            assert tokens[-1] == stop
            assert stop not in ids[len(tokens) :]
            begin = int(trained.argmax())
            assert trained[begin:].all()
            asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            np.testing.assert_array_equal(tokens[:begin], asked)
