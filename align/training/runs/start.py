"""Weights that a run starts from (`train.start_from`): those of an earlier run of the same kind, which are trained on.

Of a checkpoint, or of a run's folder with one, AdamW's moments come too. Step, schedule and order of examples are the
new run's own. The trunk has to be the same, for nothing is merged: the reference of DPO and PPO is the trunk still.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from align.models.checkpoints.sources import foreign, speaking_of
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.records import parsed
from align.training.runs.checkpoint import load_checkpoint, newest_checkpoint
from align.training.runs.state import Named, put_back, state_of

KEY = "train.start_from"
# Of an adapter's configuration: where it lies, who wrote it, and what acts in training alone.
OUTSIDE = (
    "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version", "task_type",
    "lora_dropout", "init_lora_weights",
)  # fmt: skip


class Start(NamedTuple):
    """Where weights are taken from."""

    path: Path
    is_checkpoint: bool  # with the optimizer's moments; else a result


def find_start(name: str) -> Start:
    """The checkpoint or result that a path means: itself, or the newest of a run's folder. Raises UserError."""
    folder = Path(name)
    if (folder / "manifest.json").is_file():
        found, passed_over = newest_checkpoint(folder.parent, only=folder.name)
        if found is None:
            raise UserError(f"{KEY}: {' '.join(passed_over) or f'{folder} is no whole checkpoint'}")
        return Start(found, True)
    if (folder / "align.json").is_file():
        return Start(folder, False)
    found, passed_over = newest_checkpoint(folder / "checkpoints")
    if found:
        return Start(found, True)
    if (folder / "final" / "align.json").is_file():
        return Start(folder / "final", False)
    why = f" ({' '.join(passed_over)})" if passed_over else "" if folder.is_dir() else " (there is no such folder)"
    raise UserError(
        f"{KEY}: {folder} has no weights to start from{why}; give a run's folder, one of its checkpoints, or its "
        "`final/` or `best/`"
    )


def terms_of(trunk: Trunk, labels: list[str] | None) -> dict[str, Any]:
    """What has to be the same where weights are trained on: the trunk, what the adapter is, and what a head says."""
    config = trunk.causal.peft_config["default"].to_dict() if trunk.adapted else None
    return {"fingerprint": trunk.fingerprint, "lora": config and _plain(config), "labels": labels}


def start_from(
    start: Start, trunk: Trunk, named: Named, optimizer: torch.optim.Optimizer, labels: list[str] | None
) -> str:
    """Put a start's weights, and its moments where it has some, in place of the new ones; what to say of it.

    Raises UserError, which names the difference, where it is of another trunk, another adapter or other labels.
    """
    if not start.is_checkpoint:
        return _start_from_result(start.path, trunk, named, labels)
    with speaking_of(KEY):
        tensors, state = load_checkpoint(start.path)
        state = state_of(start.path, state)
    _check_terms(start.path, state, terms_of(trunk, labels))
    there, moments = ({_bare(name): t for name, t in tensors.get(part, {}).items()} for part in ("model", "optimizer"))
    names = _taken(start.path, there, {_bare(name): p for name, p in named.items()})
    own = {name: p for name, p in named.items() if _bare(name) in names}
    put_back(
        start.path,
        {name: there[_bare(name)] for name in own},
        {f"{name}/{key}": t for name in own for key, t in _of(moments, _bare(name)).items()},
        own,
        optimizer,
    )
    return f"starting from {start.path}: weights and AdamW's moments of step {state['step']}"


