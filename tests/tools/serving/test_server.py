"""The server on a tiny trunk: adapters side by side, scores, what comes and goes, and what it counts."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from models.tiny import save_encoder
from plain import Scorer
from policies import make_policy
from results import KINDS, change, save_result
from serving import ADAPTERS, Service, generated, plain_model, serving
from world import Child, align

from align import serve
from align.recipe.schema import Lora
from align.tools.serving.limits import Limits
from align.training.labelling.classifier import Classifier

ASKED = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def service(shop):
    models = [shop[name] for name in (*ADAPTERS, "reward", "classify")]
    with serving(models, adapters=shop["base"].parent, limits=Limits(tokens=200)) as service:
        yield service


def text(service, model: str, prompt, **options) -> list[int]:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 16, "return_token_ids": True} | options
    status, reply = service.post("/v1/completions", body)
    assert status == 200, reply
    return reply["choices"][0]["token_ids"]


def test_each_model_answers_as_transformers_do(service, shop):
    """At once, by name, the base too; in float32."""
    prompts = [np.random.default_rng(i).integers(3, 250, 5 + 3 * i).tolist() for i in range(8)]
    models = [*ADAPTERS, "base"]
    plain = {name: plain_model(shop["base"], shop.get(name) if name in ADAPTERS else None) for name in models}
    asked = [(models[i % 4], prompt) for i, prompt in enumerate(prompts * 2)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = [*pool.map(lambda pair: text(service, *pair), asked)]
    for (name, prompt), said in zip(asked, found, strict=True):
        assert said == generated(plain[name], prompt, 16), name
    told = json.loads(service.get("/v1/models"))["data"]
    kinds = {"base": "base", "reward": "reward", "classify": "classify"} | dict.fromkeys(ADAPTERS, "adapter")
    assert {model["id"]: model["kind"] for model in told} == kinds
    assert [json.loads(service.get(f"/v1/models/{model['id']}")) for model in told] == told


def test_scores_are_those_of_transformers(service, shop):
    scorer = Scorer.load(shop["reward"], shop["base"])
    asked = {"model": "reward", "text_1": "Hello", "text_2": ["yes", "no, never"]}
    status, reply = service.post("/score", asked)
    assert status == 200, reply
    scores = [each["score"] for each in reply["data"]]
    scorer.tokenizer.chat_template = service.engine.models["reward"].voice.tokenizer.chat_template
    expected = [scorer.score("Hello", answer) for answer in asked["text_2"]]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert reply["data"][0]["normalized"] == pytest.approx((scores[0] - 0.5) / 2)
    talks = [[*ASKED, {"role": "assistant", "content": answer}] for answer in asked["text_2"]]
    _, again = service.post("/score", {"model": "reward", "messages": talks})
    assert [each["score"] for each in again["data"]] == pytest.approx(scores, abs=1e-5)
    _, one = service.post("/score", {"model": "classify", "input": "buy now"})
    (told,) = one["data"]
    assert set(told["probabilities"]) == {"ham", "spam"}
    assert sum(told["probabilities"].values()) == pytest.approx(1)
    assert told["score"] == max(told["probabilities"].values())
    for wrong in ({"model": "red", "input": "a"}, {"model": "reward"}, {"model": "classify", "messages": talks}):
        assert service.post("/score", wrong)[0] == 400
    assert service.post("/v1/completions", {"model": "reward", "prompt": "a"})[0] == 400


@pytest.fixture(scope="module")
def spam(tmp_path_factory):
    """Classifiers on trunks of their own: a LoRA on an encoder, and an encoder trained whole."""
    folder = tmp_path_factory.mktemp("spam")
    base = save_encoder(folder / "bert")
    loras = {"lora": Lora(r=2, alpha=4, targets=["query", "value"]), "whole": None}
    return {
        name: save_result(base, folder / name, "classify", *KINDS["classify"], lora) for name, lora in loras.items()
    }


def test_encoders_classify_beside_other_models_and_alone(shop, spam):
    texts = ["buy now", "", "Hello " * 40, "win " * 3]  # one is longer than it was trained on, and is cut
    expected = {name: Classifier(folder).probabilities(texts) for name, folder in spam.items()}
    for models in ([shop["red"], *spam.values()], [spam["lora"]]):
        with serving(models) as service:
            told = {model["id"]: model for model in json.loads(service.get("/v1/models"))["data"]}
            assert (told["lora"]["kind"], told["lora"]["max_model_len"]) == ("classify", 32)
            for name in expected.keys() & told.keys():
                status, reply = service.post("/score", {"model": name, "input": texts})
                assert status == 200, reply
                found = [list(each["probabilities"].values()) for each in reply["data"]]
                assert np.abs(np.array(found) - expected[name]).max() < 1e-6
                assert [each["label"] for each in reply["data"]] == [
                    ["ham", "spam"][row.argmax()] for row in expected[name]
                ]
            assert service.post("/score", {"model": "lora", "input": "\ud800"})[0] == 400
            assert service.post("/v1/completions", {"model": "lora", "prompt": "a"})[0] == 400
            assert 'align_replies_total{path="/score",status="200"}' in service.get("/metrics")
            if "red" in told:
                assert text(service, "red", [5, 6, 7])


def test_adapters_come_and_go(service, shop):
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    before = {name: text(service, name, [5, 6, 7]) for name in ("red", "green")}
    assert service.post(load, {"lora_name": "new", "lora_path": "red/final"})[0] == 200
    assert text(service, "new", [5, 6, 7]) == before["red"]
    status, told = service.post(load, {"lora_name": "new", "lora_path": "green/final"})
    assert (status, "load_inplace" in told["error"]["message"]) == (400, True)
    assert service.post(load, {"lora_name": "new", "lora_path": "green/final", "load_inplace": True})[0] == 200
    assert text(service, "new", [5, 6, 7]) == before["green"], "nothing is left of the one before"
    assert service.post(unload, {"lora_name": "new"})[0] == 200
    assert service.post(unload, {"lora_name": "new"})[0] == 404
    assert service.post(unload, {"lora_name": "base"})[0] == 400
    assert service.post("/v1/completions", {"model": "new", "prompt": "a"})[0] == 404
    assert len(service.engine.running.adapters.known) == 5


def test_only_adapters_of_this_trunk_below_the_folder_are_loaded(service, shop, tmp_path):
    folder = shop["base"].parent
    other = make_policy(shop["base"], tmp_path / "outside")
    (folder / "link").symlink_to(other)
    damaged = shutil.copytree(shop["red"], folder / "damaged")
    change(damaged / "align.json", fingerprint="0" * 16)
    for path, told in (
        (str(other), "no such folder"),
        ("link", "no such folder"),
        ("../" * 20 + "etc", "no such folder"),
        ("/etc", "no such folder"),
        ("red/final/../../../..", "no such folder"),
        ("a\0b", "no such folder"),
        ("nowhere", "no such folder"),
        ("base", "has no align.json"),
        ("damaged", "was trained on a trunk with fingerprint 0000"),
    ):
        status, reply = service.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
        assert status in (400, 404)
        assert told in reply["error"]["message"], reply
        assert str(tmp_path / "outside") not in reply["error"]["message"] or path == str(other)
    for name in ("../x", "", "a b", "a\n", "x" * 101):
        assert service.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "red/final"})[0] == 400
    assert "x" not in service.engine.models


@pytest.mark.parametrize("instead", [None, "green/final"])
def test_a_request_that_is_still_read_never_gets_another_models_answer(service, instead):
    """Its model goes, or another comes in its place, while its texts wait to become tokens."""
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    assert service.post(load, {"lora_name": "new", "lora_path": "red/final"})[0] == 200
    body = {"prompt": [f"{i:03}" * 20 for i in range(300)], "temperature": 0, "max_tokens": 3}  # long, taken together
    wanted = service.post("/v1/completions", body | {"model": "red"})[1]
    others = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            pool.submit(asyncio.run, service.desk.do(others.wait, long=True))  # as long texts before it would
            while not service.desk.waiting:
                time.sleep(0.001)
            asked = pool.submit(service.post, "/v1/completions", body | {"model": "new"})
            while service.desk.waiting < 2:
                assert not asked.done(), asked.result()
                time.sleep(0.001)
            if instead:
                change = {"lora_name": "new", "lora_path": instead, "load_inplace": True}
                assert service.post(load, change)[0] == 200
            assert service.post(unload, {"lora_name": "new"})[0] == 200
            assert not asked.done(), "it was read before its model went"
        finally:
            others.set()
        status, reply = asked.result()
    if status == 200:
        assert [each["text"] for each in reply["choices"]] == [each["text"] for each in wanted["choices"]]
    else:
        assert (status, "ask again" in reply["error"]["message"]) == (409, True)


def test_what_it_counts(service):
    text(service, "red", [5, 6, 7], max_tokens=4, ignore_eos=True)
    lines = service.get("/metrics").splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(values['align_generated_tokens_total{model="red"}']) >= 4
    assert int(values['align_replies_total{path="/v1/completions",status="200"}']) >= 1
    assert int(values["align_first_token_seconds_count"]) >= 1
    assert values['align_first_token_seconds_bucket{le="+Inf"}'] == values["align_first_token_seconds_count"]
    assert 0 <= int(values["align_kept_tokens"]) <= int(values["align_kept_tokens_limit"])
    assert values["align_faults_total"] == "0"
    kinds = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    assert all(any(name.startswith(kind) for kind in kinds) for name in values)


WRONG = {
    "no JSON": (b"{", 400),
    "no object": (b"[]", 400),
    "NaN": (b'{"model": "red", "prompt": "a", "temperature": NaN}', 400),
    "deep": (b'{"model": "red", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "huge number": (b'{"model": "red", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400),
    "huge body": (b" " * (2**20 + 1), 413),
    "half a character": (b'{"model": "red", "prompt": "\\ud800"}', 400),
    "bytes": (b'{"model": "red", "prompt": "\xff"}', 400),
    "unknown model": ({"model": "x" * 10_000, "prompt": "a"}, 404),
    "no model": ({"prompt": "a"}, 400),
    "no prompt": ({"model": "red"}, 400),
    "empty prompt": ({"model": "red", "prompt": ""}, 400),
    "no tokens": ({"model": "red", "prompt": []}, 400),
    "negative token": ({"model": "red", "prompt": [-1]}, 400),
    "token without row": ({"model": "red", "prompt": [10**6]}, 400),
    "tokens and texts": ({"model": "red", "prompt": [1, "a"]}, 400),
    "too many": ({"model": "red", "prompt": [[5]] * 1025, "max_tokens": 1}, 400),
    "n": ({"model": "red", "prompt": "a", "n": 129}, 400),
    "a bool": ({"model": "red", "prompt": "a", "max_tokens": True}, 400),
    "too long": ({"model": "red", "prompt": "a", "max_tokens": 201}, 400),
    "longer than the context": ({"model": "red", "prompt": [5] * 100, "max_tokens": 200}, 400),
    "empty stop": ({"model": "red", "prompt": "a", "stop": ""}, 400),
    "temperature": ({"model": "red", "prompt": "a", "temperature": 1e999}, 400),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_requests_get_the_right_status(service, what):
    body, wanted = WRONG[what]
    status, reply = service.post("/v1/completions", body)
    assert (status, set(reply["error"])) == (wanted, {"message", "type", "param", "code"}), reply
    assert len(reply["error"]["message"]) < 1000
    assert text(service, "red", [5, 6, 7])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": [10**6]}, "the prompt has the token '1000000'"),
        ({"prompt": [-1]}, "prompt: Input should be greater than or equal to 0"),
        ({"prompt": 5}, "prompt: Input should be a valid string or Input should be a valid list"),
        ({"prompt": "a", "stop": ["a"] * 100}, "stop: List should have at most 16 items"),
    ],
)
def test_what_is_wrong_is_told_of_the_kind_that_was_given(service, body, told):
    status, reply = service.post("/v1/completions", {"model": "red"} | body)
    assert (status, reply["error"]["message"][: len(told)]) == (400, told)


def test_tools_that_are_nested_too_deeply_are_no_fault_of_the_server(service, capfd):
    """JSON may be nested deeper than what writes prompts can follow."""
    for depth in (50, 600, 900):
        deep = []
        for _ in range(depth):
            deep = [deep]
        tool = {"type": "function", "function": {"name": "f", "parameters": {"x": deep}}}
        body = {"model": "red", "messages": ASKED, "tools": [tool], "max_tokens": 1}
        status, reply = service.post("/v1/chat/completions", body)
        told = "context length" if depth == 50 else "nested at most 100 deep"
        assert (status, told in reply["error"]["message"]) == (400, True), reply
    assert capfd.readouterr().err == ""


def test_a_client_that_leaves_within_its_body_is_counted_and_no_fault(service, capfd):
    counted = lambda: 'align_replies_total{path="/score",status="499"} 1' in service.get("/metrics")  # noqa: E731
    line = socket.create_connection(("127.0.0.1", service.port))
    line.sendall(b"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
    line.close()
    until(counted)
    assert capfd.readouterr().err == ""


def test_wrong_paths_methods_hosts_and_origins(service):
    assert service.post("/v1/nothing", {})[0] == 404
    assert service.post("/health", {})[0] == 405
    for name in ("../app.py", "%2e%2e%2fapp.py", "..%2f..%2fserve.py", "nothing.js", "__init__.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            service.get(f"/page/{name}")
    ask = {"model": "red", "prompt": "a", "max_tokens": 1}
    assert service.post("/v1/completions", ask, Host="evil.example")[0] == 403, "a name bound anew to this address"
    assert service.post("/v1/completions", ask, Origin="http://evil.example")[0] == 403, "a page from elsewhere"
    assert service.post("/v1/completions", ask, Origin="null")[0] == 403
    assert service.post("/v1/completions", ask, Origin=service.url)[0] == 200
    assert service.post("/v1/completions", ask, Host=f"localhost:{service.port}")[0] == 200


def asking(service, **options) -> socket.socket:
    """A connection on which a request has been sent and nothing read."""
    body = json.dumps({"model": "red", "prompt": [5, 6, 7], "ignore_eos": True} | options).encode()
    line = socket.create_connection(("127.0.0.1", service.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    line.sendall(head.encode() + body)
    return line


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to be"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_request_whose_client_has_left_leaves_the_batch(shop, stream):
    with serving([shop["red"]]) as service:
        lines = [asking(service, max_tokens=240, n=2, stream=stream) for _ in range(4)]
        until(lambda: service.engine.busy == 8)
        for line in lines:
            line.close()
        began = service.engine.steps
        until(lambda: service.engine.busy == service.engine.waiting == 0)
        assert service.engine.steps - began < 200, "it went on to the end"
        assert text(service, "red", [5, 6, 7])


@pytest.mark.slow
def test_more_requests_than_may_wait_are_refused(shop):
    with serving([shop["red"]], limits=Limits(waiting=3), rows=1) as service:
        lines = [asking(service, max_tokens=100) for _ in range(2)]
        until(lambda: service.engine.busy == 1)
        with ThreadPoolExecutor(8) as pool:
            ask = {"model": "red", "prompt": "a", "max_tokens": 1}
            replies = [*pool.map(lambda _: service.post("/v1/completions", ask), range(8))]
        statuses = sorted(status for status, _ in replies)
        assert set(statuses) == {200, 429}
        assert next(reply for status, reply in replies if status == 429)["error"]["type"] == "rate_limit_error"
        for line in lines:
            line.close()
        until(lambda: service.engine.busy == 0)
        assert text(service, "red", [5, 6, 7])


def test_long_texts_hold_up_each_other_alone(shop):
    """They take their time to become tokens. What is short passes them; what would wait too long is refused."""
    path, long = "/v1/chat/completions", {"model": "red", "messages": [{"role": "user", "content": "word " * 4_000}]}
    short = {"model": "red", "messages": ASKED, "max_tokens": 1}
    others = threading.Event()
    with serving([shop["red"]], limits=Limits(waiting=5)) as service, ThreadPoolExecutor(8) as pool:
        try:
            pool.submit(asyncio.run, service.desk.do(others.wait, long=True))  # another, as long as this test wants
            asked = [pool.submit(service.post, path, long) for _ in range(3)]
            until(lambda: service.desk.waiting == 4)
            assert service.post(path, short)[0] == 200
            assert not any(each.done() for each in asked)
            asked.append(pool.submit(service.post, path, long))
            until(lambda: service.desk.waiting == 5)
            assert service.post(path, long)[0] == 429
        finally:
            others.set()
        for each in asked:
            status, reply = each.result()
            assert (status, "maximum context length" in reply["error"]["message"]) == (400, True)


@pytest.mark.slow
def test_a_request_that_takes_too_long_is_ended(shop):
    with serving([shop["red"]], limits=Limits(seconds=0.05)) as service:
        status, reply = service.post(
            "/v1/completions", {"model": "red", "prompt": [5] * 10, "max_tokens": 240, "n": 32}
        )
        assert (status, reply["error"]["type"]) == (504, "timeout_error")
        until(lambda: service.engine.busy == 0)


def test_a_step_that_fails_ends_its_requests_and_no_others(service, monkeypatch, capsys):
    running = service.engine.running

    def fails(*_given):
        monkeypatch.undo()
        raise RuntimeError("planted")

    monkeypatch.setattr(running, "_go_on", fails)
    status, reply = service.post("/v1/completions", {"model": "red", "prompt": "a", "max_tokens": 5})
    assert (status, reply["error"]["message"]) == (500, "internal error")
    assert text(service, "red", [5, 6, 7])
    assert json.loads(service.get("/health")) == {"status": "ok"}
    service.engine.faults = 0


def started(folder, model, *words) -> tuple[Child, Service]:
    """The command in a process of its own, once it serves."""
    child = Child(folder, model, "--port", 0, "--dtype", "float32", *words, stage=serve)
    until(lambda: "serving" in child.log.read_text() or child.process.exitcode is not None, 100)
    return child, Service(child.log.read_text().split(" at ")[-1].strip(), None)


@pytest.mark.slow
def test_the_command_serves_and_ends_when_asked(shop, cache, tmp_path, monkeypatch):
    """A process of its own; SIGTERM lets a running request end."""
    monkeypatch.setenv("ALIGN_CACHE", str(cache))
    child, here = started(tmp_path, shop["red"])
    body = json.dumps({"model": "red", "prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "stream": True})
    request = urllib.request.Request(f"{here.url}/v1/completions", body.encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        reply.readline()
        os.kill(child.process.pid, signal.SIGTERM)
        assert reply.read().endswith(b"data: [DONE]\n\n")
    told = child.wait()
    assert (told.status, told.err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("grace", [1, 600])
def test_a_request_that_does_not_end_is_cut_off(shop, cache, tmp_path, monkeypatch, grace):
    """Its body does not come. After the grace, or at once by a second signal. And a line says that other machines reach
    the server, and who can use it."""
    monkeypatch.setenv("ALIGN_CACHE", str(cache))
    (tmp_path / "key").write_text("sesame")
    key = ["--api-key-file", tmp_path / "key"] if grace == 1 else []
    child, here = started(tmp_path, shop["red"], "--host", "0.0.0.0", "--grace", grace, *key)
    line = socket.create_connection(("127.0.0.1", here.port))
    line.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    here.get("/health")  # what came before it is a running request now
    began = time.monotonic()
    os.kill(child.process.pid, signal.SIGTERM)
    child.process.join(0.5)
    assert child.process.exitcode is None, "it waits"
    if grace == 600:
        os.kill(child.process.pid, signal.SIGTERM)
    told = child.wait()
    assert time.monotonic() - began < 15, "half of the time that a body may take"
    assert b" 200 " not in line.recv(1000)
    who = "whoever has the key" if key else "anybody"
    assert (told.status, told.err.count("\n")) == (0, 1), told.err
    assert told.err.startswith(f"other machines reach 0.0.0.0, and {who} can use it")


@pytest.mark.parametrize(
    ("host", "local"),
    [(host, True) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")]
    + [(host, False) for host in ("0.0.0.0", "::", "192.168.1.5", "fe80::1", "localhost.example.org")],
)
def test_which_addresses_are_this_machine_alone(host, local):
    assert serve.is_local(host) == local


@pytest.mark.slow
def test_a_template_without_end_holds_up_nobody(shop, cache, tmp_path, monkeypatch):
    """It has its time in the main thread, which another process's tests have not: the command itself."""
    monkeypatch.setenv("ALIGN_CACHE", str(cache))
    endless = shutil.copytree(shop["red"], tmp_path / "endless")
    (endless / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    child, here = started(tmp_path, shop["red"], "--adapters", tmp_path)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(here.post, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "endless"})
        replies = 0
        while not loading.done():
            here.get("/health")
            replies += 1
    status, reply = loading.result()
    assert (status, "takes more than 3 seconds" in reply["error"]["message"]) == (400, True)
    assert replies > 10
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.wait().status == 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "name what is to be served"),
        (["nowhere"], "there is no model"),
        (["--base", "nowhere"], "there is no model"),
        (["{red}", "{red}"], "two models are called 'red'"),
        (["/nowhere/final"], "there is no folder /nowhere/final"),
        (["a b={red}"], "cannot be the name of a model"),
        (["{base}", "x={base}"], "several bases"),
        (["{red}", "--port", "99999"], "--port"),
        (["{red}", "--max-tokens", "0"], "--max-tokens: 1 or more"),
        (["{red}", "--adapters", "nowhere"], "no folder"),
        (["{whole}", "--adapters", "."], "no model is served that adapters could stand on"),
        (["red={whole}", "{red}"], "two models are called 'red'"),
        (["{red}", "--api-key-file", "nowhere"], "--api-key-file"),
        (["{red}", "--host", "256.0.0.1", "--port", "0"], "--host"),
        (["{red}", "--colour", "red"], "--help tells more"),
    ],
)
def test_wrong_command_lines_are_told(shop, spam, argv, told):
    result = align(*(word.format(**shop, **spam) for word in argv), stage=serve)
    assert (result.status, result.out) == (2, "")
    assert told in result.err
    assert "Traceback" not in result.err
