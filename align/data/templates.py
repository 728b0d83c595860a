"""The chat template that a tokenizer talks in: its own, one of ours, or a file of the user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.recipe.errors import UserError

Message = dict[str, Any]

BUILTIN = ("chatml", "plain")
REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
)  # what a template raises on messages it cannot take
THINK_END = "</think>"
TOOLS = (
    "# Tools\n\nYou may call one or more of these functions:\n<tools>\n{}\n</tools>\n\nTo call one, write:\n"
    '<tool_call>\n{{"name": <name>, "arguments": <object>}}\n</tool_call>'
)


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> PreTrainedTokenizerBase:
    """Give `tokenizer` the template of `model.chat_template`; `save_pretrained` then saves it too.

    None keeps the tokenizer's own; one that has none gets `chatml` if its vocabulary has `<|im_start|>`, else
    `plain`. With `chatml`, `<|im_end|>` becomes the end-of-text token, so that sampling stops at the end of a
    turn.

    Raises UserError for a template that cannot be read, does not fit the vocabulary, or cannot write one
    exchange.
    """
    vocabulary = tokenizer.get_vocab()
    if choice is None and not tokenizer.chat_template:
        choice = "chatml" if "<|im_start|>" in vocabulary else "plain"
    if choice in BUILTIN:
        _use_builtin(tokenizer, choice, vocabulary)
    elif choice is not None:
        tokenizer.chat_template = _read(choice)
    exchange = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    name = f"chat template {choice}" if choice else f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    try:
        write(tokenizer.get_chat_template(), special_tokens(tokenizer), exchange)
    except TemplateSyntaxError as error:
        raise UserError(f"{choice or name}:{error.lineno}: not a Jinja template: {error.message}") from None
    except REFUSALS as error:
        raise UserError(f"{name} cannot write a user and an assistant turn: {error}; set model.chat_template") from None
    return tokenizer


def write(
    template: str,
    special: dict[str, str],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    prompt: bool = False,
) -> str:
    """The conversation as `template` writes it; with `prompt`, up to where the assistant would begin to
    speak.
    """
    texts, _ = render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **special
    )
    return texts[0]


def fit(
    messages: list[Message], tools: list[dict[str, Any]] | None, native: frozenset[str]
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The conversation with everything that is not `native` to the template written as text.

    Thoughts as `<think>`, calls as `<tool_call>` JSON, results as `<tool_response>` in a user turn, tools
    and, where there is no such role, the system's words in the turn that takes them. Assistant turns stay one
    to one.
    """
    fitted: list[Message] = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "train"}
        if message.get("reasoning_content") and "reasoning" not in native:
            thoughts = message.pop("reasoning_content").strip("\n")
            message["content"] = f"<think>\n{thoughts}\n{THINK_END}\n\n{message['content']}"
        if message.get("tool_calls") and "calls" not in native:
            calls = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in message.pop("tool_calls")]
            message["content"] = "\n".join([message["content"]] * bool(message["content"]) + calls)
        if message["role"] == "tool" and "results" not in native:
            words = f"<tool_response>\n{message['content']}\n</tool_response>"
            if fitted and fitted[-1].get("results"):
                fitted[-1]["content"] += f"\n{words}"
                continue
            message = {"role": "user", "content": words, "results": True}
        fitted.append(message)
    fitted = [{key: value for key, value in message.items() if key != "results"} for message in fitted]
    if tools and "tools" not in native:
        words = TOOLS.format("\n".join(map(_json, tools)))
        if fitted[0]["role"] == "system":
            fitted[0] = fitted[0] | {"content": f"{fitted[0]['content']}\n\n{words}"}
        else:
            fitted.insert(0, {"role": "system", "content": words})
        tools = None
    if fitted[0]["role"] == "system" and "system" not in native:
        first, *fitted = fitted
        if fitted and fitted[0]["role"] == "user":
            fitted[0] = fitted[0] | {"content": f"{first['content']}\n\n{fitted[0]['content']}"}
        else:
            fitted.insert(0, first | {"role": "user"})
    return fitted, tools


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokens that a template may name, such as `eos_token`."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}


def _use_builtin(tokenizer: PreTrainedTokenizerBase, choice: str, vocabulary: dict[str, int]) -> None:
    if choice == "chatml":
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in vocabulary]
        if missing:
            raise UserError(f"model.chat_template: chatml needs {' and '.join(missing)} in the vocabulary; use plain")
        tokenizer.eos_token = "<|im_end|>"
    elif tokenizer.eos_token is None:
        raise UserError("model.chat_template: plain ends a turn with the end-of-text token, and the tokenizer has none")
    template = (Path(__file__).parent / f"{choice}.jinja").read_text(encoding="utf-8")
    # Chats are tokenised without special tokens; where texts start with one, the template has to write it.
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{- bos_token }}" * begins + template


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"model.chat_template: '{path}' is neither chatml, plain nor a Jinja file: {reason}") from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
