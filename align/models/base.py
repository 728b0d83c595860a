"""Loading a base checkpoint: where it comes from, its dtype, its fingerprint, and the adapter merged into it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_bnb_available
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from align.data.templates import chat_tokenizer
from align.models.demo import NAMES, demo_model
from align.models.scoring import is_encoder, with_head
from align.recipe.errors import UserError
from align.recipe.schema import Model

SCORING = ("reward", "classify")  # stages whose results have no output projection
META = "align.json"  # beside a saved adapter: stage, role, fingerprint of the trunk it was trained on
ELSEWHERE = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "transformers_version",
    "base",
    "trunk",
    "_name_or_path",
)
WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


class Base(NamedTuple):
    """A loaded base."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    fingerprint: str  # of the weights, an adapter merged on load included
    name: str  # as the recipe names it
    source: str  # what peft and transformers can load it from: a folder or a hub id


def base_folder(section: Model) -> Path:
    """The local folder of the base's files; a hub id is fetched (the only place where models use the network)."""
    name = section.base
    if name.startswith("demo/"):
        return demo_model(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = "give it to model.adapter, and its base here" if (folder / "adapter_config.json").is_file() else ""
            raise UserError(
                f"model.base: {name} has no config.json, so it is no checkpoint; {hint or 'check the path'}"
            )
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        known = f"a local folder in Hugging Face format, a hub id (owner/name) or {NAMES[0]}"
        raise UserError(f"model.base: there is no model {name!r}; expected {known}")
    try:
        return Path(snapshot_download(name, revision=section.revision, allow_patterns=[*WEIGHTS, "*.py"]))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.base: {name!r} is neither a local folder nor could it be fetched from the hub ({reason}); "
            f"check the name and the network, or use {NAMES[0]}"
        ) from None


def load_tokenizer(section: Model) -> Tokenizer:
    """The base's tokenizer (an SFT adapter brings its own, with its chat template), ready to render chats."""
    folder = adapter_folder(section.adapter) if section.adapter else base_folder(section)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.base: no tokenizer can be loaded from {folder} ({_first_line(error)})") from None
    if not tokenizer.is_fast:
        raise UserError(f"model.base: {section.base} has no fast tokenizer (tokenizer.json), which align needs")
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT's end every text with it
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.base: the tokenizer of {section.base} names no eos token; set it in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return chat_tokenizer(tokenizer, section.chat_template)


def load_base(section: Model, device: torch.device, *, frozen: bool, seed: int = 0, outputs: int | None = None) -> Base:
    """Load the model onto `device`. A frozen trunk is held in the dtype it computes in, a trained one in float32.

    With `outputs` it has a head of as many scores in place of the output projection.
    """
    folder = base_folder(section)
    stage = about_result(folder, "model.base").get("stage")
    if outputs is None and stage in SCORING:
        raise UserError(f"model.base: {section.base} is a result of stage {stage}, which only scores texts")
    dtype = compute_dtype(section.dtype, device) if frozen else torch.float32
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.base: {section.base} has no usable config.json ({_first_line(error)})") from None
    _no_dropout(config)
    kind = AutoModelForCausalLM
    if is_encoder(config):
        if outputs is None or section.adapter:
            raise UserError(f"model.base: {section.base} reads in both directions and predicts no next token")
        config.num_labels, kind = outputs, AutoModelForSequenceClassification
    if section.init == "random":
        model, fingerprint = _new_model(section, config, seed, kind)
    else:
        model, fingerprint = _load_model(section, folder, config, device, seed, kind), weights_fingerprint(folder)
    if section.adapter:
        model, fingerprint = merge_adapter(model, adapter_folder(section.adapter), fingerprint)
    if not section.quantize:
        model = model.to(device)
        for p in model.parameters():  # buffers, such as rotary frequencies, stay in the float32 that they need
            if p.is_floating_point():
                p.data = p.data.to(dtype)
    if outputs and kind is AutoModelForCausalLM:
        model = with_head(model, outputs, seed).to(device)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.max_length = None
    local = folder if section.base.startswith("demo/") or Path(section.base).expanduser().is_dir() else None
    source = str(local.resolve()) if local else section.base
    return Base(model, load_tokenizer(section), fingerprint, section.base, source)


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


def _no_dropout(config: object) -> None:
    """Dropout belongs to the recipe's LoRA; the base's own would make log-probabilities random."""
    for part in {id(c): c for c in (config, getattr(config, "text_config", config))}.values():
        for key, value in part.to_dict().items():
            if isinstance(value, float) and (key.endswith(("dropout", "_pdrop")) or "dropout_" in key):
                setattr(part, key, 0.0)


