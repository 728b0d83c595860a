"""Calls of tools, read out of what a model says; and the `openai` client, which gets them."""

from __future__ import annotations

import json
from itertools import pairwise

import openai
import pytest
from browser import make_parrot
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving

from align.tools.serving.calls import Call, Calls

ROME = Call("weather", '{"city": "Rome"}')
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NONE = (
    "<tool_call>\nno JSON\n</tool_call>",
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>',
    "<tool_call>" + "[" * 10_000 + "</tool_call>",
    "<tool_call>",
    "a <tool_cal",
    "</tool_call>",
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def read(*pieces: str) -> tuple[str, list[Call]]:
    calls = Calls()
    found = [calls.add(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    return "".join(words for words, _ in found), [call for _, each in found for call in each]


def test_what_is_a_call_and_what_is_words():
    assert read(ONE) == ("", [ROME])
    assert read(f"I look. \n{ONE}\n{ONE}\n") == ("I look.", [ROME, ROME])
    assert read(f"{ONE} and {ONE}") == ("and", [ROME, ROME])
    assert read(ONE.removesuffix("</tool_call>")) == ("", [ROME]), "the turn ended"
    assert read('<tool_call>{"name": "now"}</tool_call>') == ("", [Call("now", "{}")])
    assert (
        read('<tool_call>{"name": "say", "arguments": "{\\"a\\": \\"é\\"}"}</tool_call>')[1][0].arguments
        == '{"a": "é"}'
    )
    for text in (*NONE, " two\n", ""):
        assert read(text) == (text, [])
    assert read(f"{NONE[0]} {ONE}") == (NONE[0], [ROME])


@settings(max_examples=50)
@given(st.lists(st.sampled_from([ONE, *NONE[:2], "<", " ", "\n", "words", "<tool_"]), max_size=6), st.data())
def test_pieces_say_what_the_whole_says(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    edges = [0, *cuts, len(text)]
    assert read(*(text[a:b] for a, b in pairwise(edges))) == read(text)


def test_words_that_are_no_call_do_not_wait():
    calls = Calls()
    assert calls.add("1 < 2") == ("1 < 2", [])
    assert calls.add(" <t") == ("", [])
    assert calls.add("able>") == (" <table>", [])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A client, and a model that says one sentence and one call."""
    said = f"I look.\n{ONE}<|im_end|>"
    base = make_parrot(tmp_path_factory.mktemp("parrot") / "parrot", said, 1024)
    with serving([base]) as service:
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
        asked = {"model": "parrot", "temperature": 0, "tools": [TOOL], "max_tokens": 200}
        plain = [{"role": "user", "content": "a"}]
        length = client.chat.completions.create(messages=plain, **asked | {"max_tokens": 1}).usage.prompt_tokens
        period = len(said) - len("<|im_end|>") + 1
        plain[0]["content"] += "a" * (-(length - 1) % period)  # so that it begins with the beginning
        yield client, asked | {"messages": plain}


def test_the_openai_client_gets_calls(place):
    client, asked = place
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        *ROME[:1],
        {"city": "Rome"},
    )
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = [*asked["messages"], choice.message, result]
    assert client.chat.completions.create(**asked | {"messages": again, "max_tokens": 1}).choices


def test_streams_say_the_same(place):
    client, asked = place
    content, calls, ends = "", {}, []
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            calls[call.index] = (call.id, call.function.name, call.function.arguments)
        ends.append(choice.finish_reason)
    assert content == "I look."
    assert [call[1:] for call in calls.values()] == [tuple(ROME)]
    assert calls[0][0].startswith("call_")
    assert (ends[-1], {*ends[:-1]}) == ("tool_calls", {None})


def test_without_tools_it_is_text(place):
    client, asked = place
    for more in ({"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}):
        (choice,) = client.chat.completions.create(**asked | more).choices
        assert choice.message.tool_calls is None
        assert choice.finish_reason in ("stop", "length")
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(**asked, tool_choice="required")
