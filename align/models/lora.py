"""peft's LoRA on a trunk: its configuration, its targets, and the switch between adapters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from difflib import get_close_matches

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from align.recipe.errors import UserError
from align.recipe.schema import Lora

ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)  # kinds of layers that peft adapts


class Switch:
    """Which adapter acts. peft's layers all read one list, so a turn costs the same however many there are.

    peft's own switches walk the whole model, and decide what trains besides.
    """

    def __init__(self, model: PeftModel) -> None:
        """Takes over the layers that there are; adapters that are added later need another switch."""
        self.known = frozenset(model.peft_config)
        self.acting: list[str] = []  # one name; none for the bare model
        self.tables: list[TrainableTokensLayer] = []  # at most two: rows of added tokens, which not every role has
        for layer in model.modules():
            if isinstance(layer, TrainableTokensLayer):
                self.tables.append(layer)
            elif isinstance(layer, BaseTunerLayer):
                layer._active_adapter = self.acting

    def turn(self, name: str | None) -> None:
        """To an adapter; None: to the bare model."""
        assert name is None or name in self.known, f"{name} was added after this switch was made"
        self.acting[:] = [] if name is None else [name]
        for table in self.tables:
            table._active_adapter = [name] if name in table.token_indices else []


def adapted(causal: nn.Module, section: Lora, scores: bool = False, added: Sequence[int] = ()) -> PeftModel:
    """A model with an adapter, which starts as the model itself; UserError where it cannot take one. See
    `lora_config`."""
    check_targets(causal, section, bool(added), scores)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights: merging unties them
            return get_peft_model(causal, lora_config(section, causal, scores, added))
    except ValueError as error:
        raise UserError(f"lora.targets: {str(error).splitlines()[0]}") from None


def lora_config(section: Lora, model: nn.Module, scores: bool = False, added: Sequence[int] = ()) -> LoraConfig:
    """peft's configuration for a recipe's `lora` section.

    `scores`: the model has a score or class head, which is trained whole beside the adapter. `added`: tokens whose
    rows train in the embedding, and in the output head where there is one.
    """
    tables = {}
    if added:
        layers = {id(layer): name for name, layer in model.named_modules()}
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
        tables = {layers[id(table)]: list(added) for table in found if id(table) in layers}
    fresh = new_parts(model) if scores else []
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.targets if isinstance(section.targets, str) else list(section.targets),
        use_rslora=section.rslora,
        use_dora=section.dora,
        init_lora_weights=True if section.init == "default" else section.init,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        trainable_token_indices=tables or None,
        modules_to_save=fresh or None,
        exclude_modules=fresh or None,
    )


def new_parts(model: nn.Module) -> list[str]:
    """Parts of a scoring model, by name, that a base may not have brought: they are drawn anew, so they train whole and
    are saved. peft adds heads called `classifier` and `score` by itself."""
    outside = [
        name for name, part in model.named_children() if name != model.base_model_prefix and [*part.parameters()]
    ]
    poolers = [name for name, _ in model.named_modules() if name.endswith("pooler")]
    return [name for name in dict.fromkeys((*outside, *poolers)) if name not in ("classifier", "score")]


def check_targets(model: nn.Module, section: Lora, tokens: bool = False, scores: bool = False) -> None:
    """UserError, with a line for each, for targets that the model has not, or that cannot take an adapter here.

    `tokens`: rows of added tokens train. Works on a model without weights, too.
    """
    named = dict(model.named_modules())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layers = sorted({name.rpartition(".")[2] for name, layer in named.items() if isinstance(layer, ADAPTABLE)})
    problems = []
    if not section.targets:
        problems.append(f"lora.targets: an empty list; there are {', '.join(layers)}")
    for target in [] if isinstance(section.targets, str) else section.targets:
        chosen = [layer for name, layer in named.items() if name == target or name.endswith(f".{target}")]
        if not chosen:
            close = get_close_matches(target, layers, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(layers)}"
            problems.append(f"lora.targets: the model has no module {target!r}; {hint}")
        elif not any(isinstance(beneath(layer), ADAPTABLE) for layer in chosen):
            problems.append(
                f"lora.targets: {target!r} is a {type(chosen[0]).__name__}, which takes no adapter; there are "
                f"{', '.join(layers)}"
            )
        elif not scores and any(layer is head for layer in chosen):
            problems.append("lora.targets: the output head takes no adapter; leave it out, or use all-linear")
        elif tokens and any(layer is embedding for layer in chosen):
            problems.append(
                f"lora.targets: {target!r} has the rows that model.add_tokens trains; leave one of them out"
            )
    if tokens and not scores and getattr(head, "bias", None) is not None:
        problems.append("model.add_tokens: the output head has a bias, of which peft can train no rows; use lora: null")
    if problems:
        raise UserError(*problems)


def beneath(layer: nn.Module) -> nn.Module:
    """A layer of the base, without what peft has put around it."""
    while hasattr(layer, "token_adapter") or hasattr(layer, "base_layer"):
        layer = layer.token_adapter if hasattr(layer, "token_adapter") else layer.base_layer
    return layer


def acts(tokens: TrainableTokensLayer) -> bool:
    """Whether rows of some adapter stand in place of the base's."""
    return bool(tokens.active_adapters) and not tokens.disable_adapters
