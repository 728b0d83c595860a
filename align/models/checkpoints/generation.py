"""A generation_config.json: what a checkpoint says of how its answers end and are drawn, made fit to be saved.

transformers saves no config in which a setting does nothing, such as a temperature without `do_sample`; but many
checkpoints have such ones, and what a run saves has other ends of turns than its base.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from align.data.formats.shown import a
from align.recipe.errors import UserError

FIRST = ("do_sample", "num_beams")  # decide which of the others do something


def settle(config: GenerationConfig, told: str) -> None:
    """Leave out what does nothing: what `generate` does with it stays the same. UserError, which begins with `told`,
    for ends that are none."""
    _check_ends(config, told)
    usual = GenerationConfig()
    asked = {key: value for key, value in config.to_diff_dict().items() if hasattr(usual, key)}
    for key in asked:
        setattr(config, key, getattr(usual, key))
    for key in sorted(asked, key=lambda key: key not in FIRST):
        setattr(config, key, asked[key])
        try:
            config.validate(strict=True)
        except Exception:  # a value of any kind
            setattr(config, key, getattr(usual, key))


def ends_of(config: GenerationConfig | None) -> list[int]:
    """Tokens that end an answer."""
    return _several(getattr(config, "eos_token_id", None))


def _check_ends(config: GenerationConfig, told: str) -> None:
    for key, kind, wanted in (("eos_token_id", int, "token numbers"), ("stop_strings", str, "texts")):
        values = _several(getattr(config, key, None))
        if not (isinstance(values, list) and all(type(value) is kind for value in values)):
            raise UserError(
                f"{told}: generation_config.json: {key}: expected {wanted}, found {a(getattr(config, key))}"
            )


def _several(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, int | str) else value
