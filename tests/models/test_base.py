"""Loading a base: its dtype, its fingerprint, what it starts from, what is merged into it, and every way to fail."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from models.tiny import save_base, stir, tiny_model, tree
from peft import AutoPeftModelForCausalLM, PeftModel
from results import change
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from align.data.trees import plant
from align.models.base import compute_dtype, load_base, load_tokenizer
from align.models.checkpoints import fingerprints
from align.models.checkpoints.fingerprints import settings_of, weights_fingerprint
from align.models.checkpoints.results import META
from align.models.checkpoints.sources import read_config
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model

CPU = torch.device("cpu")
FOREST = plant([tree(6, 4, 3), tree(9, seed=1)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "llama")


def loaded(folder: Path, *, frozen: bool = True, seed: int = 0, **settings):
    return load_base(Model(base=str(folder), **({"dtype": "float32"} | settings)), CPU, frozen=frozen, seed=seed)


def trunk_on(folder: Path, lora: Lora | None = Lora(r=4, alpha=8), **settings) -> Trunk:  # noqa: B008
    section = Model(base=str(folder), **({"dtype": "float32"} | settings))
    return Trunk(load_base(section, CPU, frozen=lora is not None), section, lora)


def saved(trunk: Trunk, final: Path) -> Path:
    trunk.save(final, {name: p.detach() for name, p in trunk.named_parameters() if p.requires_grad}, {"stage": "sft"})
    return final


def problem(folder: Path | str, **settings) -> str:
    with pytest.raises(UserError) as error:
        load_base(Model(base=str(folder), **settings), CPU, frozen=True)
    (line,) = error.value.problems
    assert "\n" not in line
    return line


def dtypes(model) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}


# -- dtype -------------------------------------------------------------------------------------------------------------


def test_a_frozen_trunk_has_the_dtype_it_computes_in(folder):
    for choice in ("float32", "bfloat16", "float16"):
        assert dtypes(loaded(folder, dtype=choice).model) == {getattr(torch, choice)}
        assert compute_dtype(choice, CPU) == getattr(torch, choice)
    assert dtypes(loaded(folder, dtype="auto").model) == {compute_dtype("auto", CPU)}


def test_weights_are_cast_before_they_move_to_the_device(folder, monkeypatch):
    """A base with adapters merged in is float32, and may not fit there."""
    moved, move = [], PreTrainedModel.to

    def watched(model, *args):
        moved.append(dtypes(model))
        return move(model, *args)

    monkeypatch.setattr(PreTrainedModel, "to", watched)
    loaded(folder, dtype="bfloat16")
    assert moved == [{torch.bfloat16}]


def test_a_trained_trunk_is_float32_and_computes_in_its_dtype(folder):
    assert dtypes(loaded(folder, frozen=False, dtype="bfloat16").model) == {torch.float32}
    trunk = trunk_on(folder, None, dtype="bfloat16")
    assert trunk.dtype == torch.bfloat16
    logprobs = trunk(FOREST)
    assert logprobs.dtype == torch.float32
    exact = trunk_on(folder, None)(FOREST)
    assert 0 < (logprobs - exact).abs().max() < 0.5
    logprobs.sum().backward()
    assert {p.grad.dtype for p in trunk.parameters()} == {torch.float32}


def test_adapters_are_float32_on_a_bfloat16_trunk(folder):
    trunk = trunk_on(folder, dtype="bfloat16")
    assert {p.dtype for p in trunk.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trunk.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype"), [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")]
)
def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch, avx512, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype("auto", CPU) == getattr(torch, dtype)


def test_the_bases_own_dropout_is_off(tmp_path):
    base = save_base(tmp_path / "gpt2", model=tiny_model("gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5))
    trunk = trunk_on(base)
    trunk.train()
    assert torch.equal(trunk(FOREST), trunk(FOREST))


# -- fingerprint -------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_weights(folder, tmp_path):
    own = weights_fingerprint(folder)
    assert len(own) == 16
    assert int(own, 16) >= 0
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert weights_fingerprint(copy) == own
    assert loaded(folder).fingerprint == loaded(folder, dtype="bfloat16").fingerprint == own


def test_retrained_weights_have_another(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for p in model.parameters():
        p.data *= 1.001
    assert weights_fingerprint(save_base(tmp_path / "more", model=model)) != weights_fingerprint(folder)
    assert weights_fingerprint(save_base(tmp_path / "other", "qwen2")) != weights_fingerprint(folder)


# -- from scratch ------------------------------------------------------------------------------------------------------


def test_new_weights_follow_the_seed(folder):
    before = torch.random.get_rng_state()
    first, again, other = (loaded(folder, init="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [base.model.get_input_embeddings().weight for base in (first, again, other, loaded(folder))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, weights_fingerprint(folder)}) == 3


def test_new_shapes_come_from_the_recipe(folder):
    base = loaded(folder, init="random", config={"num_hidden_layers": 3, "hidden_size": 16})
    assert base.model.config.num_hidden_layers == 3
    assert base.model.get_input_embeddings().weight.shape[1] == 16
    assert base.fingerprint != loaded(folder, init="random").fingerprint


def test_settings_that_no_model_has_are_told(folder):
    told = problem(folder, init="random", config={"hidden_sizes": 8, "num_layer": 2})
    assert told == f"model.config: {folder} has no setting 'hidden_sizes', 'num_layer'"
    assert problem(folder, init="random", config={"hidden_act": "nope"}).startswith(
        "model.config: no model can be made from these settings ("
    )


# -- results and merging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_base_and_merged_adapter_are_the_adapted_trunk(family, tmp_path):
    base = save_base(tmp_path / "base", family)
    trunk = stir(trunk_on(base))
    final = saved(trunk, tmp_path / "final")
    merged = trunk_on(base, Lora(r=2), adapter=str(final))
    with torch.no_grad():
        adapted = trunk(FOREST)
        torch.testing.assert_close(merged(FOREST), adapted, rtol=1e-5, atol=2e-5)
        assert (adapted - trunk_on(base)(FOREST)).abs().max() > 0.01
    assert merged.fingerprint not in (trunk.fingerprint, "")
    assert sum("lora_A" in name for name, _ in merged.named_parameters()) == sum(
        "lora_A" in name for name, _ in trunk.named_parameters()
    )


def test_merging_happens_before_rounding(tmp_path):
    folder = save_base(tmp_path / "half", model=tiny_model("llama").bfloat16())
    final = saved(stir(trunk_on(folder)), tmp_path / "final")
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exact = dict(PeftModel.from_pretrained(wide, final).merge_and_unload().named_parameters())
    rounded = dict(loaded(folder, adapter=str(final), dtype="bfloat16").model.named_parameters())
    assert all(torch.equal(p, exact[name].bfloat16()) for name, p in rounded.items())


def test_a_fingerprint_is_the_same_however_its_files_are_read(tmp_path, monkeypatch):
    """Tensors at once, or row by row where they are large."""
    shapes = {"long": (40, 300), "short": (3, 5, 700), "row": (100,), "one": (), "none": (0, 4)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    at_once = weights_fingerprint(tmp_path)
    monkeypatch.setattr(fingerprints, "WHOLE", 0)
    assert weights_fingerprint(tmp_path) == at_once


def test_a_merged_trunks_fingerprint_is_of_both(folder, tmp_path):
    one, other = (saved(stir(trunk_on(folder), seed), tmp_path / str(seed)) for seed in (1, 2))
    prints = [loaded(folder, adapter=str(final)).fingerprint for final in (one, one, other)]
    assert prints[0] == prints[1] != prints[2]


def test_final_loads_with_plain_peft_and_transformers(folder, tmp_path):
    trunk = stir(trunk_on(folder))
    final = saved(trunk, tmp_path / "final")
    ids = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    plain = AutoPeftModelForCausalLM.from_pretrained(final)
    with torch.no_grad(), trunk.generating() as model:
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.chat_template == trunk.tokenizer.chat_template
    assert json.loads((final / META).read_text()) == {
        "stage": "sft",
        "role": "adapter",
        "base": str(folder),
        "fingerprint": weights_fingerprint(folder),
        "trunk": [
            {
                "name": str(folder),
                "path": str(folder),
                "fingerprint": weights_fingerprint(folder),
                "settings": settings_of(read_config(folder, "it")),
            }
        ],
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # output heads tied, apart, tied
def test_a_full_result_is_an_ordinary_checkpoint(family, tmp_path):
    trunk = trunk_on(save_base(tmp_path / "base", family), None)
    with torch.no_grad():
        for p in trunk.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    final = saved(trunk, tmp_path / "final")
    plain, told = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    for name, p in trunk.plain.named_parameters():
        assert torch.equal(plain.get_parameter(name), p), name
    torch.testing.assert_close(trunk_on(final, None)(FOREST), trunk(FOREST), rtol=0, atol=0)
    assert json.loads((final / META).read_text())["role"] == "model"


# -- what a user can get wrong -----------------------------------------------------------------------------------------


def test_an_adapter_of_another_trunk_is_refused(folder, tmp_path):
    final = saved(trunk_on(folder), tmp_path / "final")
    other = save_base(tmp_path / "other", model=tiny_model("llama", seed=7))
    told = problem(other, adapter=str(final))
    assert told.startswith(f"model.adapter: {final} was trained on a trunk with fingerprint ")
    assert weights_fingerprint(folder) in told
    assert weights_fingerprint(other) in told


def changed_base(folder, to, **settings):
    """A copy of a base whose config.json says something else."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | settings))
    return to


