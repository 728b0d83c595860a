"""Results on trunks: merged is unmerged, a chain is merged link by link, what is loaded is what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.tiny import save_base, stir, tiny_model, tiny_tokenizer, tree
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.data.trees import plant
from align.models.base import load_base
from align.models.checkpoints.results import META, check_finite, read_result
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model

CPU = torch.device("cpu")
FOREST = plant([tree(6, 4, 3), tree(9, seed=1)])
IDS = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))


def trunk_on(base: Path, lora: Lora | None = Lora(r=4, alpha=8), **settings) -> Trunk:  # noqa: B008
    section = Model(base=str(base), **({"dtype": "float32"} | settings))
    return Trunk(load_base(section, CPU, frozen=lora is not None), section, lora)


def saved(trunk: Trunk, final: Path) -> Path:
    trunk.save(final, {name: p.detach() for name, p in trunk.named_parameters() if p.requires_grad}, {"stage": "sft"})
    return final


def moved(trunk: Trunk, seed: int = 1) -> Trunk:
    """Everything that trains, away from where it starts, embedding rows and magnitudes too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trunk.parameters():
            p += 0.1 * torch.randn(p.shape, generator=draw) * p.requires_grad
    return trunk


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def problem(base: Path, **settings) -> str:
    with pytest.raises(UserError) as error:
        trunk_on(base, **settings)
    (line,) = error.value.problems
    return line


# -- merged is unmerged ------------------------------------------------------------------------------------------------

KINDS = {
    "all": ("llama", Lora(r=3, alpha=6)),
    "some": ("llama", Lora(r=3, alpha=6, targets=["q_proj", "down_proj"])),
    "rslora": ("llama", Lora(r=3, alpha=6, rslora=True)),
    "tied embeddings": ("llama", Lora(r=3, alpha=6, targets=["embed_tokens", "q_proj"])),
    "tied embeddings of another name": ("gpt2", Lora(r=3, alpha=6, targets=["wte", "c_attn"])),
    "scaled embeddings": ("gemma", Lora(r=3, alpha=6, targets=["embed_tokens"])),
    "embeddings apart": ("qwen2", Lora(r=3, alpha=6, targets=["embed_tokens", "v_proj"])),
    "transposed": ("gpt2", Lora(r=3, alpha=6)),
    "dora": ("llama", Lora(r=3, alpha=6, dora=True)),
    "dora on transposed": ("gpt2", Lora(r=3, alpha=6, dora=True)),
    "dora on tied embeddings": ("llama", Lora(r=3, alpha=6, dora=True, targets=["embed_tokens", "q_proj"])),
    "gaussian": ("llama", Lora(r=3, alpha=6, init="gaussian")),
}
ADDED = ["<|call|>", "<|back|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged_and_plain_peft_says_the_same(kind, tmp_path):
    family, lora = KINDS[kind]
    base = save_base(tmp_path / "base", family)
    trunk = trunk_on(base, lora)
    with torch.no_grad():
        start = trunk(FOREST)
        with trunk.acting(None):
            torch.testing.assert_close(start, trunk(FOREST), rtol=0, atol=0)
        adapted = moved(trunk)(FOREST)
        assert (adapted - start).abs().max() > 0.01
        final = saved(trunk, tmp_path / "final")
        with trunk.generating() as model:
            plain = AutoPeftModelForCausalLM.from_pretrained(final)
            torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=5e-5)
        merged = trunk_on(base, Lora(r=2), adapter=str(final))
        torch.testing.assert_close(merged(FOREST), adapted, rtol=1e-5, atol=1e-5 * adapted.abs().max())
        with merged.acting(None):
            torch.testing.assert_close(merged(FOREST), adapted, rtol=1e-5, atol=1e-5 * adapted.abs().max())


def test_what_is_trained_whole_on_untied_embeddings_loads_as_it_was(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    final = saved(moved(trunk_on(base, KINDS["tied embeddings"][1])), tmp_path / "final")
    whole = moved(trunk_on(base, None, adapter=str(final)))
    plain = AutoModelForCausalLM.from_pretrained(saved(whole, tmp_path / "whole"))
    assert not plain.config.tie_word_embeddings
    with whole.generating() as model:
        torch.testing.assert_close(logits(plain), logits(model))


# -- added tokens ------------------------------------------------------------------------------------------------------


def short_of_rows(folder: Path, family: str) -> Path:
    """A base whose tokenizer has one token more than it has rows."""
    base = save_base(folder, family)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([ADDED[0]])
    tokenizer.save_pretrained(base)
    return base


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma"])  # heads tied, apart, tied; scaled embeddings
def test_rows_of_added_tokens_train_and_plain_peft_loads_them(family, dora, tmp_path):
    base = short_of_rows(tmp_path / "base", family)
    trunk = trunk_on(base, Lora(r=2, alpha=4, dora=dora), add_tokens=ADDED)
    first, second = trunk.added
    assert (trunk.rows, second) == (first + 2, first + 1)
    ids = IDS.clone()
    ids[0, [2, 5, 6]] = torch.tensor([first, second, first])
    forest = plant([tree(6, 4)._replace(segments=(ids[0, :6].int().numpy(), ids[0, 6:10].int().numpy()))])
    before = trunk(forest)
    with trunk.acting(None):
        torch.testing.assert_close(trunk(forest), before, rtol=0, atol=0)
    before.sum().backward()
    rows = {name: p.grad for name, p in trunk.named_parameters() if "trainable_tokens" in name}
    assert len(rows) == (2 if family == "qwen2" else 1)
    for name, gradient in rows.items():
        assert gradient.shape[0] == 2, name
        assert (gradient.abs().amax(1) > 0).all(), name
    trunk.zero_grad()
    adapted = moved(trunk)(forest)
    final = saved(trunk, tmp_path / "final")
    assert AutoTokenizer.from_pretrained(final).convert_tokens_to_ids(ADDED) == [first, second]
    with trunk.generating() as model:
        expected = logits(model, ids)
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(final), ids), expected)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(second + 1)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, final), ids), expected)
    merged = trunk_on(base, Lora(r=2), adapter=str(final))
    assert merged.tokenizer.convert_tokens_to_ids(ADDED) == [first, second]
    torch.testing.assert_close(merged(forest), adapted, rtol=1e-5, atol=1e-5 * float(adapted.abs().max()))


