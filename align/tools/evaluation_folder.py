"""The folder of an evaluation: whose it is, and what is written to it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.chat import chat_of
from align.data.mixture import Prepared
from align.recipe.errors import UserError
from align.recipe.load import dump_recipe, load_recipe
from align.recipe.schema import Section
from align.tools.generation import SUMS, Prompts, Responses
from align.tools.statistics import Estimate
from align.training.checkpoint import write_atomic
from align.training.run import _differences as differences

RESULT = "evaluation.json"  # written last: where it stands, the rest does too
OWN = ("recipe.yaml", "environment.json", "ledger.jsonl", "responses.jsonl", RESULT)


def check_folder(recipe: Section, fresh: bool) -> None:
    """Raise UserError if the run's folder holds something that is not this evaluation. Writes nothing."""
    folder = Path(recipe.run)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run: {folder} is a file; name another folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"run: {folder} holds files but no evaluation (no recipe.yaml); name another folder")
    try:
        other = load_recipe(folder / "recipe.yaml", [], type(recipe))
    except UserError as error:
        raise UserError(f"run: {folder} holds no evaluation ({error.problems[0]}); name another folder") from None
    changed = differences(other.model_dump(exclude={"run"}), recipe.model_dump(exclude={"run"}))
    if changed and not fresh:
        raise UserError(
            f"run: {folder} holds another evaluation, which differs in {'; '.join(changed)}; "
            "name another folder (run=…), or start over with --fresh, which deletes it"
        )


def clear(folder: Path, recipe: Section) -> None:
    """Make the folder ready for what comes: the recipe alone stands in it, and says whose it is."""
    for name in reversed(OWN[1:]):  # the mark of a finished one first
        (folder / name).unlink(missing_ok=True)
    write_atomic(folder / "recipe.yaml", dump_recipe(recipe))


def response_lines(prompts: Prompts, responses: Responses) -> str:
    """responses.jsonl. Raises UserError where the policy's own numbers are not finite."""
    n, s = responses.figures["tokens"].shape
    lines = []
    for i, sample in np.ndindex(n, s):
        number = i * s + sample
        said, answered = responses.episodes.flat[number], responses.answered[number]
        of = {name: float(column[i, sample]) for name, column in responses.figures.items()}
        if not all(map(math.isfinite, of.values())):
            raise UserError(f"prompt {i}: the policy's log-probabilities are not finite; try model.dtype=float32")
        record = {
            "prompt": i,
            "sample": sample,
            "key": prompts.keys[i],
            "prompt_text": answered.prompt,
            "response": answered.response,
            "tokens": len(said.tokens),
            "ended": bool(said.ended),
            **{name: of[name] for name in SUMS},
            "scores": {name: _number(float(score[i, sample])) for name, score in responses.scores.items()},
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def ledger_lines(sources: Sequence[Prepared]) -> str:
    """ledger.jsonl: what became of rows of all sources."""
    entries = sorted((e for data in sources for e in data.ledger.entries), key=lambda e: (e["file"], e["line"]))
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def told(found: Estimate) -> dict[str, float | int | None]:
    """An estimate as evaluation.json has it: null where a number is not known."""
    return {name: _number(value) for name, value in found._asdict().items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which tokens a prompt becomes; truncation and padding are settings of a call."""
    backend, chat = json.loads(tokenizer.backend_tokenizer.to_str()), chat_of(tokenizer)
    about = [{k: v for k, v in backend.items() if k not in ("truncation", "padding")}, chat.template, chat.special]
    return sha256(json.dumps([*about, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()[:16]


def source_names(paths: Sequence[str]) -> list[str]:
    """What sources are called in metrics: their files' names; where two are alike, with their numbers."""
    stems = [Path(path).name.partition(".")[0] for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}_{i}" for i, stem in enumerate(stems)]
