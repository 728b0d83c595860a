"""On one batch of pairs, our preference losses and gradients equal TRL's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models.tiny import VOCABULARY, save_base, stir, tiny_model, tiny_tokenizer, tiny_trunk
from oracle import assert_equal, trained
from preference_oracle import Answer, Pair, dpo, kto, reward, told, trl_dpo, trl_kto, trl_reward
from transformers import AutoModelForSequenceClassification
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from align.models.base import Base, load_base
from align.models.trunk import Trunk
from align.objectives.losses import odds_ratio, simpo
from align.recipe.schema import Lora, Model


def drawn(*lengths: tuple[int, int, int]) -> list[Pair]:
    draw = torch.Generator().manual_seed(0)
    return [Pair(*(torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in row)) for row in lengths]


PAIRS = drawn((6, 5, 9), (3, 8, 1), (11, 2, 4))  # as long as each other in no way


@pytest.mark.parametrize(
    ("kind", "beta", "label_smoothing"),
    [("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2), ("ipo", 0.3, 0.0), ("hinge", 0.1, 0.0), ("robust", 0.1, 0.1)],
)
def test_dpo(kind, beta, label_smoothing, tmp_path):
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))
    assert trunk.packed
    # TRL 1.16 smooths no labels in its `sigmoid`; its `aot` of a single pair is that loss, smoothed.
    smoothed = kind == "sigmoid" and label_smoothing > 0
    pairs, their_kind = (PAIRS[:1], "aot") if smoothed else (PAIRS, kind)
    settings = {"beta": beta, "label_smoothing": label_smoothing}
    found = told(trunk, dpo(trunk, pairs, kind, **settings))
    model = tiny_model("llama")
    expected = trl_dpo(model, tiny_tokenizer(), pairs, trained(trunk), tmp_path, their_kind, **settings)
    assert_equal(found, expected)


def test_kto(tmp_path):
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))
    first, *more = drawn((5, 3, 2), (4, 1, 1), (7, 2, 1))
    answers = [Answer(*first[:2], True), *(Answer(pair.prompt, pair.rejected, False) for pair in more)]
    found = told(trunk, kto(trunk, answers, 0.3, (1.5, 0.5)))
    model = tiny_model("llama")
    assert_equal(found, trl_kto(model, tiny_tokenizer(), answers, trained(trunk), tmp_path, 0.3, (1.5, 0.5)))


@pytest.mark.parametrize(("margins", "centring"), [([0.0] * 3, 0.0), ([1.5, 0.25, 0.0], 0.01)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reward(family, margins, centring, tmp_path):
    folder = save_base(tmp_path / "base", family)
    section, lora = Model(base=str(folder), dtype="float32"), Lora(r=4, alpha=8)
    base = load_base(section, torch.device("cpu"), frozen=True, outputs=1)
    trunk = stir(Trunk(base, section, lora, outputs=1))
    assert trunk.packed
    found = told(trunk, reward(trunk, PAIRS, margins, centring))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    expected = trl_reward(model, tiny_tokenizer(), PAIRS, trained(trunk), tmp_path / "trl", margins, centring)
    assert_equal(found, expected)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_simpo_and_odds_ratio(beta):
    """By TRL's functions alone: its trainers' batches are not ours (see `orpo`)."""
    better, worse = -torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).double()
    settings = SimpleNamespace(
        beta=beta,
        alpha=0.0,
        simpo_gamma=0.7,
        loss_type="simpo",
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    expected, *_ = CPOTrainer.cpo_loss(settings, better, worse)
    torch.testing.assert_close(simpo(better, worse, beta, 0.7), expected)
    gains, *_ = ORPOTrainer.odds_ratio_loss(settings, better.float(), worse.float())
    torch.testing.assert_close(beta * odds_ratio(better.float(), worse.float()), -gains)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_policy_equal_to_the_reference_gives_log_2(dtype, layout):
    """A new LoRA adds nothing, to the last bit; two pairs, so that their mean is not rounded."""
    base = Base(tiny_model("llama").to(getattr(torch, dtype)), tiny_tokenizer(), "fingerprint", "tiny", "tiny")
    trunk = Trunk(base, Model(base="tiny", dtype=dtype, layout=layout), Lora(r=4, alpha=8))
    assert dpo(trunk, PAIRS[:2], "sigmoid", 0.1).item() == torch.tensor(2.0).log().item()
