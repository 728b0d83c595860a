"""The turns of one row: how each chat format writes a conversation, and what makes one well formed.

A reader takes a row, its columns under the format's own names, and returns its turns in order. What is wrong
raises `Refused` with the field, what was expected and what was found; `formats.convert` makes a Fault of it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """A canonical message and where in the row its role and its content stand."""

    role_at: str
    content_at: str
    message: dict[str, Any]


class Refused(Exception):
    """Why the row at hand cannot be taken."""


ROLES = {  # as data sets write them; "call" is an assistant turn whose content is a tool call in JSON
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}

NEXT = {  # the roles that may follow one; "call" is an assistant turn that calls tools
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("assistant", "tool"),
}


def alpaca(row: dict[str, Any]) -> list[Turn]:
    """What `alpaca_prompt` reads, then `output`."""
    return [*alpaca_prompt(row), said("assistant", "output", row.get("output"))]


def alpaca_prompt(row: dict[str, Any]) -> list[Turn]:
    """`history` of earlier [question, answer]s; `instruction` and on the next line `input`."""
    history = from_json("history", row.get("history") or [])
    if not isinstance(history, list):
        raise Refused(f"history: expected a list of [question, answer], found {a(history)}")
    turns = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused(f"history[{i}]: expected [question, answer], found {a(pair)}")
        turns += [said("user", f"history[{i}][0]", pair[0]), said("assistant", f"history[{i}][1]", pair[1])]
    asked = [text(name, row[name]) for name in ("instruction", "input") if row.get(name)]
    return [*turns, said("user", "instruction", "\n".join(asked))]


def sharegpt(row: dict[str, Any]) -> list[Turn]:
    """`conversations`: turns of `from` and `value`."""
    return conversation(row, "conversations", "from", "value")


def messages(row: dict[str, Any]) -> list[Turn]:
    """`messages`: turns of `role` and `content`."""
    return conversation(row, "messages", "role", "content")


def prompt_completion(row: dict[str, Any]) -> list[Turn]:
    """`prompt` and `completion`, each a text or a list of messages. What the prompt says is context."""
    sides = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        is_text = not isinstance(row.get(name), list)
        sides.append([said(role, name, row.get(name))] if is_text else conversation(row, name, "role", "content"))
    for turn in sides[0]:
        if turn.message["role"] == "assistant":
            turn.message["train"] = False
    return sides[0] + sides[1]


def check(turns: list[Turn]) -> None:
    """Refuse roles in a wrong order, turns that say nothing, and rows in which no turn is trained."""
    previous, calls = "start", 0
    for role_at, content_at, message in turns:
        role = message["role"]
        if role not in NEXT[previous]:
            came = {"start": "at the start", "call": "after a tool call"}.get(previous, f"after {previous}")
            raise Refused(f"{role_at}: expected {' or '.join(NEXT[previous])} {came}, found {role}")
        calls = calls - 1 if role == "tool" else len(message.get("tool_calls", ()))
        if calls < 0:
            raise Refused(f"{role_at}: this tool turn answers no call: there are more results than calls")
        if not message.get("tool_calls"):
            filled(content_at, message["content"])
        previous = "call" if message.get("tool_calls") else role
    if not any(turn.message.get("train", True) for turn in turns if turn.message["role"] == "assistant"):
        raise Refused(f"{turns[-1].content_at}: every assistant turn is marked as context: none to learn from")


def tools_of(tools: Any) -> list[dict[str, Any]] | None:
    """The `tools` column, a list or its JSON, each with or without its {"type": "function"} wrapper."""
    tools = from_json("tools", tools) if tools else None
    if not tools:
        return None
    wrapped = []
    for i, tool in enumerate(tools if isinstance(tools, list) else [tools]):
        function = tool.get("function") or tool if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"tools[{i}]: expected a function with a `name`, found {a(tool)}")
        wrapped.append({"type": "function", "function": function})
    return wrapped


def conversation(row: dict[str, Any], column: str, role_key: str, content_key: str) -> list[Turn]:
    """The column's turns, a list or its JSON, each with these two keys."""
    turns = from_json(column, row.get(column))
    if not isinstance(turns, list) or not turns:
        raise Refused(f"{column}: expected a list of turns, found {a(turns)}")
    return [turn_of(turn, f"{column}[{i}]", role_key, content_key) for i, turn in enumerate(turns)]


