"""On batches of published pairs, our preference losses and gradients equal TRL's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from models.tiny import stir
from oracle import assert_equal, trained
from preference_oracle import Pair, dpo, reward, told, trl_dpo, trl_reward
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from align.models.base import load_base, load_tokenizer
from align.models.demo import NAMES, cache_folder
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260k"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models and data are not beside the project")

LORA = Lora(r=4, alpha=8)
Talk = tuple[list[dict], str, str]  # the turns of the prompt, and the two answers


def harmless() -> list[Talk]:
    """HH transcripts that part at the last turn."""
    talks = []
    for row in _rows("hh_harmless/rows_0_1499.jsonl"):
        sides = [row[side].rpartition("\n\nAssistant: ") for side in ("chosen", "rejected")]
        if sides[0][0] == sides[1][0]:
            parts = re.split(r"\n\n(Human|Assistant): ", sides[0][0])[1:]
            roles = [{"Human": "user", "Assistant": "assistant"}[role] for role in parts[::2]]
            turns = [{"role": r, "content": c} for r, c in zip(roles, parts[1::2], strict=True)]
            talks.append((turns, sides[0][2], sides[1][2]))
    return talks


def ultrafeedback() -> list[Talk]:
    rows = _rows("ultrafeedback/train_clean.jsonl")
    return [([{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"]) for row in rows]


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHARED / "data" / name).read_text("utf-8").splitlines()]


def short_pairs(talks: list[Talk], tokenizer: PreTrainedTokenizerBase, count: int = 3) -> list[Pair]:
    """Token ids of the shortest talks; every answer ends with the end of its turn."""
    pairs = []
    for turns, *answers in sorted((talk for talk in talks if all(talk[1:])), key=lambda talk: len(json.dumps(talk))):
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        wholes = [
            tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], return_dict=False)
            for answer in answers
        ]
        if answers[0] != answers[1] and all(whole[: len(prompt)] == prompt for whole in wholes):
            pairs.append(Pair(prompt, *(_to_end_of_turn(whole[len(prompt) :], tokenizer) for whole in wholes)))
        if len(pairs) == count:
            break
    return pairs


def _to_end_of_turn(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else [*ids, end]


@pytest.fixture(params=["stories260k", "smollm2"])
def folder(request) -> Path:
    if request.param == "stories260k":
        return STORIES
    smollm2 = cache_folder() / "demo" / "smollm2-135m"
    if not (smollm2 / "config.json").is_file():
        pytest.skip(f"no demo model in {cache_folder()}; {NAMES[0]} is converted when it is first used")
    return smollm2


@pytest.fixture(params=[harmless, ultrafeedback])
def talks(request) -> list[Talk]:
    return request.param()


def loaded(folder: Path, outputs: int | None = None, dtype: str = "float32") -> Trunk:
    section = Model(base=str(folder), dtype=dtype)
    base = load_base(section, torch.device("cpu"), frozen=True, outputs=outputs)
    return Trunk(base, section, LORA, outputs=outputs)


@pytest.mark.parametrize(
    ("folder", "kind", "settings"),
    [
        ("smollm2", "sigmoid", {"beta": 0.1}),
        ("stories260k", "sigmoid", {"beta": 0.1}),
        ("stories260k", "ipo", {"beta": 0.2}),
        ("stories260k", "hinge", {"beta": 0.1}),
        ("stories260k", "robust", {"beta": 0.1, "label_smoothing": 0.1}),
        ("stories260k", "aot", {"beta": 0.1, "label_smoothing": 0.2}),  # of one pair: `sigmoid`, labels smoothed
    ],
    indirect=["folder"],
)
def test_dpo(folder, talks, kind, settings, tmp_path):
    trunk = loaded(folder)
    tokenizer = load_tokenizer(Model(base=str(folder)))
    pairs = short_pairs(talks, tokenizer, count=1 if kind == "aot" else 3)
    _stir(trunk)
    found = told(trunk, dpo(trunk, pairs, "sigmoid" if kind == "aot" else kind, **settings))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_equal(found, trl_dpo(model, tokenizer, pairs, trained(trunk), tmp_path, kind, **settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_equal_to_the_reference_gives_log_2(folder, dtype):
    """To the last bit; two pairs, so that their mean is not rounded."""
    pairs = short_pairs(harmless(), load_tokenizer(Model(base=str(folder))), count=2)
    assert dpo(loaded(folder, dtype=dtype), pairs, "sigmoid", 0.1).item() == torch.tensor(2.0).log().item()


def test_reward(folder, talks, tmp_path):
    trunk = loaded(folder, outputs=1)
    _stir(trunk)
    tokenizer = load_tokenizer(Model(base=str(folder)))
    pairs = short_pairs(talks, tokenizer)
    # With its own pad token, which ends every answer, TRL would read the token before the end.
    tokenizer.pad_token = tokenizer.unk_token
    found = told(trunk, reward(trunk, pairs, [0.5, 0.0, 1.0], 0.01))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    expected = trl_reward(model, tokenizer, pairs, trained(trunk), tmp_path, [0.5, 0.0, 1.0], 0.01)
    # Through thirty layers float32 leaves 1 to 2e-5 between the gradient of a score, TRL's too, and its own in float64.
    assert_equal(found, expected, rtol=1e-5 if folder == STORIES else 5e-5)


def _stir(trunk: Trunk) -> None:
    """As far as training goes: enough for every pair to have a ratio of its own, few enough to keep its digits."""
    stir(trunk)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if "lora_B" in name:
                p *= 0.1
