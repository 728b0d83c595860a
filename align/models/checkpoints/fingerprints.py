"""What tells one checkpoint's or result's numbers from another's: 16 hex digits over weights and settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from align.models.checkpoints.sources import first_line, foreign
from align.recipe.errors import UserError

WHOLE = 2**20  # numbers of a tensor that is read at once
ELSEWHERE = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "transformers_version",
    "base",
    "trunk",
    "_name_or_path",
)
OUTSIDE = (  # of a config: what does not concern the numbers of a base
    "architectures", "auto_map", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "id2label", "label2id", "num_labels", "problem_type", "attn_implementation", "max_position_embeddings",
)  # fmt: skip


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a base computes its numbers by besides its weights, as JSON holds it: the settings that are not those of its
    kind, without names, versions, tokens and what loading decides."""
    told = {key: value for key, value in config.to_diff_dict().items() if key not in (*ELSEWHERE, *OUTSIDE)}
    return json.loads(json.dumps(told, sort_keys=True, default=str))


def weights_fingerprint(folder: Path, name: str | None = None, sample: int = 4096) -> str:
    """16 hex digits that tell one checkpoint's weights from another's, whatever dtype they are loaded in.

    Over every tensor's name and shape and up to `sample` of its bytes, evenly spread, straight from the files: a
    retrained checkpoint differs everywhere, and 100 GB are read no slower than their headers.
    """
    digest = sha256()
    with foreign(f"model.base: the weights of {name or folder} are damaged"):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for tensor in sorted(file.keys()):
                    part = file.get_slice(tensor)
                    shape = part.get_shape()
                    digest.update(f"{tensor} {part.get_dtype()} {shape}".encode())
                    for values in _sampled(file.get_tensor(tensor) if prod(shape) <= WHOLE else part, shape):
                        step = max(1, values.shape[1] // (sample // 16))
                        digest.update(values[:, ::step].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sampled(part: Any, shape: Sequence[int]) -> Iterator[Tensor]:
    """Some 16 rows of a tensor, or of a slice that is read row by row, as (rows, numbers)."""
    every = max(1, shape[0] // 16) if shape else 1
    if not shape or not prod(shape):
        return
    if isinstance(part, Tensor):
        yield part[::every].flatten(1) if len(shape) > 1 else part[::every, None]
    else:
        yield from (part[row : row + 1].reshape(1, -1) for row in range(0, shape[0], every))


def result_fingerprint(folder: Path) -> str:
    """16 hex digits of all that a saved result or checkpoint computes: its weights, its configuration, and what
    align.json says of its outputs. Where its base lies, and which version wrote it, does not count.

    Weights beside an adapter's are told as `weights_fingerprint` tells them. Raises UserError where a file is damaged.
    """
    digest = sha256()
    for name in ("adapter_config.json", "config.json", "align.json"):
        try:
            about = dict(json.loads((folder / name).read_bytes())) if (folder / name).is_file() else {}
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / name}: it is damaged ({first_line(error)})") from None
        parts = {key: sorted(v) if key == "target_modules" and isinstance(v, list) else v for key, v in about.items()}
        told = {key: value for key, value in parts.items() if key not in ELSEWHERE}
        digest.update(f"{name} {json.dumps(told, sort_keys=True)}".encode())
    weights = folder / "adapter_model.safetensors"
    digest.update(weights.read_bytes() if weights.is_file() else weights_fingerprint(folder).encode())
    return digest.hexdigest()[:16]
