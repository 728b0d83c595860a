"""`python -m align.plan`: a 7B shape described by a config file alone, and what a run says of itself."""

from __future__ import annotations

import json

import pytest
import yaml
from world import align

from align import plan
from align.training.planning import forecast

GB = 10**9
SEVEN = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A recipe of PPO, 512 + 512 tokens and 64 episodes, on a 7B model of which there is only the config."""
    folder = tmp_path_factory.mktemp("seven")
    (folder / "config.json").write_text(json.dumps(SEVEN))
    recipe = {
        "stage": "ppo",
        "run": str(folder / "run"),
        "model": {"base": str(folder)},
        "data": {"train": [{"path": "prompts.jsonl"}], "max_length": 512},
        "batch": {"examples": 64},
        "ppo": {"rewards": [{"adapter": "runs/reward/final"}], "generation": {"max_new": 512}},
    }
    path = folder / "ppo.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def planned(*words):
    status, out, err = align(*words, "--json", stage=plan)
    assert status == 0, err
    return json.loads(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "size", "most"), [("seed=0", "24GB", 24 * GB), ("model.quantize=4bit", "14GB", 14 * GB)]
)
def test_ppo_of_a_7b_shape_fits_with_the_settings_it_names(seven, override, size, most):
    first = planned(seven, override, "--device", size)
    assert first["weights"] == pytest.approx(6.74e9, rel=0.001)
    assert not first["fits"]
    assert first["changes"] == {"model.gradient_checkpointing": True}
    changes = [f"{key}={str(value).lower()}" for key, value in first["changes"].items()]
    again = planned(seven, override, *changes, "--device", size)
    assert again["fits"]
    assert again["changes"] == {}
    assert again["peak_bytes"] == first["changed_peak_bytes"] < most
    assert again["largest_row"] > first["largest_row"]


@pytest.mark.slow
def test_a_sharded_trunk_takes_its_share(seven):
    whole, sharded = (
        planned(seven, f"train.shard={how}", "--device", "h100", "--processes", 8) for how in ("none", "layers")
    )
    trunk = [next(m["parts"]["trunk"] for m in plan["moments"] if m["name"] == "update") for plan in (whole, sharded)]
    assert trunk[1] == trunk[0] // 8
    assert sharded["sent_bytes"] > whole["sent_bytes"] > 0
    assert whole["seconds"][0] < whole["seconds"][1]


def test_lines_for_a_reader(seven):
    status, out, _ = align(seven, "--device", "24GB", stage=plan)
    assert status == 0
    assert "it does NOT fit" in out
    assert "model.gradient_checkpointing=true" in out
    assert "activations kept" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--device", "h300"), "there is no 'h300'; expected h200"),
        (("--processes", "0"), "expected a number of 1 or more, found 0"),
        (("--processes", "8", "--hosts", "3"), "cannot be shared out over 3 hosts"),
        (("--device", "0.4GB"), "a GPU has 1 GB or more"),
        (("--tokens", "513"), "no example is longer than data.max_length=512"),
        (("model.base=nowhere",), "there is no model 'nowhere'"),
    ],
)
def test_what_cannot_be_planned_is_one_line(seven, words, told):
    status, out, err = align(seven, *words, stage=plan)
    assert (status, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_a_run_says_its_plan_and_what_came_of_it(world, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "SMALL", 0)
    status, out, err = align(world.recipe(tmp_path / "sft.yaml", train={"steps": 1}))
    assert status == 0, err
    assert "plan: a peak of" in out
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert told["planned_peak_bytes"] > 0
    assert told["measured_peak_bytes"] > 0


@pytest.mark.slow
def test_rows_follow_the_memory(seven):
    small, large = (planned(seven, "--device", size) for size in ("24GB", "h200"))
    assert small["row_tokens"] < large["row_tokens"]
