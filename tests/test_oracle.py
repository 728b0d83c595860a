"""On one batch, our SFT loss and gradients equal TRL's, and so do the tokens that they are taken over."""

from __future__ import annotations

import numpy as np
import pytest
from data.voices import make_row
from models.tiny import tiny_model, tiny_tokenizer, tiny_trunk
from oracle import assert_equal, ours, theirs, trained

from align.data.templates.render import render_rows
from align.data.templates.templates import chat_tokenizer
from align.data.trees import Tree
from align.recipe.schema import Lora

TALKS = [
    ["Hi!", "Hello. How can I help?"],
    ["2 + 2?", "4", "And 3 + 3?", "6, of course.", "Thanks", "You are welcome."],
    ["写一首诗", "春风拂面，花开满园。"],
    ["Say nothing much", "ok"],
]
TURNS = [
    [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(talk)] for talk in TALKS
]
# The template's words with the marks that TRL needs to find an assistant's.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_assistant_turns(family, lora, tmp_path):
    trunk = tiny_trunk(family, Lora(r=4, alpha=8) if lora else None)
    tokenizer = chat_tokenizer(tiny_tokenizer(), "chatml")
    trees = render_rows([make_row(turns) for turns in TURNS], tokenizer, "assistant")
    marked = tiny_tokenizer()
    marked.chat_template = MARKED
    rows = [{"messages": turns} for turns in TURNS]
    expected = theirs(tiny_model(family), marked, rows, trained(trunk), tmp_path, lora=lora, assistant_only_loss=True)
    found = ours(trunk, trees)
    # What the template writes after the last end of turn is left off; nothing of it is learnt, and nothing comes after.
    for (own, marks), (ids, labels) in zip(found.rows, expected.rows, strict=True):
        assert (own, marks) == (ids[: len(own)], labels[: len(own)])
        assert (ids[len(own) :], labels[len(own) :]) == (tokenizer("\n")["input_ids"], [-100])
    assert_equal(found, expected)


def test_last_turns_are_completions(tmp_path):
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))
    tokenizer = chat_tokenizer(tiny_tokenizer(), "chatml")
    trees = render_rows([make_row(turns) for turns in TURNS], tokenizer, "last")
    rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in TURNS]
    weights = trained(trunk)
    expected = theirs(tiny_model("llama"), tokenizer, rows, weights, tmp_path, lora=True, completion_only_loss=True)
    # TRL learns the line break that the template writes after the end of a turn; we stop at the end of turn.
    (line_break,) = tokenizer("\n")["input_ids"]
    for (ids, labels), (own, marks) in zip(expected.rows, ours(trunk, trees).rows, strict=True):
        assert ids[-1] == labels[-1] == line_break
        assert (ids[:-1], labels[:-1]) == (own, marks)
    longer = [
        Tree((np.append(ids, np.int32(line_break)),), (np.append(marks, True),))
        for (ids,), (marks,) in (tree[:2] for tree in trees)
    ]
    assert_equal(ours(trunk, longer), expected)


def test_plain_text(tmp_path):
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))
    texts = [words for talk in TALKS for words in talk]
    trees = render_rows([make_row(text=text) for text in texts], tiny_tokenizer(), "all")
    rows = [{"text": text} for text in texts]
    expected = theirs(tiny_model("llama"), tiny_tokenizer(), rows, trained(trunk), tmp_path, lora=True)
    found = ours(trunk, trees)
    assert [ids for ids, _ in found.rows] == [ids for ids, _ in expected.rows]
    assert_equal(found, expected)
