"""Which template a tokenizer's conversations are written by for training, studied once."""

from __future__ import annotations

from copy import copy
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from align.data.templates.chat import Chat, Unwritable
from align.data.templates.templates import plain_template, special_tokens
from align.recipe.errors import UserError

EVERYTHING = 6  # that `Chat.teaches` counts


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The tokenizer's template or, where that leaves out thoughts or ends of turns, TRL's variant of it for training
    if that writes more of them.

    Raises UserError for a template that cannot write an exchange of two turns.
    """
    own = tokenizer.get_chat_template()
    special = tuple(special_tokens(tokenizer).items())
    stops = tuple(sorted(tokenizer.added_tokens_encoder, key=len, reverse=True))
    try:
        chat = _chat(own, special, stops)
    except Unwritable as error:
        raise UserError(
            f"{error}, though it is an exchange of two turns; give another in model.chat_template"
        ) from None
    if chat.teaches == EVERYTHING:
        return chat
    variant = _variant(tokenizer, own)
    try:
        other = _chat(variant, special, stops)
    except Unwritable:
        return chat
    return other if other.teaches > chat.teaches else chat


@lru_cache(maxsize=32)
def _chat(template: str, special: tuple[tuple[str, str], ...], stops: tuple[str, ...]) -> Chat:
    return Chat(template, dict(special), stops)


_variants: dict[str, str] = {}  # by template


def _variant(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """TRL's variant of a template for training; the template itself where TRL knows none."""
    if template not in _variants:
        from trl.chat_template_utils import get_training_chat_template  # slow to import, rarely needed

        plain = plain_template(template)
        bare = copy(tokenizer)
        bare.chat_template = plain
        try:
            found = get_training_chat_template(bare) or plain
        except Exception:  # it knows no variant, or tries the template on what that cannot take
            found = plain
        _variants[template] = template.replace(plain, found) if plain else template
    return _variants[template]
