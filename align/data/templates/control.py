"""Text that looks like a control token stays text.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands. In what users and assistants say it is text, or
anybody's words could end a turn and begin another. So before a template writes them, such places are *disguised*: each
letter becomes a private-use character, as many as there were, so that places in the text stay what they are. Then the
whole is tokenised by a twin of the tokenizer that has the two exchanged: it knows its control tokens by their
disguise alone, and reads the words as letters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from align.data.formats.rows import Row
from align.data.templates.chat import ANSWER, ASK, Unwritable
from align.data.templates.chats import chat_of
from align.data.templates.thoughts import THINK, THINK_END
from align.recipe.errors import UserError

FIRST, PLANE = 0x100000, 0xFFFE  # Unicode's last private-use plane, and how many characters it has
STRUCTURE = frozenset({  # keys of a message, and the roles and types in it: never words
    "role", "content", "system", "user", "assistant", "tool", "train", "tool_calls", "tool_call_id", "type", "function",
    "name", "arguments", "description", "parameters", "properties", "required", "object", "string", "number", "integer",
    "boolean", "array", "reasoning_content",
})  # fmt: skip
DISGUISED = re.compile("[\U00100000-\U0010fffd]")


class Encoded(NamedTuple):
    """A text's tokens and where each stands in it."""

    ids: np.ndarray  # (n,) int32
    offsets: np.ndarray  # (n, 2) int64, places in the text


