"""Saved adapters on a trunk: whether they belong on it, whether they fit, and putting one after another into a base.

A trunk is a base with any number of adapters in it, in order: merged into its weights, or kept beside those that are
quantised. Each adapter tells the trunk that it was trained on, link by link.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from align.models.checkpoints.results import META, SCORING, Link, Result, check_fit
from align.models.checkpoints.sources import check_regular, folder_on_disk, foreign, is_file
from align.models.kept import folded
from align.models.quantized import is_quantized, numbers
from align.recipe.errors import UserError
from align.recipe.schema import Model


class Merged(NamedTuple):
    """A base, or a base with adapters in it."""

    model: PreTrainedModel
    links: tuple[Link, ...]  # the base, and each adapter
    fingerprint: str  # of all, rows for added tokens included


def merge(
    trunk: Merged,
    result: Result,
    name: str,
    key: str = "model.adapter",
    stays: Callable[[nn.Module], bool] = is_quantized,
) -> Merged:
    """The trunk with an adapter in it: merged in float32, and kept beside each layer that `stays` as it is.

    Raises UserError for one that does not belong on it.
    """
    folder = result.folder
    if result.about.stage in SCORING:
        raise UserError(f"{key}: {folder} is a result of stage {result.about.stage}, which only scores texts")
    if is_quantized(trunk.model) and (result.config.tokens or result.config.use_dora):
        what = "rows of added tokens" if result.config.tokens else "DoRA"
        raise UserError(f"{key}: {folder} has {what}, which a quantised trunk cannot take; drop model.quantize")
    for _, p in numbers(trunk.model):
        p.data = p.data.float()
    trunk, adapted = beside(trunk, [result], None, key, lambda: len(plain_tokenizer(folder, key)), with_itself=True)
    with foreign(f"{key}: {folder} cannot be put on this trunk"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights: see `untie`
        untie(trunk.model)
        return grown(trunk, folded(adapted, stays), result, name)


def beside(
    trunk: Merged,
    results: Sequence[Result],
    task: str | None,
    key: str,
    known: Callable[[], int],
    with_itself: bool = False,
) -> tuple[Merged, PeftModel]:
    """The trunk with rows for the tokens that results add, and their adapters on it, called "merged_0" and so on; the
    first one acts.

    `task`: peft's; `known()`: how many tokens there are; `with_itself`: as of `stranger`. Raises UserError for one that
    does not belong on it.
    """
    first = results[0]
    told = f"{key}: {first.folder}"
    if first.config.tokens:
        trunk = with_rows(trunk, first.config.tokens, known, told)
    if not stands_on(first, trunk):
        raise UserError(f"{key}: {stranger(first, trunk, 'this trunk', with_itself)}")
    with foreign(f"{told} cannot be put on this trunk"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights: see `untie`
        adapted = get_peft_model(trunk.model, first.config.peft(task), adapter_name="merged_0").eval()
        for number, one in enumerate(results):
            if number:
                adapted.add_adapter(f"merged_{number}", one.config.peft(task))
            put(adapted, one.weights, f"merged_{number}", f"{key}: {one.folder}")
    return trunk, adapted


def grown(trunk: Merged, model: PreTrainedModel, result: Result, name: str) -> Merged:
    """The trunk with one more link, now that its model holds the adapter."""
    fingerprint = result.merged_fingerprint(trunk.fingerprint)
    link = Link(name=name, path=str(result.folder.resolve()), fingerprint=fingerprint)
    return Merged(model, (*trunk.links, link), fingerprint)


def put(model: PeftModel, weights: dict[str, Tensor], role: str, told: str) -> None:
    """Give an adapter on the model its weights; UserError, which begins with `told`, unless they are exactly those that
    it has."""
    wanted = get_peft_model_state_dict(model, adapter_name=role, save_embedding_layers=False)
    check_fit(weights, wanted, f"{told} does not fit this trunk")
    set_peft_model_state_dict(model, weights, adapter_name=role)


def untie(model: PreTrainedModel) -> bool:
    """Give the output head weights of its own where an adapter is on one only of two layers that share theirs: merged
    into the one, it would move the other too. Whether it was so."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not any(isinstance(layer, LoraLayer) for layer in (embedding, head)):
        return False
    own, other = (layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in (head, embedding))
    if own.weight is not other.weight:
        return False
    own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=own.weight.requires_grad)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return True


def with_rows(trunk: Merged, ids: Sequence[int], known: object, told: str) -> Merged:
    """The trunk with an embedding row for each of these tokens; new rows are the mean of those before.

    `known()`: how many tokens there are, which no id may reach.
    """
    model, rows = trunk.model, trunk.model.get_input_embeddings().weight.shape[0]
    wanted = max(ids) + 1
    if wanted <= rows:
        return trunk
    if wanted > known():
        raise UserError(f"{told}: token {wanted - 1} is in no vocabulary; its tokenizer has {known():,} tokens")
    model.resize_token_embeddings(wanted, mean_resizing=False)
    tables = {
        id(table.weight): table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table
    }
    with torch.no_grad():
        for table in tables.values():
            for values in (table.weight, getattr(table, "bias", None)):
                if values is not None and len(values) == wanted:
                    values[rows:] = values[:rows].float().mean(0).to(values.dtype)
    return trunk._replace(fingerprint=sha256(f"{trunk.fingerprint} {wanted} rows".encode()).hexdigest()[:16])


