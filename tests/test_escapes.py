"""Escape codes in rows, columns, labels, file names and messages are shown, never sent to a terminal."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from world import align, pair, talk, write_rows

from align import classify, dpo, sft
from align.recipe.errors import UserError, printable
from align.training.screen import Screen

CLIPBOARD, COLOUR, BIDI = "\x1b]52;c;bWFsd2FyZQ==\x07", "\x9b31m", "\u202edecrypt\u2066"
EVIL = f"a{CLIPBOARD}b{COLOUR}c{BIDI}\x08\r\x00d"
SHOWN = r"a\x1b]52;c;bWFsd2FyZQ==\x07b\x9b31mc\u202edecrypt\u2066\x08\r\x00d"


def harmless(text: str) -> bool:
    """Whether nothing in it makes a terminal act."""
    return not any((unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in BIDI[::8] for c in text)


def test_what_is_spelt_out():
    assert printable(EVIL) == SHOWN
    assert harmless(printable(EVIL))
    assert not harmless(EVIL)
    for plain in ("", "né 你好 🌸 שלום\u200f العربية\u200d", "two\nlines\tand a tab", "[bold]markup[/bold]", "\\x1b"):
        assert printable(plain) == plain
    assert printable("\udcff\u2028") == r"\udcff\u2028"
    (problem,) = UserError(f"one\n{EVIL}").problems
    assert problem == rf"one\n{SHOWN}"


@given(st.text(st.characters()))
def test_any_text_is_made_harmless(text):
    shown = printable(text)
    assert harmless(shown)
    assert printable(shown) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("stage", "rows"),
    [
        (sft, [talk(EVIL, f"so {EVIL}")]),
        (dpo, [pair("Hi", "there") | {"chosen": EVIL, "rejected": EVIL[:9]}]),
        (classify, [{"text": f"{EVIL} {i}", "label": EVIL if i % 2 else "ham"} for i in range(4)]),
    ],
)
def test_examples_are_shown_harmless(world, here, stage, rows):
    file = write_rows(here / "rows.jsonl", rows)
    recipe = world.recipe(
        here / "recipe.yaml",
        stage=stage.__name__.removeprefix("align."),
        data={"train": [{"path": str(file)}], "eval": {"sources": []}},
    )
    told = align(recipe, "--show", stage=stage)
    assert told.status == 0, told.err
    assert harmless(told.out)
    assert r"a\x1b]52;c;bWFsd2FyZQ==\x07b" in told.out


def test_messages_are_harmless(world, here):
    """Of rows that cannot be taken, columns that nobody knows, keys of a recipe, files that are not there."""
    for name, content in (
        ("a.jsonl", '{"messages": [{"role": "\\u001b[2J", "content": "x"}]}\n'),
        ("b.jsonl", '{"\\u001b[2J": 1}\n'),
        ("c.csv", "\x1b[2J,b\n1,2\n"),
    ):
        (here / name).write_text(content)
        told = align(world.recipe(here / "recipe.yaml", data={"train": [{"path": name}]}))
        assert told.status == 2
        assert r"\x1b[2J" in told.err
        assert harmless(told.err)
    for word in ("\x1b[2J.yaml", "-\x1b[2J"):
        told = align(word)
        assert told.status == 2
        assert harmless(told.err)
        assert r"\x1b[2J" in told.err
    for override in ('model.base="\\e[2J"', 'model."\\e[2J"=1', "\x1b[2J=1"):
        told = align(world.recipe(here / "recipe.yaml"), override)
        assert (told.status, harmless(told.err)) == (2, True), told.err


def test_the_screen_takes_no_markup_and_no_codes():
    """From names of metrics, and from what it says that it is doing."""
    out = io.StringIO()
    screen = Screen(Console(file=out, width=120, force_terminal=True), 3)
    with screen:
        screen.tell({"step": 1, "split": "eval", "f1/[red]\x1b[2J": 0.5}, quiet=False)
        list(screen.track([1, 2], "reading [/red] [x"))
        screen.bars.refresh()
    assert r"f1/[red]\x1b[2J 0.5" in out.getvalue()
