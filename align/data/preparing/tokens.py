"""How many tokens a row has, under the tokenizer of the model that it is prepared for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from align.data.formats.rows import Row
from align.data.preparing.texts import texts_of, words_of
from align.recipe.errors import UserError


def words_in(row: Row) -> int:
    """Words of a row: its length where no tokenizer is named."""
    return sum(len(words_of(text)) for text in texts_of(row))


class Tokens:
    """Counts the tokens of all texts of a row, without what a chat template writes around them."""

    def __init__(self, file: str | Path) -> None:
        """`file`: a tokenizer.json. Raises UserError where it cannot be read."""
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file}: cannot be read as a tokenizer: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A row is counted where it is read, and again where it is mixed.
        self._length = lru_cache(maxsize=4096)(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))

    def __call__(self, row: Row) -> int:
        """Tokens of one row."""
        return sum(map(self._length, texts_of(row)))
