"""A model that answers: its trunk, and the running batch that its answers grow in."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from align.data.templates.ends import turn_ends
from align.models.sampling.adapters import BARE
from align.models.sampling.running import Running, Voice
from align.models.trunk import Trunk


class Speaker:
    """A policy on its trunk, by a name."""

    def __init__(self, name: str, trunk: Trunk, draws: bool) -> None:
        """Without `draws` answers are searched for, one by one, and no batch runs."""
        self.name, self.trunk = name, trunk
        self.voice = Voice(BARE, trunk.tokenizer, frozenset(trunk.end_tokens), tuple(turn_ends(trunk.tokenizer).texts))
        self.running = Running(trunk, acts="default") if draws else None
        positions = getattr(trunk.plain.config.get_text_config(), "max_position_embeddings", None)
        self.room: int | None = self.running.room if self.running else positions  # for prompt and answer together

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """With the template that it was trained with."""
        return self.trunk.tokenizer