class Controls:
    """A tokenizer's control tokens: its special ones, and what its chat template writes around turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = ref(tokenizer)  # it is the key that these are kept under, and may go
        known = tokenizer.added_tokens_decoder.values()
        talk = _exchange(tokenizer)
        tokens = [t.content for t in known if t.special or (t.content in talk and t.content not in (THINK, THINK_END))]
        # A letter that is one is a letter all the same: nothing else could write it.
        named = sorted((t for t in tokens if t.strip() and not _is_letter(t, tokenizer)), key=len)
        self.disguise = {token: _disguise(k, len(token)) for k, token in enumerate(named)}
        self.looks = _any_of(self.disguise)
        self._other = self.disguise | {disguised: token for token, disguised in self.disguise.items()}
        self._either = _any_of(self._other)
        normalizer = tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer
        self._normalises = bool(normalizer) and any(t.normalized for t in known if t.content in self.disguise)
        self._twin: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Whose they are."""
        found = self._tokenizer()
        assert found is not None, "whoever asks for the controls holds the tokenizer"
        return found

    def disguised(self, value: Any) -> Any:
        """The value with what looks like a control token disguised, in all texts inside it. Raises Unwritable for a
        text that holds the characters of a disguise."""
        if isinstance(value, str):
            if DISGUISED.search(value):
                raise Unwritable("it holds private-use characters of Unicode's plane 16, which align needs for itself")
            return self.looks.sub(lambda found: self.disguise[found.group()], value)
        if isinstance(value, list):
            return [self.disguised(item) for item in value]
        if isinstance(value, dict):
            return {self._key(key): self._value(key, item) for key, item in value.items()}
        return value

    def _key(self, key: Any) -> Any:
        return key if key in STRUCTURE else self.disguised(key)

    def _value(self, key: Any, value: Any) -> Any:
        plain = key in ("role", "type") and isinstance(value, str) and value in STRUCTURE
        return value if plain else self.disguised(value)

    def words(self, row: Row, value: Any) -> Any:
        """A part of a row, disguised unless its control tokens are to be read as such. Raises Unwritable."""
        return value if row.control else self.disguised(value)

    def notes(self, text: str) -> tuple[str, ...]:
        """What to say of a row whose text has something in disguise."""
        if not DISGUISED.search(text):
            return ()
        found = dict.fromkeys(
            self._other[each.group()] for each in self._either.finditer(text) if DISGUISED.match(each.group())
        )
        return (f"{', '.join(found)} in its words stays text, and is no control token (see control_tokens)",)

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[Encoded]:
        """Each text as tokens, what is disguised in it as the text that it stands for.

        Raises UserError for a tokenizer without offsets (a slow one).
        """
        if not self.tokenizer.is_fast:
            name = self.tokenizer.name_or_path
            raise UserError(f"{name}: no fast tokenizer, which tells where in the text each token stands")
        odd = [bool(DISGUISED.search(text)) for text in texts]
        plain = [text for text, is_odd in zip(texts, odd, strict=True) if not is_odd]
        exchanged = [self._exchanged(text) for text, is_odd in zip(texts, odd, strict=True) if is_odd]
        by_itself = iter(self._by_itself(plain, add_special_tokens))
        by_twin = iter(_encoded(self.twin, exchanged, add_special_tokens) if exchanged else [])
        return [next(by_twin if is_odd else by_itself) for is_odd in odd]

    def _by_itself(self, texts: list[str], add_special_tokens: bool) -> list[Encoded]:
        """Texts without a disguise. A tokenizer that normalises words before it looks for control tokens in them finds
        some under other spellings, such as `<|IM_END|>`; the twin does not."""
        encoded = _encoded(self.tokenizer, texts, add_special_tokens)
        if not self._normalises:
            return encoded
        ids = self.tokenizer.convert_tokens_to_ids(list(self.disguise))
        for i, (text, each) in enumerate(zip(texts, encoded, strict=True)):
            places = each.offsets[np.isin(each.ids, ids)]
            if {text[begin:end].strip() for begin, end in places} - {"", *self.disguise}:
                (encoded[i],) = _encoded(self.twin, [self._exchanged(text)], add_special_tokens)
        return encoded

    def _exchanged(self, text: str) -> str:
        """Control tokens in disguise, and what was disguised as it is."""
        return self._either.sub(lambda each: self._other[each.group()], text)

    @property
    def twin(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its control tokens under their disguise. Raises UserError where it cannot be had."""
        if self._twin is None:
            self._twin = self._made_twin()
        return self._twin

    def _made_twin(self) -> PreTrainedTokenizerBase:
        about = json.loads(self.tokenizer.backend_tokenizer.to_str())
        renamed = lambda token: self.disguise.get(token, token)  # noqa: E731
        for added in about["added_tokens"]:
            added["content"] = renamed(added["content"])
        model = about["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {renamed(token): number for token, number in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):  # unigrams, each with its score
            model["vocab"] = [[renamed(token), score] for token, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = renamed(model["unk_token"])
        try:
            backend = Tokenizer.from_str(json.dumps(about))
            lost = [
                token
                for token, disguised in self.disguise.items()
                if backend.token_to_id(disguised) != self.tokenizer.convert_tokens_to_ids(token)
                or not backend.encode(token, add_special_tokens=False).ids
            ]
        except Exception:  # a vocabulary that needs the names
            lost = [*self.disguise]
        if lost:
            raise UserError(
                f"{self.tokenizer.name_or_path}: this tokenizer cannot write its control tokens as text, and some rows "
                f"hold them ({', '.join(lost[:4])} …); take them out of the rows, or set control_tokens of the source"
            )
        twin = deepcopy(self.tokenizer)
        twin._tokenizer = backend
        return twin


_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, Controls]] = WeakKeyDictionary()


def controls_of(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """The control tokens, found once."""
    state = (tokenizer.chat_template, len(tokenizer))
    if tokenizer not in _known or _known[tokenizer][0] != state:
        _known[tokenizer] = state, Controls(tokenizer)
    return _known[tokenizer][1]


def encoded_text(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Plain texts as tokens, (n,) int32 each, with the special tokens that the tokenizer adds by itself; what looks
    like one in them is text. Raises Unwritable as `Controls.disguised` does."""
    controls = controls_of(tokenizer)
    return [each.ids for each in controls.encode(controls.disguised(texts), add_special_tokens=True)]


def _disguise(number: int, length: int) -> str:
    """Private-use characters, as many as the token has, that stand for the token of this number alone. There may be
    more tokens than characters."""
    again, place = divmod(number, PLANE)
    return chr(FIRST + place) + chr(FIRST + again) * (length - 1)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """The longest of the texts that stands at a place."""
    longest = sorted(texts, key=len, reverse=True)
    if not longest:
        return re.compile("(?!)")
    firsts = "".join(map(re.escape, sorted({text[0] for text in longest})))  # most places are passed over by these
    return re.compile(f"(?=[{firsts}])(?:{'|'.join(map(re.escape, longest))})")


def _is_letter(token: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is one in the vocabulary without added tokens; False of a slow tokenizer."""
    return len(token) == 1 and tokenizer.is_fast and tokenizer.backend_tokenizer.model.token_to_id(token) is not None


def _exchange(tokenizer: PreTrainedTokenizerBase) -> str:
    """Two turns as the chat template writes them; nothing where it has none or cannot."""
    if not tokenizer.chat_template:
        return ""
    try:
        return chat_of(tokenizer).turns([ASK, ANSWER, ASK, ANSWER], None, {1})[0]
    except (Unwritable, UserError):
        return ""


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[Encoded]:
    if not texts:
        return []
    found = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        Encoded(np.array(ids, np.int32), np.array(offsets).reshape(-1, 2))
        for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]
