"""Results whose files are cut, emptied, mixed up or replaced: each is refused in words, or is what its files say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models.tiny import tree
from often import REPEATS
from results import make_results
from safetensors.torch import load_file, save_file

from align.data.trees import plant
from align.models.base import load_base
from align.models.judge import read_judge
from align.models.roles import read_scorer
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model
from align.tools.chat.talker import load_talker
from align.tools.evaluation.policy import load_policy, read_policy
from align.training.labelling.classifier import Classifier

CPU = torch.device("cpu")
FOREST = plant([tree(6, 4, 3), tree(9, seed=1)])
FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a failure is shown as found: shrinking through models is slow
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["q_proj", "../../etc", "a/b", "\udc00", "\x1b[2J", "~nobody/a", "a\0b", "all-linear", ".*"]),
    st.sampled_from([[], {}, [[]], [None], {"": None}, [-1], [10**12], ["q_proj"], {"model.embed_tokens": [3]}]),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Path]:
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def trunk(results) -> Trunk:
    section = Model(base=str(results["base"]), dtype="float32")
    return Trunk(load_base(section, CPU, frozen=True), section, Lora(r=2))


def damage(file: Path, draw) -> str:
    """Something that may have become of a file; in a word what."""
    whole = file.read_bytes()
    kinds = ["cut", "emptied", "gone", "a folder", "other bytes", "other"]
    kind = draw(st.sampled_from(kinds + ["changed"] * 8))
    if kind == "cut":
        file.write_bytes(whole[: draw(st.integers(0, len(whole) - 1))])
    elif kind == "emptied":
        file.write_bytes(b"")
    elif kind in ("gone", "a folder"):
        file.unlink()
        if kind == "a folder":
            file.mkdir()
    elif kind == "other bytes":
        place = draw(st.integers(0, len(whole) - 1))
        file.write_bytes(whole[:place] + draw(st.binary(max_size=9)) + whole[place + 1 :])
    elif file.suffix == ".safetensors":
        tensors = load_file(file)
        name = draw(st.sampled_from(sorted(tensors)))
        kind = draw(st.sampled_from(["lacks", "too many", "renamed", "shape", "nan", "integers", "empty", "turned"]))
        tensor = tensors.pop(name)
        changed = {
            "too many": {name: tensor, f"{name}.more": tensor.clone()},
            "renamed": {name.replace("lora_A", "lora_B") + "x": tensor},
            "shape": {name: tensor[:1].clone()},
            "nan": {name: tensor * math.nan},
            "integers": {name: tensor.int()},
            "empty": {name: tensor[:0].clone()},
            "turned": {name: tensor.T.contiguous()},
        }
        save_file(tensors | changed.get(kind, {}), file)
    elif kind == "other":
        file.write_text(json.dumps(draw(VALUES)), "utf-8")
    else:
        values = json.loads(whole)
        inside, key = values, draw(st.sampled_from(sorted(values)))
        while isinstance(inside[key], dict | list) and inside[key] and draw(st.booleans()):
            inside = inside[key]
            key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if draw(st.booleans()):
            inside[key] = draw(VALUES)
            kind = f"{key}={inside[key]!r}"
        else:
            kind = f"without {key}"
            del inside[key]
        file.write_text(json.dumps(values), "utf-8")
    return f"{file.name}: {kind}"


def numbers(found: Trunk) -> torch.Tensor:
    with torch.no_grad():
        return found.eval()(FOREST)


def merged(folder: Path, results: dict, _trunk: Trunk) -> torch.Tensor:
    section = Model(base=str(results["base"]), adapter=str(folder), dtype="float32")
    return numbers(Trunk(load_base(section, CPU, frozen=True), section, Lora(r=2)))


def acting(folder: Path, results: dict, _trunk: Trunk) -> torch.Tensor:
    model = Model(base=str(results["base"]), dtype="float32")
    return numbers(load_policy(model, read_policy(str(folder)), Accelerator(), 0))


def talking(folder: Path, _results: dict, _trunk: Trunk) -> torch.Tensor:
    return numbers(load_talker(str(folder), [], Accelerator()))


def scoring(folder: Path, _results: dict, trunk: Trunk) -> torch.Tensor:
    found = read_scorer(str(folder), "ppo.rewards.0.adapter", trunk)
    return torch.cat([found.head.flatten(), torch.tensor([found.mean, found.std])])


def judging(folder: Path, _results: dict, _trunk: Trunk) -> torch.Tensor:
    judge = read_judge(str(folder), None, "ppo.rewards.0", CPU, torch.float32)
    with torch.no_grad():
        return judge.model(FOREST.tokens % 250).logits


def predicting(folder: Path, _results: dict, _trunk: Trunk) -> torch.Tensor:
    return torch.from_numpy(Classifier(folder).probabilities(["one text", "another"]))


WAYS = {
    "sft": (merged, acting, talking),
    "reward": (scoring, judging),
    "classify": (predicting,),
    "whole": (predicting,),
}


def damaged_results(data, results: dict, trunk: Trunk, here: Path) -> None:
    kind = data.draw(st.sampled_from(sorted(WAYS)))
    way = data.draw(st.sampled_from(WAYS[kind]))
    folder = here / "final"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(results[kind], folder)
    files = ["align.json", "adapter_config.json", "adapter_model.safetensors"]
    files = ["align.json", "config.json", "model.safetensors"] if kind == "whole" else files
    file = data.draw(st.sampled_from(files * 4 + ["tokenizer.json", "tokenizer_config.json"]))
    what = f"{way.__name__}: {damage(folder / file, data.draw)}"
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        try:
            found.append(way(folder, results, trunk))
        except UserError as error:
            told = error.problems
            break
    else:
        told = ()
    assert all(problem and "\n" not in problem for problem in told), (what, told)
    if told:
        return
    assert torch.equal(*found), f"{what}: random weights"
    assert torch.isfinite(found[0]).all(), what


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, value)
            for key in ("score_mean", "score_std")
            for value in (1e39, -1e39, math.nan, math.inf, "1", [], True)
        ),
        ("score_std", -1.0),
    ],
)
def test_a_reward_models_mean_and_spread_out_of_range(key, value, results, trunk, here):
    """What divides every reward of PPO; float32 would hold an infinity."""
    folder = shutil.copytree(results["reward"], here / "final")
    file = folder / "align.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=rf"ppo.rewards.0.adapter: .*align.json: {key}: ") as caught:
        scoring(folder, results, trunk)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.0), (-3e38, 3e38)])
def test_a_mean_and_a_spread_at_the_edges_are_taken(mean, std, results, trunk, here):
    folder = shutil.copytree(results["reward"], here / "final")
    file = folder / "align.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score_mean": mean, "score_std": std}))
    assert scoring(folder, results, trunk)[-2:].tolist() == pytest.approx([mean, std])


@given(data=st.data())
@settings(FUZZ, max_examples=40)
def test_damaged_results(data, results, trunk, here):
    damaged_results(data, results, trunk, here)


@pytest.mark.slow
@pytest.mark.timeout(900 * REPEATS)
@given(data=st.data())
@settings(FUZZ, max_examples=1000 * REPEATS)
def test_thousands_of_damaged_results(data, results, trunk, here):
    damaged_results(data, results, trunk, here)
