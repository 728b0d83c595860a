"""The two sides of `vs_trl.py`, each run in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from align.data.mixture import prepare
from align.data.trees import Tree
from align.models.base import base_folder, load_tokenizer
from align.models.demo import cache_folder
from align.recipe.schema import BaseRecipe
from align.training.plan import Plan

MAX_LENGTH, RANK, ALPHA, SEED, BETA = 512, 8, 16, 0, 0.1
OWN = {"sft": {}, "dpo": {"beta": BETA}, "reward": {"demonstration_rows": 2}}  # the stage's own section


def run_arm(spec: dict) -> None:
    trl = run_trl_sft if spec["stage"] == "sft" else run_trl_preference
    result = run_align(spec) if spec["arm"] == "align" else trl(spec)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


def recipe_of(spec: dict, run: Path) -> dict:
    stage = spec["stage"]
    return {
        "stage": stage, "run": str(run), "seed": SEED,
        "model": {"base": spec["base"], "dtype": spec["dtype"]},
        "lora": {"r": RANK, "alpha": ALPHA},
        "data": {
            "train": [{"path": spec["data"]}], "max_length": MAX_LENGTH, "overlong": "truncate", "invalid": "drop",
        },
        "batch": {"examples": spec["examples"]},
        "train": {"steps": spec["steps"]},
        "log": {"trackers": []},
        stage: OWN[stage],
    }  # fmt: skip


def run_align(spec: dict) -> dict:
    run = Path(tempfile.mkdtemp(dir=spec["work"]))
    recipe = run.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(recipe_of(spec, run)))
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(f"align.{spec['stage']}").main([str(recipe)])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = [line for line in lines if line["split"] == "train" and line["step"] > 1]
    seconds = sum(line["step_seconds"] for line in counted)
    return {
        "tokens_per_second": sum(line["tokens"] for line in counted) / seconds,
        "pairs_per_second": len(counted) * spec["examples"] / seconds,
    }


def examples_of(spec: dict) -> tuple[BaseRecipe, object, list[Tree]]:
    """The recipe, its tokenizer, and the examples of all steps in the order that align takes them."""
    torch.set_num_threads(spec["threads"])
    schema = importlib.import_module(f"align.{spec['stage']}").Recipe
    recipe = schema.model_validate(recipe_of(spec, Path(spec["work"]) / "unused"))
    tokenizer = load_tokenizer(recipe.model)
    if spec["stage"] == "sft":
        from align.data.templates.render import conversations

        reading = conversations("assistant")
    else:
        from align.data.templates.preferences import preferences

        reading = preferences()
    data = prepare(recipe.data, tokenizer, reading, SEED, cache_folder()).train
    plan = Plan(recipe, data)
    return recipe, tokenizer, [data.tree(int(i)) for step in range(1, plan.steps + 1) for i in plan.batch(step)]


def common_arguments(spec: dict) -> dict:
    """What all of TRL's trainers are given."""
    setting = spec["setting"]
    return {
        "output_dir": spec["work"],
        "use_cpu": True,
        "bf16": setting.get("bf16", False),
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "learning_rate": 2e-4,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": setting["rows"],
        "gradient_accumulation_steps": spec["examples"] // setting["rows"],
    }


def clock() -> tuple[object, list[float]]:
    """A callback, and the ends of the steps as it sees them."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_options):
            ends.append(time.perf_counter())

    return Clock(), ends


def run_trl_sft(spec: dict) -> dict:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    recipe, tokenizer, trees = examples_of(spec)
    rows = [
        {"input_ids": tokens.tolist(), "completion_mask": trained.astype(int).tolist()}
        for (tokens,), (trained,), *_ in trees
    ]
    setting, options = spec["setting"], common_arguments(spec)
    if "pack" in setting:
        # As many tokens a step as the examples have on average: packs replace examples.
        packs = sum(len(row["input_ids"]) for row in rows) / setting["pack"] / spec["steps"]
        options |= {"packing": True, "max_length": setting["pack"], "gradient_accumulation_steps": max(1, round(packs))}
    elif setting.get("padding_free"):
        options |= {"padding_free": True, "max_length": None}
    else:
        options |= {"max_length": MAX_LENGTH}
    arguments = SFTConfig(**options, completion_only_loss=True, shuffle_dataset=False)
    model = AutoModelForCausalLM.from_pretrained(base_folder(recipe.model), dtype=getattr(torch, spec["dtype"]))
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    if setting.get("adapters") == "bfloat16":
        model, lora = get_peft_model(model, lora, autocast_adapter_dtype=False), None
    callback, ends = clock()
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[callback],
    )
    collate = trainer.data_collator
    micro_batches = []  # real tokens of each, as it was collated

    def counting(features):
        # Lengths of the rows, whatever padding the collator adds. It runs ahead of the steps.
        micro_batches.append(sum(len(feature["input_ids"]) for feature in features))
        return collate(features)

    trainer.data_collator = counting
    trainer.train()
    counted = sum(micro_batches[options["gradient_accumulation_steps"] :])  # all but the first step's
    return {"tokens_per_second": counted / (ends[-1] - ends[0])}


def run_trl_preference(spec: dict) -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    recipe, tokenizer, trees = examples_of(spec)
    setting, options, rows = spec["setting"], common_arguments(spec), []
    for tree in trees:
        prompt, chosen, rejected = (segment.tolist() for segment in tree.segments)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    reference_seconds = []  # of each micro-batch, where it is computed ahead

    class GivenDPO(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):  # it is token ids already
            return dataset

        def compute_ref_log_probs(self, *inputs):
            with clocked(reference_seconds):
                return super().compute_ref_log_probs(*inputs)

    if spec["stage"] == "dpo":
        trainer_class, model_class, more, task = GivenDPO, AutoModelForCausalLM, {}, "CAUSAL_LM"
        ahead = setting.get("ahead", False)
        arguments = DPOConfig(**options, max_length=None, beta=BETA, precompute_ref_log_probs=ahead)
    else:
        trainer_class, model_class, more, task = (
            RewardTrainer, AutoModelForSequenceClassification, {"num_labels": 1}, "SEQ_CLS",
        )  # fmt: skip
        arguments = RewardConfig(**options, max_length=None)
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.pad_token  # a pad token at the end would not be read
        rows = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in rows]
    model = model_class.from_pretrained(base_folder(recipe.model), dtype=getattr(torch, spec["dtype"]), **more)
    callback, ends = clock()
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type=task),
        callbacks=[callback],
    )
    if setting.get("adapters") == "bfloat16":
        for name, p in trainer.model.named_parameters():
            if "lora_" in name:
                p.data = p.data.bfloat16()
    trainer.train()
    # All but the first step's; of the reference its forward passes alone, though TRL hashes the model too.
    seconds = ends[-1] - ends[0] + sum(reference_seconds[options["gradient_accumulation_steps"] :])
    return {"pairs_per_second": (len(rows) - spec["examples"]) / seconds}


@contextlib.contextmanager
def clocked(seconds: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)
