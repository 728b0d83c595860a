"""One reading of yes and no, for all stages: whether a row's answer is a good one, and whether a turn is learnt."""

from __future__ import annotations

import re
from typing import Any

from align.data.formats.rows import Refused
from align.data.formats.shown import a

WORDS = {"true": True, "yes": True, "false": False, "no": False}
VERDICTS = {
    **dict.fromkeys(("desirable", "good", "chosen", "accepted", "correct"), True),
    **dict.fromkeys(("undesirable", "bad", "rejected", "incorrect"), False),
}
EXPECTED = "true or false, 1 or 0 or -1, desirable or undesirable, good or bad"
# Columns that judge a row's answer. LLaMA-Factory's comes first: under a format's own names, a row has it as both, and
# is told of the one that is in the file.
LABELS = ("kto_tag", "label")
TRAINED = (  # keys of a turn that is learnt where they say yes: of OpenAI, Axolotl, ms-swift, LLaMA-Factory, verl …
    "train", "training", "trained", "trainable", "train_on_turn", "weight", "loss", "loss_weight", "loss_mask",
    "loss_scale", "calculate_loss",
)  # fmt: skip
MASKED = (
    "mask",
    "masked",
    "mask_loss",
    "ignore",
    "ignored",
    "ignore_loss",
    "no_loss",
)  # … where they say no: torchtune
MARKS = (*TRAINED, *MASKED)
DETAILS = ("train_detail", "training_detail")  # Axolotl's marks on parts of a turn


def truth(value: Any) -> bool | None:
    """True for true, yes and 1, as a value or its text; False for false, no and 0; None for anything else."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in WORDS:
            return WORDS[word]
        value = number(word)
    if isinstance(value, bool):
        return value
    return {0: False, 1: True}.get(value) if isinstance(value, int | float) else None


def number(text: str) -> float | None:
    """The number that a text writes in digits, such as `01`, `+1` or `-1.0`."""
    return float(text) if re.fullmatch(r"[+-]?\d{1,300}(\.\d*)?", text, re.ASCII) else None


def verdict(row: dict[str, Any]) -> bool | None:
    """Whether the row's answer is a good one; None where neither column of LABELS says anything.

    Raises Refused for a label that is no verdict, and where the two columns contradict each other.
    """
    found: dict[str, bool] = {}
    for column in LABELS:
        value = row.get(column)
        if value is None or value == "":
            continue
        found[column] = _verdict(column, value)
    if len(set(found.values())) > 1:
        raise Refused(f"{' and '.join(reversed(found))}: one calls the answer good, the other bad")
    return next(iter(found.values()), None)


def _verdict(column: str, value: Any) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, str) and word in VERDICTS:
        return VERDICTS[word]
    said = truth(value)
    if said is None and (number(word) if isinstance(word, str) else word) == -1:
        said = False
    if said is None:
        raise Refused(
            f"{column}: expected {EXPECTED}, found {a(value)}; "
            f"where the column is no verdict on the answer, leave it unread: `columns: {{{column}: null}}`"
        )
    return said


def learnable(row: dict[str, Any]) -> None:
    """Refuse a row whose answer is marked as a bad one: what is learnt from an answer makes it likelier."""
    if verdict(row) is False:
        column = next(name for name in LABELS if row.get(name) not in (None, ""))
        raise Refused(
            f"{column}: {a(row[column])} marks the answer as undesirable, so it is not learnt; "
            "align.dpo learns from such rows with dpo.loss=kto"
        )


def learnt(at: str, role: str, turn: dict[str, Any]) -> bool:
    """Whether a turn is learnt: one of the assistant whose marks, if it has any, say so.

    Raises Refused for a mark that is neither yes nor no, marks that contradict each other, marks on parts of a turn,
    and a yes on another's turn, which is never trained.
    """
    said: dict[str, bool] = {}
    speaks = role == "assistant"
    for key in MARKS:
        value = turn.get(key)
        if value is None:
            continue
        yes = truth(value)
        if yes is None:
            raise Refused(f"{at}.{key}: expected 0 or 1, true or false, found {a(value)}")
        if yes and key in TRAINED and not speaks:
            raise Refused(f"{at}.{key}: only assistant turns are trained, found {a(value)} on a {role} turn")
        said[key] = yes if key in TRAINED else not yes
    if not speaks:
        return False
    if len(set(said.values())) > 1:
        raise Refused(f"{at}: {' and '.join(said)} contradict each other: one says that the turn is learnt, one not")
    for key in DETAILS:
        if turn.get(key):
            raise Refused(f"{at}.{key}: parts of a turn cannot be marked; mark the whole turn with `train`")
    return all(said.values())