class HasLinks(Protocol):
    """A trunk, loaded or being made."""

    links: tuple[Link, ...]
    fingerprint: str


def stands_on(result: Result, here: HasLinks) -> bool:
    """Whether this is the trunk that an adapter was trained on, its base's settings included."""
    return result.about.fingerprint == here.fingerprint and not _settings(result, here)


def _settings(result: Result, here: HasLinks) -> list[str]:
    """Settings of the base that are others than at the training."""
    there, now = (links[0].settings if links else None for links in (result.about.trunk, here.links))
    if there is None or now is None:
        return []
    keys = [key for key in sorted({**there, **now}) if there.get(key) != now.get(key)]
    told = ((json.dumps(each.get(key)) if key in each else "the usual" for each in (there, now)) for key in keys)
    return [f"{key}: {old[:80]} there, {new[:80]} here" for key, (old, new) in zip(keys, told, strict=True)]


def stranger(result: Result, here: HasLinks, what: str, with_itself: bool = False) -> str:
    """Why an adapter does not belong on a trunk, link by link, and what to give instead.

    `what` the trunk is called; `with_itself`: the adapter stands in `model.adapter` too.
    """
    if result.about.fingerprint == here.fingerprint:
        return (
            f"{result.folder} was trained on {result.about.base} with another config.json ("
            f"{'; '.join(_settings(result, here))}); restore it"
        )
    about, given = result.about, [link.name for link in here.links[1:]]
    told = (
        f"{result.folder} was trained on a trunk with fingerprint {about.fingerprint}{_sum(about.trunk)}, but {what} "
        f"has {here.fingerprint}{_sum(here.links)}"
    )
    named = [link.name for link in about.trunk[1:]]
    bases = {link.fingerprint for link in (*about.trunk[:1], *here.links[:1])}
    theirs, ours = (links[0].quantize if links else None for links in (about.trunk, here.links))
    if len(bases) == 1 and theirs != ours:
        return f"{told}; {f'set model.quantize: {theirs}' if theirs else 'leave model.quantize out'}"
    if len(bases) != 1 or named == given:
        return f"{told}; use the base that it was trained on, {about.base}"
    named += [str(result.folder)] * with_itself
    if not named:
        return f"{told}; leave model.adapter out"
    return f"{told}; give model.adapter: {named[0] if len(named) == 1 else '[' + ', '.join(named) + ']'}"


def _sum(links: Sequence[Link]) -> str:
    bits = {link.name: f" in {link.quantize.removesuffix('bit')} bits" for link in links if link.quantize}
    return f" ({' + '.join(link.name + bits.get(link.name, '') for link in links)})" if links else ""


def trunk_of(
    result: Result, key: str, remedy: str, base: str | None = None, trust: bool = False, merged: Sequence[str] = ()
) -> Model:
    """The trunk that an adapter was trained on, as a recipe's section, from what is on this machine.

    `base`, `merged`: what the user names instead; `trust`: the user allows code beside the base; `remedy`: what to do
    where something is not there. A result names folders and ids, which are read where they are here already; it allows
    no code, and nothing is fetched for it.
    """
    about, folder = result.about, result.folder
    first, *before = about.trunk or [Link(name=about.base, path=about.base, fingerprint=about.fingerprint)]
    settings: dict[str, object] = {"base": base, "trust_remote_code": trust, "quantize": first.quantize}
    if base is None:
        named = [first.name, first.path, result.config.base_model_name_or_path or first.path]
        found = next(filter(None, map(folder_on_disk, named)), None)
        if found is None:
            raise UserError(f"{key}: {folder} was trained on {first.name}, which is not on this machine; {remedy}")
        settings["base"] = str(found)
    adapters = list(merged)
    for link in [] if merged else before:
        here = next((name for name in (link.name, link.path) if is_file(Path(name) / META)), None)
        if here is None:
            raise UserError(
                f"{key}: {folder} was trained on a trunk with fingerprint {about.fingerprint}{_sum(about.trunk)}, and "
                f"{link.name} is not there; {remedy}"
            )
        adapters.append(here)
    if result.config.tokens:
        tokenizer = plain_tokenizer(folder, key)
        settings["add_tokens"] = token_names(tokenizer, result.config.tokens)
    return Model(adapter=adapters or None, **settings)


def token_names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Tokens as the vocabulary names them; `convert_ids_to_tokens` may put a blank's sign before an added one."""
    named = {number: token for token, number in tokenizer.get_vocab().items()}
    return [named.get(i, str(i)) for i in ids]


def token_without_row(tokenizer: Tokenizer, ids: Iterable[int], rows: int) -> str | None:
    """What is wrong with tokens of which one has no embedding row; None where nothing is."""
    number = max(ids, default=0)
    if number < rows:
        return None
    (token,) = token_names(tokenizer, [int(number)])
    return f"has the token {token!r}, which the model has no embedding row for"


def plain_tokenizer(folder: Path, key: str, trust: bool = False) -> Tokenizer:
    """The tokenizer in a folder; code beside it runs only where the user allows it."""
    check_regular(folder, key)
    with foreign(f"{key}: no tokenizer can be loaded from {folder}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
