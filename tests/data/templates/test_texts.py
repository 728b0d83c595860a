"""A response is what the text of all tokens has beyond its prompt, whatever the decoder does at a text's beginning."""

from __future__ import annotations

import pytest
from models.tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from align.data.templates.texts import decoded, said

PIECES = ["<unk>", "<s>", "</s>", "<0xE2>", "<0x82>", "<0xAC>", "▁a", "▁dog", "s", "▁", "."]


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """As SentencePiece decodes: a blank is part of the word after it, and a text's first blank is dropped."""
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_a_first_blank_is_kept(pieces):
    prompt, response = [1, 6, 7, 8], [6, 7, 10, 2]  # <s>▁a▁dogs | ▁a▁dog.</s>
    assert pieces.decode(response, skip_special_tokens=True) == "a dog.", "as the decoder alone has it"
    assert said(pieces, prompt, response) == " a dog."
    assert decoded(pieces, prompt) + said(pieces, prompt, response) == decoded(pieces, prompt + response)
    assert said(pieces, [1], response) == "a dog.", "the blank before the first word of all is no part of the text"
    assert said(pieces, prompt, []) == "" == said(pieces, prompt, [2])


def test_what_ends_the_turn_is_no_part_of_the_text(pieces):
    """Special or not; it stays where it ends nothing."""
    assert said(pieces, [1, 6], [7, 10, 8], ends={8}) == " dog."
    assert said(pieces, [1, 6], [7, 8, 10], ends={8}) == " dogs."


def test_a_character_belongs_to_the_response_that_completes_it(pieces):
    assert said(pieces, [1, 6, 3], [4, 5, 10]) == "€."
    assert said(pieces, [1, 6], [3, 4]) != "", "half a character is not lost"
    tokenizer = tiny_tokenizer()
    ids = tokenizer("né 你好")["input_ids"]
    for place in range(len(ids) + 1):
        before, after = decoded(tokenizer, ids[:place]).rstrip("\ufffd"), said(tokenizer, ids[:place], ids[place:])
        assert before + after == "né 你好"


def test_blanks_stay_as_they_were_written():
    """Though the tokenizer would tidy them up."""
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer("a , b .")["input_ids"]
    assert said(tokenizer, ids[:1], ids[1:]) == " , b ."
