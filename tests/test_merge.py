"""Merged checkpoints: plain transformers give what base and adapters gave, and a merge that does not is refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft.tuners.lora.layer as peft_layers
import pytest
import torch
import yaml
from models.tiny import save_base, tiny_tokenizer
from peft import PeftModel
from results import save_result
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from world import align

from align import merge
from align.models.base import load_base
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model
from align.tools.merging.export import go_template

IDS = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))
KINDS = {
    "lora": ("llama", {}),
    "rslora": ("qwen3", {"rslora": True}),
    "tied": ("llama", {"targets": ["embed_tokens", "q_proj"]}),
    "untied": ("qwen2", {"targets": ["embed_tokens", "v_proj"]}),
    "scaled": ("gemma", {"targets": ["embed_tokens"]}),
    "conv1d": ("gpt2", {}),
    "dora": ("gpt2", {"dora": True}),
    "dora tied": ("llama", {"dora": True, "targets": ["embed_tokens", "q_proj"]}),
}


def trained(base: Path, final: Path, seed: int = 3, stage: str = "sft", lora: Lora | None = None, **settings) -> Trunk:
    """`final/` of a run that never was, and its trunk with what was trained."""
    section = Model(base=str(base), dtype="float32", **settings)
    lora = Lora(r=3, alpha=6) if lora is None else lora
    trunk = Trunk(load_base(section, torch.device("cpu"), frozen=True), section, lora)
    draw = torch.Generator().manual_seed(seed)
    named = {name: p.detach() for name, p in trunk.named_parameters() if p.requires_grad}
    for weight in named.values():
        weight += 0.1 * torch.randn(weight.shape, generator=draw)
    trunk.save(final, named, {"stage": stage})
    return trunk


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def far(trunk: Trunk, out: Path, ids: torch.Tensor = IDS) -> float:
    """The largest difference of logits between a trunk and a checkpoint that plain transformers load."""
    with trunk.generating() as model:
        return float((logits(model, ids) - logits(AutoModelForCausalLM.from_pretrained(out), ids)).abs().max())


def merged(*argv: object) -> str:
    told = align(*argv, stage=merge)
    assert (told.status, told.err) == (0, ""), told.err
    return told.out


def refused(*argv: object) -> str:
    told = align(*argv, stage=merge)
    assert told.status == 2, told.out
    (line,) = told.err.splitlines()
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_base_and_adapter_compute(kind, tmp_path):
    family, lora = KINDS[kind]
    base = save_base(tmp_path / "a_base: 2", family)
    trunk = trained(base, tmp_path / "final", lora=Lora(r=3, alpha=6, **lora))
    out = tmp_path / "out"
    said = merged(tmp_path / "final", out)
    assert "done" in said
    assert far(trunk, out) < 1e-4
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert not (out / "align.json").exists()
    told = json.loads((out / "merge.json").read_text())
    assert 0 <= told["on_disk"]["largest"] < 1e-4
    card = (out / "README.md").read_text()
    assert "# license" in card
    unties = kind in ("tied", "scaled", "dora tied")
    config = json.loads((out / "config.json").read_text())
    assert told["steps"][0]["untied"] is unties
    assert not (unties and config["tie_word_embeddings"])
    assert ("weights of its own" in said, "weights of its own" in card) == (unties, unties)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == str(base)


def test_a_chain_of_three_with_added_tokens_and_the_base_elsewhere(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|call|>"])
    tokenizer.save_pretrained(base)  # one token more than there are rows
    names = [str(tmp_path / name) for name in ("sft", "dpo", "again")]
    trained(base, Path(names[0]), 1, lora=Lora(r=2, alpha=4), add_tokens=["<|call|>", "<|back|>"])
    trained(base, Path(names[1]), 2, "dpo", adapter=names[0])
    trunk = trained(base, Path(names[2]), 3, "dpo", adapter=names[:2])
    out = tmp_path / "out"
    said = merged(names[2], out)
    assert said.count("merged ") == 3
    ids = torch.cat([IDS, torch.tensor([[trunk.rows - 1, trunk.rows - 2]])], 1)
    assert far(trunk, out, ids) < 1e-4
    assert "<|back|>" in AutoTokenizer.from_pretrained(out).get_vocab()

    moved = base.rename(tmp_path / "moved")
    line = refused(names[2], tmp_path / "other")
    assert "--onto" in line
    onto = [word for name in (moved, *names[:2]) for word in ("--onto", name)]
    merged(names[2], tmp_path / "other", *onto)
    assert far(trunk, tmp_path / "other", ids) < 1e-4
    assert "trunk" in refused(names[2], tmp_path / "none", *onto[:4])  # a link is missing
    assert not (tmp_path / "none").exists()


def test_a_narrower_dtype_rounds_the_weights_and_nothing_else(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    trunk = trained(base, tmp_path / "run" / "final")
    said = merged(tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")  # the run stands for its final/
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert 1e-4 < far(trunk, tmp_path / "out") < 1
    assert "bfloat16" in said


def test_averages(tmp_path):
    """`linear` is the weighted sum of what the adapters add, to the weights of the base; TIES and DARE are peft's."""
    base = save_base(tmp_path / "base", "qwen2")
    finals = [tmp_path / "one", tmp_path / "two"]
    for seed, final in enumerate(finals):
        trained(base, final, seed, lora=Lora(r=2 + seed, alpha=4))
    alone = []
    for number, final in enumerate(finals):
        merged(final, tmp_path / f"alone{number}")
        alone.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"alone{number}").state_dict())
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    merged(*finals, tmp_path / "mean", "--weight", 0.75, "--weight", 0.5)
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "mean").state_dict()
    for name, weight in mean.items():
        wanted = start[name] + 0.75 * (alone[0][name] - start[name]) + 0.5 * (alone[1][name] - start[name])
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-6)
    assert "one rank" in refused(*finals, tmp_path / "x", "--average", "ties")
    trained(base, tmp_path / "like", 5, lora=Lora(r=2, alpha=4))
    both = [finals[0], tmp_path / "like"]
    for number, kind in enumerate(("ties", "dare_linear", "dare_ties")):
        out, weights, seed = tmp_path / kind, (0.75, 0.5), 7 + number
        words = ["--weight", 0.75, "--weight", 0.5, "--density", 0.3, "--seed", seed]
        merged(*both, out, "--average", kind, *words)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), both[0], "one")
        plain.load_adapter(both[1], "two")
        torch.manual_seed(seed)
        plain.add_weighted_adapter(["one", "two"], weights, "mean", kind, density=0.3)
        plain.set_adapter("mean")
        there = AutoModelForCausalLM.from_pretrained(out).state_dict()
        for name, weight in plain.merge_and_unload().state_dict().items():
            torch.testing.assert_close(there[name], weight, rtol=1e-5, atol=1e-6)
        card = (out / "README.md").read_text()
        assert f"weights 0.75, 0.5, density 0.3, seed {seed}" in card
        assert "None: nothing has measured the average yet." in card


