"""The model card of a merged checkpoint: what it was made of, what was checked, what its run tells of it.

A run's files are data: their words are escaped. What they do not say is left open.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from align import __version__
from align.models.checkpoints.results import SCORING, Result
from align.models.scoring import is_encoder
from align.recipe.errors import UserError, printable
from align.recipe.records import read_lines, to_json
from align.tools.merging.averages import Average
from align.tools.merging.chain import Whole
from align.tools.merging.compared import Difference

MOST = 1_000_000  # bytes of a recipe that are read
SHOWN = ("sft", "reward", "dpo", "ppo", "grpo", "distill", "classify", "lora", "optim", "batch", "train", "seed")
NO_MEASURE = re.compile(  # clocks, counters, and what says how training went and not how good the model is
    r"_seconds$|_per_second$|^(step|split|epoch|tokens|tokens_seen|kl_coef)$|^(logprobs|nll_per_token)/"
)
CHAT = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
asked = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]))"""
CLASSES = """from transformers import pipeline

classify = pipeline("text-classification", model="FOLDER")
print(classify("A text.", function_to_apply="softmax"))"""
SCORES = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForSequenceClassification.from_pretrained("FOLDER").eval()
talk = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help?"}]
text = tokenizer.apply_chat_template(talk, tokenize=False).rstrip()  # ends with the end of turn, where the score is
with torch.no_grad():
    print(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item())"""
USES = {"reward": SCORES, "classify": CLASSES}


def card(whole: Whole, result: Result, average: Average | None, on_disk: Difference, dtype: str, weights: int) -> str:
    """The text of README.md."""
    about, run, config = result.about, result.folder.parent, whole.model.config
    scores = about.stage in SCORING
    reads_last = scores and not is_encoder(config)  # as a decoder's head does
    recipe, measures = {}, {}
    if not average:  # which no one run has made or measured
        recipe, measures = _recipe(run / "recipe.yaml"), _evaluation(run / "metrics.jsonl", about.step)
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, _Plain) else _escaped(value),
    )  # fmt: skip
    ends = None if scores else getattr(whole.model.generation_config, "eos_token_id", None)
    tokens = [ends] if isinstance(ends, int) else ends or []
    return page.get_template("card.md.jinja").render(
        base=about.base,
        base_id=_Plain(to_json(about.base)),  # in YAML, which takes a JSON text
        scores=scores,
        stage=about.stage,
        title=f"{Path(about.base).name} after {about.stage}",
        what=_Plain(WHAT[about.stage]) if about.stage in WHAT else "A model with its adapters merged in.",
        steps=whole.steps,
        average=str(average) if average else None,
        weights=weights,
        dtype=dtype,
        untied=any(step.untied for step in whole.steps),
        labels=", ".join(about.labels or ()),
        threshold=about.threshold,
        ends=", ".join(map(str, whole.tokenizer.convert_ids_to_tokens(tokens))),
        probes=len(whole.unmerged),
        on_disk=on_disk,
        settings=[*_settings(recipe)],
        data=", ".join(_sources(recipe)),
        step=about.step,
        measures=[(key, f"{value:.6g}") for key, value in measures.items() if _is_measure(key, value)],
        reads_last=reads_last,
        padding=whole.tokenizer.pad_token if reads_last and config.pad_token_id is not None else None,
        use=_Plain(USES.get(about.stage, CHAT)),
        version=__version__,
        config=config,
    )


WHAT = {
    "sft": "A language model after supervised fine-tuning, its adapters merged into its base.",
    "dpo": "A language model after training on preferences, its adapters merged into its base.",
    "ppo": "A language model after reinforcement learning (PPO), its adapters merged into its base.",
    "grpo": "A language model after reinforcement learning (GRPO), its adapters merged into its base.",
    "distill": "A language model that was taught by another one, its adapters merged into its base.",
    "reward": "A reward model: one score for a whole conversation. Only differences of scores mean something.",
    "classify": "A classifier of texts.",
}


class _Plain(str):
    """Text of this file, which needs no escape."""


def _escaped(value: object) -> object:
    """What somebody else wrote, as plain words of Markdown."""
    if not isinstance(value, str):
        return value
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", printable(value).replace("\n", " "))


def _recipe(path: Path) -> dict[str, Any]:
    """A run's recipe as it stands there, unchecked; empty where there is none that can be read."""
    try:
        found = yaml.safe_load(path.read_text("utf-8")) if path.stat().st_size < MOST else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(recipe: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in SHOWN:
        section = recipe.get(name)
        for key, value in section.items() if isinstance(section, dict) else [("", section)]:
            if isinstance(value, str | int | float) and value not in ("", None):
                yield f"{name}.{key}".rstrip("."), str(value)


def _sources(recipe: dict[str, Any]) -> Iterator[str]:
    data = recipe.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    for source in train if isinstance(train, list) else ():
        path = source.get("path") if isinstance(source, dict) else None
        if isinstance(path, str):
            yield Path(path).name or path


def _evaluation(path: Path, step: int | None) -> dict[str, Any]:
    """The record of a run's last evaluation at a step; empty where there is none, or the step is not known."""
    try:
        records = read_lines(path, {"split": str})
    except (UserError, OSError):
        return {}
    held = (record for record in reversed(records) if record["split"] == "eval" and record.get("step") == step)
    return {} if step is None else next(held, {})


def _is_measure(key: str, value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not NO_MEASURE.search(key)
