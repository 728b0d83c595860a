"""The page of align.serve in a real browser: what a person sees and does there, and what it may not do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest
from browser import Browser, browser, make_parrot, needs_browser
from policies import make_policy
from serving import Service, serving
from world import align, lines

from align import reward, sft

pytestmark = [pytest.mark.slow, needs_browser, pytest.mark.timeout(300)]
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[2J&lt; "
SHADED = """
    const style = getComputedStyle(document.querySelector(".token"));
    return [style.color, getComputedStyle(document.body).backgroundColor, style.backgroundColor];"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def server(world, folder) -> Iterator[Service]:
    """A base and two results on it; votes go to votes.jsonl."""
    results = [f"{name}={make_policy(world.base, folder / name, seed=i)}" for i, name in enumerate(("one", "two"))]
    with serving([f"base={world.base}", *results], votes=folder / "votes.jsonl") as here:
        yield here


@pytest.fixture
def votes(folder) -> Path:
    return folder / "votes.jsonl"


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def page(server, window) -> Iterator[Browser]:
    """It, just opened on a large screen; nothing may have gone wrong on it at the end."""
    window.complaints()
    window.size(1280, 800)
    window.open(f"{server.url}/")
    window.until(lambda: window.all("#left option"), "the list of models")
    window.one("#options").click()
    window.fill("#max_tokens", "12")
    window.fill("#temperature", "0")
    yield window
    assert window.complaints() == []


def ask(page: Browser, text: str, answers: int = 1) -> list[str]:
    """Send a text; the answers when they are whole."""
    before = len(page.all(".turn"))
    page.one("#words").send_keys(text, "\n")
    page.until(lambda: len(page.all(".turn")) == before + 1, "the turn")
    return done(page, answers)


def done(page: Browser, answers: int = 1) -> list[str]:
    page.until(lambda: not page.all(".busy"), "the end of the answers")
    return page.texts(".turn:last-child .said")[-answers:]


def answer_of(server: Service, model: str, messages: list, **more) -> str:
    """What the API says, greedily."""
    body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0} | more
    status, told = server.post("/v1/chat/completions", body)
    assert status == 200, told
    return told["choices"][0]["message"]["content"]


