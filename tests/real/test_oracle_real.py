"""On a batch of published rows, our SFT loss and gradients equal TRL's."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import assert_equal, ours, theirs, trained
from transformers import AutoModelForCausalLM

from align.data.formats.formats import Row, read_rows
from align.data.templates.render import render_rows
from align.data.trees import Tree
from align.models.base import load_base, load_tokenizer
from align.models.demo import NAMES, cache_folder
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model, Source

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260k"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models and data are not beside the project")


def harmless() -> list[list[dict]]:
    """The chosen sides of HH transcripts, as turns."""
    talks = []
    with (SHARED / "data/hh_harmless/rows_0_1499.jsonl").open(encoding="utf-8") as lines:
        for line in islice(lines, 12):
            parts = re.split(r"\n\n(Human|Assistant): ", json.loads(line)["chosen"])[1:]
            roles = [{"Human": "user", "Assistant": "assistant"}[role] for role in parts[::2]]
            talks.append([{"role": r, "content": c} for r, c in zip(roles, parts[1::2], strict=True)])
    return [talk for talk in talks if all(turn["content"].strip() for turn in talk)]


def alpaca() -> list[list[dict]]:
    rows = read_rows(Source(path=str(SHARED / "data/llamafactory/alpaca_en_demo.json"), limit=12))
    return [list(row.messages) for row in rows if isinstance(row, Row)]


@pytest.fixture(params=["stories260k", "smollm2"])
def base(request) -> tuple[Model, Path]:
    folder = STORIES
    if request.param == "smollm2":
        folder = cache_folder() / "demo" / "smollm2-135m"
        if not (folder / "config.json").is_file():
            pytest.skip(f"no demo model in {cache_folder()}; {NAMES[0]} is converted when it is first used")
    return Model(base=str(folder), dtype="float32"), folder


@pytest.mark.parametrize("talks", [harmless, alpaca])
def test_last_turns(base, talks, tmp_path):
    """The whole conversation before the last turn is the prompt; what TRL learns of it is what we learn."""
    section, folder = base
    trunk = Trunk(load_base(section, torch.device("cpu"), frozen=True), section, Lora(r=4, alpha=8))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02, generator=draw)
    tokenizer = load_tokenizer(section)
    kept = sorted(talks(), key=lambda talk: sum(len(turn["content"]) for turn in talk))[:3]
    assert len(kept) == 3
    trees = render_rows([Row("rows", i, talk, None, None) for i, talk in enumerate(kept)], tokenizer, "last")
    rows = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in kept]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs(model, tokenizer, rows, trained(trunk), tmp_path, lora=True, completion_only_loss=True)
    # TRL learns the template's blanks after the end of the last turn too; these aside, the same tokens.
    longer = []
    for (ids, labels), tree in zip(expected.rows, trees, strict=True):
        own, learnt = tree.segments[0].tolist(), torch.tensor(labels).ne(-100).numpy()
        assert own == ids[: len(own)]
        assert tree.trained[0].tolist() == learnt[: len(own)].tolist()
        assert not tokenizer.decode(ids[len(own) :]).strip()
        longer.append(Tree((np.array(ids, np.int32),), (learnt,)))
    assert_equal(ours(trunk, longer), expected)
