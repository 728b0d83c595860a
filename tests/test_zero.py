"""DeepSpeed's ZeRO: losses, weights and checkpoints as with one process; what it cannot do is refused by name."""

from __future__ import annotations

import importlib
import json
import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DeepSpeedPlugin, DistributedType
from forks import PRELOADED
from test_classify import recipe as classes
from test_processes import free_port
from world import Child, align, lines, metrics, weights

from align import dpo, ppo, reward, sft
from align.models import quantized
from align.recipe.errors import UserError
from align.training import zero

deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
if find_spec("deepspeed"):
    os.environ["DS_ACCELERATOR"] = "cpu"  # before the children's server imports it
    PRELOADED.append("deepspeed")
STAGES = {"sft": sft, "dpo": dpo, "reward": reward}
ROWS = {"batch": {"examples": 4, "row_tokens": 128}}  # one for each example, so that processes have several


def pair(here, *argv, zero, stage=sft, more=()):
    """Two processes as accelerate's launcher starts them for DeepSpeed."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero), "OMP_NUM_THREADS": "1"}
    if zero == 3 and not more:
        more = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": config_of(here, 3)}
    shared |= {"DS_ACCELERATOR": "cpu", **dict(more)}
    ranks = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    first, second = [Child(here, *argv, stage=stage, rank=rank) for rank in ranks]
    return first.wait(), second.wait()


def config_of(here, stage):
    """A file that asks for a stage, where weights as small as these do not stay whole."""
    file = here / f"zero{stage}.json"
    more = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    file.write_text(json.dumps({"zero_optimization": {"stage": stage} | more}))
    return str(file)


def assert_same(run, other, tolerance=1e-5):
    """Every figure of metrics.jsonl, and the trained weights."""
    ours, theirs = metrics(run), metrics(other)
    assert [set(record) for record in ours] == [set(record) for record in theirs]
    for record, reference in zip(ours, theirs, strict=True):
        numbers = {n: x for n, x in record.items() if isinstance(x, float | int)}
        assert numbers == pytest.approx({n: reference[n] for n in numbers}, rel=tolerance, abs=tolerance)
    mine = weights(run)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=2e-4 if tolerance > 1e-5 else 1e-5)


RUNS = [
    ("sft", 2, {}), ("sft", 3, {}), ("sft", 3, {"lora": None}), ("dpo", 3, {}), ("dpo", 3, {"dpo": {"loss": "kto"}}),
    ("dpo", 2, {"lora": None}), ("reward", 2, {}), ("reward", 3, {}),
]  # fmt: skip


@deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "zero", "sections"),
    RUNS,
    ids=[f"{s}{z}{'-full' * ('lora' in m)}{'-kto' * ('dpo' in m)}" for s, z, m in RUNS],
)
def test_as_with_one_process_and_gone_on_with(stage, zero, sections, world, here):
    module, path = STAGES[stage], here / "recipe.yaml"
    optim = {"learning_rate": 0.002} if "lora" in sections else {}
    write = world.recipe if stage == "sft" else lambda path, **given: world.preferences(path, module, **given)
    given = {
        **ROWS,
        "optim": {"learning_rate": 0.005, "warmup": 2} | optim,
        "train": {"steps": 6, "eval_every": 3, "save_every": 2},
        "log": {"trackers": [], "samples": ["Peru?"], "sample_tokens": 4} if stage == "sft" else {"trackers": []},
    }
    recipe = write(path, **given, **sections)
    assert align(recipe, stage=module).status == 0
    first, second = pair(here, recipe, f"run={here / 'two'}", zero=zero, stage=module)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert f"DeepSpeed ZeRO-{zero}" in first.out
    assert_same(here / "two", here / "run")
    if stage == "sft":
        assert lines(here / "two" / "samples.jsonl") == lines(here / "run" / "samples.jsonl")
    checkpoints = here / "two" / "checkpoints"
    for step in (4, 6):  # a checkpoint of two processes goes on with one, and the other way round
        ours, theirs = (p / "checkpoints" / f"step-00000{step}" for p in (here / "two", here / "run"))
        assert json.loads((ours / "state.json").read_text())["step"] == step
        assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    assert checkpoints.is_dir()
    longer = [recipe, "--extend", "train.steps=9"]
    assert align(*longer, stage=module).status == 0
    first, _ = pair(here, *longer, f"run={here / 'two'}", zero=zero, stage=module)
    assert first.status == 0, first.err
    assert "(step 6 of 9)" in first.out
    assert_same(here / "two", here / "run")


@deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_classifiers_bfloat16_and_few_bits(world, here, monkeypatch):
    """Several runs of the same two processes, one after another, beside one process."""
    monkeypatch.setattr("world.WAIT", 600)
    rounded, steps = {"dtype": "bfloat16"}, ROWS | {"train": {"steps": 3, "eval_every": 3, "save_every": None}}
    # Of rounded products AdamW moves a weight whose gradient is close to 0 either way, unless eps is large.
    gentle = {"optim": {"learning_rate": 0.001, "warmup": 0, "eps": 0.1}} | steps
    made = []

    def add(stage, name, number, make, **sections):
        folder = here / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        made.append((stage, folder, number, make(folder / "recipe.yaml", **sections)))

    def scores(path, **sections):
        return world.preferences(path, reward, **sections)

    def labelled(path, **sections):
        return classes(world, path, data={"train": [{"path": str(path.parent / "rows.jsonl")}]}, **sections)

    for stage in (2, 3):
        add("classify", f"classes {stage}", stage, labelled, **steps)
        add("reward", f"rounded scores {stage}", stage, scores, model=rounded, **gentle)
        add("sft", f"rounded {stage}", stage, world.recipe, model=rounded, **gentle)
    add("classify", "blocks", 3, labelled, lora=None, classify={"train": "last_blocks"}, **gentle)
    add("sft", "rounded, all weights", 3, world.recipe, model=rounded, lora=None, **gentle)
    for bits in ("4bit", "8bit") if quantized.LAYERS else ():
        add("sft", bits, 2, world.recipe, model={"quantize": bits}, **gentle)
    for stage, folder, number, recipe in made:  # in processes of their own: DeepSpeed remembers a group that has gone
        module = importlib.import_module(f"align.{stage}")
        told = align(recipe, f"run={folder / 'one'}", stage=module)
        assert told.status == 0, told.err
        config = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": config_of(here, number)}
        both = pair(folder, recipe, f"run={folder / 'two'}", zero=number, stage=module, more=config)
        assert [one.status for one in both] == [0, 0], both[0].err + both[1].err
        assert f"DeepSpeed ZeRO-{number}" in both[0].out
    for _, folder, _, _ in made:
        assert_same(folder / "two", folder / "one", 3e-2 if "rounded" in folder.name else 1e-5)


def asks(config, recipe):
    """What is said of a DeepSpeed configuration, line by line."""
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}} | config)
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    try:
        zero.settle(accelerator, recipe)
    except UserError as error:
        return list(error.problems)
    return []


STAGE_2, STAGE_3 = ({"stage": stage} for stage in (2, 3))
FIGHTING = [
    ({"train_batch_size": 32}, "train_batch_size: leave it out, batch.examples decides"),
    ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu: leave it out, batch.row_tokens decides"),
    ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8: set it to 1, batch.examples decides"),
    ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3: leave it out, optim.max_grad_norm (1.0) decides"),
    ({"optimizer": {"type": "AdamW"}}, "optimizer: leave it out, optim of the recipe decides"),
    ({"fp16": {"enabled": True}}, "fp16.enabled: leave it out, model.dtype decides"),
    ({"amp": {"enabled": True}}, "amp.enabled: leave it out, model.dtype decides"),
    ({"curriculum_learning": {"enabled": True}}, "curriculum_learning: leave it out, nothing here goes by it"),
    ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: leave it out, nothing here goes by it"),
    ({"zero_optimization": STAGE_2 | {"offload_optimizer": {"device": "cpu"}}},
     "zero_optimization.offload_optimizer.device: leave it out, nothing (moments stay on the device) decides"),
    ({"zero_optimization": STAGE_2 | {"cpu_offload": True}},
     "zero_optimization.cpu_offload: leave it out, nothing (moments stay on the device) decides"),
    ({"zero_optimization": STAGE_3 | {"zero_quantized_weights": True}},
     "zero_optimization.zero_quantized_weights: leave it out, nothing (what is sent is not rounded) decides"),
    ({"zero_optimization": STAGE_2 | {"bucket": 3}}, "zero_optimization.bucket: Extra inputs are not permitted"),
]  # fmt: skip


@deepspeed
def test_fields_that_fight_the_recipe(world, here):
    recipe = sft.Recipe.model_validate(yaml.safe_load(world.recipe(here / "recipe.yaml").read_text()))
    for config, told in FIGHTING:
        assert asks(config, recipe) == [f"DeepSpeed's {told}"]
    quiet = {"fp16": {"enabled": False}, "steps_per_print": 10, "train_batch_size": "auto", "gradient_clipping": 1.0}
    assert asks({**quiet, "tensorboard": {"enabled": False}, "gradient_accumulation_steps": 1}, recipe) == []
    shards = recipe.model_copy(update={"train": recipe.train.model_copy(update={"shard": "layers"})})
    assert asks({}, shards) == ["train.shard: DeepSpeed shards by itself; take one of the two"]
    bits = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantize": "8bit"})})
    (told,) = asks({"zero_optimization": STAGE_3}, bits)
    assert told.startswith("model.quantize does not go with ZeRO-3: ")
    assert asks({}, bits) == []


@deepspeed
def test_a_launcher_that_cannot_be_followed(world, here, monkeypatch):
    """Each in one line, before anything is read; nothing waits for processes that are not there."""
    recipe, file = world.recipe(here / "recipe.yaml"), here / "ds.json"

    def told(**variables):
        with monkeypatch.context() as patch:
            for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **variables}.items():
                patch.setenv(name, str(value))
            said = align(recipe)
        assert (said.status, said.err.count("\n")) == (2, 1), said.err
        return said.err

    assert "DeepSpeed needs a launcher, which sets RANK, WORLD_SIZE" in told()
    assert "is 'perhaps': set it to true or false, or unset it" in told(ACCELERATE_USE_DEEPSPEED="perhaps")
    assert "ACCELERATE_USE_FSDP in the environment is 'x'" in told(ACCELERATE_USE_FSDP="x")
    for name in zero.ALONE:
        monkeypatch.setenv(name, {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.get(name, "0"))
    assert "STAGE is '0': take 2 or 3, or DDP without DeepSpeed" in told(ACCELERATE_DEEPSPEED_ZERO_STAGE=0)
    assert "ds.json cannot be read; give a JSON file (" in told(ACCELERATE_DEEPSPEED_CONFIG_FILE=file)
    for text, why in (
        ("{", "cannot be read"), ("[]", "stage is missing"), ("{}", "stage is missing"),
        ('{"zero_optimization": {"stage": "auto"}}', "stage is 'auto'"), ('{"zero_optimization": 3}', "is missing"),
    ):  # fmt: skip
        file.write_text(text)
        assert why in told(ACCELERATE_DEEPSPEED_CONFIG_FILE=file)


@deepspeed
def test_refused_by_name(world, here):
    """What it cannot run, and what its configuration may not ask for, all at once."""
    recipe = world.recipe(here / "recipe.yaml")
    (here / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "bf16": {"enabled": True}})
    )
    told, _ = pair(here, recipe, zero=3, more={"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(here / "ds.json")})
    assert told.status == 2
    assert "bf16.enabled: leave it out, model.dtype decides" in told.err
    assert "offload_param" in told.err
    assert "Traceback" not in told.err
    rewards = [{"function": "ppo_start:wordy"}]
    recipe = world.recipe(here / "ppo.yaml", stage="ppo", ppo={"rewards": rewards})
    told, _ = pair(here, recipe, zero=2, stage=ppo)
    assert told.status == 2
    assert "DeepSpeed cannot run align.ppo" in told.err
    assert "train.shard=layers" in told.err


def test_without_deepspeed(world, here, monkeypatch):
    """A launcher's configuration that asks for it says what to install."""
    if find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    told = align(world.recipe(here / "recipe.yaml"))
    assert (told.status, told.err.count("\n")) == (2, 1)
    assert "pip install deepspeed" in told.err
