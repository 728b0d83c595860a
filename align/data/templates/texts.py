"""Tokens as the text that they write."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids (n,), without special tokens and letter by letter as it was written."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def said(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    response: Sequence[int],
    ends: Collection[int] = (),
    stops: Collection[str] = (),
) -> str:
    """What a response, token ids (k,), adds to the text of its prompt, token ids (l,).

    prompt + response is the text of all tokens decoded together: many decoders drop the blank before the first token,
    so a response decoded alone would lose one. A last token that is one of `ends` is no part of the text, nor is a text
    of `stops` that ends it, nor are special tokens. Where the prompt ends within a character, the response begins with
    that character.
    """
    before = decoded(tokenizer, prompt).rstrip("\ufffd")
    kept = response[:-1] if len(response) and int(response[-1]) in ends else response
    whole = decoded(tokenizer, [*prompt, *kept])
    # A decoder that rewrites what it wrote before has no such beginning; then the response's own text is all there is.
    text = whole[len(before) :] if whole.startswith(before) else decoded(tokenizer, kept)
    stop = next((stop for stop in stops if text.rstrip().endswith(stop)), "")
    return text.rstrip().removesuffix(stop) if stop else text
