"""A result folder is data: whatever stands in it, nothing of it is run and nothing is fetched for it."""

from __future__ import annotations

import io
import json
import shutil
import socket
from pathlib import Path

import pytest
import yaml
from results import add_code, change, hostile, make_results
from world import align, write_rows

from align import chat, classify, compare, dpo, evaluate, pipeline, ppo, sft


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Path]:
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture
def guarded(here, monkeypatch):
    """Where code has run or the network was asked for, the test fails at its end."""
    import huggingface_hub.constants

    asked, connect = [], socket.socket.connect

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network here")

    def within(own, address):
        """Processes of one machine may speak to each other."""
        return connect(own, address) if own.family == socket.AF_UNIX else refuse(address)

    monkeypatch.setattr(socket.socket, "connect", within)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield here / "marker"
    assert not (here / "marker").exists(), "code of a result was run"
    assert asked == [], "a result asked for the network"


@pytest.fixture(params=["a hub id", "a folder with code", "a folder with code of a known family"])
def elsewhere(request, results, here) -> str:
    """The base that a hostile result names."""
    if request.param == "a hub id":
        return "somebody/evil-model"
    folder = shutil.copytree(results["base"], here / "elsewhere")
    add_code(folder, here / "marker")
    if request.param == "a folder with code":
        change(folder / "config.json", model_type="evil", architectures=["EvilModel"])
    return str(folder)


