"""A quantised trunk: its numbers are those of plain transformers, peft and bitsandbytes, whatever acts and however it
is laid out; what cannot be quantised is refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from models.test_base import CPU, FOREST, problem, saved, trunk_on
from models.tiny import gradients, save_base, stir, tree
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, BitsAndBytesConfig

from align.data.trees import plant
from align.models import quantized
from align.models.base import load_base
from align.models.checkpoints.fingerprints import weights_fingerprint
from align.models.judge import read_judge
from align.models.quantized import is_quantized, numbers
from align.models.roles import CRITIC, Roles, read_scorer
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model

needed = pytest.mark.skipif(not quantized.LAYERS, reason="bitsandbytes is not installed")
both = pytest.mark.parametrize("bits", ["4bit", "8bit"])
LORA = Lora(r=4, alpha=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def chains(folder, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """In 4 and in 8 bits: an adapter on the quantised base, and one on both."""
    found = {}
    for bits in ("4bit", "8bit"):
        out = tmp_path_factory.mktemp(bits)
        first = saved(stir(trunk_on(folder, quantize=bits)), out / "first")
        second = trunk_on(folder, Lora(r=2, alpha=3), quantize=bits, adapter=str(first))
        found[bits] = first, saved(stir(second, 2), out / "second")
    return found


def plain(folder: Path, bits: str, *adapters: Path) -> PeftModel:
    """What the libraries alone make of it, in training: there bitsandbytes rounds no activations on a CPU."""
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(load_in_4bit=True, **four) if bits == "4bit" else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    adapted = PeftModel.from_pretrained(model, adapters[0], adapter_name="0", is_trainable=True)
    for number, path in enumerate(adapters[1:], start=1):
        adapted.load_adapter(path, adapter_name=str(number), is_trainable=True)
    adapted.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return adapted.train()


TREE = tree(9, seed=1)  # one path


def said(model: PeftModel) -> Tensor:
    """Log-probabilities of its labels, as a plain model is asked."""
    ids = torch.from_numpy(TREE.segments[0]).long()
    logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None])[:, 0][torch.from_numpy(TREE.trained[0][1:])]


@needed
@both
def test_numbers_and_gradients_are_those_of_the_libraries(folder, chains, bits):
    theirs, ours = plain(folder, bits, chains[bits][0]), stir(trunk_on(folder, quantize=bits))
    values, expected = ours(plant([TREE])), said(theirs)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert (values - stir(trunk_on(folder))(plant([TREE]))).abs().max() > 1e-3  # the bits are felt
    values.mean().backward()
    expected.mean().backward()
    compared = [
        torch.testing.assert_close(
            p.grad, theirs.get_parameter(name.replace(".default.", ".0.")).grad, rtol=1e-4, atol=1e-6
        )
        for name, p in ours.causal.named_parameters()
        if p.requires_grad
    ]
    assert len(compared) == 28


@needed
@both
def test_adapters_that_stay_are_those_of_peft(folder, chains, bits):
    """peft with all of them active at once, and without the last for the bare trunk."""
    first, second = chains[bits]
    trunk = stir(trunk_on(folder, Lora(r=2, alpha=3), quantize=bits, adapter=str(first)), 2)
    torch.testing.assert_close(trunk(plant([TREE])), said(plain(folder, bits, first, second)), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), trunk.acting(None) as bare:
        expected = said(plain(folder, bits, first))
        torch.testing.assert_close(bare(plant([TREE])), expected, rtol=1e-5, atol=1e-5)


@needed
@both
def test_a_trunk_computes_alike_in_all_modes_and_layouts(folder, chains, bits):
    section = {"quantize": bits, "adapter": str(chains[bits][0])}
    trunk = stir(trunk_on(folder, **section))
    assert trunk.packed
    values = trunk.train()(FOREST)
    for other in (
        trunk.eval()(FOREST),
        stir(trunk_on(folder, gradient_checkpointing=True, **section)).train()(FOREST),
        stir(trunk_on(folder, layout="padded", **section))(plant([tree(6, 4, 3), tree(9, seed=1)], packed=False)),
    ):
        torch.testing.assert_close(other, values, rtol=1e-4, atol=1e-4)
    slopes = [
        gradients(one, one(FOREST))
        for one in (trunk, stir(trunk_on(folder, gradient_checkpointing=True, **section)).train())
    ]
    for name in slopes[0]:
        torch.testing.assert_close(slopes[0][name], slopes[1][name], rtol=1e-4, atol=1e-5)


@needed
@both
def test_no_token_feels_the_rest_of_its_batch(folder, bits):
    """As it would where activations are rounded: a large value in one row changes how all others are computed."""
    layer = trunk_on(folder, quantize=bits).layers[0].mlp.down_proj.get_base_layer().eval()
    x = torch.randn(4, layer.in_features)
    large = x.clone()
    large[0, 3] = 1e3
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[1:], layer(large)[1:], rtol=1e-6, atol=1e-6)


@needed
@both
def test_a_trunk_without_an_adapter_is_the_same(folder, bits):
    """Such as a teacher of its own. Its bits are not asked for gradients, which integers cannot have."""
    section = Model(base=str(folder), dtype="float32", quantize=bits)
    trunk = Trunk(load_base(section, CPU, frozen=True), section, None)
    packed = [layer.weight for layer in trunk.modules() if isinstance(layer, quantized.LAYERS)]
    assert packed
    assert not any(weight.requires_grad for weight in packed)
    with torch.no_grad():
        torch.testing.assert_close(trunk(FOREST), trunk_on(folder, quantize=bits)(FOREST), rtol=1e-5, atol=1e-5)


@needed
@both
def test_samples_are_those_of_generate(folder, chains, bits):
    trunk = stir(trunk_on(folder, quantize=bits, adapter=str(chains[bits][0])))
    prompts = [tree(length, seed=length).segments[0] for length in (3, 7, 5)]
    greedy = sample(trunk, prompts, Sampling(8, temperature=0), [(i,) for i in range(3)])
    searched = sample(trunk, prompts, Sampling(8, temperature=0, beams=3), [(i,) for i in range(3)])
    for prompt, *found in zip(prompts, greedy, searched, strict=True):
        for beams, (response, *_) in zip((1, 3), found, strict=True):
            ids = torch.from_numpy(prompt).long()[None]
            with trunk.generating() as model:
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=beams, max_new_tokens=8,
                    pad_token_id=1, eos_token_id=sorted(trunk.end_tokens),
                )  # fmt: skip
            row = out[0, len(prompt) :].tolist()
            assert response.tokens.tolist() == row[: len(response.tokens)]


@needed
@both
def test_every_role_stands_on_what_is_kept(folder, chains, bits, tmp_path):
    first, _ = chains[bits]
    section = Model(base=str(folder), dtype="float32", quantize=bits, adapter=str(first))
    scored = stir(Trunk(load_base(section, CPU, frozen=True, outputs=1), section, LORA, outputs=1), 5)
    about = {"stage": "reward", "score_mean": 0.5, "score_std": 2.0}
    scored.save(tmp_path / "reward", {n: p.detach() for n, p in scored.named_parameters() if p.requires_grad}, about)
    trunk = trunk_on(folder, quantize=bits, adapter=str(first))
    scorer = read_scorer(str(tmp_path / "reward"), "adapter", trunk)
    roles = Roles(trunk, LORA, {"reward": scorer}, "reward")
    with torch.no_grad():
        scores = roles.scores("reward", FOREST, FOREST.ends)
        torch.testing.assert_close(scores, scored(FOREST)[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(roles.scores(CRITIC, FOREST, FOREST.ends), (scores - 0.5) / 2, rtol=1e-4, atol=1e-4)
        actor, reference = roles(FOREST, valued=False).logprobs, roles.reference(FOREST)
        assert torch.equal(actor, reference)
        expected = trunk_on(folder, quantize=bits, adapter=str(first))(FOREST)
        torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)
        judge = read_judge(str(tmp_path / "reward"), None, "key", CPU, torch.float32)  # the same as a model of its own
        apart = judge.model(input_ids=torch.from_numpy(TREE.segments[0]).long()[None]).logits[0]
        torch.testing.assert_close(scored(plant([TREE]))[0], apart, rtol=1e-5, atol=1e-5)
    assert {type(m).__name__ for m in roles.modules() if hasattr(m, "lora_A")} == {
        "Linear4bit" if bits == "4bit" else "Linear8bitLt"
    }


@needed
@both
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_other_families(family, bits, tmp_path):
    """Transposed layers, biases, tied and untied heads."""
    base = save_base(tmp_path / "base", family)
    trunk = stir(trunk_on(base, quantize=bits))
    final = saved(trunk, tmp_path / "final")
    theirs = plain(base, bits, final)
    torch.testing.assert_close(trunk(plant([TREE])), said(theirs), rtol=1e-5, atol=2e-5)
    again = trunk_on(base, Lora(r=1), quantize=bits, adapter=str(final))
    torch.testing.assert_close(again(plant([TREE])), said(theirs), rtol=1e-5, atol=2e-5)
    assert not is_quantized(trunk.head)


@needed
def test_four_bits_are_stored_as_numbers_of_the_compute_dtype(folder):
    for dtype in (torch.float32, torch.bfloat16):
        model = load_base(Model(base=str(folder), dtype=str(dtype)[6:], quantize="4bit"), CPU, frozen=True).model
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in numbers(model)} == {
            "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm",
        }  # fmt: skip


# -- which trunk it is -------------------------------------------------------------------------------------------------


@needed
def test_fingerprint_and_links_tell_the_bits(folder, chains):
    prints = {bits: trunk_on(folder, quantize=bits).fingerprint for bits in ("4bit", "8bit")}
    assert len({*prints.values(), weights_fingerprint(folder)}) == 3
    first, second = chains["4bit"]
    about = json.loads((second / "align.json").read_text())
    assert about["trunk"][0].pop("settings")
    assert about["trunk"] == [
        {"name": str(folder), "path": str(folder), "fingerprint": weights_fingerprint(folder), "quantize": "4bit"},
        {"name": str(first), "path": str(first), "fingerprint": about["fingerprint"]},
    ]
    loaded = trunk_on(folder, quantize="4bit", adapter=[str(first), str(second)])
    assert loaded.links[2].fingerprint == loaded.fingerprint != about["fingerprint"]


@needed
def test_an_adapter_of_other_bits_is_refused(folder, chains, tmp_path):
    (of_four, _), (of_eight, _) = chains["4bit"], chains["8bit"]
    of_numbers = saved(trunk_on(folder), tmp_path / "numbers")
    for adapter, bits, told, remedy in (
        (of_four, None, f"({folder} in 4 bits), but", "set model.quantize: 4bit"),
        (of_four, "8bit", f"({folder} in 8 bits)", "set model.quantize: 4bit"),
        (of_eight, "4bit", f"({folder} in 8 bits), but", "set model.quantize: 8bit"),
        (of_numbers, "8bit", f"({folder}), but", "leave model.quantize out"),
    ):
        line = problem(folder, adapter=str(adapter), quantize=bits)
        assert line.startswith(f"model.adapter: {adapter} was trained on a trunk with fingerprint ")
        assert told in line
        assert line.endswith(f"; {remedy}")


# -- what a user can get wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "named"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"), ({"quant_method": "fp8"}, "fp8")],
)
def test_a_checkpoint_that_is_quantised_already_is_refused(folder, tmp_path, bits, named):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | {"quantization_config": bits}
    (copy / "config.json").write_text(json.dumps(config))
    assert problem(copy) == (
        f"model.base: {copy} is quantised already ({named}); give the checkpoint that it was made from, and "
        "model.quantize: 4bit or 8bit"
    )


def test_without_bitsandbytes_it_is_named(folder, monkeypatch):
    monkeypatch.setattr(quantized, "LAYERS", ())  # as where it is not installed
    told = "model.quantize: bitsandbytes is not installed; run: pip install bitsandbytes"
    assert problem(folder, quantize="4bit") == told


@needed
@both
def test_weights_that_are_no_numbers_are_not_rounded_away(folder, tmp_path, bits):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights, name = load_file(copy / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = math.nan
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert problem(copy, quantize=bits) == f"model.base: {copy}: {name} has values that are not finite numbers"


@needed
@pytest.mark.parametrize(
    ("more", "what"), [({"use_dora": True}, "DoRA"), ({"trainable_token_indices": [5]}, "rows of added tokens")]
)
def test_an_adapter_that_needs_whole_weights_is_refused(folder, chains, tmp_path, more, what):
    final = tmp_path / "final"
    shutil.copytree(chains["4bit"][0], final)
    config = json.loads((final / "adapter_config.json").read_text()) | more
    (final / "adapter_config.json").write_text(json.dumps(config))
    assert problem(folder, adapter=str(final), quantize="4bit") == (
        f"model.adapter: {final} has {what}, which a quantised trunk cannot take; drop model.quantize"
    )


@needed
@both
def test_an_encoders_head_and_pooler_stay_numbers(tmp_path, bits):
    """They may be new: a checkpoint of masked language modelling has neither."""
    config = BertConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    base = save_base(tmp_path / "bert", model=BertForMaskedLM(config))
    row = plant([TREE], packed=False)
    section = Model(base=str(base), dtype="float32", quantize=bits)
    trunk = Trunk(load_base(section, CPU, frozen=True, outputs=3), section, LORA, outputs=3)
    trunk(row).square().sum().backward()
    assert all(p.grad is not None for p in trunk.parameters() if p.requires_grad)
    layers = {name for name, layer in trunk.plain.named_modules() if isinstance(layer, quantized.LAYERS)}
    assert layers
    assert not [name for name in layers if "pooler" in name or "classifier" in name]
