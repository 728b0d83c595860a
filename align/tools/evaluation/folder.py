"""The folder of an evaluation: whose it is, what is written to it, and what the screen tells of that."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.mixture import Prepared
from align.data.templates.chats import chat_of
from align.models.checkpoints.results import CONFIG, WEIGHTS
from align.recipe.errors import UserError
from align.recipe.load import load_recipe
from align.recipe.records import to_json
from align.recipe.schema import Section
from align.tools.evaluation.drawn_pairs import DrawnPairs
from align.tools.evaluation.generation import SUMS, Prompts, Responses
from align.tools.pipeline.inputs import digest
from align.training.bootstrap import Estimate
from align.training.rollouts.parts import RewardPart
from align.training.runs.durable import write_atomic
from align.training.runs.removal import is_written, run_recipe
from align.training.runs.run import differences

RESULT = "evaluation.json"  # written last: where it stands, the rest does too
PREFERENCES = "preferences.jsonl"  # where they were asked for
OWN = ("recipe.yaml", "environment.json", "ledger.jsonl", "responses.jsonl", PREFERENCES, RESULT)


def check_folder(recipe: Section, fresh: bool) -> None:
    """Raise UserError if the run's folder holds something that is not this evaluation. Writes nothing."""
    folder = Path(recipe.run)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run: {folder} is a file; name another folder")
    if not folder.is_dir() or all(path.name.startswith(".writing-") for path in folder.iterdir()):
        return  # nothing, or what a kill left of its first file
    if not is_written(folder / "recipe.yaml"):
        what = "no recipe.yaml that an evaluation wrote"
        raise UserError(f"run: {folder} holds files but no evaluation ({what}); name another folder")
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
    write_atomic(folder / "recipe.yaml", run_recipe(recipe))


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
            "scores": {name: float(score[i, sample]) for name, score in responses.scores.items()},
        }
        lines.append(to_json(record) + "\n")
    return "".join(lines)


def ledger_lines(sources: Sequence[Prepared]) -> str:
    """ledger.jsonl: what became of rows of all sources."""
    entries = sorted((e for data in sources for e in data.ledger.entries), key=lambda e: (e["file"], e["line"]))
    return "".join(to_json(entry) + "\n" for entry in entries)


def in_words(
    metrics: dict[str, Estimate], responses: Responses, judges: dict[str, Any], pairs: DrawnPairs | None
) -> Iterator[str]:
    """The measures, and what was left out of them."""
    for name, (value, low, high, n) in metrics.items():
        span = f"{low:.4g} to {high:.4g}" if math.isfinite(low) else "no interval"
        yield f"{name:28} {value:9.4g}  ({span}; {n:,} prompt{'s' * (n != 1)})"
    for name, score in responses.scores.items():
        if lost := int((~np.isfinite(score)).sum()):
            yield f"score {name}: {lost:,} of {score.size:,} are not a number, and excluded"
    for name, count in judges.items():
        yield f"judge {name}: {count['pairs']:,} pairs, each asked twice; excluded: {_counted(count['excluded'])}"
    if pairs:
        yield f"{PREFERENCES}: {len(pairs.rows):,} pairs; left out: {_counted(pairs.left_out)}"


def identities(parts: Sequence[RewardPart]) -> dict[str, str]:
    """What each score is, by name: equal texts are equal scores, wherever their files lie."""
    found = {}
    for part in parts:
        if part.function:
            file = getattr(sys.modules.get(part.function.partition(":")[0]), "__file__", None)
            there = isinstance(file, str) and Path(file).is_file()
            found[part.title] = f"the function {part.function}" + (f" ({digest(Path(file))[:8]})" if there else "")
        elif part.adapter:
            files = (Path(part.adapter).expanduser() / name for name in (WEIGHTS, CONFIG))
            found[part.title] = "the adapter " + "-".join(digest(file)[:8] for file in files if file.is_file())
        else:
            folder = Path(part.model)
            kind = f"the model {digest(folder)[:8] if folder.is_dir() else part.model}"
            found[part.title] = kind if part.label is None else f"{kind}, label {part.label}"
    return found


def _counted(kinds: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {kind}" for kind, n in kinds.items() if n) or "none"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which tokens a prompt becomes; truncation and padding are settings of a call."""
    backend, chat = json.loads(tokenizer.backend_tokenizer.to_str()), chat_of(tokenizer)
    about = [{k: v for k, v in backend.items() if k not in ("truncation", "padding")}, chat.template, chat.special]
    return sha256(json.dumps([*about, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()[:16]


def source_names(paths: Sequence[str]) -> list[str]:
    """What sources are called in metrics: their files' names; where two are alike, with their numbers."""
    stems = [Path(path).name.partition(".")[0] for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}_{i}" for i, stem in enumerate(stems)]
