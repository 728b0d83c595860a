"""A chain of adapters, merged into its base link by link; each merge is compared with the adapter unmerged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from align.models.base import base_config, load_base
from align.models.checkpoints.adapters import Merged, beside, grown, plain_tokenizer, trunk_of, untie
from align.models.checkpoints.results import SCORING, Link, Result, read_about, read_result
from align.models.checkpoints.sources import foreign, speaking_of
from align.models.quantized import unpacked
from align.models.scoring import is_encoder, name_padding, with_head
from align.recipe.errors import UserError
from align.tools.merging.averages import Average
from align.tools.merging.compared import Difference, difference, logits_of, probes

CPU = torch.device("cpu")
KEY = "merge"  # what messages call the command's results
OWN = "name what it was trained on: --onto BASE, then --onto FOLDER for every adapter before it, in their order"


class Step(NamedTuple):
    """One adapter, or one average of several, that was merged."""

    name: str
    difference: Difference  # merged from unmerged, in float32
    untied: bool  # whether the output head got weights of its own for it


class Whole(NamedTuple):
    """A chain in one model, and what is known of it."""

    model: PreTrainedModel  # float32
    tokenizer: Tokenizer
    unmerged: list[Tensor]  # what the chain gave for each probe before its last merge, (l, V) float32
    steps: list[Step]
    links: tuple[Link, ...]  # the base, and every adapter


def read_results(names: Sequence[str]) -> list[Result]:
    """The results that are to be merged. Raises UserError for what is none, and for several that have no average."""
    for name in names:
        about = read_about(Path(name), KEY)
        if about is not None and about.role == "model":
            raise UserError(f"{KEY}: {name} is a whole model already; there is no adapter in it to merge")
    results = [read_result(name, KEY, "a finished run") for name in names]
    for one in results if len(results) > 1 else ():
        told = f"{KEY}: {results[0].folder} and {results[1].folder} have no average"
        if one.about.fingerprint != results[0].about.fingerprint:
            raise UserError(f"{KEY}: {one.folder} was trained on another trunk than {results[0].folder}")
        if one.about.stage in SCORING:
            raise UserError(f"{told}: {one.folder} only scores texts, with a head of its own")
        if one.config.tokens or one.config.use_dora:
            raise UserError(f"{told}: {one.folder} has more than a plain LoRA (rows of added tokens, or DoRA)")
    return results


def merged_chain(results: Sequence[Result], onto: Sequence[str], trust: bool, average: Average) -> Whole:
    """Base, earlier adapters and the results as one model, in float32 on the CPU.

    `onto`: base and earlier adapters where the user names them; `trust`: code beside the base may run. Raises
    UserError where something is missing or does not belong together, and where a merged model computes something
    else than the unmerged one.
    """
    last = results[0]
    stands_on = trunk_of(last, KEY, OWN, onto[0] if onto else None, trust, onto[1:])
    names = list(onto[1:]) or [link.name for link in last.about.trunk[1:]]
    bare = stands_on.model_copy(update={"dtype": "float32", "adapter": None, "add_tokens": []})
    tokenizer = plain_tokenizer(last.folder, KEY)
    outputs = {"reward": 1, "classify": len(last.about.labels or ())}.get(last.about.stage)
    with speaking_of(KEY):
        whole = outputs if is_encoder(base_config(bare, outputs is not None)) else None  # its head is its own
        base, steps = load_base(bare, CPU, frozen=True, outputs=whole), []
        model = unpacked(base.model) if bare.quantize else base.model
        trunk = Merged(model.eval(), base.links, base.fingerprint)
        for name, path in zip(names, stands_on.adapters, strict=True):
            trunk, step, _ = _step(trunk, [read_result(path, KEY)], average, name)
            steps.append(step)
        if outputs and whole is None:
            trunk = trunk._replace(model=with_head(trunk.model, outputs, 0).eval())
        if outputs:
            tokenizer = name_padding(trunk.model.config, tokenizer)
        trunk, step, unmerged = _step(trunk, results, average, " + ".join(str(one.folder) for one in results))
    return Whole(trunk.model, tokenizer, unmerged, [*steps, step], trunk.links)


def _step(trunk: Merged, results: Sequence[Result], average: Average, name: str) -> tuple[Merged, Step, list[Tensor]]:
    """The trunk with an adapter, or an average of several, merged into it; and its logits before that, unmerged."""
    first = results[0]
    tokenizer = plain_tokenizer(first.folder, KEY)
    task = "SEQ_CLS" if first.about.stage in SCORING else "CAUSAL_LM"
    trunk, adapted = beside(trunk, results, task, KEY, partial(len, tokenizer))
    with foreign(f"{KEY}: {first.folder} cannot be put on its trunk"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights: merging unties them
        if len(results) > 1:
            average.act(adapted, list(adapted.peft_config))
        given = probes(tokenizer, trunk.model.get_input_embeddings().weight.shape[0])
        unmerged = logits_of(adapted, given)
        untied = untie(trunk.model)
        model = adapted.merge_and_unload().eval()
    told = difference(unmerged, logits_of(model, given))
    told.check(f"{KEY}: {name}: the merged model computes something else than the unmerged one")
    return grown(trunk, model, first, name), Step(name, told, untied), unmerged
