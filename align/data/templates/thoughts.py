"""What of a message a template has no words for, written as text; and thoughts, wherever a message holds them.

An assistant's thoughts stand in `reasoning_content`, or in its content before `</think>`. Templates read one, the other
or both, and some write none of them.
"""

from __future__ import annotations

import json
import re
from typing import Any

from align.data.templates.templates import TOOLS, Message, Tools

THINK, THINK_END = "<think>", "</think>"
EMPTY = re.compile(
    rf"\s*(?:{THINK})?\s*{THINK_END}\s*"
)  # a thought without a word, its beginning perhaps in the prompt


def thoughts_of(message: Message) -> list[str]:
    """The thoughts of an assistant's message, without the blanks around them."""
    inside = [part.rpartition(THINK)[2].strip() for part in message["content"].split(THINK_END)[:-1]]
    return [thought for thought in [(message.get("reasoning_content") or "").strip(), *inside] if thought]


def answer_of(message: Message) -> str:
    """What it says after its thoughts."""
    return message["content"].rpartition(THINK_END)[2].strip()


def words_of(message: Message) -> list[str]:
    """What it says outside its thoughts: before, between and after them, without the blanks around each."""
    *before, answer = message["content"].split(THINK_END)
    spoken = [*(part.rpartition(THINK)[0].strip() for part in before), answer.strip()]
    return [words for words in spoken if words]


def fit(messages: list[Message], tools: Tools, native: frozenset[str]) -> tuple[list[Message], Tools]:
    """The conversation with everything that is not `native` to the template written as text.

    Thoughts as `<think>`, calls as `<tool_call>` JSON, results as `<tool_response>` in a user turn, tools
    and, where there is no such role, the system's words in the turn that takes them. Thoughts inside the content become
    `reasoning_content` where the template reads them there alone. Assistant turns stay one to one.
    """
    fitted: list[Message] = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "train"}
        if message["role"] == "assistant":
            message = _with_thoughts(message, native)
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


def _with_thoughts(message: Message, native: frozenset[str]) -> Message:
    """The message with its thoughts where the template reads them."""
    if message.get("reasoning_content") and "reasoning" not in native:
        thoughts = message.pop("reasoning_content").strip("\n")
        return message | {"content": f"{THINK}\n{thoughts}\n{THINK_END}\n\n{message['content']}"}
    ahead = "".join(words_of(message)) == answer_of(message)  # no word stands before a thought
    if THINK_END in message["content"] and ahead and "reasoning" in native and "thoughts" not in native:
        thoughts = "\n".join(thoughts_of(message))
        return message | {"content": answer_of(message), "reasoning_content": thoughts}
    return message


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
