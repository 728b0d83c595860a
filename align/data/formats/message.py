"""One turn in any of the ways that data sets write one, as a canonical message."""

from __future__ import annotations

from typing import Any, NamedTuple

from align.data.formats.media import part_of_text, text_alone
from align.data.formats.rows import Refused
from align.data.formats.shown import a, in_yaml, listed, meant, shown
from align.data.formats.values import from_json, text
from align.data.formats.verdicts import DETAILS, MARKS, learnt


class Turn(NamedTuple):
    """A canonical message and where in the row its role and its content stand."""

    role_at: str
    content_at: str
    message: dict[str, Any]
    remarks: tuple[str, ...] = ()  # as `Row.remarks`


ROLES = {  # as data sets write them; "call" is an assistant turn whose content is a tool call in JSON
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
NOTHING = (None, "", [], {})  # values that say no more than a key that is not there
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys that hold what the assistant thinks before it speaks
READ = {  # the keys of a turn that are read besides role and content
    "assistant": ("tool_calls", "function_call", *THOUGHTS, *DETAILS),
    "tool": ("name", "tool_call_id"),
}


def said(role: str, at: str, content: Any) -> Turn:
    """A turn whose content, a text, stands at `at`."""
    return Turn(at, at, {"role": role, "content": text(at, content)})


def turn_of(raw: Any, at: str, role_key: str, content_key: str) -> Turn:
    """One turn in any of the ways that data sets write one."""
    if not isinstance(raw, dict):
        raise Refused(f"{at}: expected `{role_key}` and `{content_key}`, found {a(raw)}")
    role_at, content_at = f"{at}.{role_key}", f"{at}.{content_key}"
    there = [key for key, value in raw.items() if value not in NOTHING]
    if role_key not in raw:
        raise Refused(f"{role_at}: expected text, found nothing{_keys_of_its_own('role', there)}")
    role, content = _role(role_at, raw[role_key]), raw.get(content_key)
    mute = (role == "system" and there == [role_key]) or raw.get("tool_calls") or raw.get("function_call")
    if content_key not in raw and not mute:
        raise Refused(f"{content_at}: expected text, found nothing{_keys_of_its_own('content', there)}")
    message: dict[str, Any] = {"role": "assistant" if role == "call" else role, "content": content}
    if role == "call":
        message |= {"content": "", "tool_calls": _calls(content_at, from_json(content_at, content))}
        if not message["tool_calls"]:
            raise Refused(f"{content_at}: expected tool calls with `name` and `arguments`, found an empty list")
    elif isinstance(content, list):
        message |= _parts(content_at, content)
    speaks = message["role"] == "assistant"
    called = raw.get("tool_calls") or raw.get("function_call")  # the second is OpenAI's older name
    calls = _calls(f"{at}.tool_calls", from_json(f"{at}.tool_calls", called)) if called else []
    if not speaks and (calls or "tool_calls" in message):
        raise Refused(f"{at}.tool_calls: only an assistant can call tools, found role {role}")
    if role == "assistant":
        if calls:
            message["tool_calls"] = calls
        message |= _thoughts(at, raw)
        if message["content"] is None and message.get("tool_calls"):
            message["content"] = ""
    elif role == "tool":
        message |= {key: text(f"{at}.{key}", raw[key]) for key in ("name", "tool_call_id") if raw.get(key)}
    elif role == "system" and message["content"] is None:
        message["content"] = ""
    text(content_at, message["content"])
    if not learnt(at, message["role"], raw) and speaks:
        message["train"] = False
    text_alone(f"{at}.", raw)
    known = {role_key, content_key, *MARKS, *READ.get(message["role"], ())}
    remarks = (f"nothing reads the key {listed([key])} of a turn" for key in there if key not in known)
    return Turn(role_at, content_at, message, tuple(remarks))


def _keys_of_its_own(ours: str, keys: list[str]) -> str:
    """What the recipe should say of a turn without the key that is wanted."""
    return f"; its keys are {listed(keys)}; name its own in the recipe: `turn_keys: {{{ours}: <key>}}`" if keys else ""


def _role(at: str, value: Any) -> str:
    named = text(at, value)
    role = ROLES.get(named.strip().lower())
    if role is None:
        raise Refused(f"{at}: unknown role '{shown(named, 40)}'{meant(named.lower(), ROLES, 0.75) or mapping([named])}")
    return role


def mapping(names: list[str]) -> str:
    """How the recipe says who speaks, as far as one can guess."""
    guesses = zip(names, ("user", "assistant", "system", "tool"), strict=False)
    guessed = (f"{in_yaml(name[:40])}: {role}" for name, role in guesses)
    return f"; say in the recipe who speaks so: `roles: {{{', '.join(guessed)}}}`"


def _thoughts(at: str, raw: dict[str, Any]) -> dict[str, str]:
    """`reasoning_content`, by whichever of its names the turn has it."""
    thoughts = {key: text(f"{at}.{key}", raw[key]) for key in THOUGHTS if raw.get(key)}
    if len(set(thoughts.values())) > 1:
        raise Refused(f"{at}: {' and '.join(thoughts)} differ: which is what the assistant thinks?")
    return {"reasoning_content": next(iter(thoughts.values()))} if thoughts else {}


def _parts(at: str, parts: list[Any]) -> dict[str, Any]:
    """Content in parts: OpenAI's {"type": "text", "text"}; LLaMA-Factory's {"type", "value"}."""
    read: dict[str, list] = {"text": [], "reasoning": [], "tool_call": []}
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in read:
            part_of_text(f"{at}[{i}].type", str(kind))
            raise Refused(f"{at}[{i}].type: expected one of {', '.join(read)}, found {a(kind if kind else part)}")
        mark = next((key for key in (*MARKS, *DETAILS) if part.get(key) not in NOTHING), None)
        if mark:
            raise Refused(f"{at}[{i}].{mark}: parts of a turn cannot be marked; mark the whole turn with `train`")
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
    return read
