"""The page of a prepared set: whole by itself, safe with any text, the same for the same set."""

from html.parser import HTMLParser

from align.data.formats.rows import Fault, Row
from align.data.preparing.card.card import Card
from align.data.preparing.step import Item
from align.tools.preparing.page import bars, page

EVIL = "<script>alert(1)</script>\x1b[31m ]]> {{ 7 * 7 }} \u202e"


def cards(count: int = 30):
    counter = Card([f"a {EVIL}"], None)
    rows = [
        Item(
            i,
            0,
            "classes",
            Row(f"f{EVIL}", i + 1, None, f"{EVIL} word " * (i % 7 + 1), None, label=f"l{i % 20} {EVIL}"),
            {},
        )
        for i in range(count)
    ]
    parts = [counter.observe(rows, [Fault("f", 3, f"found {EVIL}")])]
    return {"read": counter.merge(parts), "written": counter.merge([counter.observe(rows[: count // 2], [])])}


REPORT = [
    {"name": "privacy", "dropped": {}, "changed": 3, "found": {"EMAIL": 4}, "examples": [["f", 1, "4 EMAIL", EVIL]]},
    {"name": "deduplicate.exact", "dropped": {"the same as an earlier row": 12}, "changed": 0,
     "found": {"repeated": 12}, "examples": [["f", 2, "the same as an earlier row", "f:1"]]},
    {"name": "mix", "dropped": {}, "changed": 0, "found": {"by": "tokens", "sources": [
        {"source": EVIL, "wanted": 0.75, "amount": 3.0, "rows": 2, "tokens": 20, "share_of_rows": 0.5,
         "share_of_tokens": 0.74, "passes": 1.5}]}, "examples": []},
]  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found, self.open = [], []
        self.feed(html)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_and_runs_nothing():
    html = page(f"set {EVIL}", REPORT, cards(), f"run: x # {EVIL}")
    tags = Tags(html).found
    assert not [tag for tag, _ in tags if tag in ("script", "link", "img", "iframe")]
    assert not [
        attrs
        for _, attrs in tags
        if {"src", "href", "onclick"} & attrs.keys() and not attrs.get("href", "").startswith("#")
    ]
    policies = [attrs["content"] for tag, attrs in tags if tag == "meta" and "content" in attrs]
    assert any(policy.startswith("default-src 'none'") for policy in policies)
    assert "49" not in html.partition("Rows to look at")[2].partition("<pre>")[0].replace("word", "")
    assert html == page(f"set {EVIL}", REPORT, cards(), f"run: x # {EVIL}")


def test_it_says_what_was_done_and_what_is_there():
    html = page("set", REPORT, cards(), "")
    for words in (
        "Rows read", "Rows written", "50.0 % of those read", "12 the same as an earlier row", "4 EMAIL", "75.0 %",
        "74.0 %", "The longest rows written", "Languages", "Records that are no rows", "8 others",
    ):  # fmt: skip
        assert words in html, words


def test_a_set_without_rows_has_a_page():
    counter = Card(["a"], None)
    assert "Rows read" in page("set", [], {"read": counter.merge([])}, "")


def test_bars_add_up_what_they_do_not_show():
    names = {f"n{i}": 30 - i for i in range(20)}
    shown = bars([names, {"n0": 60}])
    assert (shown[0].name, shown[0].counts) == ("n0", (30, 60))
    assert max(share for bar in shown for share in bar.shares) == 1
    assert shown[-1].name == "8 others"
    assert sum(bar.counts[0] for bar in shown) == sum(names.values())