def contrast(ink: str, paper: str, shade: str) -> float:
    """That of two colours of a page, as the WCAG have it, with a shade over the lower one."""
    over = [float(each) for each in re.findall(r"[\d.]+", shade)]  # color(srgb red green blue / alpha)
    ink, paper = ([int(each) / 255 for each in re.findall(r"\d+", colour)] for colour in (ink, paper))
    paper = [over[3] * high + (1 - over[3]) * low for high, low in zip(over, paper, strict=False)]
    light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: list[float]) -> float:
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in colour]
    return sum(share * each for share, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_a_conversation(page, server):
    """Answers are those of the API, over turns, with the system prompt; edited and asked again."""
    page.fill("#system", "Be brief.")
    page.choose("#left", "one")
    (first,) = ask(page, "Name the capital of France")
    asked = [{"role": "system", "content": "Be brief."}, user("Name the capital of France")]
    assert first == answer_of(server, "one", asked)
    (second,) = ask(page, "And?")
    said = [*asked, {"role": "assistant", "content": first.strip()}, user("And?")]
    assert second == answer_of(server, "one", said)
    figures = page.texts(".figures")[1]
    assert "first token" in figures
    assert "ms a token" in figures
    assert "12 tokens" in figures or "cut off" not in figures

    page.all(".edit")[1].click()
    field = page.one(".asked textarea")
    assert field.get_property("value") == "And?"
    field.clear()
    field.send_keys("Why?\n")
    page.until(lambda: "Why?" in "".join(page.texts(".asked")), "the edited turn")
    (edited,) = done(page)
    assert len(page.all(".turn")) == 2
    assert edited == answer_of(server, "one", [*said[:-1], user("Why?")])

    page.fill("#temperature", "2")
    page.fill("#seed", "3")
    page.all(".turn:last-child .answer button")[2].click()
    again = page.until(lambda: not page.all(".busy") and page.texts(".turn:last-child .said"), "the other answer")
    expected = answer_of(server, "one", [*said[:-1], user("Why?")], temperature=2, seed=4, top_p=0.95)
    assert again == [expected]
    page.one("#new").click()
    assert not page.all(".turn")


def test_tokens_and_their_probabilities(page, server):
    ask(page, "Hi")
    body = {"model": page.one("#left").get_property("value"), "messages": [user("Hi")], "max_tokens": 12}
    body |= {"temperature": 0, "logprobs": True, "top_logprobs": 5}
    told = server.post("/v1/chat/completions", body)[1]["choices"][0]["logprobs"]["content"]
    tokens = page.all(".token")
    assert "".join(page.texts(".token")) == page.texts(".said")[0]
    page.hover(tokens[0])
    page.until(lambda: page.one("#tip").is_displayed(), "the token's figures")
    share = 100 * 2.718281828459045 ** told[0]["logprob"]
    assert f"{share:.1f} %" in page.texts("#tip th")[0] or share < 1
    assert len(page.all("#tip tbody tr")) == 5
    page.one(".said").click()
    page.run("arguments[0].focus()", page.one(".said"))
    page.keys("\ue014", "\ue014")  # the right arrow, twice
    assert page.run("return [...document.querySelectorAll('.token')].findIndex(t => t.matches('.here'))") >= 1
    page.keys("\ue00c")  # Escape
    assert not page.one("#tip").is_displayed()
    page.one("#shade").click()
    assert page.run("return getComputedStyle(document.querySelector('.token')).backgroundColor") != "rgba(0, 0, 0, 0)"
    page.run("document.querySelector('.token').style.setProperty('--doubt', 1)")
    for scheme in ("light", "dark"):
        page.colours(scheme)
        assert contrast(*page.run(SHADED)) >= 4.5, f"{scheme}: a token that is shaded most can be read"


def test_side_by_side_and_a_vote(page, server, votes, world, tmp_path):
    """Two models on one prompt; the vote is a pair that align.reward reads, and the talk goes on from the winner."""
    page.choose("#left", "one")
    page.choose("#right", "two")
    left, right = ask(page, "Hi", 2)
    assert [left, right] == [answer_of(server, name, [user("Hi")]) for name in ("one", "two")]
    assert page.texts(".answer h2") == ["one", "two"]
    first, second = page.all(".answer")
    assert first.location["y"] == second.location["y"]
    before = len(lines(votes))
    page.all(".vote button")[1].click()
    page.until(lambda: "Kept:" in page.texts(".vote .soft")[0], "the vote")
    row = lines(votes)[before]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([user("Hi")], right, left)
    assert (row["models"], row["vote"]) == ({"left": "one", "right": "two"}, "right")
    assert "kept" in page.all(".answer")[1].get_attribute("class")
    assert not page.all(".vote button")[0].is_enabled()

    left, right = ask(page, "And?", 2)
    said = [user("Hi"), {"role": "assistant", "content": row["chosen"].strip()}, user("And?")]
    assert [left, right] == [answer_of(server, name, said) for name in ("one", "two")]
    page.run("document.activeElement.blur()")
    page.keys("0")
    page.until(lambda: "1 tie" in page.texts(".vote .soft")[1], "the tie")
    assert len(lines(votes)) == before + 1
    recipe = world.preferences(tmp_path / "r.yaml", reward, data={"train": [{"path": str(votes)}]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
        told = align(recipe, "--show", stage=reward)
    assert (told.status, told.err) == (0, "")


def test_names_are_hidden_until_the_vote(page):
    page.choose("#left", "one")
    page.choose("#right", "two")
    page.one("#blind").click()
    ask(page, "Hi", 2)
    assert page.texts(".answer h2") == ["Left", "Right"]
    page.all(".vote button")[0].click()
    page.until(lambda: sorted(page.texts(".answer h2")) == ["one", "two"], "the names")


def test_the_export_is_what_sft_reads(page, window, world, tmp_path):
    page.fill("#system", 'Be "brief" <b>é你')
    for text in ("Hi", "And?"):
        ask(page, text)
    page.one("#export").click()
    file = window.downloads / "conversation.jsonl"
    page.until(file.is_file, "the file")
    (row,) = lines(file)
    roles = [turn["role"] for turn in row["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert row["messages"][0]["content"] == 'Be "brief" <b>é你'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
        told = align(world.recipe(tmp_path / "r.yaml", data={"train": [{"path": str(file)}]}), "--show", stage=sft)
    assert (told.status, told.err) == (0, "")
    assert "conversation.jsonl: messages" in told.out


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_every_screen(page, width, scheme):
    """Nothing to scroll sideways, everything within reach, colours as the system has them and as the button says."""
    page.size(width, 700, finger=width < 1000)
    page.colours(scheme)
    page.choose("#left", "one")
    page.choose("#right", "two")
    page.one("#options").click()
    page.one("#words").send_keys("x" * 300)
    page.one("#send").click()
    page.until(lambda: page.all(".turn"), "the turn")
    done(page, 2)
    wide = "const p = document.documentElement; return [p.scrollWidth - p.clientWidth, p.scrollHeight - p.clientHeight]"
    assert page.run(wide) == [0, 0]
    first, second = page.all(".answer")
    assert (first.location["y"] == second.location["y"]) == (width > 1000)
    box = page.one("#send").rect
    assert box["x"] + box["width"] <= width
    assert box["y"] + box["height"] <= 700
    shade = "return getComputedStyle(document.body).backgroundColor"
    dark = page.run(shade) == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")
    page.one("#theme").click()
    assert (page.run(shade) == "rgb(21, 24, 28)") != dark


def test_keys_alone(page):
    """Everything can be reached with the tabulator, and each stop has a name."""
    page.choose("#right", "two")
    ask(page, "Hi", 2)
    page.run("document.querySelector('#left').focus()")
    names = []
    for _ in range(60):
        page.keys("\ue004")
        names.append(page.run(
            "const e = document.activeElement; return e === document.body ? null :"
            " e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent"
        ))  # fmt: skip
        if None in names:
            break
    assert None not in names[:-1]
    assert all(name.strip() for name in names if name is not None)
    for name in ("Settings", "System prompt", "Edit", "Regenerate", "Go on with this", "Tie", "Your message", "Send"):
        assert any(name in (seen or "") for seen in names), (name, names)


def test_it_asks_nobody_else_and_its_policy_is_strict(page, server):
    page.requested()
    page.open(f"{server.url}/")
    page.until(lambda: page.all("#left option"), "the list of models")
    assert page.one("#max_tokens").get_property("value") == "128", "a quarter of what the model has room for"
    ask(page, "Hi")
    assert page.texts(".fault") == [""]
    asked = page.requested()
    assert {f"{server.url}/{name}" for name in ("page/main.js", "v1/models", "v1/chat/completions")} <= {*asked}
    assert [url for url in asked if not url.startswith(f"{server.url}/")] == []
    headers = urlopen(server.url).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    page.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))")
    assert page.run("return window.ran") is None
    refused = page.complaints()
    assert refused
    assert [each for each in refused if "Content Security Policy" not in each] == []


def test_a_model_that_writes_markup(folder, window):
    """Its words are text, whatever they are; so are a user's, and a model's name."""
    parrot = make_parrot(folder / "parrot", EVIL)
    with serving([f"a-b.c={parrot}"]) as here:
        window.size(1280, 800)
        window.open(f"{here.url}/")
        window.until(lambda: window.all("#left option"), "the list of models")
        window.one("#options").click()
        window.fill("#max_tokens", "200")
        window.one("#words").send_keys(f"{EVIL[:60]}\n")
        window.until(lambda: window.all(".turn"), "the turn")
        (said,) = done(window)
        assert "<script>alert(2)</script>" in said
        assert "onerror=alert(1)" in window.texts(".asked .text")[0]
        assert window.run("return document.querySelectorAll('#talk img, #talk script').length") == 0
        window.hover(window.all(".token")[3])
        window.until(lambda: window.one("#tip").is_displayed(), "the token's figures")
        assert window.run("return document.querySelectorAll('#tip img, #tip script').length") == 0
        assert window.complaints() == []


def test_stop_and_a_server_that_goes(folder, window):
    """A stopped answer keeps what was said, and leaves the batch; a server that is killed is told of."""
    words = [make_parrot(folder / "endless", "abc ", 4096), "--port", 0]
    command = [sys.executable, "-m", "align.serve", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[-1]
        assert url.startswith("http://127.0.0.1:")
        here = Service(url, None)
        window.size(1280, 800)
        window.open(f"{here.url}/")
        window.until(lambda: window.all("#left option"), "the list of models")
        window.one("#options").click()
        window.fill("#max_tokens", "4000")
        window.one("#words").send_keys("Go\n")
        window.until(lambda: window.texts(".said") and len(window.texts(".said")[0]) > 8, "the first words")
        window.keys("\ue00c")  # Escape
        (said,) = done(window)
        assert 8 < len(said) < 4000
        assert "stopped" in window.texts(".figures")[0]
        window.until(lambda: "align_requests_running 0" in here.get("/metrics"), "its end")
        window.one("#words").send_keys("Again\n")
        window.until(lambda: len(window.texts(".said")) == 2 and window.texts(".said")[1], "the first words")
        process.kill()
        done(window)
        assert "connection broke" in window.texts(".fault")[1]
        assert window.texts(".said")[1], "what came before stays"
        window.one("#words").send_keys("Hello?\n")
        window.until(lambda: len(window.texts(".fault")) == 3 and window.texts(".fault")[2], "the fault")
        assert window.texts(".fault")[2] == "The server cannot be reached."


def test_a_key(folder, world, window):
    """The page asks for the key where the server has one, and votes need it too."""
    with serving([world.base], key="s3cret", votes=folder / "keyed.jsonl") as here:
        window.size(1280, 800)
        window.open(f"{here.url}/")
        window.until(lambda: window.one("#key").is_displayed(), "the field for the key")
        assert not window.all("#left option")
        window.one("#key").send_keys("s3cret\t")
        window.until(lambda: window.all("#left option"), "the list of models")
        window.fill("#max_tokens", "3")
        ask(window, "Hi")
        assert window.texts(".fault") == [""]
        assert here.post("/votes", {})[0] == 401


class Stranger(BaseHTTPRequestHandler):
    """A page of another site, which sends what it may."""

    target = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        row = json.dumps({"messages": [user("Hi")], "vote": "left", "answers": [
            {"model": "a", "content": "evil"}, {"model": "b", "content": "good"}]})  # fmt: skip
        self.wfile.write(
            f"""<form method=post enctype=text/plain action="{self.target}/votes"><input name='{row[:-1]}, "x": "'
            value='"}}'></form><script>
            const send = (mode, type) => fetch("{self.target}/votes", {{method: "POST", mode, body: {json.dumps(row)},
              headers: {{"Content-Type": type}}}}).then(r => r.type + r.status, e => e.name);
            Promise.all([send("cors", "application/json"), send("no-cors", "text/plain"), send("cors", "text/plain")])
              .then(told => {{ document.title = told.join(); document.forms[0].submit(); }});
            </script>""".encode()
        )

    def log_message(self, *_words: object) -> None:
        """Silent."""


def test_no_other_site_votes(server, votes, window):
    Stranger.target = server.url
    site = HTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    try:
        before = votes.read_bytes()
        window.open(f"http://localhost:{site.server_port}/")
        window.until(lambda: window.driver.current_url == f"{server.url}/votes", "the form's own way")
        assert votes.read_bytes() == before
        assert "error" in window.one("body").text
    finally:
        site.shutdown()
