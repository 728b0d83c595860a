"""Real base models: the numbers that transformers computes token by token, and the words that they are known for."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.data.trees import Tree, plant
from align.models.base import load_base, load_tokenizer
from align.models.demo import NAMES, cache_folder, demo_model
from align.models.sampling.decode import answer
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model
from align.training.meters import perplexity

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "The perplexity of a text is exp of its mean negative log-likelihood.\n\n1. Count tokens.\n2. Sum.\n3. Divide.",
    "def add(a, b):\n    return a + b  # 1234567890",
    "写一首关于春天的诗。春风拂面，花开满园。",
    "Yes",
]


@pytest.fixture(scope="module")
def smollm2() -> Model:
    """The demo model, if it was converted before or can be fetched now."""
    try:
        demo_model(NAMES[0])
    except UserError as error:
        pytest.skip(f"no demo model in {cache_folder()}, and none can be fetched: {error.problems[0]}")
    return Model(base=NAMES[0], dtype="float32")


@pytest.fixture(scope="module")
def stories() -> Model:
    if not STORIES.is_dir():
        pytest.skip("the shared models are not beside the project")
    return Model(base=str(STORIES), dtype="float32")


def trunk_on(section: Model) -> Trunk:
    return Trunk(load_base(section, torch.device("cpu"), frozen=True), section, Lora())


def token_by_token(model: PreTrainedModel, ids: list[int]) -> float:
    """Sum of negative log-likelihoods of `ids[1:]`, each read off one step of transformers' cached decoding."""
    cache, total = None, 0.0
    with torch.no_grad():
        for token, following in pairwise(ids):
            out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            total -= float(out.logits[0, -1].double().log_softmax(-1)[following])
    return total


@pytest.mark.parametrize("which", ["smollm2", "stories"])
def test_perplexity_is_transformers_own_token_by_token(which, request):
    section = request.getfixturevalue(which)
    trunk = trunk_on(section)
    assert trunk.layout == "tree"
    texts = [trunk.tokenizer(text)["input_ids"] for text in TEXTS]
    texts = [ids for ids in texts if len(ids) > 1]
    trees = [Tree((np.array(ids, np.int32),), (np.ones(len(ids), bool),)) for ids in texts]
    with torch.no_grad():
        forest = plant(trees)
        nll = torch.zeros(len(trees), dtype=torch.float64).index_add_(0, forest.path, -trunk(forest).double())
    folder = trunk.causal.active_peft_config.base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ids, ours in zip(texts, nll.tolist(), strict=True):
        count = len(ids) - 1
        assert perplexity(ours, count) == pytest.approx(math.exp(token_by_token(model, ids) / count), rel=1e-5)


def test_smollm2_answers(smollm2):
    said = answer(trunk_on(smollm2), "What is the capital of France?", 16, "chat")
    assert said == "The capital of France is Paris."


def test_smollm2_splits_digits_before_bytes(smollm2):
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1.")["input_ids"]) == ["ĊĊ", "1", "."]
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024")["input_ids"]) == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_stories_tells_its_known_story(stories):
    page = (STORIES / "stories260K.md").read_text("utf-8")
    story = page[page.index("Once upon a time") : page.index("Don't worry, Lily. We can help you.")]
    trunk = trunk_on(stories)
    begin = trunk.tokenizer(trunk.tokenizer.bos_token, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with trunk.generating() as model:
        ids = model.generate(begin, max_new_tokens=200, do_sample=False, pad_token_id=0, eos_token_id=2)
    told = trunk.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert len(ids[0]) == 201
    assert len(told) > 400
    assert story.startswith(told)
