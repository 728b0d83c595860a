"""A real base, fine-tuned and merged: plain transformers answer with the merged checkpoint as with the adapter."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from world import align

from align import merge
from align.models.demo import NAMES, cache_folder, demo_model
from align.recipe.errors import UserError
from align.tools.merging.compared import difference, logits_of, probes

ROOT = Path(__file__).parents[2]
ASKED = [
    "How do I keep cut flowers fresh for longer?",
    "Why is the sky blue?",
    "Name a planet.",
    "怎样养成早睡的习惯？",
]


def answers(model: PreTrainedModel, folder: Path) -> list[str]:
    """Greedy answers by transformers' own `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    said = []
    for text in ASKED:
        talk = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.eval().generate(**chat, max_new_tokens=32, do_sample=False)[0, chat["input_ids"].shape[1] :]
        said.append(tokenizer.decode(ids))
    return said


def check_logits(unmerged: PeftModel, merged: PreTrainedModel, final: Path) -> None:
    """In float32 the two differ by no more than the noise of float32. What merging itself has changed, the rounding of
    its weights, is what they differ by in float64."""
    unmerged, merged = deepcopy(unmerged).eval(), deepcopy(merged).eval()
    given = probes(AutoTokenizer.from_pretrained(final), len(merged.get_input_embeddings().weight))
    noisy, exact = (
        difference(*(logits_of(model.to(dtype), given) for model in (unmerged, merged)))
        for dtype in (torch.float32, torch.float64)
    )
    assert noisy.largest < 1e-5 * noisy.scale
    assert 0 < exact.largest < 1e-4


@pytest.mark.slow
def test_a_merged_smollm2_answers_as_base_and_adapter(tmp_path, monkeypatch):
    try:
        demo_model(NAMES[0])
    except UserError as error:
        pytest.skip(f"no demo model in {cache_folder()}, and none can be fetched: {error.problems[0]}")
    monkeypatch.chdir(ROOT)
    short = ["train.steps=4", "batch.examples=2", "optim.learning_rate=2e-3", "data.eval.max_rows=1", "log.samples=[]"]
    told = align("recipes/chat.yaml", f"run={tmp_path / 'chat'}", "model.dtype=float32", *short)
    assert told.status == 0, told.err
    final, out = tmp_path / "chat" / "final", tmp_path / "merged"
    told = align(tmp_path / "chat", out, stage=merge)
    assert told.status == 0, told.err

    unmerged = AutoPeftModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    base = unmerged.get_base_model()
    said = answers(unmerged, final)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.float32
    assert answers(merged, out) == said
    check_logits(unmerged, merged, final)
    with unmerged.disable_adapter():
        assert answers(base, final) != said  # four steps are enough to tell them apart
