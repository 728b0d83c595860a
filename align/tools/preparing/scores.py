"""Steps that judge rows by a model: perplexity under a language model, the probability of a class.

They run in one process, on batches whose bounds depend on the rows alone, so their numbers do not depend on the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from align.data.packing import pack, pack_padded
from align.data.preparing.step import Decision, Item, SetStep, Sketch, Sketches, Verdict, keep
from align.data.preparing.texts import answers_of, whole
from align.data.templates.control import encoded_text
from align.data.trees import Tree, plant
from align.models.base import load_base
from align.models.limits import positions_of
from align.models.trunk import Trunk
from align.objectives.losses import path_sums
from align.recipe.errors import UserError
from align.recipe.preparing.filters import Filter, Perplexity, Score
from align.recipe.schema import Lora, Model
from align.training.labelling.classifier import Classifier
from align.training.plan import row_budget

NO_UPDATE = Lora(r=1, alpha=1)  # it starts at zero: the model itself


def scorers(section: Filter) -> list[SetStep]:
    """The steps of a recipe that need a model, each of which is loaded."""
    found: list[SetStep] = [PerplexityStep(section.perplexity)] if section.perplexity else []
    return found + [ScoreStep(score, f"filter.scores.{i}") for i, score in enumerate(section.scores)]


class Scored:
    """A number for each row, and bounds that it has to keep."""

    name, what = "", ""
    where, raw = "main", False
    higher_is_better = True

    def __init__(self, section: Perplexity | Score) -> None:
        self.section = section

    def numbers(self, items: Sequence[Item]) -> np.ndarray:
        """(len(items),) float64."""
        raise NotImplementedError

    def sketch(self, items: Sequence[Item]) -> Sketch:
        """`number`: (n,) float64."""
        return {"number": self.numbers(items)}

    def decide(self, sketches: Sketches, alive: np.ndarray, group: np.ndarray) -> Decision:
        """Rows beyond a bound go, then those beyond the share that is kept; of equals, the earlier stay."""
        number, section = np.asarray(sketches["number"]), self.section
        gone = np.zeros(len(number), np.int8)
        if section.min is not None:
            gone[alive & ~(number >= section.min)] = 1
        if section.max is not None:
            gone[alive & (gone == 0) & ~(number <= section.max)] = 2
        if section.keep is not None:
            left = np.flatnonzero(alive & (gone == 0))
            best = np.argsort(-number[left] if self.higher_is_better else number[left], kind="stable")
            gone[left[best[round(section.keep * len(left)) :]]] = 3
        reasons = (
            f"{self.what} below {section.min}",
            f"{self.what} above {section.max}",
            f"{self.what} not among the best {section.keep or 1:.3g} of the rows",
        )
        told = number[alive & np.isfinite(number)]  # a text of one token has no perplexity
        at = np.quantile(told, (0, 0.1, 0.5, 0.9, 1)).tolist() if len(told) else []
        return Decision(gone, reasons, counts={"quantiles_0_10_50_90_100": [float(f"{x:.6g}") for x in at]})

    def edit(self, item: Item, cuts: np.ndarray) -> Verdict:
        """Rows stay as they are."""
        return keep(item)


class PerplexityStep(Scored):
    """Perplexity under a causal language model."""

    name, what, higher_is_better = "filter.perplexity", "perplexity", False

    def __init__(self, section: Perplexity) -> None:
        super().__init__(section)
        model, device = Model(base=section.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.trunk = Trunk(load_base(model, device, frozen=True), model, NO_UPDATE).eval()
        positions = positions_of(self.trunk.plain.config)
        self.length = min(filter(None, (section.max_length, positions)))

    @torch.inference_mode()
    def numbers(self, items: Sequence[Item]) -> np.ndarray:
        """exp of the mean negative log-likelihood of every token but the first; inf of a text with a single token."""
        trunk = self.trunk
        ids = [each[: self.length] for each in encoded_text([whole(item.row) for item in items], trunk.tokenizer)]
        long = [i for i, each in enumerate(ids) if len(each) > 1]
        lengths = [len(ids[i]) for i in long]
        rows = (pack if trunk.packed else pack_padded)(lengths, row_budget("auto", trunk.device))
        found = np.full(len(items), np.inf)
        for row in rows:
            trees = [Tree((ids[long[k]],), (np.arange(lengths[k]) > 0,)) for k in row]
            multiple = trunk.row_multiple if trunk.packed else 1
            forest = plant(trees, packed=trunk.packed, multiple=multiple).to(trunk.device)
            sums = path_sums(trunk(forest), forest.path, forest.paths).double().cpu().numpy()
            for k, total in zip(np.array(row)[forest.owner.cpu().numpy()], sums, strict=True):
                found[long[k]] = np.exp(-total / (lengths[k] - 1))
        return found


class ScoreStep(Scored):
    """The probability of a class."""

    def __init__(self, section: Score, key: str) -> None:
        super().__init__(section)
        self.name, self.what = key, f"the probability of {section.label!r}"
        try:
            self.classifier = Classifier(Path(section.classifier))
        except UserError as error:
            raise UserError(
                *(problem.replace("--predict", f"{key}.classifier") for problem in error.problems)
            ) from None
        if section.label not in self.classifier.labels:
            raise UserError(
                f"{key}.label: expected one of {', '.join(self.classifier.labels)}, found {section.label!r}"
            )
        self.place = self.classifier.labels.index(section.label)

    def numbers(self, items: Sequence[Item]) -> np.ndarray:
        """Of each row, as a text."""
        said = [whole(item.row) if self.section.on == "all" else "\n\n".join(answers_of(item.row)) for item in items]
        return self.classifier.probabilities(said)[:, self.place]
