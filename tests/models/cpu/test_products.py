"""Our LoRA layer computes what peft's own does."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora as peft_lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from align.models.cpu.fixed import prepare_products
from align.models.cpu.packed import arranges
from align.models.cpu.products import LoraLinear, adopt_layers, rounded
from align.models.lora import lora_config
from align.recipe.schema import Lora

LAYERS = {
    "linear": lambda: nn.Linear(6, 10, bias=False),
    "linear with bias": lambda: nn.Linear(6, 10),
    "conv1d": lambda: Conv1D(10, 6),
}


def pair(layer: str, section: Lora, dtype: torch.dtype = torch.float32) -> tuple[PeftModel, PeftModel]:
    """The same adapted model twice: with our layer, and with peft's."""
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(LAYERS[layer](), nn.Tanh(), nn.Linear(10, 3))
        for p in model.parameters():
            nn.init.normal_(p)
        model = model.to(dtype)
        config = lora_config(section, model)
        if not ours:
            config = LoraConfig(
                r=section.r,
                lora_alpha=section.alpha,
                lora_dropout=section.dropout,
                target_modules=section.targets,
                use_rslora=section.rslora,
                fan_in_fan_out=layer == "conv1d",
            )
        config.task_type = None
        model = get_peft_model(model, config)
        if ours:
            adopt_layers(model)
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
        layers = {type(m) for m in model.modules() if isinstance(m, peft_lora.LoraLayer)}
        assert layers == {LoraLinear if ours else peft_lora.Linear}
        found.append(model)
    return found[0], found[1]


def run(model: PeftModel, dtype: torch.dtype = torch.float32, *, frozen_input: bool = False):
    torch.manual_seed(5)
    x = torch.randn(2, 7, 6).to(dtype).requires_grad_(not frozen_input)
    out = model(x)
    out.float().square().sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return out.detach(), named | ({} if frozen_input else {"x": x.grad})


def same(ours, theirs, tolerance: float) -> None:
    assert ours[0].dtype == theirs[0].dtype
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert ours[1][name].dtype == gradient.dtype
        assert (ours[1][name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize(
    "section", [Lora(r=3, alpha=5, targets=["0", "2"]), Lora(r=3, targets=["0", "2"], rslora=True)]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_values_and_gradients_are_pefts(layer, section, frozen_input):
    if layer == "conv1d":
        section = section.model_copy(update={"targets": ["0"]})  # peft takes one orientation a configuration
    ours, theirs = pair(layer, section)
    same(run(ours, frozen_input=frozen_input), run(theirs, frozen_input=frozen_input), 1e-5)


def test_the_scale_is_alpha_over_r_or_its_root():
    def scale(**section) -> float:
        model, _ = pair("linear", Lora(r=4, alpha=8, targets=["0"], **section))
        return next(m for m in model.modules() if isinstance(m, LoraLinear)).scaling["default"]

    assert scale() == 2
    assert scale(rslora=True) == 4


def test_dropout_is_pefts_and_in_training_only():
    ours, theirs = pair("linear", Lora(r=3, dropout=0.5, targets=["0"]))
    ours.train()
    theirs.train()
    trained, expected = run(ours), run(theirs)
    same(trained, expected, 1e-6)  # the same seed drops the same
    ours.zero_grad()
    theirs.zero_grad()
    evaluated = run(ours.eval())
    same(evaluated, run(theirs.eval()), 1e-5)  # one product
    assert not torch.allclose(trained[0], evaluated[0])


@pytest.mark.parametrize("layer", ["linear with bias", "conv1d"])
def test_adapters_off_and_merged(layer):
    ours, theirs = pair(layer, Lora(r=3, targets=["0"]))
    x = torch.randn(4, 6)
    with torch.no_grad(), ours.disable_adapter():
        assert torch.equal(ours(x), theirs.get_base_model()(x)) is False  # peft's own stays on
        with theirs.disable_adapter():
            assert torch.equal(ours(x), theirs(x))
    adapted = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), adapted, rtol=1e-4, atol=1e-4)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.merge_and_unload()(x), adapted, rtol=1e-4, atol=1e-4)


def test_bfloat16_trunk_with_float32_adapters():
    section = Lora(r=3, alpha=5, targets=["0", "2"])
    ours, theirs = pair("linear with bias", section, torch.bfloat16)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    found = run(ours, torch.bfloat16)
    assert found[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for name, g in found[1].items() if name != "x")
    same(found, run(theirs, torch.bfloat16), 0.05)


def test_no_gradient_is_taken_where_none_is_asked():
    ours, _ = pair("linear", Lora(r=3, targets=["0"]))
    with torch.no_grad():
        assert not ours(torch.randn(4, 6)).requires_grad


@pytest.mark.skipif(not arranges(torch.empty(1, 1, dtype=torch.bfloat16)), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("layer", LAYERS)
def test_prepared_products_are_the_plain_ones(layer, monkeypatch):
    """In bfloat16, where a CPU makes copies of the frozen weights; never more than may be."""
    section = Lora(r=3, alpha=6, targets=["0"])
    prepared, plain = (pair(layer, section, torch.bfloat16)[0] for _ in range(2))
    monkeypatch.setattr("align.models.cpu.fixed.COPIES", 0)
    prepare_products(plain)
    monkeypatch.undo()
    prepare_products(prepared)
    copies = [next(m for m in model.modules() if isinstance(m, LoraLinear)).ready for model in (prepared, plain)]
    assert copies[0] is not None
    assert copies[1] is None
    (out, grads), (stock, known) = (run(model, torch.bfloat16) for model in (prepared, plain))
    torch.testing.assert_close(out, stock, rtol=0.02, atol=0.02)
    for name, grad in known.items():
        assert (grads[name] - grad).norm() <= 0.02 * grad.norm(), name


def test_nothing_is_prepared_that_is_not_used():
    model, _ = pair("linear", Lora(r=3, alpha=6, targets=["0"], dropout=0.1), torch.bfloat16)
    prepare_products(model)
    assert all(m.ready is None for m in model.modules() if isinstance(m, LoraLinear))


def test_matrices_of_one_input_are_joined():
    trained = [torch.randn(shape) for shape in ((2, 5), (4, 2), (3, 5), (6, 3))]
    a, b = rounded(trained, torch.bfloat16)
    assert torch.equal(a, torch.cat([trained[0], trained[2]]).bfloat16())
    assert torch.equal(b, torch.block_diag(trained[1], trained[3]).bfloat16())