def turn_of(raw: Any, at: str, role_key: str, content_key: str) -> Turn:
    """One turn in any of the ways that data sets write one."""
    if not isinstance(raw, dict):
        raise Refused(f"{at}: expected `{role_key}` and `{content_key}`, found {a(raw)}")
    role_at, content_at = f"{at}.{role_key}", f"{at}.{content_key}"
    named = text(role_at, raw.get(role_key))
    role = ROLES.get(named)
    if role is None:
        raise Refused(f"{role_at}: unknown role {named[:40]!r}{meant(named.lower(), ROLES)}")
    content = raw.get(content_key)
    if role == "call":
        message = {
            "role": "assistant",
            "content": "",
            "tool_calls": _calls(content_at, from_json(content_at, content)),
        }
        return Turn(role_at, content_at, message | _context(at, role, raw))
    message = {"role": role, "content": content}
    if isinstance(content, list):
        message |= _parts(content_at, content)
    if role == "assistant":
        called = raw.get("tool_calls") or raw.get("function_call")  # the second is OpenAI's older name
        if called:
            message["tool_calls"] = _calls(f"{at}.tool_calls", from_json(f"{at}.tool_calls", called))
        if raw.get("reasoning_content"):
            message["reasoning_content"] = text(f"{at}.reasoning_content", raw["reasoning_content"])
        if message["content"] is None and message.get("tool_calls"):
            message["content"] = ""
    elif "tool_calls" in message:
        raise Refused(f"{content_at}: only an assistant can call tools, found role {role}")
    elif role == "tool":
        message |= {key: text(f"{at}.{key}", raw[key]) for key in ("name", "tool_call_id") if raw.get(key)}
    text(content_at, message["content"])
    return Turn(role_at, content_at, message | _context(at, role, raw))


def _context(at: str, role: str, raw: dict[str, Any]) -> dict[str, bool]:
    """`train: False` where the data gives an assistant turn no weight. No other role is ever trained."""
    for key in ("loss_weight", "weight", "train"):
        weight = raw.get(key)
        if weight is None:
            continue
        if weight not in (0, 1):
            raise Refused(f"{at}.{key}: expected 0 or 1, found {a(weight)}")
        if weight and role not in ("assistant", "call"):
            raise Refused(f"{at}.{key}: only assistant turns are trained, found {weight} on a {role} turn")
        if not weight and role in ("assistant", "call"):
            return {"train": False}
    return {}


def _parts(at: str, parts: list[Any]) -> dict[str, Any]:
    """Content in parts: OpenAI's {"type": "text", "text"}; LLaMA-Factory's {"type", "value"}."""
    read: dict[str, list] = {"text": [], "reasoning": [], "tool_call": []}
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in read:
            raise Refused(f"{at}[{i}].type: expected one of {', '.join(read)}, found {a(kind if kind else part)}")
        key = "text" if kind == "text" and part.get("text") is not None else "value"
        where, value = f"{at}[{i}].{key}", part.get(key)
        read[kind] += _calls(where, from_json(where, value)) if kind == "tool_call" else [text(where, value)]
    message: dict[str, Any] = {"content": "".join(read["text"])}
    if read["reasoning"]:
        message["reasoning_content"] = "\n".join(read["reasoning"])
    if read["tool_call"]:
        message["tool_calls"] = read["tool_call"]
    return message


def _calls(at: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls, one or a list, with or without a {"function"} wrapper; arguments an object or its JSON."""
    read = []
    for i, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{at}: expected tool calls with `name` and `arguments`, found {a(call)}")
        given = function.get("arguments")
        arguments = {} if given is None else from_json(f"{at}[{i}].arguments", given)
        if not isinstance(arguments, dict):
            raise Refused(f"{at}[{i}].arguments: expected an object, found {a(arguments)}")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append(named | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not read:
        raise Refused(f"{at}: expected tool calls with `name` and `arguments`, found an empty list")
    return read


def said(role: str, at: str, content: Any) -> Turn:
    """A turn whose content, a text, stands at `at`."""
    return Turn(at, at, {"role": role, "content": text(at, content)})


def text(at: str, value: Any) -> str:
    """The value, which must be a text."""
    if not isinstance(value, str):
        raise Refused(f"{at}: expected text, found {a(value)}")
    return value


def filled(at: str, value: Any) -> str:
    """The value, which must be a text with more than white space."""
    if not text(at, value).strip():
        raise Refused(f"{at}: expected text, found {'only white space' if value else 'an empty text'}")
    return value


def from_json(at: str, value: Any) -> Any:
    """A nested value, which CSV cells and many columns hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{at}: expected JSON, found {a(value)} ({error})") from error


def encodable(at: str, value: Any) -> Any:
    """The value, which must survive being written as UTF-8 JSON: half surrogate pairs and dates do not."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise Refused(f"{at}: cannot be written as JSON in UTF-8: {error}") from error
    return value


def meant(word: str, known: Iterable[str]) -> str:
    """A did-you-mean for the end of a message, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


KINDS = {
    str: "the text ",
    list: "the list ",
    dict: "the object ",
    int: "the number ",
    float: "the number ",
    bool: "",
}


def a(value: Any) -> str:
    """What a value is, shown short, for messages."""
    shown = repr(value)
    kind = KINDS.get(type(value), f"the {type(value).__name__} ")
    return "nothing" if value is None else kind + (shown if len(shown) < 50 else shown[:46] + " …")
