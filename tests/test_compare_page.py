"""The page of a comparison: whole by itself, safe with any text, usable in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from evaluations import EVIL, compare_sweeps, evaluated, make_sweeps, recipe, result, trained


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    return make_sweeps(tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(scope="module")
def swept(sweeps, tmp_path_factory):
    return compare_sweeps(sweeps, tmp_path_factory.mktemp("swept"))


class Page(HTMLParser):
    """Tags with their attributes, and what the scripts hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, data):
        if self.scripts and self.tags[-1][0] == "script":
            self.scripts[-1] += data


class TestPage:
    def test_it_needs_nothing_from_elsewhere_and_runs_nothing_of_the_data(self, swept):
        page = Page(swept[1])
        assert not [
            attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys() and "#" not in attrs.get("href", "#")
        ]
        assert [attrs for tag, attrs in page.tags if tag == "script"] == [
            {"type": "application/json", "id": "data"},
            {},
        ]
        assert not [tag for tag, _ in page.tags if tag == "b"]
        data = json.loads(page.scripts[0])
        assert data["prompts"][0] == f"question 0 {EVIL}"
        assert data["runs"][1]["responses"][0] == f"dpo1 answers 0 {EVIL}"

    def test_the_four_questions_are_answered_first(self, swept):
        """Which won, at which KL, how surely, at what cost, each with units and with its words explained."""
        body = swept[1].partition("<body>")[2]
        found = re.findall(r"<dt>(.*?)</dt>\s*<dd>\s*<p>(.*?)</p>\s*<p class=\"soft\">(.*?)</p>", body)
        assert [asked for asked, _, _ in found] == ["Which won?", "At which KL?", "How surely?", "At what cost?"]
        told = "dpo wins 1 of 3 pairs", "at KL 9.45 nats", "78.4 % of the time (", "ppo 30 min 0 s"
        explained = "more is better", "0 is not at all", "50 % is an even match", "time × devices"
        for (_, answer, gloss), words, meant in zip(found, told, explained, strict=True):
            assert words in answer
            assert meant in gloss
        assert body.index("At what cost?") < min(body.index('class="grid'), body.index("<svg"))

    def test_colours_are_the_pages_own(self, swept):
        body = swept[1].partition("<body>")[2].partition("<script")[0]
        assert "var(--c1)" in body
        assert not re.search(r"(fill|stroke): ?#[0-9a-f]{6}", body)

    def test_training_curves_are_drawn_or_said_to_be_missing(self, sweeps, tmp_path):
        run = tmp_path / "train"
        run.mkdir()
        lines = [{"step": step, "split": "train", "kl_per_token": step / 9} for step in range(9)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        drawn = evaluated(tmp_path / "drawn", training=trained("sft", run=str(run)))
        _, page = result(recipe(tmp_path / "c.yaml", drawn, sweeps["ppo9"]))
        assert "sft: KL to the reference per token" in page
        assert "No training curves were found of ppo9." in page

    @pytest.mark.slow
    @pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
    @pytest.mark.parametrize("width", [320, 390, 1280])
    def test_a_browser_pages_through_it_without_scrolling_sideways(self, swept, tmp_path, width):
        """The page's own policy lets its script run; the test's script needs it gone to tell what it sees."""
        look = """<script>
          const page = document.documentElement, place = document.getElementById("place"), seen = [place.textContent];
          document.getElementById("after").click();
          seen.push(place.textContent, page.scrollWidth - page.clientWidth);
          parent.postMessage(JSON.stringify(seen), "*");</script>"""
        open_page = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", swept[1])
        (tmp_path / "own.html").write_text(swept[1])
        (tmp_path / "seen.html").write_text(open_page.replace("</body>", f"{look}</body>"))
        (tmp_path / "frame.html").write_text(  # a window is at least 500 wide, a frame may be a phone's
            f"<script>onmessage = (e) => {{ document.title = e.data; }}</script><iframe src='seen.html' width={width}>"
        )
        browser = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=2000",
            "--dump-dom",
        ]
        own, frame = (
            subprocess.run([*browser, (tmp_path / name).as_uri()], capture_output=True, text=True, timeout=60).stdout
            for name in ("own.html", "frame.html")
        )
        assert '<span id="place" aria-live="polite">1 of 60</span>' in own
        assert '<title>["1 of 60","2 of 60",0]</title>' in frame
