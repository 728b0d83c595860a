"""Loading a base: its config, tokenizer and weights, the adapters merged into it, rows for added tokens, its dtype."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from align.data.templates.templates import chat_tokenizer
from align.models.checkpoints.adapters import Merged, merge, plain_tokenizer, with_rows
from align.models.checkpoints.fingerprints import settings_of, weights_fingerprint
from align.models.checkpoints.generation import settle as settle_generation
from align.models.checkpoints.results import CONFIG, SCORING, Link, read_about, read_result
from align.models.checkpoints.sources import (
    base_folder,
    check_finite_files,
    check_weights,
    first_line,
    foreign,
    is_file,
    is_folder,
    read_config,
)
from align.models.kept import cast
from align.models.quantized import check_installed, loading, numbers, quantized_fingerprint, settle
from align.models.scoring import is_encoder, with_head
from align.recipe.errors import UserError
from align.recipe.schema import Model


class Base(NamedTuple):
    """A loaded base."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    fingerprint: str  # of the weights, its bits, adapters and added rows included
    name: str  # as the recipe names it
    source: str  # what peft and transformers can load it from: a folder or a hub id
    links: tuple[Link, ...] = ()  # what the trunk is made of: the base, and each adapter
    added: tuple[int, ...] = ()  # ids of the tokens whose embedding rows train
    unused: tuple[str, ...] = ()  # weights of layers that the files have, and the model that config.json describes not


def load_tokenizer(section: Model) -> Tokenizer:
    """The base's tokenizer (an adapter brings its own, with its chat template), ready to render chats."""
    if section.adapters:
        folder = Path(section.adapters[-1])
        if not is_file(folder / CONFIG):
            read_result(section.adapters[-1], "model.adapter")  # which says what is missing
        tokenizer = plain_tokenizer(folder, "model.adapter")
    else:
        tokenizer = plain_tokenizer(base_folder(section), "model.base", section.trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(f"model.base: {section.base} has no fast tokenizer (tokenizer.json), which align needs")
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT's end every text with it
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.base: the tokenizer of {section.base} names no eos token; set it in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = tokenizer.get_vocab()  # a token of which, added again, would be cut out of the middle of words
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in section.add_tokens if token not in known])
    return chat_tokenizer(tokenizer, section.chat_template, section.template_options, section.template_day)


def base_config(section: Model, scores: bool, described: Path | None = None) -> PreTrainedConfig:
    """The config of the model that is loaded: without dropout, with the recipe's settings where its weights are new.

    `scores`: it gets a head. `described`: a folder with its config.json, where its weights need not be there.
    UserError for what cannot be what is asked for.
    """
    if described is None:
        check_installed(section.quantize)
    folder = described or base_folder(section)
    config = read_config(folder, f"model.base: {section.base}", section.trust_remote_code)
    about = read_about(folder, "model.base")
    if about and about.stage in SCORING and not scores:
        raise UserError(f"model.base: {section.base} is a result of stage {about.stage}, which only scores texts")
    if is_encoder(config) and (not scores or section.adapters):
        raise UserError(f"model.base: {section.base} reads in both directions and predicts no next token")
    with foreign(f"model.base: {section.base} has no usable config.json"):
        _no_dropout(config)
    if section.init == "random":
        unknown = [key for key in section.config if not hasattr(config, key)]
        if unknown:
            raise UserError(f"model.config: {section.base} has no setting {', '.join(map(repr, unknown))}")
        for key, value in section.config.items():
            setattr(config, key, value)
    elif described is None:
        check_weights(folder, config, f"model.base: {section.base}")
    return config


def _stay_within_limit() -> None:
    """No more threads than OpenMP gives: PyTorch does not ask, and oneDNN's products are wrong where some lack."""
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdigit() and 0 < int(limit) < torch.get_num_threads():
        torch.set_num_threads(int(limit))