def recipe(path: Path, stage: str, base: Path, **sections) -> Path:
    rows = write_rows(
        path.with_suffix(".jsonl"), [{"prompt": f"Say {i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    )
    made = {
        "stage": stage,
        "run": str(path.with_suffix("")),
        "model": {"base": str(base), "dtype": "float32"},
        "data": {"train": [{"path": str(rows)}]},
    }
    if stage != "evaluate":
        made |= {"lora": {"r": 2}, "train": {"steps": 1}, "batch": {"examples": 2}, "log": {"trackers": []}}
    for name, section in sections.items():
        made[name] = made.get(name, {}) | section if isinstance(section, dict) else section
    path.write_text(yaml.safe_dump(made))
    return path


def refused(told) -> None:
    """One line, no traceback."""
    assert told.status == 2, told
    assert "Traceback" not in told.out + told.err
    (line,) = told.err.strip().splitlines()
    assert len(line) > 20


def test_commands_that_take_the_base_from_a_result(results, elsewhere, guarded, here, monkeypatch):
    """Chat and prediction, within the folder, too, from where Python imports."""
    speaker = hostile(results["sft"], here / "a", elsewhere, guarded)
    labels = hostile(results["classify"], here / "b", elsewhere, guarded)
    whole = hostile(results["whole"], here / "c", elsewhere, guarded)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    for folder in (here, speaker, labels):
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        for command, argv in ((chat, [speaker]), (chat, [speaker.parent]), (classify, ["--predict", labels])):
            told = align(*argv, stage=command)
            if elsewhere.startswith("somebody") or told.status:
                refused(told)
    refused(align("--predict", whole, stage=classify))
    refused(align(whole, stage=chat))


def test_the_user_names_the_base_and_allows_its_code(results, guarded, here, monkeypatch):
    labels = hostile(results["classify"], here / "b", "somebody/evil-model", guarded)
    for file in ("tokenizer_config.json",):
        shutil.copy(results["classify"] / file, labels / file)
    write_rows(here / "texts.jsonl", [{"text": "hello"}])
    told = align("--predict", labels, here / "texts.jsonl", "--base", results["base"], stage=classify)
    assert (told.status, told.err) == (0, "")
    same = align("--predict", results["classify"], here / "texts.jsonl", stage=classify)
    assert same.out == told.out


def test_code_beside_a_base_runs_where_the_user_says_so(results, here, monkeypatch):
    folder = add_code(shutil.copytree(results["base"], here / "base"), here / "marker")
    monkeypatch.setenv("HF_HOME", str(here / "home"))
    refused(align(folder, stage=chat))
    assert not (here / "marker").exists()
    refused(align(folder, "--trust-remote-code", stage=chat))  # for the code fails
    assert (here / "marker").exists()


def test_recipes_that_name_a_hostile_result(results, elsewhere, guarded, here):
    base = results["base"]
    speaker = hostile(results["sft"], here / "a", elsewhere, guarded)
    scores = hostile(results["reward"], here / "b", elsewhere, guarded)
    told = align(recipe(here / "first.yaml", "sft", base, model={"adapter": str(speaker)}), stage=sft)
    refused(told)  # its tokenizer asks for code
    refused(align(recipe(here / "second.yaml", "dpo", base, model={"adapter": [str(speaker)]}), stage=dpo))
    generation = {"generation": {"max_new": 2}}
    part = {"model": str(scores)}
    refused(align(recipe(here / "fourth.yaml", "ppo", base, ppo=generation | {"rewards": [part]}), stage=ppo))
    part["name"] = "judge"
    made = recipe(here / "fifth.yaml", "evaluate", base, evaluate=generation | {"scores": [part]})
    refused(align(made, stage=evaluate))


def test_adapters_on_the_users_own_trunk_are_only_read(results, guarded, here):
    """Their weights are of that trunk, whatever else stands in their files."""
    speaker = hostile(results["sft"], here / "a", "somebody/evil-model", guarded)
    scores = hostile(results["reward"], here / "b", "somebody/evil-model", guarded)
    parts, generation = [{"adapter": str(scores)}], {"generation": {"max_new": 2}}
    told = align(recipe(here / "p.yaml", "ppo", results["base"], ppo=generation | {"rewards": parts}), stage=ppo)
    assert (told.status, told.err) == (0, "")
    measured = generation | {"scores": parts}
    made = recipe(here / "e.yaml", "evaluate", results["base"], policy=str(speaker), evaluate=measured)
    told = align(made, stage=evaluate)
    assert (told.status, told.err) == (0, "")


def test_a_pipeline_and_a_comparison(results, guarded, here):
    speaker = hostile(results["sft"], here / "a", "somebody/evil-model", guarded)
    first = recipe(here / "first.yaml", "sft", results["base"], model={"adapter": [str(speaker)]})
    stage = {key: value for key, value in yaml.safe_load(first.read_text()).items() if key != "run"}
    made = {"stage": "pipeline", "run": str(here / "p"), "accelerate": None, "stages": {"one": stage}}
    (here / "p.yaml").write_text(yaml.safe_dump(made))
    told = align(here / "p.yaml", stage=pipeline)
    assert told.status == 2
    assert "Traceback" not in told.out + told.err
    assert "no tokenizer can be loaded" in told.out + told.err
    runs = [{"path": str(speaker.parent)}, {"path": str(speaker)}]
    (here / "c.yaml").write_text(yaml.safe_dump({"stage": "compare", "run": str(here / "c"), "runs": runs}))
    told = align(here / "c.yaml", stage=compare)
    assert told.status == 2
    assert "Traceback" not in told.out + told.err


@pytest.mark.parametrize(
    "key", ["megatron_config", "loftq_config", "eva_config", "layer_replication", "alora_invocation_tokens"]
)
def test_settings_that_peft_would_act_on_are_refused(key, results, here, guarded):
    """`megatron_config` makes peft import the module that `megatron_core` names."""
    final = hostile(results["sft"], here / "a", str(results["base"]), guarded)
    change(
        final / "adapter_config.json", **{key: {"a": 1} if key.endswith("config") else [[0, 1]]}, megatron_core="evil"
    )
    told = align(final, stage=chat)
    refused(told)
    assert f"adapter_config.json: {key}: " in told.err


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq"])
def test_an_adapter_of_a_changed_base_is_refused(init, results, here):
    final = shutil.copytree(results["sft"], here / "final")
    change(final / "adapter_config.json", init_lora_weights=init)
    told = align(final, stage=chat)
    refused(told)
    assert f"init_lora_weights: '{init}' changes the base's weights" in told.err


def test_an_attention_kernel_of_the_hub_is_code(results, here, guarded):
    base = shutil.copytree(results["base"], here / "base")
    change(base / "config.json", attn_implementation="somebody/evil-kernel")
    told = align(recipe(here / "r.yaml", "sft", base), stage=sft)
    refused(told)
    assert "asks for an attention kernel from the hub (somebody/evil-kernel), which is code" in told.err
    assert json.loads((base / "config.json").read_text())["attn_implementation"]
