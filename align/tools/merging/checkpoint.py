"""A merged model on the disk: written in its dtype, loaded again by plain transformers, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel

from align.models.checkpoints.generation import settle
from align.models.checkpoints.results import SCORING, Result
from align.models.checkpoints.sources import foreign, is_file
from align.models.scoring import name_outputs
from align.recipe.errors import UserError
from align.tools.merging.chain import KEY, Whole
from align.tools.merging.compared import Difference, difference, logits_of, probes


def write(whole: Whole, result: Result, folder: Path, dtype: torch.dtype, trust: bool) -> tuple[Difference, list[str]]:
    """Write the model, its tokenizer and its configuration; how far what is on the disk lies from the unmerged model,
    and what else is to be said.

    Both are computed in float32, so what a narrower `dtype` changes is the rounding of the weights. Raises UserError
    where the files give something else than the model in memory, rounded alike.
    """
    model, remarks = whole.model, []
    scores = result.about.stage in SCORING
    if scores:
        name_outputs(model.config, result.about.labels)
        if model.config.pad_token_id is None:
            remarks.append("every special token ends a text, so none can be padding: score one row at a time")
    else:
        remarks += _ends(model, result)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model.config.dtype = dtype
    with foreign(f"{KEY}: {folder} cannot be written"):
        model.save_pretrained(folder)
        whole.tokenizer.save_pretrained(folder)
    given = probes(whole.tokenizer, model.get_input_embeddings().weight.shape[0])
    in_memory = logits_of(model.float(), given)  # the values that it has
    on_disk = logits_of(load(folder, scores, trust).float(), given)
    difference(in_memory, on_disk).check(f"{KEY}: what was written computes something else than the model in memory")
    return difference(whole.unmerged, on_disk), remarks


def load(folder: Path, scores: bool, trust: bool) -> PreTrainedModel:
    """A checkpoint as plain transformers load it."""
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with foreign(f"{KEY}: transformers cannot load what was written to {folder}"):
        return kind.from_pretrained(folder, dtype="auto", trust_remote_code=trust).eval()


def _ends(model: PreTrainedModel, result: Result) -> Sequence[str]:
    """Give the model what ends its answers, as the result's training taught it."""
    if not is_file(result.folder / "generation_config.json"):
        return [f"{result.folder} has no generation_config.json: the base's own says where an answer ends"]
    with foreign(f"{KEY}: {result.folder / 'generation_config.json'} is damaged"):
        model.generation_config = GenerationConfig.from_pretrained(result.folder)
    settle(model.generation_config, f"{KEY}: {result.folder}")
    texts = model.generation_config.stop_strings or []
    named = " or ".join(map(repr, texts))
    return [f"answers end with {named}, which is no single token: servers need it as a stop string"] if texts else []


def sizes(model: nn.Module) -> tuple[int, int]:
    """Weights of a model, and bytes that they take."""
    tensors: list[Tensor] = [*model.parameters()]
    return sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)


def refuse_taken(out: Path) -> None:
    """UserError where something is in the way of the result."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} is already there; name a folder that is new or empty")