def _load_model(
    section: Model, folder: Path, config: object, device: torch.device, seed: int, kind: type
) -> PreTrainedModel:
    options: dict[str, object] = {}
    if section.quantize:
        if not is_bnb_available():
            raise UserError("model.quantize: bitsandbytes is not installed; run: pip install bitsandbytes")
        compute = compute_dtype(section.dtype, device)
        four = section.quantize == "4bit"
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
        )
        options["device_map"] = {"": device}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # an encoder's new head is drawn here
            model, told = kind.from_pretrained(
                folder,
                config=config,
                dtype="auto" if not section.quantize else compute_dtype(section.dtype, device),
                use_safetensors=True,
                trust_remote_code=section.trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise UserError(f"model.base: {section.base} cannot be loaded ({_first_line(error)})") from None
    lacking = sorted(told["missing_keys"]) if kind is AutoModelForCausalLM else []
    if lacking:  # a reward model or classifier, say: its output projection would be random
        raise UserError(f"model.base: {section.base} is no whole language model: it lacks {', '.join(lacking[:3])}")
    return model


def _new_model(section: Model, config: object, seed: int, kind: type) -> tuple[PreTrainedModel, str]:
    unknown = [key for key in section.config if not hasattr(config, key)]
    if unknown:
        raise UserError(f"model.config: {section.base} has no setting {', '.join(map(repr, unknown))}")
    for key, value in section.config.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = kind.from_config(config, trust_remote_code=section.trust_remote_code)
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"model.config: no model can be made from these settings ({_first_line(error)})") from None
    described = json.dumps([config.to_diff_dict(), seed], sort_keys=True, default=str)
    return model.float(), hashlib.sha256(described.encode()).hexdigest()[:16]


def adapter_folder(name: str, key: str = "model.adapter", of: str = "a finished SFT run") -> Path:
    """The folder of an earlier run's adapter; `key` names it in the recipe."""
    folder = Path(name).expanduser()
    for file in (META, "adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"{key}: {folder} has no {file}; give the `final/` folder of {of}")
    return folder


def merge_adapter(model: PreTrainedModel, folder: Path, fingerprint: str) -> tuple[PreTrainedModel, str]:
    """base + merged adapter, in float32."""
    weights, about = folder / "adapter_model.safetensors", about_result(folder, "model.adapter")
    trained_on = about.get("fingerprint")
    if about.get("stage") in SCORING:
        raise UserError(f"model.adapter: {folder} is a result of stage {about['stage']}, which only scores texts")
    if trained_on != fingerprint:
        raise UserError(
            f"model.adapter: {folder} was trained on a trunk with fingerprint {trained_on}, but model.base has "
            f"{fingerprint}; use the base that its recipe.yaml names"
        )
    if getattr(model, "is_quantized", False):
        raise UserError("model.adapter: a quantised trunk cannot take an earlier adapter yet; drop model.quantize")
    for p in model.parameters():
        p.data = p.data.float()
    try:
        adapted = PeftModel.from_pretrained(model, folder, adapter_name="sft")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        raise UserError(f"model.adapter: {folder} cannot be loaded ({_first_line(error)})") from None
    digest = hashlib.sha256(fingerprint.encode() + weights.read_bytes()).hexdigest()[:16]
    return adapted.merge_and_unload(), digest


def about_result(folder: Path, key: str) -> dict[str, Any]:
    """What align.json tells of a result; nothing of any other checkpoint."""
    meta = folder / META
    try:
        return dict(json.loads(meta.read_text("utf-8"))) if meta.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}: {meta} is damaged ({_first_line(error)})") from None


def weights_fingerprint(folder: Path, sample: int = 4096) -> str:
    """16 hex digits that tell one checkpoint's weights from another's, whatever dtype they are loaded in.

    Over every tensor's name and shape and up to `sample` of its bytes, evenly spread, straight from the files: a
    retrained checkpoint differs everywhere, and 100 GB are read no slower than their headers.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                shape = part.get_shape()
                digest.update(f"{name} {part.get_dtype()} {shape}".encode())
                rows = range(0, shape[0], max(1, shape[0] // 16)) if shape else ()
                for row in rows:
                    values = part[row : row + 1].flatten()
                    step = max(1, values.numel() // (sample // 16))
                    digest.update(values[::step].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def result_fingerprint(folder: Path) -> str:
    """16 hex digits of all that a saved result or checkpoint computes: its weights, its configuration, and what
    align.json says of its outputs. Where its base lies, and which version wrote it, does not count.

    Weights beside an adapter's are told as `weights_fingerprint` tells them. Raises UserError where a file is damaged.
    """
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "config.json", "align.json"):
        try:
            about = dict(json.loads((folder / name).read_bytes())) if (folder / name).is_file() else {}
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / name}: it is damaged ({_first_line(error)})") from None
        parts = {key: sorted(v) if key == "target_modules" and isinstance(v, list) else v for key, v in about.items()}
        told = {key: value for key, value in parts.items() if key not in ELSEWHERE}
        digest.update(f"{name} {json.dumps(told, sort_keys=True)}".encode())
    weights = folder / "adapter_model.safetensors"
    digest.update(weights.read_bytes() if weights.is_file() else weights_fingerprint(folder).encode())
    return digest.hexdigest()[:16]
