"""Where the files of a base are, and reading those that others wrote: one line for whatever is wrong with them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from align.models.demo import NAMES, cache_folder, demo_model
from align.recipe.errors import UserError
from align.recipe.schema import Model

FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # of a hub repository
CODE = "it asks for Python code beside it, which does not run unless you allow it: model.trust_remote_code of the base"
MOST_LABELS = 10**6  # of a classifier
PACKED = 16  # weights that a quantised checkpoint may hold in one value
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt")


@contextmanager
def foreign(told: str) -> Iterator[None]:
    """Whatever fails within, on a file that somebody else wrote, becomes one line: `told` and the reason."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a file may be wrong in any way
        reason = CODE if "trust_remote_code" in str(error) else first_line(error)
        raise UserError(f"{told} ({reason})") from None


@contextmanager
def speaking_of(key: str) -> Iterator[None]:
    """Problems with keys of a recipe's section of the model are told as problems with this key."""
    try:
        yield
    except UserError as error:
        plain = (re.sub(r"^model\.(base|adapter): ", "", problem) for problem in error.problems)
        raise UserError(*(p if p.startswith(key) else f"{key}: {p}" for p in plain)) from None


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def is_file(path: Path | str) -> bool:
    """Whether there is such a file; False for a text that can be no path."""
    return os.path.isfile(path)


def is_folder(path: Path | str) -> bool:
    """The same for a folder."""
    return os.path.isdir(path)


def check_regular(folder: Path, told: str) -> None:
    """UserError where a named pipe, a device or a socket, which may never end, stands among a checkpoint's files."""
    for pattern in FILES:
        for path in folder.glob(pattern):
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"{told}: {path} is no regular file; move it away")


def base_folder(section: Model) -> Path:
    """The local folder of the base's files; a hub id is fetched (the only place where models use the network)."""
    name = section.base
    if name.startswith("demo/"):
        return demo_model(name)
    folder = Path(name)
    if is_folder(folder):
        if not is_file(folder / "config.json"):
            hint = "give it to model.adapter, and its base here" if is_file(folder / "adapter_config.json") else ""
            raise UserError(
                f"model.base: {name} has no config.json, so it is no checkpoint; {hint or 'check the path'}"
            )
        check_regular(folder, "model.base")
        return folder
    if os.path.lexists(folder) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        known = f"a local folder in Hugging Face format, a hub id (owner/name) or {NAMES[0]}"
        raise UserError(f"model.base: there is no model {name!r}; expected {known}")
    code = ["*.py"] if section.trust_remote_code else []
    try:
        return Path(snapshot_download(name, revision=section.revision, allow_patterns=[*FILES, *code]))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"model.base: {name!r} is neither a local folder nor could it be fetched from the hub "
            f"({first_line(error)}); check the name and the network, or use {NAMES[0]}"
        ) from None


def config_folder(section: Model) -> Path:
    """A folder with the base's config.json. Of a hub id that is not on this machine only that file is fetched."""
    name = section.base
    if name.startswith("demo/") or is_folder(Path(name)) or folder_on_disk(name) or name.count("/") != 1:
        return base_folder(section)
    try:
        return Path(hf_hub_download(name, "config.json", revision=section.revision)).parent
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"model.base: {name!r} is neither a local folder nor could its config.json be fetched from the hub "
            f"({first_line(error)}); check the name and the network"
        ) from None


def folder_on_disk(name: str) -> Path | None:
    """The folder of a checkpoint that somebody else's file names, if it is on this machine already; nothing is
    fetched for it."""
    if name in NAMES:
        made = cache_folder() / name
        return made if is_file(made / "config.json") else None
    if is_file(Path(name) / "config.json"):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES], local_files_only=True))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError):
        return None


def read_config(folder: Path, told: str, trust: bool = False) -> PreTrainedConfig:
    """config.json of a checkpoint. `trust`: the user allows code that stands beside it.

    Raises UserError for a file that is none, or that asks for code that the user has not allowed.
    """
    with foreign(f"{told} has no usable config.json"):
        written = json.loads((folder / "config.json").read_bytes()) if is_file(folder / "config.json") else {}
        labels = written.get("num_labels") if isinstance(written, dict) else None
        if isinstance(labels, int) and labels > MOST_LABELS:  # each of which would get a name in memory
            raise ValueError(f"num_labels: {labels:,} is more than any model has")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        if not all(isinstance(name, str) for name in config.architectures or ()):
            raise ValueError("architectures: expected names of classes")
        parts = {id(part): part for part in (config, config.get_text_config())}.values()
        kernels = [part._attn_implementation for part in parts if "/" in str(part._attn_implementation)]
    if kernels and not trust:
        raise UserError(
            f"{told}: its config.json asks for an attention kernel from the hub ({kernels[0]}), which is code; take "
            "`attn_implementation` out of it"
        )
    return config


def check_weights(folder: Path, config: PreTrainedConfig, told: str) -> None:
    """UserError for a checkpoint whose weights are quantised; for one without safetensors, with the way to make some;
    and for a config that asks for a model far larger than its weights, before memory is taken for it."""
    if bits := getattr(config, "quantization_config", None):
        method = bits.get("quant_method") if isinstance(bits, dict) else getattr(bits, "quant_method", None)
        raise UserError(
            f"{told} is quantised already ({getattr(method, 'value', method) or 'by an unknown method'}); give the "
            "checkpoint that it was made from, and model.quantize: 4bit or 8bit"
        )
    if files := sorted(folder.glob("*.safetensors")):
        _check_size(files, config.get_text_config(), told)
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        raise UserError(
            f"{told} has no weights in safetensors format (*.safetensors); if there are .bin files, convert them"
        )
    raise UserError(
        f"{told} has its weights as {pickles[0]}, a pickle, which may run code and is not read; convert it where you "
        'trust it: python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('OLD').save_pretrained('NEW')\", and copy the tokenizer's files"
    )


def check_finite_files(folder: Path, told: str) -> None:
    """UserError, which begins with `told`, where a weight in the files of a checkpoint is no finite number."""
    for path in sorted(folder.glob("*.safetensors")):
        with foreign(f"{told}: its weights are damaged"), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not torch.isfinite(file.get_tensor(name).float()).all():
                    raise UserError(f"{told}: {name} has values that are not finite numbers")


def _check_size(files: list[Path], config: PreTrainedConfig, told: str) -> None:
    shapes = []
    with foreign(f"{told}: its weights are damaged"):
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    shapes.append(part.get_shape())
                    if name.endswith(".weight") and part.get_dtype().startswith(("I", "U", "BOOL")):
                        raise ValueError(f"{name} holds whole numbers, as weights that were quantised")
    values = PACKED * sum(map(math.prod, shapes))
    width = getattr(config, "hidden_size", None)
    most = {"hidden_size": values, "num_hidden_layers": len(shapes)}
    most |= {key: values // max(width or 1, 1) for key in ("vocab_size", "intermediate_size")}
    for key, limit in most.items():
        size = getattr(config, key, None)
        if isinstance(size, int) and size > limit:
            raise UserError(f"{told}: its config.json has {key}: {size:,}, which its weights are far too small for")
        if size == 0 and key in ("hidden_size", "num_hidden_layers"):
            raise UserError(f"{told}: its config.json has {key}: 0, which makes no model")
    size = 0
    with suppress(Exception), torch.device("meta"):  # where none can be made, what loads it says so
        size = sum(p.numel() for p in AutoModel.from_config(config, trust_remote_code=False).parameters())
    if size > values:
        raise UserError(
            f"{told}: its config.json describes {size:,} parameters, which its weights are far too small for"
        )