def test_an_adapter_on_a_base_with_other_settings_is_refused(folder, tmp_path):
    """Its weights are the same, its numbers are not."""
    final = saved(trunk_on(folder), tmp_path / "final")
    other = changed_base(folder, tmp_path / "other", rms_norm_eps=0.25, tie_word_embeddings=False)
    assert problem(changed_base(folder, tmp_path / "b", rms_norm_eps=0.25), adapter=str(final)) == (
        f"model.adapter: {final} was trained on {folder} with another config.json (rms_norm_eps: 1e-06 there, 0.25 "
        "here); restore it"
    )
    assert weights_fingerprint(other) == weights_fingerprint(folder)
    names = {"transformers_version": "0", "architectures": ["X"], "use_cache": False, "max_position_embeddings": 9999}
    config = read_config(changed_base(folder, tmp_path / "same", **names), "it")
    assert settings_of(config) == settings_of(read_config(folder, "it")) != settings_of(read_config(other, "it"))


@pytest.mark.parametrize("file", [META, "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_without_its_files_is_refused(folder, tmp_path, file):
    final = saved(trunk_on(folder), tmp_path / "final")
    (final / file).unlink()
    assert problem(folder, adapter=str(final)).startswith(f"model.adapter: {final} has no {file};")


@pytest.mark.parametrize("file", [META, "adapter_config.json", "adapter_model.safetensors"])
def test_a_broken_adapter_is_refused(folder, tmp_path, file):
    final = saved(trunk_on(folder), tmp_path / "final")
    (final / file).write_bytes((final / file).read_bytes()[:40])
    assert problem(folder, adapter=str(final)).startswith(f"model.adapter: {final}")


def test_no_such_model(tmp_path):
    for name in (str(tmp_path / "none"), "./none", "none", "a/b/c"):
        assert problem(name).startswith(f"model.base: there is no model {name!r}; expected a local folder")
    assert problem("demo/none").startswith("model.base: there is no embedded model 'demo/none'; there is: demo/smol")


def test_a_folder_that_is_no_checkpoint(folder, tmp_path):
    assert "has no config.json, so it is no checkpoint; check the path" in problem(tmp_path)
    final = saved(trunk_on(folder), tmp_path / "final")
    assert "no checkpoint; give it to model.adapter, and its base here" in problem(final)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\x00" * 64),
        ("model.safetensors", b""),
        ("model.safetensors", None),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "nope"}'),
        ("tokenizer.json", b"{}"),
    ],
)
def test_a_broken_checkpoint(folder, tmp_path, file, content):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / file).unlink() if content is None else (copy / file).write_bytes(content)
    assert problem(copy).startswith("model.base: ")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda w: w | {"model.norm.weight": torch.full_like(w["model.norm.weight"], math.nan)}, "norm.weight has "),
        (lambda w: w | {"model.norm.weight": torch.ones(31)}, "norm.weight has the shape (31,) where its "),
        (lambda w: {n: t for n, t in w.items() if "norm" not in n}, "whole language model: it lacks model.layers.0."),
        (lambda w: w | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "norm.weight holds whole numbers, as "),
    ],
    ids=["nan", "shape", "lacking", "integers"],
)  # fmt: skip
def test_odd_weights(folder, tmp_path, harm, said):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    save_file(harm(load_file(copy / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
    assert said in problem(copy)


@pytest.mark.parametrize(
    "content", ["[1, 2]", "null", "3", '"llama"', "[" * 5000, '{"model_type": "llama", "vocab_size": []}']
)
def test_a_config_of_another_kind(folder, tmp_path, content):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text(content)
    assert problem(copy).startswith(f"model.base: {copy} has no usable config.json (")


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_config_far_larger_than_its_weights(folder, tmp_path, key):
    """Before time and memory are spent on it."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | {key: 2_000_000}
    (copy / "config.json").write_text(json.dumps(config))
    assert f"its config.json has {key}: 2,000,000, which its weights are far too small for" in problem(copy)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"head_dim": 10**7}, "describes 7,"),
        ({"num_key_value_heads": 10**7}, "describes "),
        ({"num_labels": 10**9}, "num_labels: 1,000,000,000 is more than any model has"),
        ({"hidden_size": 0}, "hidden_size: 0, which makes no model"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0, which makes no model"),
    ],
)
def test_a_config_that_asks_for_all_memory_or_for_no_model(folder, tmp_path, values, said):
    base = shutil.copytree(folder, tmp_path / "base")
    change(base / "config.json", **values)
    assert said in problem(base)


def test_layers_that_the_config_leaves_out_are_told(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    change(base / "config.json", num_hidden_layers=1)
    (remark,) = trunk_on(base).remarks
    assert remark.startswith("warning: ")
    assert "weights of " in remark
    assert "describes fewer layers: model.layers.1." in remark
    assert trunk_on(folder).remarks == []


@pytest.mark.parametrize("lora", [Lora(r=4), None])
def test_what_a_generation_config_says_is_saved_but_for_what_does_nothing(folder, tmp_path, lora):
    """Published ones have a temperature without `do_sample`, which transformers does not save."""
    base = shutil.copytree(folder, tmp_path / "base")
    idle = {"temperature": 0.6, "top_p": 0.9, "early_stopping": True}
    GenerationConfig().save_pretrained(base)
    change(base / "generation_config.json", eos_token_id=[2, 1], repetition_penalty=1.2, **idle)
    trunk = trunk_on(base, lora)
    trunk.save(tmp_path / "final", {name: p.detach() for name, p in trunk.saved().items()}, {"stage": "sft"})
    written = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert written["repetition_penalty"] == 1.2
    assert {1, 2} <= {*written["eos_token_id"]}
    assert not written.keys() & idle.keys()
    change(base / "generation_config.json", do_sample=True)
    assert trunk_on(base, lora).generation_config().temperature == 0.6


@pytest.mark.parametrize(
    "values", [{"eos_token_id": ends} for ends in ("</s>", [[1]], 2.0, True, [1, "x"], {})] + [{"stop_strings": 5}]
)
def test_ends_that_are_none_are_refused(folder, tmp_path, values):
    base = shutil.copytree(folder, tmp_path / "base")
    GenerationConfig().save_pretrained(base)
    change(base / "generation_config.json", **values)
    assert f"generation_config.json: {next(iter(values))}: expected " in problem(base)


def test_pickled_weights_are_told_how_to_be_converted(folder, tmp_path):
    """And the command that is told does it."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(folder, old)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    told = problem(old)
    assert told.startswith(f"model.base: {old} has its weights as pytorch_model.bin, a pickle, ")
    code = re.search(r'python -c "(.*)"', told)[1].replace("OLD", str(old)).replace("NEW", str(new))
    exec(code)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(old / name, new)
    assert torch.equal(loaded(new).model.lm_head.weight, loaded(folder).model.lm_head.weight)
    final = saved(trunk_on(folder), tmp_path / "final")
    (final / "adapter_model.safetensors").rename(final / "adapter_model.bin")
    assert "as adapter_model.bin, a pickle, " in problem(folder, adapter=str(final))


def test_half_a_checkpoint(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert problem(copy).startswith("model.base: ")


def test_a_tokenizer_brings_what_batches_need(folder, tmp_path):
    tokenizer = load_tokenizer(Model(base=str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert "<|im_start|>" in tokenizer.chat_template  # the vocabulary has it
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="names no eos token"):
        load_tokenizer(Model(base=str(bare)))


def test_only_weights_are_cast(folder):
    """Rotary frequencies in bfloat16 would turn far positions by up to a radian."""
    loaded = load_base(Model(base=str(folder), dtype="bfloat16"), torch.device("cpu"), frozen=True).model
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    frequencies = {name: b for name, b in loaded.named_buffers() if "inv_freq" in name}
    fresh = dict(tiny_model("llama").named_buffers())
    assert frequencies
    for name, buffer in frequencies.items():
        assert torch.equal(buffer, fresh[name]), name


@pytest.mark.parametrize("stage", ["reward", "classify"])
def test_what_scores_texts_is_no_start_for_a_policy(stage, folder, tmp_path):
    section, device = Model(base=str(folder), dtype="float32"), torch.device("cpu")
    base = load_base(section, device, frozen=False, outputs=2)
    scoring = Trunk(base, section, None, outputs=2)
    scoring.save(tmp_path / "whole", {n: p.detach() for n, p in scoring.named_parameters()}, {"stage": stage})
    lora = Lora(r=2, alpha=2)
    adapted = Trunk(load_base(section, device, frozen=True, outputs=2), section, lora, outputs=2)
    trained = {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}
    adapted.save(tmp_path / "adapter", trained, {"stage": stage})
    with pytest.raises(UserError, match=f"adapter is a result of stage {stage}, which only scores texts"):
        load_base(section.model_copy(update={"adapter": str(tmp_path / "adapter")}), device, frozen=True)
    with pytest.raises(UserError, match=f"whole is a result of stage {stage}, which only scores texts"):
        load_base(section.model_copy(update={"base": str(tmp_path / "whole")}), device, frozen=True)


@pytest.mark.parametrize(("limit", "threads"), [("1", 1), ("8", 2)])
def test_no_more_threads_than_openmp_gives(limit, threads, folder, monkeypatch):
    """With fewer than PyTorch believes in, oneDNN's products are wrong, without a word."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_THREAD_LIMIT", limit)  # of a fresh process; PyTorch believes in what it is told, too
    torch.set_num_threads(2)
    try:
        load_base(Model(base=str(folder)), torch.device("cpu"), frozen=True)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
