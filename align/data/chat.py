"""Where in a written conversation the assistant speaks, found and verified for any chat template.

A template with `{% generation %}` marks says so itself. For every other, the conversation is written twice:
as it is, and with two invisible marks around each assistant's words. Without its marks the second must equal
the first, letter by letter; then the marks tell the place of the words, the template's generation prompt
before them tells where the turn begins, and its end-of-turn token after them where it ends. What cannot be
verified so is refused, with the reason.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.data.templates import REFUSALS, THINK_END, Message, fit, special_tokens, write
from align.recipe.errors import UserError

Span = tuple[int, int]

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: Unicode reserves them for use inside a program
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Unwritable(Exception):
    """The template cannot take the conversation, or where the assistant speaks in it cannot be verified."""


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """What is known of the tokenizer's template; a template is studied once."""
    stops = tuple(sorted(tokenizer.added_tokens_encoder, key=len, reverse=True))
    special = special_tokens(tokenizer)
    try:
        return _chat(_training_template(tokenizer, special), tuple(special.items()), stops)
    except (Unwritable, *REFUSALS) as error:
        raise UserError(
            f"{error}, though it is an exchange of two turns; give another in model.chat_template"
        ) from None


@lru_cache(maxsize=16)
def _chat(template: str, special: tuple[tuple[str, str], ...], stops: tuple[str, ...]) -> Chat:
    return Chat(template, dict(special), stops)


class Chat:
    """A chat template; `native` is what of system, tools, calls, results and reasoning it can write."""

    def __init__(self, template: str, special: dict[str, str], stops: tuple[str, ...]) -> None:
        self.template, self.special = template, special
        self.marks = bool(GENERATION.search(template))
        ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": f"{OPEN}a{CLOSE}"}
        before, turn = self._write([ask]), self._write([ask, answer])
        prompt, two = self._write([ask], prompt=True), self._write([ask, answer, ask, answer])
        header, _, tail = turn.partition(OPEN)
        tail = tail.partition(CLOSE)[2]
        both = prompt.startswith(before) and header.startswith(before)
        opening = _common(prompt[len(before) :], header[len(before) :]) if both else ""
        self.opening = opening if opening.strip() else ""  # as `<|im_start|>assistant\n`, where there is one
        stop = re.compile("|".join(map(re.escape, stops)) or "(?!)")
        self.last_stop = _stop(stop, tail)  # as `<|im_end|>`
        shared = _common(tail, two.partition(CLOSE)[2])  # by the last turn of a talk and one before it
        self.stop = _stop(stop, shared) if stop.search(shared) or shared.strip() == tail.strip() else ""
        self.native = frozenset(what for what, probe in _probes().items() if self._takes(*probe))

    def turns(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, wanted: set[int]
    ) -> tuple[str, list[Span]]:
        """The conversation's text, and in it the span of each wanted assistant turn (counted from 0).

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

    def _turns(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, wanted: set[int]
    ) -> tuple[str, list[Span]]:
        if self.marks:
            text, spans = self._generated(messages, tools)
            said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if len(spans) == len(said) and all(
                _last_words(messages[i]) in text[slice(*span)] for i, span in zip(said, spans, strict=True)
            ):
                self._check_kept(messages, text)
                return text, [self._closed(text, span) for i, span in enumerate(spans) if i in wanted]
        text = self._write(messages, tools)
        self._check_kept(messages, text)
        return text, self._found(messages, tools, wanted, text)

    def _found(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, wanted: set[int], text: str
    ) -> list[Span]:
        """Spans of the wanted turns by invisible marks."""
        if any(mark in text for mark in (OPEN, CLOSE)):
            raise Unwritable("the conversation holds the noncharacters U+FDD0 or U+FDD1")
        marked, chosen = [], []
        ordinal = -1
        for i, message in enumerate(messages):
            ordinal += message["role"] == "assistant"
            take = message["role"] == "assistant" and ordinal in wanted
            marked.append(self._marked(message) if take else message)
            chosen += [i] * take
        pieces = re.split(f"([{OPEN}{CLOSE}])", self._write(marked, tools))
        if "".join(pieces[1::2]) != (OPEN + CLOSE) * len(chosen) or "".join(pieces[::2]) != text:
            raise Unwritable("the chat template changes or leaves out an assistant turn, so its place is not certain")
        spans: list[Span] = []
        at = end = 0
        for i, before, words in zip(chosen, pieces[0::4], pieces[2::4], strict=False):
            first, last = at + len(before), at + len(before) + len(words)
            begin = self._begin(text, end, first)
            stop = self.last_stop if i == len(messages) - 1 else self.stop
            end = text.find(stop, last) if stop else last
            between = text[last:end].strip()
            calls = bool(messages[i].get("tool_calls"))  # they stand between the words and the stop
            if begin < 0 or end < 0 or (between and not calls) or (calls and not stop):
                raise Unwritable(
                    f"the bounds of assistant turn {len(spans) + 1} cannot be found in the template's text"
                )
            end += len(stop)
            spans.append((begin, end))
            at = last
        return spans

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
            if message["role"] in ("system", "user") and message["content"].strip() not in text:
                raise Unwritable(f"the chat template leaves out turn {i + 1} ({message['role']})")

    def _generated(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.special,
            )
        except REFUSALS as error:
            raise Unwritable(f"the chat template refuses it: {error}") from None
        return texts[0], [span for span in spans[0] if texts[0][slice(*span)].strip()]

    def _write(self, messages: list[Message], tools: list[dict[str, Any]] | None = None, prompt: bool = False) -> str:
        try:
            return write(self.template, self.special, messages, tools, prompt)
        except REFUSALS as error:
            raise Unwritable(f"the chat template refuses it: {error}") from None

    def _takes(self, messages: list[Message], tools: list[dict[str, Any]] | None, needles: list[str]) -> bool:
        """Whether the template writes each of the needles, and the last assistant's turn can be told."""
        try:
            last = sum(message["role"] == "assistant" for message in messages) - 1
            text, _ = self._turns(messages, tools, {last})
        except Unwritable:
            return False
        return all(needle in text for needle in needles)


