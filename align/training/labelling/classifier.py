"""A finished classifier, ready to read texts: for `align.classify --predict`, and for the server."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from align.data.graft import graft
from align.data.packing import pack_padded
from align.data.templates.chat import Unwritable
from align.data.templates.control import controls_of, encoded_text
from align.data.trees import Tree, plant
from align.models import acceleration
from align.models.base import load_base
from align.models.checkpoints.adapters import put, stands_on, stranger, token_without_row, trunk_of
from align.models.checkpoints.results import META, About, check_finite, check_fit, read_about, read_result
from align.models.checkpoints.sources import check_weights, foreign, read_config, speaking_of
from align.models.limits import positions_of
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Model
from align.training.labelling.measures import softmax
from align.training.plan import row_budget


class Text(NamedTuple):
    """A row to classify: its line, and its text or why it has none."""

    line: int
    text: str | None
    fault: str = ""


class Classifier:
    """A finished `final/` folder, ready to classify."""

    def __init__(self, folder: Path, base: str | None = None, trust: bool = False, key: str = "--predict") -> None:
        """`base`: what the user names in place of the base that the result names; `trust`: the user allows its code;
        `key`: what messages call the result."""
        about, device = _about(folder, key), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.labels, self.threshold = about.labels, about.threshold
        lora = None
        if about.role == "adapter":
            result = read_result(str(folder), key, "a finished run of align.classify")
            lora, section = result.config.section, trunk_of(result, key, "give --base", base, trust)
        else:  # the folder is the whole model: made from its config, then filled
            section = Model(base=str(folder), init="random", trust_remote_code=trust)
            check_weights(folder, read_config(folder, f"{key}: {folder}", trust), f"{key}: {folder}")
        section = section.model_copy(update=about.model.model_dump())
        with speaking_of(key):
            loaded = load_base(section, device, frozen=lora is not None, outputs=len(self.labels))
            self.trunk = Trunk(loaded, section, lora, outputs=len(self.labels)).eval()
            if lora:
                if not stands_on(result, loaded):
                    raise UserError(f"{key}: {stranger(result, loaded, 'this trunk')}")
                put(self.trunk.causal, result.weights, "default", f"{key}: {folder}")
            else:
                _fill(self.trunk.plain, folder / "model.safetensors", key)
        self.max_length = min(filter(None, (about.max_length, positions_of(self.trunk.plain.config))))
        self.tokenizer, self.row_tokens = loaded.tokenizer, row_budget("auto", device)
        self.prepared = ExitStack()
        self.prepared.enter_context(acceleration.for_sampling(self.trunk, self.row_tokens))

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as token ids, cut at the length that the classifier was trained on."""
        nothing = [self.tokenizer.eos_token_id]  # for a text of which the tokenizer makes no token
        return [ids[: self.max_length].tolist() or nothing for ids in encoded_text(list(texts), self.tokenizer)]

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(n, C) float64."""
        return self.shares(self.tokens(texts)) if texts else np.zeros((0, len(self.labels)))

    @torch.inference_mode()
    def shares(self, paths: list[list[int]]) -> np.ndarray:
        """The same of texts as token ids."""
        scores = np.zeros((len(paths), len(self.labels)), np.float32)
        for row in self._rows(paths):
            trees = [_tree(paths[i]) for i in row]
            if self.trunk.packed:
                forest = plant(graft(trees), multiple=self.trunk.row_multiple).to(self.trunk.device)
            else:
                forest = plant(trees, packed=False).to(self.trunk.device)
            scores[np.array(row)[forest.owner.cpu()]] = self.trunk(forest).float().cpu().numpy()
        return softmax(scores)

    def _rows(self, paths: list[list[int]]) -> list[list[int]]:
        """Texts that are computed together: those that begin alike, for a beginning is then computed once; or of like
        length, where rows are padded."""
        if not self.trunk.packed:
            return pack_padded([len(ids) for ids in paths], self.row_tokens)
        rows, room = [], 0
        for i in sorted(range(len(paths)), key=paths.__getitem__):
            if len(paths[i]) > room:
                rows.append([])
                room = self.row_tokens
            rows[-1].append(i)
            room -= len(paths[i])
        return rows

    def checked(self, row: Text) -> Text:
        """The row; without its text where that cannot be read, or has a token that the model does not know."""
        if row.text is None:
            return row
        try:
            controls_of(self.tokenizer).disguised(row.text)
        except Unwritable as error:
            return Text(row.line, None, str(error))
        (ids,) = encoded_text([row.text], self.tokenizer)
        fault = token_without_row(self.tokenizer, ids.tolist(), self.trunk.rows)
        return Text(row.line, None, fault) if fault else row

    def label(self, probabilities: np.ndarray) -> str:
        """The label of one text, (C,), by the saved threshold if there is one."""
        if self.threshold is not None:
            return self.labels[int(probabilities[1] >= self.threshold)]
        return self.labels[int(probabilities.argmax())]


def _tree(ids: list[int]) -> Tree:
    return Tree((np.array(ids, np.int32),), (np.zeros(len(ids), bool),))


def _about(folder: Path, key: str) -> About:
    """align.json of a classifier. Raises UserError for a folder that is none."""
    about = read_about(folder, key)
    if about is None:
        raise UserError(f"{key}: {folder} has no {META}; give the final/ folder of a finished run")
    if about.stage != "classify":
        raise UserError(f"{key}: {folder} is the result of align.{about.stage}, not of align.classify")
    if about.labels is None or about.max_length is None:
        raise UserError(f"{key}: {folder / META} has no labels and max_length, which a classifier needs")
    if about.threshold is not None and len(about.labels) != 2:
        raise UserError(f"{key}: {folder / META}: threshold goes with two labels, and there are {len(about.labels)}")
    return about


def _fill(model: nn.Module, file: Path, key: str) -> None:
    """Give a whole model its weights, all of them and no others."""
    with foreign(f"{key}: {file} cannot be read"):
        weights = load_file(file)
    check_finite(weights, f"{key}: {file}")
    check_fit(weights, model.state_dict(), f"{key}: {file} does not fit its config.json")
    model.load_state_dict(weights)