def test_rows_that_are_there_are_trained_where_they_stand(tmp_path):
    """And a token of the vocabulary is not cut out of the middle of words."""
    base = save_base(tmp_path / "base", model=tiny_model("llama", vocab_size=300))
    trunk = trunk_on(base, add_tokens=["e", *ADDED])
    assert trunk.rows == 300
    assert trunk.fingerprint == trunk_on(base).fingerprint
    assert len(trunk.added) == 3
    assert trunk.tokenizer("help") == tiny_tokenizer()("help")


def test_added_tokens_without_a_lora_are_rows_of_a_whole_model(tmp_path):
    base = save_base(tmp_path / "base")
    trunk = moved(trunk_on(base, None, add_tokens=ADDED))
    final = saved(trunk, tmp_path / "final")
    plain, told = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not told["missing_keys"]
    assert len(plain.get_input_embeddings().weight) == trunk.rows == len(AutoTokenizer.from_pretrained(final))
    with trunk.generating() as model:
        torch.testing.assert_close(logits(plain), logits(model))


@pytest.mark.parametrize(
    ("family", "lora", "said"),
    [
        ("llama", Lora(targets=["embed_tokens"]), "lora.targets: 'embed_tokens' has the rows that model.add_tokens"),
        ("llama", Lora(targets=["q_porj", "v_proj"]), "lora.targets: the model has no module 'q_porj'; did you mean "),
        ("gpt2", Lora(targets=["zzzzz"]), "lora.targets: the model has no module 'zzzzz'; there are c_attn, c_fc"),
        ("llama", Lora(targets=["norm", "q_proj"]), "lora.targets: 'norm' is a LlamaRMSNorm, which takes no adapter; "),
    ],
)  # fmt: skip
def test_targets_that_cannot_be(family, lora, said, tmp_path):
    with pytest.raises(UserError) as error:
        trunk_on(save_base(tmp_path / "base", family), lora, add_tokens=ADDED)
    assert error.value.problems[0].startswith(said)


def test_numbers_of_8_bits_are_looked_at_too():
    """torch has no `isfinite` for all of them."""
    ones = {"a": torch.ones(2).to(torch.float8_e4m3fn)}
    check_finite(ones, "told")
    with pytest.raises(UserError, match="told: a has values that are not finite"):
        check_finite({"a": torch.full((2,), torch.nan).to(torch.float8_e4m3fn)}, "told")


# -- chains ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> dict[str, Path]:
    """A base; an SFT result on it, which brings a token; a DPO result on that, and another on both."""
    here = tmp_path_factory.mktemp("chain")
    made = {"base": save_base(here / "base")}
    made["sft"] = saved(moved(trunk_on(made["base"], add_tokens=ADDED[:1])), here / "sft")
    made["dpo"] = saved(moved(trunk_on(made["base"], adapter=str(made["sft"])), 2), here / "dpo")
    both = [str(made["sft"]), str(made["dpo"])]
    made["again"] = saved(moved(trunk_on(made["base"], adapter=both), 3), here / "again")
    return made


def test_a_chain_is_merged_link_by_link(chain):
    names = [str(chain[name]) for name in ("sft", "dpo", "again")]
    with torch.no_grad():
        before = stir(trunk_on(chain["base"], adapter=names[:2]), 0)
        before.causal.load_adapter(names[2], "again")
        before.take_in()
        with before.acting("again"):
            expected = before(FOREST)
        torch.testing.assert_close(trunk_on(chain["base"], adapter=names)(FOREST), expected, rtol=1e-5, atol=1e-4)
    about = json.loads((chain["again"] / META).read_text())
    assert [link["name"] for link in about["trunk"]] == [str(chain["base"]), *names[:2]]
    assert about["trunk"][-1]["fingerprint"] == about["fingerprint"]


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (["again"], "[sft, dpo, again]"),
        (["sft", "again"], "[sft, dpo, again]"),
        (["dpo", "sft"], "[sft, dpo]"),
        (["sft", "sft"], "sft"),
        (["sft", "dpo", "again", "dpo"], "[sft, dpo]"),
    ],
)
def test_the_missing_link_is_named(chain, given, remedy):
    told = problem(chain["base"], adapter=[str(chain[name]) for name in given])
    for name in ("sft", "dpo", "again"):
        told = told.replace(str(chain[name]), name)
    assert told.endswith(f"; give model.adapter: {remedy}"), told


def test_a_fingerprint_is_of_the_adapters_settings_too(chain):
    """An update that is ten times as large is another trunk."""
    result = read_result(str(chain["sft"]), "model.adapter")
    prints = {result.merged_fingerprint("f"), result.merged_fingerprint("g")}
    for change in ({"lora_alpha": 80}, {"use_rslora": True}, {"use_dora": True}):
        prints.add(result._replace(config=result.config.model_copy(update=change)).merged_fingerprint("f"))
    assert len(prints) == 5
