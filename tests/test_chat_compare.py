"""Several models side by side in align.chat, and what is typed with prompt_toolkit."""

from __future__ import annotations

import io
import json
import sys

import pytest
from policies import make_policy
from test_chat import Terminal, piped
from world import align

from align import chat
from align.tools.chat.side import Columns
from align.tools.chat.speaker import load_speakers
from align.tools.chat.typed import Typed, reader, typed

WARM = ("--temperature", 1.5, "--max-new", 8, "--seed", 5, "--dtype", "float32")


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return [make_policy(world.base, folder / name, seed=seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture
def talk(monkeypatch, here):
    def run(text: str, *argv: object, terminal=piped):
        monkeypatch.setattr(sys, "stdin", terminal(text))
        return align(*argv, *WARM, stage=chat)

    return run


def test_each_says_what_it_says_alone(results, talk, here):
    alone = [talk("Hi\nAnd?\n", model).out.splitlines() for model in results]
    assert alone[0] != alone[1]
    told = talk("Hi\nAnd?\n", results[0], "--compare", results[1])
    assert (told.status, told.err) == (0, "")
    for number, (asked, line) in enumerate(zip(("Hi", "And?"), told.out.splitlines(), strict=True)):
        answers = [{"model": str(m), "content": said[number]} for m, said in zip(results, alone, strict=True)]
        assert json.loads(line) == {"prompt": asked, "answers": answers}
    told = talk("Hi\n/save both.jsonl\n", results[0], "--compare", results[1], terminal=Terminal)
    assert (told.status, told.err) == (0, "")
    rows = [json.loads(line) for line in (here / "both.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == [lines[0] for lines in alone]
    assert [row["model"] for row in rows] == [*map(str, results)]
    assert told.out.count("cut off after 8 tokens") == 2


def test_a_model_that_is_named_twice_is_there_once(world, results):
    for names in ([str(world.base)] * 2, [str(world.base), str(results[0]), str(world.base)]):
        speakers = load_speakers(names, "float32", False)
        assert [each.name for each in speakers] == names
        assert len({id(each.trunk) for each in speakers}) == 1
        assert speakers[0] is speakers[-1]


def test_what_only_scores_does_not_answer(results, talk, shop):
    told = talk("Hi\n", shop["red"], "--compare", shop["reward"])
    assert (told.status, told.out) == (2, "")
    assert "only scores texts" in told.err


def test_a_full_context_ends_one_and_not_the_other(results, talk):
    told = talk("b" * 600 + "\nHi\n", results[0], "--compare", results[1], terminal=Terminal)
    assert told.status == 0
    assert told.out.count("positions") == 2
    assert told.out.count("cut off after 8 tokens") == 2


def test_columns_where_there_is_room(monkeypatch):
    evil = "a\x1b[2Jb [red]c[/red]"
    for width, side_by_side in ((100, True), (50, False)):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        with Columns(["one", "two\x07"]) as columns:
            for column in (0, 1, 0):
                columns.say(column, f"{evil} {column}\n")
            columns.notes[1] = "(stopped)"
        told = sys.stdout.getvalue()
        assert "\x1b[2J" not in told
        assert r"a\x1b[2Jb [red]c[/red] 1" in told
        assert any("one" in line and r"two\x07" in line for line in told.splitlines()) == side_by_side
        assert "(stopped)" in told


class Screen(io.StringIO):
    """One that moves its cursor."""

    def isatty(self) -> bool:
        return True


def test_the_end_of_long_answers_is_seen_while_they_grow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Screen())
    with Columns(["one", "two"]) as columns:
        columns.say(0, "".join(f"line {n}\n" for n in range(40)))
        grown = sys.stdout.getvalue()
        assert "line 39" in grown
        assert "line 3 " not in grown
    assert "line 3 " in sys.stdout.getvalue()[len(grown) :], "and all of them at the end"


def test_blocks():
    def of(*lines: str) -> Typed:
        given = iter(lines)
        return typed(lambda _prompt: next(given))

    assert of(" Hi ") == Typed("Hi", False)
    assert of('"""a', "  b ", "", 'c"""') == Typed("a\n  b\n\nc", True)
    assert of('"""a"""') == Typed("a", True)
    assert of('"""', '/save"""') == Typed("/save", True)
    assert of('""""""') == Typed("", True)


def test_prompt_toolkit_takes_pasted_lines(monkeypatch):
    """Enter sends, Alt+Enter begins a line, and a pasted text keeps its own."""
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from align.tools.chat import typed as module

    monkeypatch.setattr(module, "_is_terminal", lambda: True)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = reader()
        assert read is not input
        keys.send_text("one\x1b\rtwo\r")
        assert typed(read) == Typed("one\ntwo", False)
        keys.send_text("\x1b[200~/a\nb\x1b[201~\r")
        assert typed(read) == Typed("/a\nb", False)
        keys.send_text("half\x03")
        with pytest.raises(KeyboardInterrupt):
            typed(read)
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            typed(read)


def test_without_prompt_toolkit_lines_are_read_as_before(monkeypatch):
    from align.tools.chat import typed as module

    monkeypatch.setattr(module, "_is_terminal", lambda: True)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert reader() is input
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdin", Terminal("Hi\n"))
    assert reader() is input, "keys do not come from a terminal"
