"""Sampling from the trunk."""

from __future__ import annotations

from typing import Literal

from align.models.trunk import Trunk


def answer(trunk: Trunk, prompt: str, most: int, written_as: Literal["chat", "text"]) -> str:
    """The greedy answer to one user turn, or continuation of a text, of at most `most` tokens."""
    tokenizer = trunk.tokenizer
    if written_as == "chat":
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=written_as == "text").to(trunk.device)
    inputs.pop("token_type_ids", None)
    with trunk.generating() as model:
        ids = model.generate(
            **inputs,
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
