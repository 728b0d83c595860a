"""Tiny byte-level tokenizers and the chat templates that the tests talk in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from align.data.formats.formats import Fault, Row
from align.data.templates.render import render

LINES = [
    "What is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "写一首关于春天的诗。春风拂面，花开满园。 🌸🌷",
]
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "<bos>",
    "<|assistant|>", "<|user|>", "<|system|>",
]  # fmt: skip


@lru_cache
def _backend(trim: bool) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return backend.to_str()


def tiny_tokenizer(template: str | None = None, *, trim: bool = False, **tokens: Any) -> PreTrainedTokenizerFast:
    """A small byte-level BPE; `tokens` are eos_token and the like, `trim` leaves blanks out of offsets."""
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | tokens
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend(trim)), **tokens)
    tokenizer.chat_template = template
    return tokenizer


SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops the thoughts of all turns before the last question, as Qwen3 does, but is unknown to TRL.
FORGETFUL = """
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set thoughts = '' %}
    {%- if '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set head = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set head = '' %}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (head if loop.first else '') + "
    "message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
    "{% generation %}{{ message['content'] + '<|endoftext|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class Voice:
    """A template, the tokens it needs, what ends a turn, and how it writes an assistant's words."""

    def __init__(self, template: str, end: str, *, trims: bool = False, begin: str = "", **tokens: str) -> None:
        self.template, self.end, self.trims, self.begin, self.tokens = template, end, trims, begin, tokens

    def tokenizer(self, **more: Any) -> PreTrainedTokenizerFast:
        return tiny_tokenizer(self.template, **self.tokens, **more)

    def trained(self, content: str) -> str:
        """What of one assistant turn is to be learnt."""
        return self.begin + (content.strip() if self.trims else content) + self.end


VOICES = {
    "smollm": Voice(SMOLLM, "<|im_end|>"),
    "llama2": Voice(LLAMA2, " </s>", begin=" ", trims=True, bos_token="<s>", eos_token="</s>"),
    "gemma": Voice(GEMMA, "<end_of_turn>", trims=True, bos_token="<bos>", eos_token="<|endoftext|>"),
    "marked": Voice(MARKED, "<|endoftext|>", eos_token="<|endoftext|>"),
}


def talk_of(*contents: str, system: str | None = None) -> list[dict]:
    """User and assistant say these in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def make_row(messages=None, text=None, tools=None) -> Row:
    return Row("rows.jsonl", 7, messages, text, tools)


def trained_runs(tree, tokenizer) -> list[str]:
    """The decoded runs of trained tokens."""
    (ids,), (trained,), *_ = tree
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]])))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


def learnt(messages, tokenizer, loss_on="assistant", tools=None) -> list[str]:
    return trained_runs(tree_of(make_row(messages, tools=tools), tokenizer, loss_on), tokenizer)


def written(messages, tokenizer) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False)


def tree_of(row, tokenizer, loss_on="assistant"):
    tree = render(row, tokenizer, loss_on)
    assert not isinstance(tree, Fault), tree
    return tree
