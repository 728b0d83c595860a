"""The `openai` client, as it is, against the server; or against another, such as vLLM:

    ALIGN_SERVE_URL=http://127.0.0.1:8000 ALIGN_SERVE_MODEL=name pytest tests/tools/serving/test_openai.py

What differs there stands in DIFFERS.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import openai
import pytest

URL, MODEL = os.environ.get("ALIGN_SERVE_URL"), os.environ.get("ALIGN_SERVE_MODEL")
DIFFERS = {  # test -> what another server does
    "test_one_model": "vLLM lists its models alone",
    "test_what_it_does_not_know_is_refused": "vLLM ignores settings that it does not know",
}
NO_TEXT = "\ufffd"  # bytes that are no text: vLLM shows them in an answer, and leaves them out of its tokens
ASKED = [{"role": "user", "content": "Name three colours."}]


class Place(NamedTuple):
    """Where the requests go."""

    client: openai.OpenAI
    model: str


@pytest.fixture(scope="module")
def place(request):
    if URL:
        key = os.environ.get("ALIGN_SERVE_KEY", "none")
        yield Place(openai.OpenAI(base_url=f"{URL}/v1", api_key=key, max_retries=0), MODEL)
        return
    from serving import serving

    shop = request.getfixturevalue("shop")
    with serving([shop["red"], shop["green"]], key="secret") as service:
        yield Place(openai.OpenAI(base_url=f"{service.url}/v1", api_key="secret", max_retries=0), "red")


@pytest.fixture(autouse=True)
def _as_listed(request):
    if URL and (why := DIFFERS.get(request.node.name)):
        pytest.skip(why)


def chat(place: Place, **options):
    options = {"temperature": 0, "max_tokens": 24, "messages": ASKED} | options
    return place.client.chat.completions.create(model=place.model, **options)


def complete(place: Place, prompt="The sky is", **options):
    options = {"temperature": 0, "max_tokens": 24} | options
    return place.client.completions.create(model=place.model, prompt=prompt, **options)


def test_models(place):
    assert place.model in [model.id for model in place.client.models.list()]


def test_one_model(place):
    assert place.client.models.retrieve(place.model).id == place.model
    with pytest.raises(openai.NotFoundError):
        place.client.models.retrieve("nobody/x")


def test_chat(place):
    reply = chat(place)
    (choice,) = reply.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.content
    assert reply.usage.completion_tokens <= 24
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert (reply.object, reply.model) == ("chat.completion", place.model)
    assert chat(place).choices[0].message.content == choice.message.content, "greedy"


def test_the_system_prompt_and_turns_are_read(place):
    brief, briefer = ([{"role": "system", "content": text}, *ASKED] for text in ("Be very brief.", "Be brief."))
    longer = [*brief, {"role": "assistant", "content": "Red."}, *ASKED]
    read = [chat(place, messages=talk).usage.prompt_tokens for talk in (briefer, brief, longer)]
    assert read == sorted({*read}), "some templates have a long system prompt of their own"


def test_streams_say_what_whole_replies_say(place):
    whole = chat(place)
    stream = [*chat(place, stream=True, stream_options={"include_usage": True})]
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == whole.choices[0].message.content
    assert stream[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == whole.choices[0].finish_reason
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in stream}) == 1
    text = complete(place)
    parts = [*complete(place, stream=True)]
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text


def test_completions_of_texts_and_of_tokens(place):
    whole = complete(place, extra_body={"return_token_ids": True})
    choice = whole.choices[0]
    assert len(choice.token_ids) == whole.usage.completion_tokens
    assert len(choice.prompt_token_ids) == whole.usage.prompt_tokens
    of_ids = complete(place, choice.prompt_token_ids, extra_body={"return_token_ids": True}).choices[0]
    assert (of_ids.text, of_ids.token_ids) == (choice.text, choice.token_ids)
    several = complete(place, ["The sky is", "The sea is"], max_tokens=4)
    assert [each.index for each in several.choices] == [0, 1]
    assert choice.text.startswith(several.choices[0].text)


def test_stop_texts_end_an_answer_and_are_no_part_of_it(place):
    text = complete(place, max_tokens=12).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    before = text.partition(stop)[0]
    found = complete(place, max_tokens=12, stop=[stop, "never said"]).choices[0]
    assert (found.text, found.finish_reason) == (before, "stop")
    parts = [part.choices[0].text for part in complete(place, max_tokens=12, stop=stop, stream=True)]
    assert "".join(parts) == before


def test_n_and_seeds(place):
    warm = {"temperature": 1.0, "max_tokens": 12}
    one, again, other = (chat(place, n=3, seed=seed, **warm) for seed in (1, 1, 2))
    texts = [[choice.message.content for choice in reply.choices] for reply in (one, again, other)]
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len(set(texts[0])) > 1
    assert one.usage.completion_tokens > chat(place, seed=1, **warm).usage.completion_tokens
    parts: dict[int, str] = {}
    for chunk in chat(place, n=3, seed=1, stream=True, **warm):
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + (choice.delta.content or "")
    assert [parts[i] for i in range(3)] == texts[0]


def test_logprobs(place):
    reply = chat(place, logprobs=True, top_logprobs=3, max_tokens=6)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-3), "greedy takes the likeliest"
        tops = [top.logprob for top in token.top_logprobs]
        assert tops == sorted(tops, reverse=True)
    shown = "".join(token.token for token in content), reply.choices[0].message.content
    tokens, text = (each.replace(NO_TEXT, "") for each in shown)
    assert tokens.startswith(text)
    old = complete(place, logprobs=2, max_tokens=6).choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == len(old.top_logprobs) == len(old.text_offset)
    streamed = [c.choices[0].logprobs for c in chat(place, logprobs=True, max_tokens=6, stream=True) if c.choices]
    tokens = [token for each in streamed if each for token in each.content]
    assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in content], abs=1e-3)


def test_the_least_and_the_most_tokens(place):
    assert complete(place, max_tokens=1).usage.completion_tokens == 1
    longer = complete(place, max_tokens=9, extra_body={"min_tokens": 9})
    assert longer.usage.completion_tokens == 9
    assert longer.choices[0].finish_reason == "length"
    assert complete(place, max_tokens=9, extra_body={"ignore_eos": True}).usage.completion_tokens == 9


def test_errors_are_those_of_openai(place):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        place.client.chat.completions.create(model="nobody", messages=ASKED)
    with pytest.raises(openai.BadRequestError):
        chat(place, temperature=-1)
    with pytest.raises(openai.BadRequestError):
        chat(place, messages=[])
    with pytest.raises(openai.BadRequestError):
        chat(place, top_p=0)
    with pytest.raises(openai.BadRequestError, match=r"maximum context length|max_model_len"):
        complete(place, max_tokens=4000 if not URL else 10**7)
    with pytest.raises(openai.BadRequestError, match=r"maximum context length|max_model_len"):
        complete(place, [5] * 3000 if not URL else [5] * 10**6)


def test_what_it_does_not_know_is_refused(place):
    with pytest.raises(openai.BadRequestError, match="colour"):
        chat(place, extra_body={"colour": "red"})
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        chat(place, frequency_penalty=0.5)
    chat(place, frequency_penalty=0.0, user="me", extra_body={"tool_choice": "auto"})


def test_a_wrong_key(place):
    if URL and "ALIGN_SERVE_KEY" not in os.environ:
        pytest.skip("that server has no key")
    for key in ("wrong", "secret2", "ÿ" * 3 if not URL else "x"):
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            openai.OpenAI(base_url=place.client.base_url, api_key=key, max_retries=0).models.list()
