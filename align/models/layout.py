"""Which layout a trunk computes exactly, and whether a faster attention agrees with the plain one: tried on the loaded
model, not looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from align.data.trees import Forest, Tree, plant
from align.models.attention import NAME as FOREST
from align.models.attention import Attention, ForestMask, dense_attention
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


def _trees(trunk: Trunk) -> list[Tree]:
    """Two texts and a pair, of random tokens that are all labels."""
    draw = np.random.default_rng(0)

    def tree(*lengths: int) -> Tree:
        segments = [draw.integers(3, max(trunk.rows, 4), length).astype(np.int32) for length in lengths]
        return Tree(tuple(segments), tuple(np.ones(length, bool) for length in lengths))

    return [tree(9), tree(9), tree(5, 4, 3)]


def _exact_layout(trunk: Trunk) -> tuple[str, str]:
    """`tree` if this model computes packed trees exactly as it computes them one by one, else `padded`.

    Recurrent layers leak from tree to tree, some position schemes ignore positions, and a model of tomorrow is on no
    list.
    """

    def numbers(forest) -> Tensor:
        """One row a label, of like size in all models."""
        forest = forest.to(trunk.device)
        if not trunk.outputs:
            return trunk(forest)[:, None]
        return nn.functional.normalize(trunk.states(forest).float(), dim=-1) * 10

    first, other, second = _trees(trunk)
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


def faster_attention(trunk: Trunk, faster: Attention | None) -> tuple[Attention, str]:
    """`faster` if it has values and gradients of `dense_attention` wherever the trunk attends over a forest, else that
    one; and why."""
    if faster is None or not trunk.packed:
        return dense_attention, ""
    forest = plant(_trees(trunk), multiple=trunk.row_multiple).to(trunk.device)
    try:
        agrees = all(_agrees(faster, kind, forest) for kind in _kinds(trunk, forest))
    except Exception as error:  # of whatever kind: compilers have their own
        said = " ".join((str(error) or repr(error)).splitlines()[:2])  # compilers name the cause in the second line
        return dense_attention, f"the faster way fails ({said})"
    return (faster, "") if agrees else (dense_attention, "the numbers of the faster way differ")


class _Kind(NamedTuple):
    """A way in which some layers of a trunk attend."""

    shapes: tuple[torch.Size, ...]  # of query, key and value
    dtype: torch.dtype
    more: tuple[float, int | None, float | None]  # scale, window, softcap


def _kinds(trunk: Trunk, forest: Forest) -> set[_Kind]:
    """Found in one pass."""
    found = set()

    def attend(*parts: Tensor | ForestMask | float | None) -> Tensor:
        states, (_, *more) = parts[:3], parts[3:]
        found.add(_Kind(tuple(part.shape for part in states), states[0].dtype, tuple(more)))
        return dense_attention(*parts)

    training, before = trunk.training, trunk.forest_attention
    trunk.forest_attention = attend
    trunk.eval()
    try:
        with torch.no_grad():
            trunk.states(forest)
    finally:
        trunk.forest_attention = before
        trunk.train(training)
    return found


def _agrees(faster: Attention, kind: _Kind, forest: Forest) -> bool:
    """In values and gradients, on random states that lie in memory as projections do, token by token."""
    draw, results = torch.Generator().manual_seed(0), []
    states = [
        torch.randn(1, tokens, heads, size, generator=draw).to(forest.tokens.device, kind.dtype).transpose(1, 2)
        for _, heads, tokens, size in kind.shapes
    ]
    for attend in (dense_attention, faster):
        given = [part.clone().requires_grad_() for part in states]
        with torch.enable_grad():
            out = attend(*given, ForestMask(forest), *kind.more)
            slopes = torch.autograd.grad(out.float().square().sum(), given)
        results.append([part.float() for part in (out, *slopes)])
    tolerance = 1e-4 if kind.dtype == torch.float32 else 0.03
    return all((ours - stock).norm() <= tolerance * stock.norm() for stock, ours in zip(*results, strict=True))
