"""How many answers of a set are desirable and how many not, as KTO has to know."""

from __future__ import annotations

from align.data.examples import Examples
from align.recipe.errors import UserError


def verdict_counts(examples: Examples) -> tuple[int, int]:
    """Answers that are desirable, and undesirable ones."""
    targets = [part.store.targets[part.store.examples[part.rows] + 1] for part in examples.parts]
    good = sum(int((values > 0.5).sum()) for values in targets)
    return good, len(examples) - good


def balanced(train: Examples, held: Examples, desirable: float, undesirable: float) -> list[str]:
    """Lines on both kinds of answers, and on weights that balance them where those of the recipe do not.

    Ethayarajh et al. 2024 (arXiv 2402.01306) want weight times count of the desirable answers to be 1 to 4/3 times that
    of the others. Raises UserError where all rows to train on are of one kind: KTO then only makes everything likelier,
    or everything less likely.
    """
    lines = [
        f"{side}: {good:,} desirable, {bad:,} undesirable"
        for side, (good, bad) in (("train", verdict_counts(train)), ("eval", verdict_counts(held)))
        if good + bad
    ]
    good, bad = verdict_counts(train)
    if not good or not bad:
        raise UserError(
            f"data.train: {good:,} of its answers are desirable and {bad:,} undesirable, and kto learns from how they "
            "differ; add rows of the other kind, or learn from good answers alone with align.sft"
        )
    ratio = good * desirable / (bad * undesirable)
    if not 0.99 <= ratio <= 1.35:
        rare, low = ("undesirable", 0.75 * good / bad) if good > bad else ("desirable", bad / good)
        lines.append(
            f"weight times count of the desirable answers is {ratio:.3g} times that of the undesirable ones; the paper "
            f"advises 1 to 1.33: dpo.{rare}_weight from {low:.3g} to {low * 4 / 3:.3g}, the other weight 1"
        )
    return lines
