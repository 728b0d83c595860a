"""Every stage and tool on a quantised trunk, through its command; each stands on the result of the one before."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from ppo_start import Start, make_start, recipe_of
from samplers import recipe_of as sampling
from test_processes import assert_close, pair
from transformers import AutoModelForCausalLM
from world import align, metrics

from align import chat, classify, distill, dpo, evaluate, grpo, merge, ppo, reward, sft
from align.models.base import load_base
from align.models.checkpoints.adapters import put
from align.models.checkpoints.results import read_result
from align.models.trunk import Trunk
from align.recipe.schema import Model
from align.training.labelling.classifier import Classifier

pytest.importorskip("bitsandbytes")

TRAIN = {"steps": 2, "eval_every": None, "save_every": None}


class Chain(NamedTuple):
    """`final/` folders: each but the classifier's on those before it."""

    bits: str
    start: Start
    sft: Path
    dpo: Path
    kto: Path
    reward: Path
    ppo: Path
    classify: Path

    @property
    def base(self) -> Path:
        return self.start.base


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def chain(world, cache, tmp_path_factory, request):
    start, folder, bits = make_start(world, cache, tmp_path_factory), tmp_path_factory.mktemp("chain"), request.param
    common = {"train": TRAIN, "model": {"base": str(start.base), "quantize": bits, "dtype": "float32"}}

    def after(*adapters: Path) -> dict:
        return {**common, "model": common["model"] | {"adapter": [str(path) for path in adapters]}}

    def final(name: str, stage, recipe: Path) -> Path:
        told = align(recipe, f"run={folder / name}", stage=stage)
        assert (told.status, told.err) == (0, ""), told.err
        return folder / name / "final"

    def preferences(name: str, stage, **sections) -> Path:
        return final(name, stage, world.preferences(folder / f"{name}.yaml", stage, **sections))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        one = final("sft", sft, world.recipe(folder / "sft.yaml", **common, log={"samples": ["Say the capital"]}))
        two = preferences("dpo", dpo, **after(one))
        unpaired = preferences("kto", dpo, **after(one, two), dpo={"loss": "kto"})
        score = preferences("reward", reward, **after(one, two))
        parts = {"rewards": [{"adapter": str(score)}], "ptx": {"sources": [{"path": str(world.talks)}], "examples": 2}}
        path = recipe_of(world, start, folder / "ppo.yaml", ppo=parts, **after(one, two))
        last = final("ppo", ppo, path)
        texts = [{"text": f"{word} {i}", "label": word} for word in ("yes", "no") for i in range(6)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        data = {"train": [{"path": str(folder / "texts.jsonl")}], "eval": {"sources": []}}
        classes = final("classes", classify, world.recipe(folder / "c.yaml", stage="classify", data=data, **common))
        yield Chain(bits, start, one, two, unpaired, score, last, classes)


def test_every_stage_runs_and_says_what_it_stands_on(chain):
    for final, names in ((chain.sft, []), (chain.dpo, ["sft"]), (chain.ppo, ["sft", "dpo"])):
        about = json.loads((final / "align.json").read_text())
        first, *more = about["trunk"]
        assert (first["name"], first["quantize"]) == (str(chain.base), chain.bits)
        assert [Path(link["name"]).parent.name for link in more] == names
        assert all("quantize" not in link for link in more)


def test_evaluation_finds_the_numbers_of_the_run(chain, world, here):
    """On the trunk that the recipe names; and by itself, from what the result tells."""
    recipe = {
        "stage": "evaluate",
        "run": "seen",
        "model": {"base": str(chain.base), "dtype": "float32", "quantize": chain.bits,
                  "adapter": [str(chain.sft), str(chain.dpo)]},
        "policy": str(chain.ppo),
        "data": {"train": [{"path": str(world.held_pairs), "limit": 3}]},
        "evaluate": {"samples": 2, "generation": {"max_new": 4},
                     "scores": [{"adapter": str(chain.reward), "name": "own"},
                                {"model": str(chain.reward), "name": "apart"}]},
    }  # fmt: skip
    (here / "e.yaml").write_text(yaml.safe_dump(recipe))
    told = align("e.yaml", stage=evaluate)
    assert (told.status, told.err) == (0, "")
    rows = [json.loads(line) for line in (here / "seen" / "responses.jsonl").read_text().splitlines()]
    assert any(row["logprob"] != row["ref_logprob"] for row in rows)
    for row in rows:
        assert set(row["scores"]) == {"own", "apart"}
    told = align("e.yaml", "run=other", "model.quantize=null", stage=evaluate)
    assert told.status == 2
    assert told.err.rstrip().endswith("; set model.quantize: " + chain.bits)


def test_grpo_and_distillation(chain, world, here):
    """From another base, which takes the same bits, with and without its adapter; and from an adapter on the trunk."""
    model = {"base": str(chain.base), "quantize": chain.bits, "dtype": "float32"}
    teachers = {"other": {"base": str(world.base)}, "beside": {"adapter": str(chain.sft)}}
    teachers["both"] = {"base": str(chain.base), "adapter": str(chain.sft)}
    jobs = [(grpo, "grpo", {}), *((distill, name, {"teacher": teacher}) for name, teacher in teachers.items())]
    for stage, name, own in jobs:
        recipe = sampling(world, chain.start, here / f"{name}.yaml", stage, own, model=model, train=TRAIN)
        told = align(recipe, stage=stage)
        assert (told.status, told.err) == (0, ""), told.err
    alike = [[record["loss"] for record in metrics(here / name, "train")] for name in ("beside", "both")]
    assert alike[0] == pytest.approx(alike[1], rel=1e-4, abs=1e-6)
    assert metrics(here / "other", "train")[0]["loss"] > 0


def test_chat_finds_the_trunk_by_itself(chain, here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Name the capital of France\n")))
    told = align(chain.ppo, "--max-new", 6, stage=chat)
    assert (told.status, told.err) == (0, "")


def test_prediction_has_the_numbers_of_the_run(chain, here):
    """The trunk and its bits come from the result."""
    classifier = Classifier(chain.classify)
    beside = json.loads((chain.classify / "base_config.json").read_text())
    assert "quantization_config" not in beside, "plain transformers loads the base as it is"
    assert classifier.trunk.links[0].quantize == chain.bits
    texts = ["yes 1", "no 4"]
    shares = classifier.probabilities(texts)
    section = Model(base=str(chain.base), dtype="float32", quantize=chain.bits)
    result = read_result(str(chain.classify), "model.adapter")
    base = load_base(section, torch.device("cpu"), frozen=True, outputs=2)
    trunk = Trunk(base, section, result.config.section, outputs=2).eval()
    put(trunk.causal, result.weights, "default", "")
    ids = [trunk.tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad(), trunk.attending(trunk.own_attention):
        logits = [trunk.plain(input_ids=torch.tensor([row])).logits[0] for row in ids]
    assert shares == pytest.approx(torch.stack(logits).softmax(-1).numpy(), abs=1e-5)


def test_a_merged_result_is_the_quantised_trunk_with_its_adapters(chain, here):
    """As an ordinary checkpoint of what the bits stand for."""
    told = align(chain.ppo, "out", stage=merge)
    assert (told.status, told.err) == (0, "")
    adapters = [str(chain.sft), str(chain.dpo)]
    section = Model(base=str(chain.base), dtype="float32", quantize=chain.bits, adapter=adapters)
    result = read_result(str(chain.ppo), "model.adapter")
    trunk = Trunk(load_base(section, torch.device("cpu"), frozen=True), section, result.config.section).eval()
    put(trunk.causal, result.weights, "default", "")
    ids = torch.tensor([trunk.tokenizer("Name the capital")["input_ids"]])
    plain = AutoModelForCausalLM.from_pretrained("out")
    with torch.no_grad(), trunk.attending(trunk.own_attention):
        torch.testing.assert_close(plain(input_ids=ids).logits, trunk.plain(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shard", ["none", "layers"])
def test_two_processes_are_as_one(chain, world, here, shard):
    """With all weights on each, and with a part of them."""
    model = {"base": str(chain.base), "quantize": chain.bits, "dtype": "float32", "adapter": [str(chain.sft)]}
    recipe = world.recipe(here / "recipe.yaml", model=model, train={"steps": 3, "eval_every": 2, "save_every": None})
    assert align(recipe, "run=one").status == 0
    said = pair(here, recipe, "run=two", f"train.shard={shard}")
    assert ("sharded: " in said) == (shard == "layers")
    assert_close(here / "two", here / "one")
