"""The sampling engine against transformers' `generate`, and what its draws depend on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from models.tiny import ATTENTION, SPECIAL, VOCABULARY, tiny_trunk
from transformers import GenerationConfig

from align.data.templates.ends import turn_ends
from align.models.sampling.choice import Sampling, draw, filtered, penalised, uniforms
from align.models.sampling.decode import answer, sample
from align.recipe.schema import Lora

PROMPTS = [np.random.default_rng(n).integers(len(SPECIAL), VOCABULARY, n).astype(np.int32) for n in (7, 3, 12, 1)]
KEYS = [(0, i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def trunk():
    return tiny_trunk("llama", Lora(r=4, alpha=8))


def generated(trunk, prompt: np.ndarray, **options) -> list[int]:
    """transformers' own answer to one prompt, without what follows its end."""
    inputs = torch.from_numpy(prompt).long()[None]
    with trunk.generating() as model:
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            pad_token_id=1,
            eos_token_id=sorted(trunk.end_tokens),
            **options,
        )
    return out[0, len(prompt) :].tolist()


def test_an_answer_can_be_ended_in_any_layout():
    """Also where transformers' own `generate` gives it."""
    for family in ("llama", "mamba"):
        told = []

        def heed(tokens, told=told):
            told.append(tokens)
            if len(told) == 3:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            answer(tiny_trunk(family, None), "a", 40, "text", heed)
        assert len(told) == 3


@pytest.mark.parametrize("family", ATTENTION)
def test_greedy_is_that_of_generate(family):
    trunk = tiny_trunk(family, Lora(r=4, alpha=8))
    found = sample(trunk, PROMPTS, Sampling(20, temperature=0), KEYS)
    for prompt, (response,) in zip(PROMPTS, found, strict=True):
        assert response.tokens.tolist() == generated(trunk, prompt, max_new_tokens=20, do_sample=False)
    assert trunk.plain.config._attn_implementation == "align_forest"


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.3}, {"min_new": 9}, {"repetition_penalty": 2.0, "min_new": 3}]
)
def test_greedy_with_its_options_is_that_of_generate(trunk, options):
    found = sample(trunk, PROMPTS, Sampling(12, temperature=0, **options), KEYS)
    theirs = {"min_new": "min_new_tokens", "repetition_penalty": "repetition_penalty"}
    named = {theirs[name]: value for name, value in options.items()}
    for prompt, (response,) in zip(PROMPTS, found, strict=True):
        assert response.tokens.tolist() == generated(trunk, prompt, max_new_tokens=12, do_sample=False, **named)


def test_a_response_ends_with_its_end_token(trunk):
    """A model that says its end token half of the time."""
    sampling = Sampling(30, temperature=3.0)
    found = [r for row in sample(trunk, PROMPTS * 4, sampling, [(i,) for i in range(16)], samples=8) for r in row]
    ends = trunk.end_tokens
    for response in found:
        *body, last = response.tokens.tolist()
        assert not ends & set(body)
        assert response.ended == (last in ends)
        assert response.ended or len(response.tokens) == 30
    assert {r.ended for r in found} == {True, False}


def test_a_response_ends_where_the_chat_template_ends_turns(tmp_path):
    """By a token that is not the tokenizer's end of text, or by a text; and so do other programs."""
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))
    template = "{% for m in messages %}{{ m.role + ':' + m.content + END }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    trunk.tokenizer.chat_template = template.replace("END", "'<|im_start|>'")
    assert trunk.end_tokens == {1, 2}
    found = [r for row in sample(trunk, PROMPTS * 4, Sampling(30), [(i,) for i in range(16)], samples=8) for r in row]
    assert {int(r.tokens[-1]) for r in found if r.ended} >= {1, 2}
    assert not any({1, 2} & set(r.tokens[:-1].tolist()) for r in found)
    trunk.save(tmp_path / "token", {}, {})
    assert GenerationConfig.from_pretrained(tmp_path / "token").eos_token_id == [1, 2]

    ((whole,),) = sample(trunk, PROMPTS[:1], Sampling(20, temperature=0), KEYS[:1])
    text = trunk.tokenizer.decode(whole.tokens[4:6])
    trunk.tokenizer.chat_template = template.replace("END", json.dumps(text))
    assert (trunk.end_tokens, turn_ends(trunk.tokenizer).texts) == ({2}, (text.strip(),))
    ((response,),) = sample(trunk, PROMPTS[:1], Sampling(20, temperature=0), KEYS[:1])
    assert response.ended
    assert text.strip() in trunk.tokenizer.decode(response.tokens)
    assert len(response.tokens) <= 6
    assert not trunk.said(PROMPTS[0], response.tokens).rstrip().endswith(text.strip())
    assert any(repr(text.strip()) in remark for remark in trunk.remarks)
    trunk.save(tmp_path / "text", {}, {})
    assert GenerationConfig.from_pretrained(tmp_path / "text").stop_strings == [text.strip()]


