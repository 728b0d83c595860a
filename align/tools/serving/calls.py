"""Tool calls in what a model says, in the form that Hermes and Qwen models are trained to write them:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

A template without words for calls has them written so in training, too. What only looks like a call stays text.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from align.tools.serving.protocol import no_constant

BEGIN, END = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """One call of a tool."""

    name: str
    arguments: str  # a JSON object


class Calls:
    """An answer's text, piece by piece, as words and calls. Blanks around calls are no words."""

    def __init__(self) -> None:
        self.held = ""  # what may belong to a call
        self.called = False  # whether nothing was said since a call

    def add(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
        """What is certain with this much more of the text; with the `last` of it, all. The last call may lack its end,
        for the turn has ended."""
        self.held += text
        words, calls = "", list[Call]()
        while True:
            before, begin, after = self.held.partition(BEGIN)
            inside, end, rest = after.partition(END)
            if not begin or not (end or last):
                break
            self.held = rest
            if call := _read(inside):
                words += self._words(before.rstrip())
                calls.append(call)
                self.called = True
            else:
                words += self._words(before + begin + inside + end)
        sure = self.held if last else (before if begin else _without_beginning(before)).rstrip()
        self.held = self.held[len(sure) :]
        return words + self._words(sure), calls

    def _words(self, text: str) -> str:
        text = text.lstrip() if self.called else text
        self.called = self.called and not text
        return text


def _without_beginning(text: str) -> str:
    """Without what a call may begin with, at its end."""
    return next((text[:-size] for size in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:size])), text)


def _read(text: str) -> Call | None:
    """The call that stands between the two marks; None where it is none."""
    try:
        given = json.loads(text, parse_constant=no_constant)
        arguments = given.get("arguments", {}) if isinstance(given, dict) else None
        if isinstance(arguments, str):  # JSON in JSON, as OpenAI's API has it
            arguments = json.loads(arguments, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict) or not isinstance(given.get("name"), str):
        return None
    return Call(given["name"], json.dumps(arguments, ensure_ascii=False))
