"""The chat template that a tokenizer talks in: its own, one of ours, or a file of the user's."""

from __future__ import annotations

import json
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.data.formats.shown import shown
from align.data.templates.confined import confined
from align.data.templates.day import FIXED, USUAL, asks_the_day, day_of, of_day
from align.recipe.errors import UserError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

BUILTIN = ("chatml", "plain")
TOOLS = (
    "# Tools\n\nYou may call one or more of these functions:\n<tools>\n{}\n</tools>\n\nTo call one, write:\n"
    '<tool_call>\n{{"name": <name>, "arguments": <object>}}\n</tool_call>'
)
GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
OPTION = re.compile(r"[A-Za-z_]\w*")
BEGIN, END = "{#- defaults -#}", "{#- end of defaults -#}"
DEFAULTS = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


class Refusal(Exception):
    """A template is code of others: whatever it raises on a conversation becomes this, with the reason."""


def chat_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    choice: str | None,
    options: dict[str, Any] | None = None,
    day: str | None = None,
) -> PreTrainedTokenizerBase:
    """Give `tokenizer` the template of `model.chat_template`; `save_pretrained` then saves it too.

    None keeps the tokenizer's own; one that has none gets `chatml` if its vocabulary has `<|im_start|>`, else
    `plain`. With `chatml`, `<|im_end|>` becomes the end-of-text token. `options` become the template's defaults, so
    that every program which reads the saved template writes conversations as they were trained. So does `day`,
    YYYY-MM-DD, in a template that writes today's; None: the one that it has, else `day.USUAL`.

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
    elif isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(map(shown, tokenizer.chat_template)))
        raise UserError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has chat templates for {names}, and none that is its "
            "default; give one as a file in model.chat_template"
        )
    tokenizer.chat_template = with_defaults(tokenizer, options or {}, day)
    exchange = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    name = f"chat template {choice}" if choice else f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    try:
        write(tokenizer.get_chat_template(), special_tokens(tokenizer), exchange)
    except Refusal as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            cause = error.__cause__
            raise UserError(f"{choice or name}:{cause.lineno}: not a Jinja template: {cause.message}") from None
        try:
            write(tokenizer.get_chat_template(), special_tokens(tokenizer), in_parts(exchange))
        except Refusal:
            raise UserError(
                f"{name} cannot write a user and an assistant turn: {error}; set model.chat_template"
            ) from None
    return tokenizer


def with_defaults(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], day: str | None) -> Any:
    """The template, or templates, of a tokenizer whose default one writes with these options, on this day."""
    template = tokenizer.get_chat_template()
    plain, there = plain_template(template), day_of(template)
    if not options and ((there is not None and day in (None, there)) or not asks_the_day(plain)):
        return tokenizer.chat_template
    lines = of_day(plain, day or there or USUAL) if asks_the_day(plain) else ""
    if options:
        lines += _defaults(options, plain, GIVEN | set(special_tokens(tokenizer)))
    elif there is not None:  # options of an earlier run stay
        lines += FIXED.sub("", DEFAULTS.match(template)[0].removeprefix(BEGIN).removesuffix(END))
    return f"{BEGIN}{lines}{END}{plain}"


def write(
    template: str,
    special: dict[str, str],
    messages: list[Message],
    tools: Tools = None,
    prompt: bool = False,
) -> str:
    """The conversation as `template` writes it; with `prompt`, up to where the assistant would begin to
    speak. Raises Refusal.
    """
    return _rendered(template, messages, tools, add_generation_prompt=prompt, **special)[0]


def write_marked(
    template: str, special: dict[str, str], messages: list[Message], tools: Tools
) -> tuple[str, list[tuple[int, int]]]:
    """The same, and the spans between `{% generation %}` marks. Raises Refusal."""
    return _rendered(template, messages, tools, return_assistant_tokens_mask=True, **special)


def _rendered(template: str, messages: list[Message], tools: Tools, **options: Any) -> tuple[str, Any]:
    try:
        with confined():
            texts, spans = render_jinja_template([messages], tools=tools, chat_template=template, **options)
        texts[0].encode()
    except UserError:  # its time was over: it would be for other conversations too
        raise
    except UnicodeEncodeError as error:
        raise Refusal("it writes half a character (a lone surrogate), which is no text") from error
    except Exception as error:  # whatever the template's code does: 1/0, a macro without an end, a missing key
        reason = str(error).strip().splitlines() or ["too much memory" if isinstance(error, MemoryError) else ""]
        kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
        raise Refusal(f"{kind}{reason[0][:200]}") from error
    return texts[0], spans[0] if spans else []


def in_parts(messages: list[Message]) -> list[Message]:
    """Contents as lists of one text, as the templates of models that also see pictures read them."""
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def plain_template(template: str) -> str:
    """The template without the defaults that options gave it."""
    return DEFAULTS.sub("", template, count=1)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokens that a template may name, such as `eos_token`."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}


def _defaults(options: dict[str, Any], template: str, given: set[str]) -> str:
    """Jinja that sets every option which the caller leaves open. Raises UserError for one that changes nothing."""
    lines, words = [], set(re.findall(r"[A-Za-z_]\w*", template))
    for name, value in options.items():
        if not OPTION.fullmatch(name) or name in given:
            why = "is given to every template" if name in given else "is no name of a variable"
            raise UserError(f"model.template_options: {name!r} {why}")
        if name not in words:
            close = get_close_matches(name, sorted(words - given), n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"model.template_options: the chat template reads no {name!r}{meant}")
        lines.append(f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(name, value)} %}}{{%- endif %}}")
    return "".join(lines)


def _literal(name: str, value: Any) -> str:
    """A value as Jinja writes it."""
    match value:
        case bool() | None:
            return {True: "true", False: "false", None: "none"}[value]
        case int() | float():
            return repr(value)
        case str():
            return _text(value)
        case list():
            return f"[{', '.join(_literal(name, item) for item in value)}]"
        case dict():
            return "{" + ", ".join(f"{_text(str(k))}: {_literal(name, v)}" for k, v in value.items()) + "}"
    raise UserError(f"model.template_options: {name} is neither text, number, truth value, list nor mapping")


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # Jinja would read an escaped pair of surrogates as two halves


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
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise ValueError("a device or a pipe, which may have no end")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        undecodable = isinstance(error, UnicodeDecodeError)
        reason = "not UTF-8 text" if undecodable else getattr(error, "strerror", None) or str(error)
        raise UserError(f"model.chat_template: '{path}' is neither chatml, plain nor a Jinja file: {reason}") from None
