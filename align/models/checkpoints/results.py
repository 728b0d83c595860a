"""A result folder as data: what its files say, checked whole before anything is done with it.

No file of a result is run, and nothing is fetched because a result says so. An adapter's configuration is not handed to
peft: some of its keys name modules to be imported, or weights that peft would change.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from align.models.checkpoints.sources import check_regular, foreign, is_file
from align.recipe.errors import UserError
from align.recipe.schema import Lora

SCORING = ("reward", "classify")  # stages whose results have no output projection
META = "align.json"  # beside what was trained: stage, role, and the trunk that it was trained on
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXACT = ("True", "False", "gaussian", "orthogonal", "eva")  # initialisations that leave the base as it is
SILENT = {"inference_mode", "peft_version", "revision", "task_type", "auto_mapping", "megatron_core"}
Count = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]


class Known(BaseModel):
    """A file that somebody else wrote: strict types, frozen; what else stands in it is kept apart."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class Link(Known):
    """A part of a trunk: the base, or an adapter on what is before it."""

    name: str  # as the recipe named it
    path: str  # the same as a whole path, or a hub id
    fingerprint: str  # of the base's weights as its files have them, or of the trunk with the adapter
    quantize: Literal["8bit", "4bit"] | None = None  # of a base: the bits that its weights were rounded to
    settings: dict[str, Any] | None = None  # of a base: what it computes by, as its config.json says it


class Computed(BaseModel):
    """Of the recipe's `model` section what decides how a classifier computes, and nothing else."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["8bit", "4bit"] | None = None
    layout: Literal["auto", "tree", "padded"] = "auto"


class About(Known):
    """align.json of a result."""

    stage: str
    role: Literal["adapter", "model"]
    base: str
    fingerprint: str
    trunk: list[Link] = []
    score_mean: Annotated[float | None, Field(ge=-3e38, le=3e38)] = None  # float32 holds it
    score_std: Annotated[float | None, Field(ge=0, le=3e38)] = None
    labels: Annotated[list[str], Field(min_length=2)] | None = None  # of a classifier
    threshold: float | None = None
    step: Index | None = None  # of the run that saved it
    max_length: Count | None = None
    model: Computed = Computed()


class AdapterConfig(Known):
    """adapter_config.json, as far as it decides what the adapter computes."""

    peft_type: Literal["LORA"]
    r: Count
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"]
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | None = None
    rank_pattern: dict[str, Count] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    trainable_token_indices: dict[str, list[Index]] | list[Index] | None = None
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str = True

    @property
    def tokens(self) -> list[int]:
        """Ids of the tokens whose embedding rows it brings."""
        found = self.trainable_token_indices or []
        return sorted({i for ids in found.values() for i in ids} if isinstance(found, dict) else set(found))

    @property
    def section(self) -> Lora:
        """The same as a recipe's section."""
        targets = self.target_modules if self.target_modules == "all-linear" else sorted(self.target_modules)
        return Lora(
            r=self.r, alpha=self.lora_alpha, targets=targets, rslora=self.use_rslora, dora=self.use_dora
        )  # fmt: skip

    def peft(self, task: str | None = None) -> LoraConfig:
        """The same as peft's, with nothing in it that is not above."""
        keys = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "fan_in_fan_out")
        more = ("modules_to_save", "exclude_modules", "rank_pattern", "alpha_pattern", "trainable_token_indices")
        return LoraConfig(**{key: getattr(self, key) for key in (*keys, *more)}, task_type=task)


class Result(NamedTuple):
    """An adapter that was saved, read from its folder."""

    folder: Path
    about: About | None  # None where other tools saved it
    config: AdapterConfig
    weights: dict[str, Tensor]  # under peft's names in a file

    def merged_fingerprint(self, trunk: str) -> str:
        """Of a trunk with this adapter merged into it: of all that the merged weights depend on."""
        config = self.config.model_dump(
            exclude={"base_model_name_or_path", "lora_dropout", "init_lora_weights", *(self.config.model_extra or {})}
        )
        if isinstance(config["target_modules"], list):
            config["target_modules"] = sorted(config["target_modules"])
        digest = sha256(f"{trunk} {json.dumps(config, sort_keys=True)}".encode())
        digest.update(save(dict(sorted(self.weights.items()))))
        return digest.hexdigest()[:16]


