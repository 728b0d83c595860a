"""Which moments a plan has, and what comes together in them: recipes of a tiny model."""

from __future__ import annotations

import pytest
import torch
from models.tiny import save_base

from align import distill, ppo
from align.recipe.schema import Lora
from align.training.costs import causal_attended, flops_per_token
from align.training.planning.activations import row
from align.training.planning.devices import Device, here
from align.training.planning.memory import memory
from align.training.planning.parts import host_bytes, setting, trained
from align.training.planning.words import room
from align.training.planning.work import work

DEVICE = Device("a CPU", "cpu", 8 * 10**9, torch.float32, 10.0**12, 10.0**11, None)
SERVER = {"engine": {"url": "http://127.0.0.1:1"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base") / "llama", "llama"))


def planned(module, base, processes=1, generation=None, shard="none", model=None, device=DEVICE, rank=16, **own):
    """The setting of a recipe, and its plan."""
    stage = module.__name__.removeprefix("align.")
    recipe = {
        "stage": stage,
        "run": "run",
        "model": {"base": base} | (model or {}),
        "lora": {"r": rank},
        "data": {"train": [{"path": "prompts.jsonl"}], "max_length": 32},
        "batch": {"examples": 4},
        "train": {"steps": 1, "shard": shard},
        stage: {"generation": {"max_new": 8} | (generation or {})} | own,
    }
    at = setting(module.Recipe.model_validate(recipe), device, processes)
    return at, memory(at)


def moments(plan):
    return {moment.name: dict(moment.parts) for moment in plan.moments}


@pytest.mark.parametrize("shard", ["none", "layers"])
def test_what_a_server_draws_takes_no_memory_here(base, shard):
    """No keys and values, no whole trunk while it samples, and no work of this device."""
    rewards = [{"function": "align.training.rules:sentiment"}]
    (at, own), (there, served) = (
        planned(ppo, base, 2, generation, shard, rewards=rewards) for generation in ({}, SERVER)
    )
    assert "keys and values" in moments(own)["sampling"]
    assert ("the whole trunk, while it samples" in moments(own)["sampling"]) == (shard == "layers")
    assert moments(served) == {name: parts for name, parts in moments(own).items() if name != "sampling"}
    ours, theirs = work(at, own), work(there, served)
    assert (ours.episodes, ours.tokens) == (theirs.episodes, theirs.tokens)
    assert ours.flops > theirs.flops
    assert (ours.sent > theirs.sent) == (shard == "layers")


def test_language_modelling_beside_ppo(base):
    """The actor's alone, in each update, with a label at each token; and what it computes and sends."""
    rewards, ptx = [{"function": "align.training.rules:sentiment"}], {"sources": [{"path": "texts.jsonl"}]}
    (at, without), (there, beside) = (
        planned(ppo, base, 2, shard="layers", rewards=rewards, minibatches=2, ptx=more)
        for more in (None, ptx | {"examples": 4, "max_length": 1024})
    )
    assert beside.load.beside[:2] == (2048, 1)
    assert beside.load.beside.tokens == 4096
    assert set(moments(beside)) - set(moments(without)) == {"ptx, the loss", "ptx, the backward pass"}
    one, other = moments(beside)["ptx, the loss"], moments(beside)["the loss"]
    assert one["activations kept"] == row(at.skeleton, at.way, 2048, 1024).kept
    assert one["activations of the responses"] == other["activations kept"]
    assert one["logits"] > other["logits"]
    updates = at.recipe.ppo.epochs * 2
    trunk = 2 * moments(without)["update"]["trunk"]
    assert work(there, beside).sent - work(at, without).sent == pytest.approx(updates * 2 * trunk / 2)
    a_token = 4 * at.skeleton.sizes.multiplied  # and attention
    assert work(there, beside).flops - work(at, without).flops > updates * 4096 * a_token


def test_answers_of_the_data_are_not_drawn(base):
    teacher = {"base": base}
    assert "sampling" in moments(planned(distill, base, teacher=teacher)[1])
    assert "sampling" not in moments(planned(distill, base, teacher=teacher, on_policy=0)[1])


def test_a_teacher_lies_over_the_processes_as_the_trunk_does(base):
    held = {}
    for shard in ("none", "layers"):
        parts = moments(planned(distill, base, 2, shard=shard, teacher={"base": base})[1])["update"]
        held[shard] = parts["trunk"], parts["the teacher"]
    trunk, teacher = held["none"]
    assert trunk == teacher
    assert held["layers"] == (trunk // 2, teacher // 2)


def test_loading_holds_the_file_and_what_is_made_of_it(base):
    """float32 in the file: its pages are the weights, of which shards are copies, or are cast and stay beside."""
    rewards = [{"function": "align.training.rules:sentiment"}]
    for dtype, shard, made in ((torch.float32, "none", 0), (torch.float32, "layers", 2), (torch.bfloat16, "layers", 2)):
        at, _ = planned(ppo, base, 2, shard=shard, rewards=rewards)
        at = at._replace(device=at.device._replace(dtype=dtype))
        weights = at.skeleton.sizes.weights
        assert moments(memory(at))["loading"] == {"the file": 4 * weights, "weights": made * weights}


def test_ddp_sends_weights_round_as_it_begins(base):
    rewards = [{"function": "align.training.rules:sentiment"}]
    parts = {
        (processes, shard): moments(planned(ppo, base, processes, shard=shard, rewards=rewards)[1])
        for processes, shard in ((1, "none"), (2, "none"), (2, "layers"))
    }
    assert [at for at, found in parts.items() if "DDP's beginning" in found] == [(2, "none")]
    whole = parts[2, "none"]["DDP's beginning"]
    assert whole["weights that are sent round"] == whole["trunk"], "of so small a trunk, all"


def test_processes_on_one_cpu_share_its_cores_and_its_memory(base, monkeypatch):
    """As do two of four on each of two hosts."""
    rewards = [{"function": "align.training.rules:sentiment"}]
    took = {}
    for processes, hosts in ((1, 1), (2, 1), (2, 2)):
        at, plan = planned(ppo, base, processes, rewards=rewards)
        took[processes, hosts] = work(at, plan, hosts).seconds[0]
    assert took[2, 1] == pytest.approx(took[1, 1], rel=0.05)  # but for its memory's speed
    assert took[2, 2] == pytest.approx(took[1, 1] / 2, rel=0.05)
    monkeypatch.setattr("align.training.planning.devices.free_bytes", lambda place: 10**9)  # a process's share
    for launched, of_host in (("4", "4"), ("4", "2")):
        monkeypatch.setenv("WORLD_SIZE", launched)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_host)
        assert room(here(), 4) == 10**9


def test_every_pass_over_shards_is_sent(base):
    """Those that score a rollout too: once a step, of each reward."""
    one, two = [{"adapter": "a"}], [{"adapter": "a"}, {"adapter": "b"}]
    (at, fewer), (there, more) = (planned(ppo, base, 2, shard="layers", rewards=rewards) for rewards in (one, two))
    trunk = 2 * moments(fewer)["update"]["trunk"]
    rows = fewer.load.rows * at.recipe.ppo.minibatches
    assert work(there, more).sent - work(at, fewer).sent == pytest.approx(rows * trunk / 2)


@pytest.mark.parametrize("processes", [2, 4])
def test_of_an_adapter_each_process_has_its_part_of_the_moments(base, processes):
    """In shards; with whole copies all have all. Weights and gradients are whole, and what was stepped is sent on."""
    rewards, held, sent = [{"function": "align.training.rules:sentiment"}], {}, {}
    for shard in ("none", "layers"):
        took = []
        for rank in (8, 16):
            at, plan = planned(ppo, base, processes, shard=shard, rank=rank, rewards=rewards)
            took.append(work(at, plan).sent)
            parts = moments(plan)["update"]
            held[shard] = [parts[name] / 4 / trained(at) for name in ("adapters", "gradients", "AdamW's moments")]
        updates = plan.load.passes * at.recipe.ppo.minibatches
        more = 4 * (trained(at) - at.skeleton.sizes.width - 1) / 2 * updates * (processes - 1) / processes
        sent[shard] = (took[1] - took[0]) / more
    assert held == {"none": [1, 1, 2], "layers": [1, 1, pytest.approx(2 / processes)]}
    assert sent == {"none": pytest.approx(2), "layers": pytest.approx(3)}


def test_a_teacher_costs_what_its_own_size_is(base, tmp_path):
    """Weights that a token is multiplied with, twice as operations; and its shards are sent as it reads."""
    found = []
    for name in (base, str(save_base(tmp_path / "qwen", "qwen3"))):
        at, plan = planned(distill, base, 2, shard="layers", on_policy=0, teacher={"base": name})
        did, teacher = work(at, plan), at.teacher.sizes
        own = did.flops - 2 * teacher.multiplied * plan.load.tokens
        found.append((own, did.sent - 4 * teacher.weights / 2 * plan.load.rows))
    assert found[0] == pytest.approx(found[1])


def test_a_host_holds_what_its_processes_change_of_a_base(base):
    """Before it lies over their GPUs: each makes its own copy, or all look at the file's pages."""
    rewards = [{"function": "align.training.rules:sentiment"}]
    at, _ = planned(ppo, base, 8, shard="layers", rewards=rewards)
    weights, gpu = at.skeleton.sizes.weights, DEVICE._replace(type="cuda")
    assert host_bytes(at, 1) == 0  # on a CPU it is in the plan itself
    assert host_bytes(at._replace(device=gpu), 2) == 4 * weights  # float32 in the file and in the run
    assert host_bytes(at._replace(device=gpu._replace(dtype=torch.bfloat16)), 2) == 4 * 2 * weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_while_it_samples(base, dtype, monkeypatch):
    """Layers and head: of float32 few enough bytes; of bfloat16 all, where the processor multiplies it. DoRA's layers
    are computed otherwise."""
    rewards, device = [{"function": "align.training.rules:sentiment"}], DEVICE._replace(dtype=dtype, kernels=True)
    at, _ = planned(ppo, base, rewards=rewards, device=device)
    layers, head = at.skeleton.sizes.matrices * dtype.itemsize, at.skeleton.sizes.vocabulary * 32 * dtype.itemsize
    assert (at.copied, at.copied_head) == (layers, head)
    assert moments(memory(at))["sampling"]["weights prepared for sampling"] == layers + head
    dora = at._replace(recipe=at.recipe.model_copy(update={"lora": Lora(dora=True)}))
    assert (dora.arranged, dora.copied, dora.copied_head) == (0, 0, head)
    monkeypatch.setattr("align.training.planning.parts.COPIES", 0)
    assert (at.copied, at.copied_head) == ((0, 0) if dtype == torch.float32 else (layers, head))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_trunk_has_no_copies_and_unpacks_one_matrix(base, bits):
    """No weights are joined or prepared but the head's, which is not packed; and what is unpacked is never the
    embedding, which is no packed matrix."""
    device = DEVICE._replace(dtype=torch.bfloat16, kernels=True)
    teacher = {"teacher": {"base": base}}
    whole, packed = (
        moments(planned(distill, base, model=model, device=device, **teacher)[1]) for model in ({}, {"quantize": bits})
    )
    assert "weights prepared for oneDNN" in whole["sampling"]
    assert "weights prepared for sampling" in whole["sampling"]
    (head,) = {size for parts in packed.values() for name, size in parts.items() if "prepared" in name}
    assert head < whole["sampling"]["weights prepared for sampling"]
    assert {parts.get("joined weights, beside the file", 0) for parts in packed.values()} == {0}
    at, _ = planned(distill, base, model={"quantize": bits}, device=device, **teacher)
    layers = [p.numel() for name, p in at.skeleton.made(1).named_parameters() if "_proj.base_layer" in name]
    assert packed["backward pass"]["a weight, unpacked"] == 2 * max(layers) < 2 * at.skeleton.sizes.largest
    assert packed["sampling"]["trunk"] < whole["sampling"]["trunk"]


def test_passes_of_a_distillation(base):
    """On responses of a server: the teacher's beside the step of the student, as on the data's own answers; nothing is
    computed of the student's before that."""
    teacher = {"base": base}
    for on_policy, generation in ((1, SERVER), (0, None)):
        at, plan = planned(distill, base, generation=generation, teacher=teacher, on_policy=on_policy)
        n, tokens = at.skeleton.sizes.multiplied, plan.load.tokens
        attended = causal_attended([plan.load.prompt + plan.load.answer or plan.load.segment])
        step = flops_per_token(at.skeleton.text, n, attended, lora=True)
        assert work(at, plan).flops == pytest.approx(tokens * (step + 2 * n))
