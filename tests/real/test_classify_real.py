"""The published sets for classifiers, byte for byte: every row is read, and the classes are learnt."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from world import align, metrics

from align import classify
from align.data.formats.classes import counts, find_labels, formats, prepare_classes
from align.data.formats.formats import Row, read_rows
from align.models.base import load_tokenizer
from align.recipe.schema import Data, Eval, Model, Source

SHARED = Path(__file__).parents[3] / "shared"
SMS, SST = SHARED / "data" / "sms_spam" / "SMSSpamCollection", SHARED / "data" / "sst2"
STORIES = SHARED / "models" / "stories260k"
RECIPES = Path(__file__).parents[2] / "recipes"

pytestmark = pytest.mark.skipif(not SMS.is_file(), reason=f"{SMS} is not here")


def spam(**options) -> Source:
    return Source(path=str(SMS), columns={"label": "column1", "text": "column2"}, **options)


def sst(name: str) -> Source:
    return Source(path=str(SST / name), columns={"text": "column1", "label": "column2"})


def test_the_sms_collection_has_all_its_rows_and_quotes():
    rows = list(read_rows(spam(), formats(["ham", "spam"])))
    assert all(isinstance(row, Row) for row in rows)
    assert Counter(row.label for row in rows) == {"ham": 4827, "spam": 747}
    lines = SMS.read_text("utf-8").removesuffix("\n").split("\n")
    assert [f"{row.label}\t{row.text}" for row in rows] == lines
    assert sum(row.text.startswith('"') for row in rows) > 10


def test_the_sentences_have_all_their_rows():
    assert find_labels([sst("train.tsv")]) == ["0", "1"]
    taken = [Counter(row.label for row in read_rows(sst(name), formats(None))) for name in ("train.tsv", "dev.tsv")]
    assert taken == [{"1": 3610, "0": 3310}, {"1": 444, "0": 428}]


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")
def test_the_balanced_protocol_and_the_full_set(tmp_path):
    tokenizer = load_tokenizer(Model(base=str(STORIES)))
    data = Data(train=[spam()], eval=Eval(fraction=0.1), max_length=512, overlong="truncate")

    def sides(undersample):
        return prepare_classes(data, Eval(fraction=0.2), undersample, ["ham", "spam"], tokenizer, 17, tmp_path)

    balanced = sides(True)
    each = [counts(side, 2) for side in (balanced.data.train, balanced.data.eval, balanced.test)]
    assert np.sum(each, 0).tolist() == [747, 747]
    assert [int(side.sum()) for side in each] == pytest.approx([1046, 149, 299], abs=3)
    assert "undersampled: 4,080 rows of the frequent classes are left out" in balanced.data.summary
    whole = sides(False)
    assert len(whole.data.train) + len(whole.data.eval) + len(whole.test) == 5574
    prompts = [
        set(np.concatenate([part.store.prompt[part.rows] for part in side.parts]).tolist())
        for side in (whole.data.train, whole.data.eval, whole.test)
    ]
    assert len(set.union(*prompts)) == sum(map(len, prompts))  # no text on two sides
    assert any("403 exact duplicates" in line for line in whole.data.summary)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")
def test_a_small_real_model_learns_spam_by_the_shipped_recipe(here):
    """260,000 parameters that have only read children's stories tell spam from ham, in half a minute."""
    told = align(
        RECIPES / "spam.yaml", f"data.train.0.path={SMS}", f"model.base={STORIES}", "run=run", "log.trackers=[]",
        "data.max_length=512", "train.epochs=1", "optim.learning_rate=3e-3", stage=classify,
    )  # fmt: skip
    assert told.status == 0, told.err
    last = metrics(here / "run", "test")[-1]
    assert 290 <= last["examples"] <= 305
    assert last["accuracy"] > 0.85
    assert last["auroc"] > 0.93
    results = json.loads((here / "run" / "classification.json").read_text())
    assert results["splits"]["test"]["examples"] == last["examples"]
    assert all(Path(row["where"].rsplit(":", 1)[0]) == SMS for row in results["mistakes"])
