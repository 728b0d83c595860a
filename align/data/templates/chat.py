"""Where in a written conversation the assistant speaks, found and verified for any chat template.

A template with `{% generation %}` marks says so itself. For every other, the conversation is written twice:
as it is, and with two invisible marks around each assistant's words. Without its marks the second must equal
the first, letter by letter; then the marks tell the place of the words, the template's generation prompt
before them tells where the turn begins, and its end-of-turn token after them where it ends. What cannot be
verified so is refused, with the reason.
"""

from __future__ import annotations

import re
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

from align.data.templates.templates import Message, Refusal, Tools, in_parts, write, write_marked
from align.data.templates.thoughts import EMPTY, THINK_END, answer_of, fit, thoughts_of, words_of

Span = tuple[int, int]

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: Unicode reserves them for use inside a program
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}
FUNCTION = {"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "zebra"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "look_up", "content": "striped"}


class Unwritable(Exception):
    """The template cannot take the conversation, or where the assistant speaks in it cannot be verified."""


class Spoken(NamedTuple):
    """An assistant's turn in the text of its conversation."""

    begin: int  # where the model begins to write, after the generation prompt
    own: int  # where its message begins: later than `begin` by a thought without a word that the template writes itself
    end: int  # its end-of-turn token included
    lost: str  # what of the message the template left out; empty where that is nothing


class Chat:
    """A chat template; `native` is what of system, tools, calls, results, reasoning and thoughts in a content it can
    write."""

    def __init__(self, template: str, special: dict[str, str], stops: tuple[str, ...]) -> None:
        """`stops`: the tokenizer's added tokens. Raises Unwritable for a template that cannot write two turns."""
        self.template, self.special = template, special
        self.marks = bool(GENERATION.search(template))
        answer = {"role": "assistant", "content": f"{OPEN}a{CLOSE}"}
        self.parts = False  # whether it reads contents as lists of parts, and no texts
        if not self._keeps(answer):
            self.parts = True
            self.parts = self._keeps(answer)
        before, turn = self._write([ASK]), self._write([ASK, answer])
        prompt, two = self._write([ASK], prompt=True), self._write([ASK, answer, ASK, answer])
        header, _, tail = turn.partition(OPEN)
        tail = tail.partition(CLOSE)[2]
        both = prompt.startswith(before) and header.startswith(before)
        opening = _common(prompt[len(before) :], header[len(before) :]) if both else ""
        self.opening = opening if opening.strip() else ""  # as `<|im_start|>assistant\n`, where there is one
        stop = re.compile("|".join(map(re.escape, stops)) or "(?!)")
        self.last_stop = _stop(stop, tail)  # as `<|im_end|>`
        self.tail = tail.partition(self.last_stop)[2] if self.last_stop else ""  # as `\n`
        shared = _common(tail, two.partition(CLOSE)[2])  # by the last turn of a talk and one before it
        self.stop = _stop(stop, shared) if stop.search(shared) or shared.strip() == tail.strip() else ""
        self.native = frozenset(what for what, probe in _probes().items() if self._takes(*probe))

    def turns(self, messages: list[Message], tools: Tools, wanted: set[int]) -> tuple[str, list[Spoken]]:
        """The conversation's text, and in it each wanted assistant turn (counted from 0).

        What the template has no words for is first written as text, the way Hermes and Qwen do. Raises
        Unwritable.
        """
        plainly = self.native - {"tools", "calls", "results"}
        has_tools = tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
        for native in (self.native, plainly) if has_tools and plainly != self.native else (self.native,):
            try:
                return self._turns(*fit(messages, tools, native), wanted)
            except Unwritable as error:
                refusal = error
        raise refusal

    def written(self, messages: list[Message]) -> str:
        """The conversation up to its last end of turn, whatever the template makes of it. Raises Unwritable."""
        return self._write(*fit(messages, None, self.native)).removesuffix(self.tail)

    @cached_property
    def teaches(self) -> int:
        """Of two turns, plain and with thoughts in both places, how many it writes whole and with an end: 0 to 6."""
        whole = 0
        ways = ({}, {"content": "<think>\n{}\n</think>\n\nanswer"}, {"reasoning_content": "{}"})
        for way in ways:
            first, last = (
                ANSWER | {key: value.format(thought) for key, value in way.items()} for thought in ("because", "so")
            )
            try:
                text, spoken = self.turns([ASK, first, ASK, last], None, {0, 1})
            except Unwritable:
                continue
            whole += sum(not turn.lost and not text[: turn.end].endswith("answer") for turn in spoken)
        return whole

    @cached_property
    def own_thought(self) -> bool:
        """Whether it writes a thought without a word before an answer that has none."""
        _, (turn,) = self.turns([ASK, ANSWER], None, {0})
        return turn.own > turn.begin

    def _turns(self, messages: list[Message], tools: Tools, wanted: set[int]) -> tuple[str, list[Spoken]]:
        if self.marks:
            text, spans = self._generated(messages, tools)
            said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if len(spans) == len(said) and all(
                answer_of(messages[i]) in text[slice(*span)] for i, span in zip(said, spans, strict=True)
            ):
                self._check_kept(messages, text)
                spans = [self._closed(text, span) for span in spans]
                return text, self._spoken(messages, text, spans, wanted)
        text = self._write(messages, tools)
        self._check_kept(messages, text)
        return text, self._spoken(messages, text, self._found(messages, tools, wanted, text), wanted)

    def _found(self, messages: list[Message], tools: Tools, wanted: set[int], text: str) -> list[Span | None]:
        """Spans of all assistant turns by invisible marks; None for those that are not wanted."""
        if any(mark in text for mark in (OPEN, CLOSE)):
            raise Unwritable("the conversation holds the noncharacters U+FDD0 or U+FDD1")
        marked, chosen, spans = [], [], []
        for i, message in enumerate(messages):
            take = False
            if message["role"] == "assistant":
                take = len(spans) in wanted
                spans.append(None)
            marked.append(self._marked(message) if take else message)
            chosen += [(i, len(spans) - 1)] * take
        pieces = re.split(f"([{OPEN}{CLOSE}])", self._write(marked, tools))
        if "".join(pieces[1::2]) != (OPEN + CLOSE) * len(chosen) or "".join(pieces[::2]) != text:
            raise Unwritable("the chat template changes or leaves out an assistant turn, so its place is not certain")
        at = end = 0
        for (i, number), before, words in zip(chosen, pieces[0::4], pieces[2::4], strict=False):
            first, last = at + len(before), at + len(before) + len(words)
            begin = self._begin(text, end, first)
            stop = self.last_stop if i == len(messages) - 1 else self.stop
            end = text.find(stop, last) if stop else last
            between = text[last:end].strip()
            calls = bool(messages[i].get("tool_calls"))  # they stand between the words and the stop
            if begin < 0 or end < 0 or (between and not calls) or (calls and not stop):
                raise Unwritable(f"the bounds of assistant turn {number + 1} cannot be found in the template's text")
            earlier = text.find(self.opening, at) + len(self.opening) if self.opening else begin
            if _lost(messages[i], text[begin:end]) and not _lost(messages[i], text[earlier:end]):
                begin = earlier  # its thoughts stand in a part of their own, before that of the words
            end += len(stop)
            spans[number] = (begin, end)
            at = last
        return spans

    def _spoken(self, messages: list[Message], text: str, spans: list[Span | None], wanted: set[int]) -> list[Spoken]:
        """The wanted turns: what the generation prompt says is not theirs, nor is the template's own empty thought."""
        said = [message for message in messages if message["role"] == "assistant"]
        spoken = []
        for i in sorted(wanted):
            begin, end = spans[i]
            if self.opening and text.startswith(self.opening, begin):
                begin += len(self.opening)
            elif overlap := _overlap(self.opening, text, begin):
                begin += overlap
            empty = EMPTY.match(text, begin, end)
            own = empty.end() if empty else begin
            spoken.append(Spoken(begin, own, end, _lost(said[i], text[begin:end])))
        return spoken

    def _begin(self, text: str, floor: int, first: int) -> int:
        """Where the model would begin to write the turn whose words start at `first`; -1 if nowhere."""
        if self.opening:
            header = text.rfind(self.opening, floor, first)
            return header + len(self.opening) if header >= 0 else -1
        return floor + len(text[floor:first].rstrip(" "))

    def _marked(self, message: Message) -> Message:
        content = message["content"]
        # A template may cut thoughts off or move them; the header before them is found all the same.
        begin = content.rfind(THINK_END) + len(THINK_END) if self.opening and THINK_END in content else 0
        begin = begin if content[begin:].strip() else 0
        words = content[begin:].strip()
        if words:
            first = content.index(words, begin)
            last = first + len(words)
            return message | {"content": f"{content[:first]}{OPEN}{words}{CLOSE}{content[last:]}"}
        if self.opening and message.get("tool_calls"):
            first, *others = message["tool_calls"]
            function = first["function"] | {"name": OPEN + CLOSE + first["function"]["name"]}
            return message | {"tool_calls": [first | {"function": function}, *others]}
        raise Unwritable("an assistant turn is empty")

    def _closed(self, text: str, span: Span) -> Span:
        """The span ending with the end-of-turn token, whether the template's marks stop before it or run past
        it.
        """
        begin, end = span
        said = text[begin:end].rstrip()
        rest = text[begin + len(said) :]
        if self.stop and said.endswith(self.stop):
            return begin, begin + len(said)
        if self.stop and rest.lstrip().startswith(self.stop):
            return begin, begin + len(said) + rest.index(self.stop) + len(self.stop)
        return span

    def _check_kept(self, messages: list[Message], text: str) -> None:
        for i, message in enumerate(messages):
            words = answer_of(message) if message["role"] == "assistant" else message["content"].strip()
            if message["role"] != "tool" and words not in text:
                raise Unwritable(f"the chat template leaves out turn {i + 1} ({message['role']})")

    def _generated(self, messages: list[Message], tools: Tools) -> tuple[str, list[Span]]:
        try:
            text, spans = write_marked(self.template, self.special, self._shaped(messages), tools)
        except Refusal as error:
            raise Unwritable(f"the chat template refuses it: {error}") from None
        return text, [span for span in spans if text[slice(*span)].strip()]

    def _write(self, messages: list[Message], tools: Tools = None, prompt: bool = False) -> str:
        try:
            return write(self.template, self.special, self._shaped(messages), tools, prompt)
        except Refusal as error:
            raise Unwritable(f"the chat template refuses it: {error}") from None

    def _shaped(self, messages: list[Message]) -> list[Message]:
        return in_parts(messages) if self.parts else messages

    def _keeps(self, answer: Message) -> bool:
        """Whether it writes contents as they are given to it now."""
        try:
            return answer["content"] in self._write([ASK, answer])
        except Unwritable:
            return False

    def _takes(self, messages: list[Message], tools: Tools, needles: list[str]) -> bool:
        """Whether the template writes each of the needles (its own within the last assistant's turn), and no thought
        twice."""
        try:
            last = sum(message["role"] == "assistant" for message in messages) - 1
            text, (turn,) = self._turns(messages, tools, {last})
        except Unwritable:
            return False
        said = text[text.rfind(self.opening, 0, turn.begin) if self.opening else turn.begin : turn.end]
        return all(needle in text for needle in needles) and not turn.lost and said.count(THINK_END) < 2


def _probes() -> dict[str, tuple[list[Message], Tools, list[str]]]:
    """For each thing that not every template writes: a conversation with it, its tools, and what must be
    seen.
    """
    return {
        "system": ([{"role": "system", "content": "Be brief."}, ASK, ANSWER], None, ["Be brief."]),
        "tools": ([ASK, ANSWER], [{"type": "function", "function": FUNCTION}], ["look_up"]),
        "calls": ([ASK, CALLING], None, ["look_up", "zebra"]),
        "results": ([ASK, CALLING, RESULT, ANSWER], None, ["striped"]),
        "reasoning": ([ASK, ANSWER | {"reasoning_content": "because"}], None, ["because"]),
        "thoughts": ([ASK, ANSWER | {"content": "<think>\nbecause\n</think>\n\nanswer"}], None, ["because"]),
    }


def _lost(message: Message, said: str) -> str:
    """What of an assistant's message does not stand in what was written of it: thoughts, words or calls."""
    parts = {
        "thoughts": thoughts_of(message),
        "words": words_of(message),
        "calls": [call["function"]["name"] for call in message.get("tool_calls", ())],
    }
    return " and ".join(what for what, texts in parts.items() if not all(text in said for text in texts))


def _stop(stops: re.Pattern[str], tail: str) -> str:
    """What ends a turn: the first added token after its words or, without one, all that follows them."""
    token = stops.search(tail)
    return token.group() if token else tail.strip()


def _overlap(opening: str, text: str, begin: int) -> int:
    """How much of the opening's end stands after `begin`, where its head stands right before it."""
    lengths = (k for k in range(len(opening) - 1, 0, -1) if text.startswith(opening, begin - len(opening) + k))
    return next(lengths, 0)


def _common(a: str, b: str) -> str:
    """The start that both share."""
    return "".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