def read_result(name: str, key: str, of: str = "a finished SFT run", ours: bool = True) -> Result:
    """The adapter in a folder. `key` names it in the recipe, `of` says what it should be of.

    Raises UserError for a file that is missing or damaged, for weights that are not finite, and for settings that
    cannot be taken exactly; without `ours` also other tools' adapters are taken, which have no align.json.
    """
    folder = Path(name)
    if is_file(folder / "adapter_model.bin") and not is_file(folder / WEIGHTS):
        raise UserError(
            f"{key}: {folder} has its weights as adapter_model.bin, a pickle, which may run code and is not read; load "
            "and save it with peft where you trust it: its save_pretrained writes safetensors"
        )
    for file in ((META,) if ours else ()) + (CONFIG, WEIGHTS):
        if not is_file(folder / file):
            raise UserError(f"{key}: {folder} has no {file}; give the `final/` folder of {of}")
    check_regular(folder, key)
    about = read_about(folder, key)
    if ours and about.role != "adapter":
        raise UserError(f"{key}: {folder} is a whole model (align.json: role {about.role}), not an adapter")
    config = AdapterConfig.model_validate(_checked(folder / CONFIG, key, AdapterConfig))
    _check_settings(config, folder / CONFIG, key, ours)
    with foreign(f"{key}: {folder / WEIGHTS} is damaged"):
        weights = load((folder / WEIGHTS).read_bytes())
    check_finite(weights, f"{key}: {folder / WEIGHTS}")
    ranks = [len(tensor) for tensor in weights.values() if tensor.ndim == 2]
    if max([config.r, *config.rank_pattern.values()]) > max(ranks, default=0) and not config.rank_pattern:
        raise UserError(f"{key}: {folder / CONFIG}: r: {config.r} is more than the rank of any weight in {WEIGHTS}")
    return Result(folder, about, config, weights)


def check_finite(weights: dict[str, Tensor], told: str) -> None:
    """UserError, which begins with `told`, where a value is no finite floating-point number."""
    for name, tensor in weights.items():
        if not (tensor.is_floating_point() and torch.isfinite(tensor.float()).all()):  # 8 bits know no isfinite
            raise UserError(f"{told}: {name} has values that are not finite floating-point numbers")


def check_fit(weights: dict[str, Tensor], wanted: dict[str, Tensor], told: str) -> None:
    """UserError, which begins with `told`, unless names and shapes are exactly those that are wanted."""
    for what, names in (("lacks", wanted.keys() - weights.keys()), ("has besides", weights.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise UserError(f"{told}: it {what} {min(names)}{more}")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)} in place of {tuple(wanted[name].shape)}"
            raise UserError(f"{told}: {name} has the shape {shapes}")


def read_about(folder: Path, key: str) -> About | None:
    """align.json of a result; None for any other folder. Raises UserError where it is damaged."""
    file = folder / META
    return About.model_validate(_checked(file, key, About)) if is_file(file) else None


def _checked(file: Path, key: str, kind: type[Known]) -> dict[str, Any]:
    """A JSON file whose values fit `kind`; UserError with a line for each that does not."""
    with foreign(f"{key}: {file} is damaged"):
        values = json.loads(file.read_text("utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"{key}: {file} is damaged (it holds a {type(values).__name__}, not an object)")
    try:
        kind.model_validate(values)
    except ValidationError as error:
        told = {fault["loc"][:1]: fault for fault in reversed(error.errors(include_url=False))}
        raise UserError(
            *(f"{key}: {file}: {'.'.join(map(str, loc)) or 'it'}: {fault['msg']}" for loc, fault in told.items())
        ) from None
    return values


def _check_settings(config: AdapterConfig, file: Path, key: str, ours: bool) -> None:
    """UserError for settings with which the adapter would compute something else than this package does."""
    problems = []
    if str(config.init_lora_weights) not in EXACT:
        problems.append(
            f"init_lora_weights: {config.init_lora_weights!r} changes the base's weights; convert it in peft"
        )
    usual = {field.name: field for field in fields(LoraConfig)}
    for name, value in (config.model_extra or {}).items():
        field = usual.get(name)
        default = None
        if field is not None:
            default = field.default_factory() if field.default_factory is not MISSING else field.default
        if name not in SILENT and value != default and (value or field is not None):
            problems.append(f"{name}: {value!r} is a setting that align does not take")
    if ours and (config.rank_pattern or config.alpha_pattern):
        problems.append("rank_pattern, alpha_pattern: align writes none")
    if problems:
        raise UserError(*(f"{key}: {file}: {problem}" for problem in problems))
