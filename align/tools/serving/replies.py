"""What the server replies: the objects of OpenAI's API, whole or in pieces, with vLLM's token ids where asked for."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple
from uuid import uuid4

from align.models.sampling.requests import Said
from align.tools.serving.calls import Call, Calls
from align.tools.serving.models import Served
from align.tools.serving.protocol import Asking, ChatAsking
from align.tools.serving.words import Words

JSON = dict[str, Any]


class Piece(NamedTuple):
    """What a token adds to an answer."""

    said: Said
    text: str
    calls: list[JSON]


class Answer:
    """One choice while it grows."""

    def __init__(self, index: int, served: Served, asked: Asking, prompt: list[int]) -> None:
        self.index, self.asked, self.prompt, self.tokenizer = index, asked, prompt, served.voice.tokenizer
        self.words = Words(self.tokenizer, prompt, served.voice.ends, asked.stops, served.voice.stops)
        self.reading = Calls() if isinstance(asked, ChatAsking) and asked.told_tools else None
        self.pieces: list[Piece] = []
        self.calls: list[JSON] = []  # of tools
        self.letters = 0  # of the text so far
        self.reason: str | None = None

    def add(self, said: Said) -> Piece:
        """A token more."""
        last = said.end is not None
        text, found = self.words.add(said.token, last), list[Call]()
        if self.reading:
            text, found = self.reading.add(text, last)
        calls = [{"id": f"call_{uuid4().hex}", "type": "function", "function": call._asdict()} for call in found]
        piece = Piece(said, text, calls)
        self.pieces.append(piece)
        self.calls += calls
        if last:
            self.reason = "tool_calls" if self.calls and said.end == "stop" else said.end
        return piece

    @property
    def text(self) -> str:
        """Of all tokens."""
        return "".join(piece.text for piece in self.pieces)

    def token(self, number: int) -> tuple[str, list[int]]:
        """A token as text, and its bytes as far as they are text."""
        if self.asked.return_tokens_as_token_ids:
            return f"token_id:{number}", []
        text = self.tokenizer.decode([number], clean_up_tokenization_spaces=False)
        return text, [*text.encode()]

    def logprobs(self, pieces: list[Piece]) -> JSON | None:
        """Of these pieces, in the form of the request's kind."""
        if self.asked.top is None:
            return None
        return self._of_chat(pieces) if isinstance(self.asked, ChatAsking) else self._of_text(pieces)

    def _of_chat(self, pieces: list[Piece]) -> JSON:
        def told(number: int, logprob: float) -> JSON:
            text, raw = self.token(number)
            return {"token": text, "logprob": logprob, "bytes": raw}

        content = []
        for said in (piece.said for piece in pieces):
            top = [told(*each) for each in said.top]
            content.append(told(said.token, said.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _of_text(self, pieces: list[Piece]) -> JSON:
        tokens, offsets, tops = [], [], []
        for said in (piece.said for piece in pieces):
            tokens.append(self.token(said.token)[0])
            offsets.append(self.letters)
            self.letters += len(tokens[-1])
            top = {self.token(number)[0]: logprob for number, logprob in said.top}
            tops.append(top | {tokens[-1]: said.logprob})
        return {
            "text_offset": offsets,
            "token_logprobs": [piece.said.logprob for piece in pieces],
            "tokens": tokens,
            "top_logprobs": tops,
        }


class Reply:
    """The reply to one request, whole or in chunks."""

    def __init__(self, served: Served, asked: Asking, prompts: list[list[int]]) -> None:
        self.asked, self.chat = asked, isinstance(asked, ChatAsking)
        kind = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        self.about = {
            "id": f"{kind[1]}-{uuid4().hex}", "object": kind[0], "created": int(time.time()), "model": served.name
        }  # fmt: skip
        self.prompts = prompts
        self.answers = [
            Answer(i * asked.choices + k, served, asked, prompt)
            for i, prompt in enumerate(prompts)
            for k in range(asked.choices)
        ]

    def usage(self, reused: int = 0) -> JSON:
        """Tokens read and said."""
        read, said = sum(map(len, self.prompts)), sum(len(answer.pieces) for answer in self.answers)
        return {
            "prompt_tokens": read,
            "completion_tokens": said,
            "total_tokens": read + said,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def whole(self, reused: int) -> JSON:
        """All at once."""
        choices = []
        for answer in self.answers:
            choice: JSON = {"index": answer.index, "finish_reason": answer.reason, "stop_reason": None}
            if self.chat:
                content = answer.text or (None if answer.calls else "")
                choice["message"] = {"role": "assistant", "content": content, "refusal": None}
                choice["message"] |= {"tool_calls": answer.calls} if answer.calls else {}
            else:
                choice["text"] = answer.text
            choice["logprobs"] = answer.logprobs(answer.pieces)
            if self.asked.return_token_ids:
                choice["token_ids"] = [piece.said.token for piece in answer.pieces]
                if not self.chat:
                    choice["prompt_token_ids"] = answer.prompt
            choices.append(choice)
        more = {"prompt_token_ids": self.prompts[0]} if self.chat and self.asked.return_token_ids else {}
        return self.about | {"choices": choices, "usage": self.usage(reused)} | more

    def first(self) -> list[bytes]:
        """What a stream begins with: of a chat, who speaks."""
        if not self.chat:
            return []
        more = {"prompt_token_ids": self.prompts[0]} if self.asked.return_token_ids else {}
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}], more)
            for answer in self.answers
        ]

    def chunk(self, answer: Answer, piece: Piece) -> bytes | None:
        """What a token brought; None where that is nothing to tell yet."""
        last = piece.said.end is not None
        if not (piece.text or piece.calls or last or self.asked.top is not None or self.asked.return_token_ids):
            return None
        choice: JSON = {"index": answer.index, "logprobs": answer.logprobs([piece])}
        choice["finish_reason"] = answer.reason if last else None
        choice |= {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        if piece.calls:
            first = len(answer.calls) - len(piece.calls)
            choice["delta"]["tool_calls"] = [{"index": first + i, **call} for i, call in enumerate(piece.calls)]
        if self.asked.return_token_ids:
            choice["token_ids"] = [piece.said.token]
            if not self.chat and len(answer.pieces) == 1:
                choice["prompt_token_ids"] = answer.prompt
        return self._chunk([choice])

    def last(self, reused: int) -> list[bytes]:
        """What a stream ends with."""
        end = [b"data: [DONE]\n\n"]
        if self.asked.stream_options and self.asked.stream_options.include_usage:
            return [self._chunk([], {"usage": self.usage(reused)}), *end]
        return end

    def _chunk(self, choices: list[JSON], more: JSON | None = None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(self.about | {"object": kind, "choices": choices} | (more or {}))


def event(body: JSON) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def fault(message: str, status: int, kind: str, param: str | None = None) -> JSON:
    """An error as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