def load_base(
    section: Model,
    device: torch.device,
    *,
    frozen: bool,
    seed: int = 0,
    outputs: int | None = None,
    loaded_on: torch.device | None = None,
) -> Base:
    """Load the model that computes on `device`. A frozen trunk is held in the dtype it computes in, a trained one in
    float32.

    Adapters of earlier runs are merged into it, or kept beside its layers where it is quantised. With `outputs` it has
    a head of as many scores in place of the output projection. `loaded_on`: where it stays for now, if not on the
    device.
    """
    _stay_within_limit()
    place, dtype = loaded_on or device, compute_dtype(section.dtype, device)
    results = [read_result(name, "model.adapter") for name in section.adapters]
    folder, config = base_folder(section), base_config(section, outputs is not None)
    settings = settings_of(config)
    kind = AutoModelForCausalLM
    if is_encoder(config):
        config.num_labels, kind = outputs, AutoModelForSequenceClassification
    unused: tuple[str, ...] = ()
    if section.init == "random":
        model, fingerprint = _new_model(section, config, seed, kind)
    else:
        model, unused = _load_model(section, folder, config, place, dtype, seed, kind)
        fingerprint = weights_fingerprint(folder, section.base)
    bits = section.quantize
    link = Link(
        name=section.base, path=str(folder.resolve()), fingerprint=fingerprint, quantize=bits, settings=settings
    )
    trunk = Merged(model, (link,), quantized_fingerprint(fingerprint, bits))
    for name, result in zip(section.adapters, results, strict=True):
        trunk = merge(trunk, result, name)
    tokenizer = load_tokenizer(section)
    added = tuple(sorted(tokenizer.convert_tokens_to_ids(section.add_tokens)))
    if added:
        trunk = with_rows(trunk, added, partial(len, tokenizer), "model.add_tokens")
    model = _cast(trunk.model, section, dtype if frozen else torch.float32, place)
    if outputs and kind is AutoModelForCausalLM:
        model = with_head(model, outputs, seed).to(place)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.max_length = None
        settle_generation(model.generation_config, f"model.base: {section.base}")
    local = section.base.startswith("demo/") or is_folder(Path(section.base))
    source = str(folder.resolve()) if local else section.base
    return Base(model, tokenizer, trunk.fingerprint, section.base, source, trunk.links, added, unused)


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device has the instructions for it, else float32."""
    if choice != "auto":
        return getattr(torch, choice)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def _no_dropout(config: PreTrainedConfig) -> None:
    """Dropout belongs to the recipe's LoRA; the base's own would make log-probabilities random."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if isinstance(value, float) and (key.endswith(("dropout", "_pdrop")) or "dropout_" in key):
                setattr(part, key, 0.0)


def _cast(model: PreTrainedModel, section: Model, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Weights in `dtype` on the device; UserError where one of them is no finite number."""
    cast(model, dtype)
    if not section.quantize:
        model = model.to(device)  # only now: merged weights are float32, which may not fit there
    for name, p in numbers(model):
        if not torch.isfinite(p).all():
            raise UserError(f"model.base: {section.base}: {name} has values that are not finite numbers in {dtype}")
    return model


def _load_model(
    section: Model,
    folder: Path,
    config: PreTrainedConfig,
    place: torch.device,
    dtype: torch.dtype,
    seed: int,
    kind: type,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and the names of weights of layers that it has not."""
    options = {}
    if section.quantize:
        check_finite_files(folder, f"model.base: {section.base}")  # rounding would hide it
        with torch.device("meta"):
            skeleton = empty_model(section, config, kind)
        options = loading(section.quantize, dtype, place, skeleton)
    with foreign(f"model.base: {section.base} cannot be loaded"), torch.random.fork_rng():
        torch.manual_seed(seed)  # an encoder's new head is drawn here
        model, told = kind.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them
            **options,
        )
    wrong = {name: shapes for name, *shapes in map(tuple, told.get("mismatched_keys") or ())}
    lacking = sorted(told["missing_keys"])
    if kind is not AutoModelForCausalLM:  # a head of its own is new
        below = f"{model.base_model_prefix}."
        wrong = {name: shapes for name, shapes in wrong.items() if name.startswith(below)}
        lacking = [name for name in lacking if name.startswith(below) and "pooler" not in name]
    if wrong:
        name, (found, wanted) = next(iter(sorted(wrong.items())))
        raise UserError(
            f"model.base: {section.base}: {name} has the shape {tuple(found)} where its config.json asks for "
            f"{tuple(wanted)}"
        )
    if lacking:  # a reward model or classifier, say: its output projection would be random
        what = "language model" if kind is AutoModelForCausalLM else "model"
        raise UserError(f"model.base: {section.base} is no whole {what}: it lacks {', '.join(lacking[:3])}")
    if section.quantize:
        settle(model, dtype)
    layers = {re.sub(r"\d+", "N", name) for name in model.state_dict() if re.search(r"\.\d+\.", name)}
    return model, tuple(sorted(name for name in told["unexpected_keys"] if re.sub(r"\d+", "N", name) in layers))


def _new_model(section: Model, config: PreTrainedConfig, seed: int, kind: type) -> tuple[PreTrainedModel, str]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = empty_model(section, config, kind)
    described = json.dumps([config.to_diff_dict(), seed], sort_keys=True, default=str)
    return model.float(), sha256(described.encode()).hexdigest()[:16]


def empty_model(section: Model, config: PreTrainedConfig, kind: type) -> PreTrainedModel:
    """A model of new weights; UserError where its settings make none."""
    try:
        return kind.from_config(config, trust_remote_code=section.trust_remote_code)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # settings may be wrong in any way
        key = "model.config: no model can be made from these settings"
        if section.init != "random":
            key = f"model.base: {section.base}: no model can be made from its config.json"
        raise UserError(f"{key} ({first_line(error)})") from None
