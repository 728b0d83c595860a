"""Merged reward models and classifiers: heads, labels, and where a score is read."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from models.tiny import save_base, save_encoder, tiny_tokenizer
from peft import AutoPeftModelForSequenceClassification
from plain import Scorer
from results import KINDS as SCORING
from results import save_result
from test_merge import IDS, logits, merged, refused
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from align.recipe.schema import Lora


@pytest.mark.parametrize("make", [save_base, save_encoder], ids=["decoder", "encoder"])
@pytest.mark.parametrize("stage", ["reward", "classify"])
def test_what_scores_texts_keeps_its_head_and_its_labels(stage, make, tmp_path):
    """As a file and merged, for plain transformers and peft."""
    base = make(tmp_path / "base")
    outputs, about = SCORING[stage]
    save_result(base, tmp_path / "final", stage, outputs, about, Lora(r=2, alpha=4))
    merged(tmp_path / "final", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "final" / "base_config.json")
    ways = [
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "final", num_labels=outputs),
        AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path / "final", id2label=config.id2label, label2id=config.label2id, problem_type=config.problem_type
        ),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", config=config),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", num_labels=outputs),
    ]
    for plain in ways:
        plain.config.pad_token_id = 2
        assert logits(model).shape == (1, outputs)
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    labels = about.get("labels", ["reward"])
    for named in (model, *ways[1:3]):
        assert named.config.id2label == dict(enumerate(labels))
        assert named.config.label2id == {label: number for number, label in enumerate(labels)}
        assert named.config.problem_type == ("regression" if outputs == 1 else "single_label_classification")
    tell = pipeline("text-classification", model=ways[2], tokenizer=AutoTokenizer.from_pretrained(tmp_path / "final"))
    assert tell("A text.")[0]["label"] in labels
    if stage == "classify":
        assert "only scores" in refused(tmp_path / "final", tmp_path / "file", "--modelfile")


@pytest.mark.parametrize("ends", ["<|endoftext|>", "<|im_start|>"])
def test_a_score_is_read_where_the_text_ends(world, tmp_path, ends):
    """The tokenizer pads with the end of turn, and transformers reads a score before the padding: the merged checkpoint
    has another padding token, whatever ends a plain text. So its card's code gives what the adapter gives."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {ends}", special_tokens=[(ends, tokenizer.convert_tokens_to_ids(ends))]
    )
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    tokenizer.save_pretrained(base)
    save_result(base, tmp_path / "final", "reward", *SCORING["reward"], Lora(r=2, alpha=4))
    scorer = Scorer.load(tmp_path / "final", base)
    assert tokenizer.pad_token == "<|im_end|>"
    out = tmp_path / "out"
    merged(tmp_path / "final", out)
    card = (out / "README.md").read_text()
    told = io.StringIO()
    with redirect_stdout(told):
        exec(card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(out)), {})
    asked, said = re.findall(r'"content": "([^"]*)"', card)
    assert float(told.getvalue()) == pytest.approx(scorer.score(asked, said), abs=1e-4)

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token not in ("<|im_end|>", ends)
    assert f"padding token | {tokenizer.pad_token}" in card.replace("\\", "")
    answers = ["Yes.", "It is a longer answer."]
    talks = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}] for answer in answers]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False).rstrip() for talk in talks]
    for side in ("left", "right"):
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt")
        found = model(**inputs).logits[:, 0].tolist()
        assert found == pytest.approx([scorer.score("Hi", answer) for answer in answers], abs=1e-4)


def test_without_a_token_to_pad_with_rows_are_read_alone(tmp_path):
    """Every special token is an end: transformers refuses a batch, and does not read it wrongly."""
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] == "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(save_base(tmp_path / "base"))
    save_result(tmp_path / "base", tmp_path / "final", "reward", *SCORING["reward"], Lora(r=2, alpha=4))
    said = merged(tmp_path / "final", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "one row at a time" in said
    assert "one row at a time" in card
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="no padding token"):
        model(IDS.repeat(2, 1))
