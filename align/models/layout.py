"""Which layout a trunk computes exactly: tried on the loaded model, not looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from align.data.trees import Tree, plant
from align.models.attention import NAME as FOREST
from align.recipe.errors import UserError

if TYPE_CHECKING:
    from align.models.trunk import Trunk


def layout_of(trunk: Trunk, wanted: str) -> tuple[str, str]:
    """The layout, and why it is not packed where it could have been."""
    if trunk.outputs and not hasattr(trunk.plain, "score"):
        if wanted == "tree":
            raise UserError("model.layout: a base that reads in both directions takes the padded layout alone")
        return "padded", "the base reads in both directions"
    if not trunk.outputs:
        _check_head(trunk)
    return (wanted, "") if wanted != "auto" else _exact_layout(trunk)


def _tolerance(trunk: Trunk) -> float:
    """In 16 bits a deep model's log-probabilities scatter by some 0.1; a fault moves them by more."""
    return 1e-3 if trunk.dtype == torch.float32 else 0.3


def _check_head(trunk: Trunk) -> None:
    """The head on the last hidden state must be all there is to the model's logits, or every loss is wrong."""
    ids = torch.arange(3, 12) % trunk.rows
    training = trunk.training
    trunk.eval()
    trunk.attend(trunk.own_attention)
    with torch.no_grad(), trunk.autocast():
        row = plant([Tree((ids.numpy().astype(np.int32),), (np.ones(len(ids), bool),))], packed=False)
        ours = trunk(row.to(trunk.device))
        logits = trunk.plain(input_ids=ids[None].to(trunk.device), use_cache=False).logits[0, :-1].float()
    trunk.train(training)
    stock = logits.log_softmax(-1).gather(-1, ids[1:, None].to(trunk.device))[:, 0]
    if (ours - stock).abs().median() > _tolerance(trunk):
        raise UserError(f"model.base: {trunk.base_name} computes its logits in a way that align does not know")


def _exact_layout(trunk: Trunk) -> tuple[str, str]:
    """`tree` if this model computes packed trees exactly as it computes them one by one, else `padded`.

    Recurrent layers leak from tree to tree, some position schemes ignore positions, and a model of tomorrow is on no
    list.
    """
    draw = np.random.default_rng(0)

    def segment(length: int) -> np.ndarray:
        return draw.integers(3, max(trunk.rows, 4), length).astype(np.int32)

    def tree(*segments: np.ndarray) -> Tree:
        return Tree(segments, tuple(np.ones(len(s), bool) for s in segments))

    def numbers(forest) -> Tensor:
        """One row a label, of like size in all models."""
        forest = forest.to(trunk.device)
        if not trunk.outputs:
            return trunk(forest)[:, None]
        return nn.functional.normalize(trunk.states(forest).float(), dim=-1) * 10

    first, other, second = tree(segment(9)), tree(segment(9)), tree(segment(5), segment(4), segment(3))
    training = trunk.training
    trunk.eval()
    try:
        with torch.no_grad():
            trunk.attend(trunk.own_attention)
            alone = numbers(plant([first, second], packed=False))
            trunk.attend(FOREST)
            packed, disturbed = (
                numbers(plant(trees, multiple=trunk.row_multiple)) for trees in ([first, second], [other, second])
            )
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        return "padded", f"its attention does not take trees ({(str(error) or repr(error)).splitlines()[0]})"
    finally:
        trunk.train(training)
    tail = second.label_count
    leaks = (packed[-tail:] - disturbed[-tail:]).abs().max() > 1e-5
    differs = (packed - alone).abs().median() > _tolerance(trunk)
    if leaks:
        return "padded", "its layers carry something from one tree to the next"
    return ("padded", "its packed numbers differ from those of single rows") if differs else ("tree", "")
