"""What a server is asked for, and what of its answers is taken: every fault of an answer is one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from models.tiny import VOCABULARY, tiny_tokenizer

from align.models.sampling.choice import Sampling
from align.objectives.importance import truncated_importance
from align.recipe.engine import PLACES, Server
from align.recipe.errors import UserError
from align.training.rollouts.client import LONGEST, Again, Answer, Patience, _seconds
from align.training.rollouts.completions import SEEDS, Ends, asked_for, response_of, seed_of

END, PROMPT = 2, [5, 6, 7]
HOW = Sampling(4)


def ends(*texts: str) -> Ends:
    return Ends(frozenset({END}), texts, tiny_tokenizer(), VOCABULARY)


def told(ids: object, reason: object = "stop", logprobs: object = None, **more: object) -> Answer:
    logprobs = [-0.5] * len(ids) if logprobs is None and isinstance(ids, list) else logprobs
    choice = {"finish_reason": reason, "token_ids": ids, "logprobs": {"token_logprobs": logprobs}} | more
    return Answer(200, json.dumps({"choices": [choice]}).encode())


def read(answer: Answer, how: Sampling = HOW, *texts: str):
    return response_of(answer, PROMPT, how, ends(*texts), "there")


def test_a_response_ends_where_the_own_engine_would_end_it():
    """By an end-of-turn token, a text, or its length, whatever the server makes of them; logprobs go along."""
    found = read(told([9, 9, END], logprobs=[-1.0, -2, 0.0]))
    assert (found.tokens.tolist(), found.ended, found.logprobs.tolist()) == ([9, 9, END], True, [-1, -2, 0])
    assert (found.tokens.dtype, found.logprobs.dtype) == (np.int32, np.float32)
    found = read(told([9, 9, 9, 9], "length"))
    assert (len(found.tokens), found.ended) == (4, False)
    found = read(told([9, END, 9, 9], "length"))
    assert (found.tokens.tolist(), found.ended, len(found.logprobs)) == ([9, END], True, 2), "cut at its end"
    text = tiny_tokenizer().encode("ab.c", add_special_tokens=False)
    assert len(text) == 4
    for min_new, length in ((0, 3), (4, 4)):
        found = read(told(text, "length"), HOW._replace(stop=(".",), min_new=min_new), ".")
        assert (len(found.tokens), found.ended) == (length, True)
    assert read(told([9, 9], stop_reason="x")).ended, "it found a text where one is written otherwise"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(200, b"\xff"), "something else than one choice"),
        (Answer(200, b"[" * 100_000), "something else than one choice"),
        (Answer(200, b'{"choices": []}'), "something else than one choice"),
        (Answer(200, b'{"choices": [7]}'), "something else than one choice"),
        (told(None, "length"), "`return_token_ids`"),
        (told([], "length"), "`return_token_ids`"),
        (told([9, VOCABULARY], "length"), "model.base has no row for"),
        (told([9, -1], "length"), "model.base has no row for"),
        (told([True, 9.0], "length"), "`return_token_ids`"),
        (told([END], prompt_token_ids=[1, *PROMPT]), "another prompt"),
        (told([9, END], logprobs=[-1.0]), "no log-probability of each token"),
        (told([9, END], logprobs=[-1.0, None]), "no log-probability of each token"),
        (told([9, END], logprobs=[-1.0, float("nan")]), "no log-probability of each token"),
        (told([9, END], logprobs=[-1.0, 3.0]), "no log-probability of each token"),
        (told([9, END], logprobs=[-1.0, float("-inf")]), "no log-probability of each token"),
        (told([9, END], logprobs=[-1.0, -(10**400)]), "no log-probability of each token"),
        (Answer(200, b'{"choices": [{"finish_reason": "stop", "token_ids": [2], "logprobs": [-1]}]}'), "no log-prob"),
        (told([9, 9]), "ended a response after token 9"),
        (told([9, 9], "length"), "cut a response after 2 of 4 tokens"),
        (told([9] * 5, "length"), "gave 5 tokens where at most 4"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(answer, said):
    with pytest.raises(UserError) as fault:
        read(answer)
    assert said in str(fault.value)
    assert str(fault.value).startswith("there ")


def test_what_the_server_broke_off_is_asked_for_again():
    """vLLM ends its responses so when it is shut down."""
    for reason in ("abort", "error", None):
        with pytest.raises(Again, match="broke a response off"):
            read(told([9, 9], reason))


def test_a_request_says_all_that_a_server_may_have_a_default_for():
    body = asked_for("actor", np.array(PROMPT, np.int32), HOW._replace(top_k=0), ends())
    assert json.loads(json.dumps(body)) == body
    assert (body["prompt"], body["max_tokens"], body["top_k"], body["stop_token_ids"]) == (PROMPT, 4, -1, [END])
    assert not {"seed", "stop", "cache_salt"} & set(body)
    body = asked_for("actor", PROMPT, HOW._replace(top_k=3, min_new=2), ends("."), 7, "salt")
    assert (body["top_k"], body["min_tokens"], body["stop"], body["seed"]) == (3, 2, ["."], 7)
    assert body["cache_salt"] == "salt"


def test_a_seed_is_the_key_s_own():
    keys = [(1, 5, step, place, number) for step in range(9) for place in range(9) for number in range(9)]
    seeds = [seed_of(key) for key in keys]
    assert seeds == [seed_of(key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert 0 <= min(seeds) <= max(seeds) < SEEDS


def test_asking_again_is_bounded():
    """A clock that goes on by what is waited: at most `seconds` from the first failure, longer and longer waits."""
    now, waits = [100.0], []
    patience = Patience(60, lambda: now[0])
    while (delay := patience.delay(len(waits))) is not None:
        waits.append(delay)
        now[0] += delay
    assert waits[:5] == [0.5, 1, 2, 4, 8]
    assert now[0] == pytest.approx(160)
    assert max(waits) <= LONGEST
    patience.answered()
    now[0] += 1000  # a long answer is no outage
    assert patience.delay(0, after=7.0) == 7
    assert patience.delay(3, after=1e9) == LONGEST
    assert patience.delay(3, after=-5.0) > 0
    assert Patience(0).delay(0) is None


def test_what_a_server_says_of_itself():
    assert Answer(500, b'{"error": {"message": "dead"}}').message == "dead"
    assert Answer(404, b'{"detail": "Not Found"}').message == "Not Found"
    assert Answer(400, b'{"object": "error", "message": "too long"}').message == "too long"
    assert Answer(400, b'{"error": "odd"}').message == "odd"
    assert Answer(502, b"<html>" + b"x" * 9999).message.startswith("<html>")
    assert Answer(502, b"").message == "without a word"
    assert len(Answer(502, b"\x80" * 9999).message) == 300
    assert _seconds("12") == 12
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") < 0
    assert [_seconds(odd) for odd in (None, "", "soon", "9" * 400 + "e")] == [None] * 4


def test_weights_of_tokens():
    """min(p / p_engine, cap), by hand; 1 without a cap and where both engines agree; never infinite."""
    own, mask = (
        torch.tensor([[0.5, 0.4, 0.1], [0.2, 1e-30, 0.5]]).log(),
        torch.tensor([[True, True, True], [True] * 2 + [False]]),
    )
    engine = torch.tensor([[0.25, 0.5, 0.01], [0.2, 0.5, 0.0]]).log()
    weights = truncated_importance(own, engine, mask, 2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.8, 2.0], [1.0, 2e-30, 0.0]]))
    assert torch.equal(truncated_importance(own, engine, mask, None), mask.float())
    assert torch.equal(truncated_importance(own, own, mask, 2.0), mask.float())
    far = torch.full((2, 3), -1000.0)
    for cap in (0.3, 1.5, 2.0, 7.1):
        found = truncated_importance(torch.zeros(2, 3), far, mask, cap)
        assert torch.equal(found, mask * torch.tensor(cap)), "the cap itself, which is how it is counted"


def test_the_mean_over_what_an_engine_drew_becomes_that_over_the_actor():
    """With a cap that nothing reaches: E_engine[w f] = E_own[f], exactly, over a vocabulary."""
    draw = torch.Generator().manual_seed(0)
    own, engine = (torch.randn(1, 50, generator=draw).mul(0.3).log_softmax(-1) for _ in range(2))
    worth = torch.randn(1, 50, generator=draw)
    weights = truncated_importance(own, engine, torch.ones(1, 50, dtype=torch.bool), 50.0)
    torch.testing.assert_close((engine.exp() * weights * worth).sum(), (own.exp() * worth).sum())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "no address of a server"), ("ftp://a", "no address of a server"),
        ("http://", "no address of a server"), ("http://a b", "no address of a server"),
        ("http://a/\x1b[2J", "no address of a server"), ("http://a:99999", "no address (Port"),
        ("http://[::1", "no address (Invalid IPv6"), ("http://me:secret@a", "`api_key_env`"),
        ("http://a?key=b", "more than host, port and path"),
    ],
)  # fmt: skip
def test_an_address_is_one(url, said):
    with pytest.raises(ValueError, match="Value error") as fault:
        Server(url=url)
    assert said in str(fault.value)


def test_places_are_keys():
    assert Server(url="http://a:1/v1/").url == "http://a:1"
    assert set(Server.model_fields) - PLACES == {"seeds", "importance_cap"}, "what touches the numbers"
