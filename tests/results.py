"""Results for tests: adapters of every kind on one base, and folders that would like to run code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from models.tiny import save_base

from align.models.base import load_base
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model

LABELS = ["ham", "spam"]
KINDS = {  # stage -> scores, and what its align.json tells besides
    "sft": (None, {}),
    "reward": (1, {"score_mean": 0.5, "score_std": 2.0}),
    "classify": (2, {"labels": LABELS, "threshold": None, "max_length": 32, "model": {"dtype": "float32"}}),
}


def make_results(folder: Path) -> dict[str, Path]:
    """A base, a result of each stage on it, and a whole classifier."""
    made = {"base": save_base(folder / "base")}
    for stage, (outputs, about) in KINDS.items():
        made[stage] = save_result(made["base"], folder / stage, stage, outputs, about, Lora(r=2, alpha=4))
    made["whole"] = save_result(made["base"], folder / "whole", "classify", *KINDS["classify"], None)
    return made


def save_result(base: Path, final: Path, stage: str, outputs: int | None, about: dict, lora: Lora | None) -> Path:
    """`final/` of a run that never was: what trains is moved at random."""
    section = Model(base=str(base), dtype="float32")
    trunk = Trunk(
        load_base(section, torch.device("cpu"), frozen=lora is not None, outputs=outputs), section, lora, 0, outputs
    )
    draw = torch.Generator().manual_seed(3)
    trained = {name: p.detach() for name, p in trunk.named_parameters() if p.requires_grad}
    for weight in trained.values():
        weight += 0.1 * torch.randn(weight.shape, generator=draw)
    trunk.save(final, trained, {"stage": stage, **about})
    return final


def change(file: Path, **values) -> None:
    """Other values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values))


MAPS = {
    name: f"evil.{name}"
    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
}


def hostile(final: Path, folder: Path, base: str, marker: Path) -> Path:
    """A copy of a result, in a run's folder, that names another base and asks for its Python files to be run."""
    run = folder / "run"
    shutil.copytree(final, run / "final")
    add_code(run / "final", marker)
    about = json.loads((run / "final" / "align.json").read_text())
    link = about["trunk"][0] | {"name": base, "path": base}
    model = about.get("model", {}) | {"base": base, "trust_remote_code": True}
    change(run / "final" / "align.json", base=base, trunk=[link], model=model, trust_remote_code=True)
    if (run / "final" / "adapter_config.json").is_file():
        change(
            run / "final" / "adapter_config.json",
            base_model_name_or_path=base,
            auto_mapping={"base_model_class": "EvilModel", "parent_library": "evil"},
        )
    recipe = {"stage": about["stage"], "run": str(run), "model": {"base": base, "trust_remote_code": True}}
    (run / "recipe.yaml").write_text(json.dumps(recipe | {"data": {"train": [{"path": "rows.jsonl"}]}}))
    return run / "final"


def add_code(folder: Path, marker: Path) -> Path:
    """Python files that leave a marker when they are run, and configs that point to them."""
    for name in ("evil", "modeling_evil", "sitecustomize", "conftest"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write('ran')\nraise RuntimeError('ran')\n")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="T")
    if (folder / "config.json").is_file():
        change(folder / "config.json", auto_map=MAPS, trust_remote_code=True)
    return folder