def test_a_merge_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", "llama")
    trained(base, tmp_path / "final")
    own = peft_layers.Linear.get_delta_weight
    with monkeypatch.context() as patch:
        patch.setattr(peft_layers.Linear, "get_delta_weight", lambda layer, name: -own(layer, name))
        assert "something else than the unmerged" in refused(tmp_path / "final", tmp_path / "out")
    saved = PreTrainedModel.save_pretrained

    def flipped(model, folder, *args, **more):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "down_proj" in name).neg_()
            saved(model, folder, *args, **more)
            next(p for name, p in model.named_parameters() if "down_proj" in name).neg_()

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", flipped)
        assert "what was written computes something else" in refused(tmp_path / "final", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    merged(tmp_path / "final", tmp_path / "out")


def test_wrong_input(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    final, out = tmp_path / "final", tmp_path / "out"
    trained(base, final)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "new or empty" in refused(final, tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    said = align(final, tmp_path / "file" / "out", stage=merge)
    assert (said.status, "cannot be written" in said.err, "`run`" in said.err) == (2, True, False), said.err
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert "no align.json" in refused(base, out)
    assert "OUT" in refused(final)
    assert "several results" in refused(final, out, "--average", "ties")
    assert "one for each" in refused(final, final, out, "--weight", 1)
    assert "convert_hf_to_gguf.py is not installed" in refused(final, out, "--gguf", "q8_0")
    other = save_base(tmp_path / "other", "qwen2")
    assert "fingerprint" in refused(final, out, "--onto", other)
    save_result(base, tmp_path / "whole", "sft", None, {}, None)
    assert "whole model already" in refused(tmp_path / "whole", out)
    trained(other, tmp_path / "stranger")
    assert "another trunk" in refused(final, tmp_path / "stranger", out)
    assert not out.exists()


def test_a_modelfile_and_gguf(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", "llama")
    final = tmp_path / "final"
    trained(base, final)
    tools = tmp_path / "llama.cpp"
    tools.mkdir()
    (tools / "convert_hf_to_gguf.py").write_text(
        "import sys\nopen(sys.argv[sys.argv.index('--outfile') + 1], 'wb').write(b'GGUF')\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(tools))
    merged(final, tmp_path / "out", "--gguf", "q8_0", "--modelfile")
    assert (tmp_path / "out" / "model-q8_0.gguf").read_bytes() == b"GGUF"
    lines = (tmp_path / "out" / "Modelfile").read_text()
    assert lines.startswith("FROM ./model-q8_0.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in lines
    (tools / "convert_hf_to_gguf.py").write_text("import nothing_of_that_name\n")
    assert "requirements" in refused(final, tmp_path / "other", "--gguf", "q8_0")
    (tools / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such architecture')\n")
    assert "no such architecture" in refused(final, tmp_path / "other", "--gguf", "q8_0")
    assert not (tmp_path / "other").exists()


def test_a_template_in_gos_language():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    written = (
        '{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}'
        "{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )
    assert go_template(tokenizer) == written
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2's, which is not written before a text
    assert go_template(tokenizer) == written
    sign = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", sign)]
    )
    begun = written.replace('"system" }}<|im_start|>', '"system" }}')
    assert go_template(tokenizer) == begun, "then Ollama writes it before the text"
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }} {{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"otherwise|more"):
        go_template(tokenizer)