def test_a_response_depends_on_its_key_and_prompt_alone(trunk):
    sampling = Sampling(15, temperature=1.0, top_p=0.9)
    together = sample(trunk, PROMPTS, sampling, KEYS, samples=3)
    alone = [sample(trunk, [prompt], sampling, [key], samples=3)[0] for prompt, key in zip(PROMPTS, KEYS, strict=True)]
    swapped = sample(trunk, PROMPTS[::-1], sampling, KEYS[::-1], samples=3)[::-1]
    fewer = sample(trunk, PROMPTS, sampling, KEYS, samples=1)
    for other in (alone, swapped):
        assert [[r.tokens.tolist() for r in row] for row in other] == [
            [r.tokens.tolist() for r in row] for row in together
        ]
    assert [row[0].tokens.tolist() for row in fewer] == [row[0].tokens.tolist() for row in together]
    texts = {tuple(r.tokens) for row in together for r in row}
    assert len(texts) == 12, "every draw is its own"


def test_first_tokens_follow_the_models_distribution(trunk):
    prompt = PROMPTS[0]
    inputs = torch.from_numpy(prompt).long()[None]
    with trunk.generating() as model:
        expected = model(inputs, use_cache=False).logits[0, -1].float().softmax(-1)
    count = 4000
    (rows,) = sample(trunk, [prompt], Sampling(1), [(5,)], samples=count)
    found = np.bincount([int(r.tokens[0]) for r in rows], minlength=VOCABULARY) / count
    likely = expected > 0.01
    error = (torch.from_numpy(found)[likely] - expected[likely]) / (expected[likely] / count).sqrt()
    assert likely.sum() > 5
    assert error.abs().max() < 4


def test_a_stop_text_ends_a_response(trunk):
    (free,), *_ = sample(trunk, PROMPTS[:1], Sampling(12, temperature=0), KEYS[:1])
    text = trunk.tokenizer.decode(free.tokens[4:6])
    ((stopped,),) = sample(trunk, PROMPTS[:1], Sampling(12, temperature=0, stop=(text,)), KEYS[:1])
    assert stopped.ended
    assert stopped.tokens.tolist() == free.tokens[: len(stopped.tokens)].tolist()
    assert trunk.tokenizer.decode(stopped.tokens).endswith(text)


def test_filters_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def left(**options) -> list[float]:
        return [round(p, 3) for p in filtered(logits, Sampling(1, **options)).softmax(-1)[0].tolist()]

    assert left(top_k=2) == [0.625, 0.375, 0, 0]
    assert left(top_p=0.5) == [1, 0, 0, 0]
    assert left(top_p=0.6) == [0.625, 0.375, 0, 0]
    assert left(min_p=0.25) == [0.526, 0.316, 0.158, 0]
    assert left(temperature=0.5) == [0.685, 0.247, 0.062, 0.007]
    assert penalised(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]]), 2.0).tolist() == [
        [1, -4, 1]
    ]


def test_draws_by_hand():
    logits = torch.log(torch.tensor([[0.25, 0.0, 0.75]] * 4))
    assert draw(logits, torch.tensor([0.0, 0.2499, 0.2501, 0.9999]).double()).tolist() == [0, 0, 2, 2]
    assert (uniforms((1, 2), 5)[:3] == uniforms((1, 2), 3)).all()
    assert (uniforms((1, 2), 3) != uniforms((2, 1), 3)).all()


def test_draws_are_those_of_the_cumulated_shares_and_never_a_token_without_a_share():
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (5, 256, 257, 1000):
        logits = torch.randn(64, vocabulary, generator=generator) * 3
        logits[torch.rand(logits.shape, generator=generator) < 0.5] = -torch.inf
        logits[:, 1] = 0.0
        uniform = torch.rand(64, dtype=torch.float64, generator=generator)
        shares = logits.double().softmax(-1).cumsum(-1)
        expected = (shares <= (uniform * shares[:, -1])[:, None]).sum(-1)
        assert draw(logits, uniform).tolist() == expected.tolist()
    ends = torch.full((2, 1000), -torch.inf)
    ends[0, [0, 255]] = ends[1, [256, 999]] = 0.0
    assert draw(ends, torch.tensor([0.0, 0.0]).double()).tolist() == [0, 256]
    assert draw(ends, torch.tensor([1 - 2**-53] * 2).double()).tolist() == [255, 999]


def test_an_answer_is_text(trunk):
    assert (
        answer(trunk, "hello", 6, "text")
        == trunk.tokenizer.decode(
            generated(trunk, np.array(trunk.tokenizer("hello")["input_ids"]), max_new_tokens=6, do_sample=False),
            skip_special_tokens=True,
        ).strip()
    )
