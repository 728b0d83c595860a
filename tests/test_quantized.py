"""Every stage and tool on a quantised trunk, through its command; each stands on the result of the one before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from ppo_start import make_start, recipe_of
from world import align

from align import classify, dpo, ppo, reward, sft

pytest.importorskip("bitsandbytes")

TRAIN = {"steps": 2, "eval_every": None, "save_every": None}


class Chain(NamedTuple):
    """`final/` folders: each but the classifier's on those before it."""

    bits: str
    base: Path
    sft: Path
    dpo: Path
    kto: Path
    reward: Path
    ppo: Path
    classify: Path


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
        yield Chain(bits, start.base, one, two, unpaired, score, last, classes)


def test_every_stage_runs_and_says_what_it_stands_on(chain):
    for final, names in ((chain.sft, []), (chain.dpo, ["sft"]), (chain.ppo, ["sft", "dpo"])):
        about = json.loads((final / "align.json").read_text())
        first, *more = about["trunk"]
        assert (first["name"], first["quantize"]) == (str(chain.base), chain.bits)
        assert [Path(link["name"]).parent.name for link in more] == names
        assert all("quantize" not in link for link in more)
