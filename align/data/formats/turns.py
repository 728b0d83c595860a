"""The turns of one row: how each chat format writes a conversation, and what makes one well formed.

A reader takes a row, its columns under the format's own names, and returns its turns in order. What is wrong
raises `Refused` with the field, what was expected and what was found; `formats.convert` makes a Fault of it.
"""

from __future__ import annotations

from typing import Any

from align.data.formats.message import NOTHING, ROLES, THOUGHTS, Turn, mapping, said, turn_of
from align.data.formats.rows import Refused
from align.data.formats.shown import a, shown
from align.data.formats.values import filled, from_json, text
from align.data.formats.verdicts import MARKS, truth


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
    if prompt[-1].message["role"] == "assistant" and not prompt[-1].message.get("tool_calls"):
        raise Refused(f"{prompt[-1].role_at}: expected user or tool before the answer, found assistant")
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


def thoughts_beside(row: dict[str, Any]) -> tuple[str, ...]:
    """What is to be said of thoughts, and of marks of turns, in columns of their own, which nothing reads."""
    marks = tuple(
        f"nothing reads the column `{name}`; a turn that is not to be learnt has a key `train: false` of its own"
        for name in MARKS
        if name != "loss_mask" and row.get(name) not in NOTHING and truth(row[name]) is not None
    )
    return marks + tuple(
        f"nothing reads the column `{name}`; thoughts are read from a key `reasoning_content` of a turn, or from "
        "<think> … </think> before the answer"
        for name in THOUGHTS
        if row.get(name) not in NOTHING
    )


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
    given = row.get("loss_mask")
    if given in (None, "", []):  # but not 0
        return turns
    marks = from_json("loss_mask", given)
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


def _known(turns: list[Any], at: str, key: str) -> None:
    """Refuse turns of which several have roles that are not known, and show how the recipe names them."""
    roles = [turn.get(key) if isinstance(turn, dict) else None for turn in turns]
    unknown = [role for role in roles if isinstance(role, str) and role.strip().lower() not in ROLES]
    named = list(dict.fromkeys(unknown))
    if len(named) > 1:
        names = ", ".join(f"'{shown(name, 40)}'" for name in named[:4])
        raise Refused(f"{at}[{roles.index(named[0])}].{key}: unknown roles {names}{mapping(named[:4])}")
