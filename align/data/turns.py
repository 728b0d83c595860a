"""The turns of one row: how each chat format writes a conversation, and what makes one well formed.

A reader takes a row, its columns under the format's own names, and returns its turns in order. What is wrong
raises `Refused` with the field, what was expected and what was found; `formats.convert` makes a Fault of it.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from align.data.media import part_of_text, text_alone
from align.data.rows import Refused
from align.data.shown import a, in_yaml, listed, meant, shown
from align.data.verdicts import DETAILS, MARKS, learnt, truth


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
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys that hold what the assistant thinks before it speaks
READ = {  # the keys of a turn that are read besides role and content
    "assistant": ("tool_calls", "function_call", *THOUGHTS, *DETAILS),
    "tool": ("name", "tool_call_id"),
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
    """`conversations`: turns of `from` and `value`, or of `role` and `content`."""
    return _marked(row, conversation(row, "conversations"))


def messages(row: dict[str, Any]) -> list[Turn]:
    """`messages`: turns of `role` and `content`, or of `from` and `value`."""
    return _marked(row, conversation(row, "messages"))


def prompt_completion(row: dict[str, Any]) -> list[Turn]:
    """`prompt` and `completion`, each a text or a list of messages. What the prompt says is context."""
    sides = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        is_text = not isinstance(row.get(name), list)
        sides.append([said(role, name, row.get(name))] if is_text else conversation(row, name))
    prompt, completion = sides
    if completion[0].message["role"] == "user":
        raise Refused(f"{completion[0].role_at}: expected the assistant's answer to the prompt, found user")
    for turn in prompt:
        if turn.message["role"] == "assistant":
            turn.message["train"] = False
    return prompt + completion


def settled(turns: list[Turn]) -> tuple[list[Turn], tuple[str, ...]]:
    """The turns without system turns that say nothing, and what was so repaired."""
    mute = [turn for turn in turns if turn.message["role"] == "system" and not turn.message["content"].strip()]
    kept = [turn for turn in turns if turn not in mute]
    return kept, tuple(f"left out {turn.content_at}: an empty system turn" for turn in mute)


def check(turns: list[Turn]) -> None:
    """Refuse turns that say nothing, tool calls and their results out of order, and rows in which no turn is trained.

    In what order the others may speak is for the chat template to say.
    """
    waiting, previous = 0, None  # calls that have no result yet
    for role_at, content_at, message, _ in turns:
        role, calls = message["role"], len(message.get("tool_calls", ()))
        if role == "tool":
            if not waiting:
                raise Refused(f"{role_at}: this tool turn answers no call: there are more results than calls")
            waiting -= 1
        elif previous == "call" and not calls:
            raise Refused(f"{role_at}: expected tool after a tool call, found {role}")
        else:
            waiting = calls + (waiting if previous == "call" else 0)
        if not calls:
            filled(content_at, message["content"])
        previous = "call" if calls else role
    if not any(turn.message.get("train", True) for turn in turns if turn.message["role"] == "assistant"):
        raise Refused(f"{turns[-1].content_at}: every assistant turn is marked as context: none to learn from")


def remarks_of(turns: list[Turn]) -> tuple[str, ...]:
    """What is to be said of the turns, each thing once."""
    return tuple(dict.fromkeys(remark for turn in turns for remark in turn.remarks))


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


def conversation(row: dict[str, Any], column: str) -> list[Turn]:
    """The column's turns, a list or its JSON."""
    turns = from_json(column, row.get(column))
    if not isinstance(turns, list) or not turns:
        raise Refused(f"{column}: expected a list of turns, found {a(turns)}")
    keys = keys_of(turns)
    _known(turns, column, keys[0])
    return [turn_of(turn, f"{column}[{i}]", *keys) for i, turn in enumerate(turns)]


def _marked(row: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    """The turns as the row's `loss_mask` marks them, if it has one: a list with 0 for each turn not to be learnt."""
    marks = from_json("loss_mask", row.get("loss_mask") or None)
    if marks is None:
        return turns
    if not isinstance(marks, list) or len(marks) != len(turns):
        raise Refused(f"loss_mask: expected a list of {len(turns)} marks, one a turn, found {a(marks)}")
    for i, (turn, mark) in enumerate(zip(turns, marks, strict=True)):
        if truth(mark) is None:
            raise Refused(f"loss_mask[{i}]: expected 0 or 1, true or false, found {a(mark)}")
        if turn.message["role"] == "assistant" and not truth(mark):
            turn.message["train"] = False
    return turns


def keys_of(turns: Any) -> tuple[str, str]:
    """How these turns name role and content."""
    named = isinstance(turns, list) and any(isinstance(turn, dict) and "role" in turn for turn in turns)
    other = isinstance(turns, list) and any(isinstance(turn, dict) and "from" in turn for turn in turns)
    return ("from", "value") if other and not named else ("role", "content")


def turn_of(raw: Any, at: str, role_key: str, content_key: str) -> Turn:
    """One turn in any of the ways that data sets write one."""
    if not isinstance(raw, dict):
        raise Refused(f"{at}: expected `{role_key}` and `{content_key}`, found {a(raw)}")
    role_at, content_at = f"{at}.{role_key}", f"{at}.{content_key}"
    for ours, key in (("role", role_key), ("content", content_key)):
        excused = key == content_key and (raw.get("tool_calls") or raw.get("function_call"))
        if key not in raw and not excused:
            said_by = f"its keys are {listed(raw)}; name its own in the recipe: `turn_keys: {{{ours}: <key>}}`"
            raise Refused(f"{at}.{key}: expected text, found nothing" + (f"; {said_by}" if raw else ""))
    role = _role(role_at, raw[role_key])
    content = raw.get(content_key)
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
    unread = [key for key, value in raw.items() if key not in known and value not in (None, "", [], {})]
    return Turn(
        role_at, content_at, message, tuple(f"nothing reads the key {listed([key])} of a turn" for key in unread)
    )


def _role(at: str, value: Any) -> str:
    named = text(at, value)
    role = ROLES.get(named.strip().lower())
    if role is None:
        raise Refused(
            f"{at}: unknown role '{shown(named, 40)}'{meant(named.lower(), ROLES, 0.75) or _mapping([named])}"
        )
    return role


def _known(turns: list[Any], at: str, key: str) -> None:
    """Refuse turns of which several have roles that are not known, and show how the recipe names them."""
    roles = [turn.get(key) if isinstance(turn, dict) else None for turn in turns]
    unknown = [role for role in roles if isinstance(role, str) and role.strip().lower() not in ROLES]
    named = list(dict.fromkeys(unknown))
    if len(named) > 1:
        names = ", ".join(f"'{shown(name, 40)}'" for name in named[:4])
        raise Refused(f"{at}[{roles.index(named[0])}].{key}: unknown roles {names}{_mapping(named[:4])}")


def _mapping(names: list[str]) -> str:
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
    """The value, which must survive being written as UTF-8 JSON: half surrogate pairs, dates, NaN do not."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise Refused(f"{at}: cannot be written as JSON in UTF-8: {error}") from error
    return value