def _start_from_result(folder: Path, trunk: Trunk, named: Named, labels: list[str] | None) -> str:
    there: dict[str, Tensor] = {}
    with foreign(f"{KEY}: {folder} cannot be read"):
        about = parsed((folder / "align.json").read_bytes())
        config = folder / "adapter_config.json"
        lora = _plain(json.loads(config.read_text("utf-8"))) if config.is_file() else None
        for file in sorted(folder.glob("*.safetensors")):
            there |= load_file(file)
    if about is None:
        raise UserError(f"{KEY}: {folder / 'align.json'} is damaged")
    terms = {"fingerprint": about.get("fingerprint"), "lora": lora, "labels": about.get("labels")}
    _check_terms(folder, terms, terms_of(trunk, labels))
    saved = get_peft_model_state_dict(trunk.causal, save_embedding_layers=False) if trunk.adapted else {}
    places = {p.data_ptr(): name for name, p in named.items()}
    names = {places[t.data_ptr()]: key for key, t in saved.items() if t.data_ptr() in places} or {
        name: name.removeprefix("causal.") for name in named
    }
    of_trunk = {name: there[key] for name, key in names.items() if key in there}
    lost = there.keys() - names.values() if trunk.adapted else set()
    if lost:
        raise UserError(f"{KEY}: {folder} has weights that this recipe does not train: {min(lost)}")
    taken = _taken(folder, {_bare(n): t for n, t in of_trunk.items()}, {_bare(n): p for n, p in named.items()})
    own = {name: p for name, p in named.items() if _bare(name) in taken}
    put_back(folder, of_trunk, {}, own, None)
    return f"starting from {folder}: its weights; AdamW's moments begin at zero, for a result has none"


def _taken(path: Path, there: dict[str, Tensor], named: Named) -> set[str]:
    """The names that the start gives; UserError where it is of something else. A critic may be new, or left behind."""
    lacking = [name for name in named if name not in there and not _is_critic(name)]
    strange = [name for name in there if name not in named and not _is_critic(name)]
    if lacking or strange:
        what = f"no {lacking[0]}" if lacking else f"{strange[0]}, which this recipe does not train"
        raise UserError(f"{KEY}: {path} has {what}; start from a run that trained the same weights")
    found = there.keys() & named.keys()
    for name in sorted(found):
        if there[name].shape != named[name].shape:
            shapes = f"{[*there[name].shape]} there, {[*named[name].shape]} here"
            raise UserError(f"{KEY}: {path}: {name} has another shape, {shapes}")
    return found


def _check_terms(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if there.get("fingerprint") != here["fingerprint"]:
        raise UserError(
            f"{KEY}: {path} was trained on a trunk with fingerprint {there.get('fingerprint')}, but this run's has "
            f"{here['fingerprint']}; give the same model.base and model.adapter"
        )
    old, new = there.get("lora"), here["lora"]
    if (old is None) != (new is None):
        kinds = ("every weight", "a LoRA") if old is None else ("a LoRA", "every weight")
        raise UserError(f"{KEY}: {path} trained {kinds[0]}, but this recipe trains {kinds[1]}; give the same `lora`")
    old, new = old or {}, new or {}
    if bool(old.get("modules_to_save")) != bool(new.get("modules_to_save")):
        heads = ("a head that scores", "none") if old.get("modules_to_save") else ("no head that scores", "one")
        raise UserError(f"{KEY}: {path} has {heads[0]}, but this stage trains {heads[1]}; start from a run of its kind")
    different = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    if found := [f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} here" for key in different]:
        same = "`lora` section" + " and the same model.add_tokens" * ("trainable_token_indices" in different)
        raise UserError(f"{KEY}: {path} has another LoRA: {'; '.join(found)}; give the same {same}")
    if there.get("labels") != here["labels"]:
        raise UserError(
            f"{KEY}: {path} has the labels {there.get('labels')}, but this run has {here['labels']}; name those, in "
            "their order, in classify.labels"
        )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter's configuration as JSON holds it: the keys that are set and decide what it computes."""
    kept = {key: sorted(v) if isinstance(v, set | list) else v for key, v in config.items() if key not in OUTSIDE}
    return {key: value for key, value in json.loads(json.dumps(kept, default=str)).items() if value}


def _of(moments: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.rpartition("/")[2]: t for key, t in moments.items() if key.rpartition("/")[0] == name}


def _bare(name: str) -> str:
    """A parameter's name without the roles that PPO puts around the trunk."""
    return name.removeprefix("trunk.")


def _is_critic(name: str) -> bool:
    return ".critic." in name or name.startswith("heads.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
