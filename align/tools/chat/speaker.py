"""Models that answer: each on its trunk, and the running batch that its answers grow in."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from align.data.templates.ends import turn_ends
from align.data.templates.texts import said
from align.models.sampling.adapters import BARE
from align.models.sampling.requests import Voice
from align.models.sampling.running import Running
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.serve import make_engine
from align.tools.chat.talker import load_talker
from align.tools.serving.models import load_models


class Speaker:
    """A model by the name that the user gave it."""

    def __init__(self, name: str, trunk: Trunk, running: Running | None, voice: Voice) -> None:
        """Without `running`, answers are searched for, one by one."""
        self.name, self.trunk, self.running, self.voice = name, trunk, running, voice
        positions = getattr(trunk.plain.config.get_text_config(), "max_position_embeddings", None)
        self.room: int | None = running.room if running else positions  # for prompt and answer together

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """With the template that it was trained with."""
        return self.voice.tokenizer

    def said(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """What an answer, token ids (k,), adds to the text of its prompt, (l,), without what ends its turn."""
        return said(self.tokenizer, prompt, answer, self.voice.ends, self.voice.stops)


def load_speaker(name: str, adapters: Sequence[str], dtype: str, trust: bool, draws: bool = True) -> Speaker:
    """One model on a trunk of its own, `adapters` on it. Raises UserError for what is not there, or does not answer."""
    trunk = load_talker(name, adapters, Accelerator(mixed_precision="no"), trust, dtype)
    voice = Voice(BARE, trunk.tokenizer, frozenset(trunk.end_tokens), turn_ends(trunk.tokenizer).texts)
    return Speaker(name, trunk, Running(trunk, acts="default") if draws else None, voice)


def load_speakers(names: Sequence[str], dtype: str, trust: bool) -> list[Speaker]:
    """Several models: on one trunk and in one batch, where all stand on the same base; one that is named twice is
    there once."""
    once = list(dict.fromkeys(names))
    try:
        engine = make_engine(load_models([f"m{i}={name}" for i, name in enumerate(once)], None, dtype, trust))
        served = [engine.models[f"m{i}"] for i in range(len(once))]
        mute = next((each for each in served if not each.answers), None)
        if mute is not None:
            raise UserError(f"{mute.source} only scores texts")
        trunk = engine.shelf.trunk
        there = [Speaker(name, trunk, engine.running, each.voice) for name, each in zip(once, served, strict=True)]
    except UserError:  # several bases, or a result that needs a trunk of its own; or one that is not there, told next
        there = [load_speaker(name, [], dtype, trust) for name in once]
    return [there[once.index(name)] for name in names]