def _probes() -> dict[str, tuple[list[Message], list[dict[str, Any]] | None, list[str]]]:
    """For each thing that not every template writes: a conversation with it, its tools, and what must be
    seen.
    """
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}
    function = {"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "zebra"}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "name": "look_up", "content": "striped"}
    return {
        "system": ([{"role": "system", "content": "Be brief."}, ask, answer], None, ["Be brief."]),
        "tools": ([ask, answer], [{"type": "function", "function": function}], ["look_up"]),
        "calls": ([ask, calling], None, ["look_up", "zebra"]),
        "results": ([ask, calling, result, answer], None, ["striped"]),
        "reasoning": ([ask, answer | {"reasoning_content": "because"}], None, ["because"]),
    }


def _training_template(tokenizer: PreTrainedTokenizerBase, special: dict[str, str]) -> str:
    """The tokenizer's template or, where later turns change what it wrote for earlier ones (Qwen3 drops
    thoughts), TRL's variant for training that does not, where TRL knows one.
    """
    own = tokenizer.get_chat_template()
    exchange = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nt\n</think>\n\na"},
    ]
    if GENERATION.search(own) or write(own, special, exchange * 2).startswith(write(own, special, exchange)):
        return own
    from trl.chat_template_utils import get_training_chat_template  # slow to import, rarely needed

    try:
        return get_training_chat_template(tokenizer) or own
    except ValueError:
        return own


def _stop(stops: re.Pattern[str], tail: str) -> str:
    """What ends a turn: the first added token after its words or, without one, all that follows them."""
    token = stops.search(tail)
    return token.group() if token else tail.strip()


def _last_words(message: Message) -> str:
    return message["content"].rpartition(THINK_END)[2].strip()


def _common(a: str, b: str) -> str:
    """The start that both share."""
    return "".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
