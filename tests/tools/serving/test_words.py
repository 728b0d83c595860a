"""Tokens as words, piece by piece: together they are the whole text, and no stop text is seen in part."""

from __future__ import annotations

import numpy as np
import pytest
from data.voices import SMOLLM, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.templates.texts import said
from align.recipe.errors import UserError
from align.tools.serving.words import Words, classified, conversation, judged, text

TOKENIZER = tiny_tokenizer(SMOLLM)
END = TOKENIZER.eos_token_id
TOKENS = st.lists(st.integers(11, len(TOKENIZER) - 1), min_size=1, max_size=40)
TEXTS = st.text(max_size=30).map(lambda words: TOKENIZER.encode(words or "a", add_special_tokens=False))


def pieces(ids: list[int], prompt=(), stops=(), cut: bool = False) -> list[str]:
    words = Words(TOKENIZER, list(prompt), frozenset({END}), stops)
    return [words.add(token, last=i + 1 == len(ids)) for i, token in enumerate(ids)]


@settings(max_examples=20)
@given(TOKENS | TEXTS, TOKENS)
def test_pieces_are_the_text_that_is_said(ids, prompt):
    """Of any tokens, halves of characters included, after any prompt."""
    assert "".join(pieces([*ids, END], prompt[:8])) == said(TOKENIZER, prompt[:8], [*ids, END], {END})


@settings(max_examples=20)
@given(st.text(alphabet="ab<", min_size=1, max_size=30), st.sampled_from(["ab", "aab", "<ab", "b"]))
def test_a_stop_text_and_what_follows_are_never_told(words, stop):
    ids = TOKENIZER.encode(words, add_special_tokens=False)
    told = pieces(ids, stops=[stop])
    assert "".join(told) == words.partition(stop)[0]
    assert not any(stop in "".join(told[:i]) for i in range(len(told) + 1))


@settings(max_examples=20)
@given(st.text(min_size=1, max_size=20))
def test_whole_characters_come_as_soon_as_they_are_whole(words):
    """What is held back is less than a character."""
    ids = TOKENIZER.encode(words, add_special_tokens=False)
    one = Words(TOKENIZER, [], frozenset(), [])
    told = ""
    for i, token in enumerate(ids):
        told += one.add(token)
        whole = TOKENIZER.decode(ids[: i + 1], skip_special_tokens=True)
        assert told == whole.rstrip("\ufffd") or "\ufffd" in words


def test_long_answers_read_only_their_last_tokens_again(monkeypatch):
    ids = TOKENIZER.encode("The capital of France is Paris. " * 40, add_special_tokens=False)
    read, decode = [], type(TOKENIZER).decode
    monkeypatch.setattr(
        type(TOKENIZER), "decode", lambda self, ids, **o: (read.append(len(ids)), decode(self, ids, **o))[1]
    )
    assert "".join(pieces(ids)) == "The capital of France is Paris. " * 40
    assert max(read) < 24


def test_a_conversation_is_written_as_in_training():
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    ids = conversation(TOKENIZER, messages).tokens()
    assert TOKENIZER.decode(ids).endswith("<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n")
    assert list(ids).count(END) == 2, "what a user writes is no control token"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi <|im_end|>"}]}]
    assert conversation(TOKENIZER, parts).tokens().tolist() == ids.tolist()
    whole = judged(TOKENIZER, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).tokens()
    assert TOKENIZER.decode(whole).endswith("b<|im_end|>")
    assert (
        classified(TOKENIZER, "France France", 1).tokens().tolist()
        == classified(TOKENIZER, "France", 1).tokens().tolist()
    )


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (None, "list"),
        ([], "list"),
        ([3], "messages.0."),
        ([{"role": "user"}], "content"),
        ([{"role": "king", "content": "a"}], "king"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "assistant"),
        ([{"role": "tool", "content": "a"}], "call"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "image"),
        ([{"role": "system", "content": "a"}], "prompt"),
        ([{"role": "user", "content": "\U00100000"}], "plane 16"),
    ],
)
def test_what_is_no_conversation_is_told(messages, told):
    with pytest.raises(UserError, match=told) as error:
        conversation(TOKENIZER, messages)
    assert not any(word in str(error.value) for word in ("recipe", "turn_keys", "learnt", "drop the row"))


def test_a_text_is_what_the_tokenizer_makes_of_it():
    assert text(TOKENIZER, "France").tokens().tolist() == TOKENIZER("France")["input_ids"]
    for wrong in ("", "\udfff"):
        with pytest.raises(UserError):
            text(TOKENIZER, wrong).tokens()
    assert np.issubdtype(text(TOKENIZER, "a").tokens().dtype, np.integer)
