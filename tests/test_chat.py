"""Talking with a model: on a terminal, in lines, and what is said of a model that is not there."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from accelerate import Accelerator
from models.tiny import tiny_tokenizer
from policies import make_policy
from world import Told, align, tree, write_rows

from align import chat
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.tools.chat.speaker import load_speaker
from align.tools.chat.talk import Answer, Stream, Talk
from align.tools.chat.talker import load_talker
from align.tools.chat.terminal import HELP

ASKED = ["Name the capital of France", "And?", "你好"]
WARM = ("--temperature", 1.5, "--top-p", 0.9, "--max-new", 12, "--seed", 5, "--dtype", "float32")


class Terminal(io.StringIO):
    """What stands before a person."""

    def isatty(self) -> bool:
        return True


class Screen(io.StringIO):
    """Notes what is written piece by piece; a person who sees `enough` of an answer presses Ctrl-C, maybe twice."""

    def __init__(self, enough: int | None = None, presses: int = 1) -> None:
        super().__init__()
        self.pieces, self.enough, self.presses = [], enough, presses

    def write(self, text: str) -> int:
        self.pieces += [text] * bool(text)
        if len(self.answer) == self.enough and self.presses:
            self.presses -= 1
            signal.raise_signal(signal.SIGINT)  # to this thread: another one would let some pieces pass
        return super().write(text)

    @property
    def answer(self) -> list[str]:
        """What came after the first prompt; before it, a slow machine may be shown that something is loading."""
        return self.pieces[self.pieces.index("> ") + 1 :] if "> " in self.pieces else []


def piped(text: str | bytes) -> io.TextIOWrapper:
    """What comes from a file or another command."""
    return io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()), "utf-8")


@pytest.fixture
def talk(monkeypatch, here):
    """Run the command on lines of standard input."""

    def run(model: object, lines: list[str], *argv: object, terminal: Callable[[str], TextIO] = piped) -> Told:
        monkeypatch.setattr(sys, "stdin", terminal("".join(f"{line}\n" for line in lines)))
        return align(model, *argv, stage=chat)

    return run


@pytest.fixture(scope="module")
def tuned(world, cache, tmp_path_factory) -> Path:
    """`final/` of an SFT run of two steps, in float32."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(world.recipe(folder / "sft.yaml", train={"steps": 2, "eval_every": None, "save_every": None}))
    assert told.status == 0, told.err
    return folder / "run" / "final"


def by_hand(model: Path, lines: list[str], how: Sampling, seed: int, system: str = "") -> list[str]:
    """The answers, from prompts that the tokenizer itself writes."""
    trunk, messages = (
        load_talker(str(model), [], Accelerator(), dtype="float32"),
        [{"role": "system", "content": system}] * bool(system),
    )
    tokenizer, answers = trunk.tokenizer, []
    for number, line in enumerate(lines):
        messages.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        ((response,),) = sample(trunk, [ids], how, [(seed, number)])
        text = tokenizer.decode(response.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append(text.strip())
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_lines_are_turns_and_their_answers_are_those_of_sample(tuned, talk):
    told = talk(tuned, [ASKED[0], "", *ASKED[1:]], *WARM, "--system", "Be brief.")
    answers = by_hand(tuned, ASKED, Sampling(12, temperature=1.5, top_p=0.9), 5, "Be brief.")
    assert (told.status, told.err) == (0, "")
    assert told.out == "".join(f"{answer}\n" for answer in answers)
    assert len(set(answers)) == 3
    assert talk(tuned, ASKED, *WARM).out != told.out, "the system's words count"
    assert talk(tuned, ASKED, *WARM[:-1], 6, "--system", "Be brief.").out != told.out


def test_beams_are_those_of_sample(tuned, talk):
    told = talk(tuned, ASKED[:1], "--beams", 3, "--max-new", 6, "--dtype", "float32")
    (answer,) = by_hand(tuned, ASKED[:1], Sampling(6, temperature=0, beams=3), 0)
    assert told.out == f"{answer}\n"


def test_on_a_terminal_answers_stream_and_the_talk_is_kept(tuned, talk, here, monkeypatch):
    lines = ["/system Be brief.", *ASKED, "/save talk.jsonl", "/save talk.jsonl", "/nod", "/reset", ASKED[0], "/help"]
    told = talk(tuned, lines, *WARM, terminal=Terminal)
    answers = by_hand(tuned, ASKED, Sampling(12, temperature=1.5, top_p=0.9), 5, "Be brief.")
    assert told.status == 0
    for answer in answers:
        assert answer in told.out
    assert told.out.count(answers[0]) == 2, "anew after /reset"
    assert "talk.jsonl is already there" in told.out
    assert "there is no command /nod; /help" in told.out
    assert "Ctrl-C stops" in told.out
    (row,) = map(json.loads, (here / "talk.jsonl").read_text("utf-8").splitlines())
    roles = ["system", *["user", "assistant"] * 3]
    said = ["Be brief.", *(text for pair in zip(ASKED, answers, strict=True) for text in pair)]
    assert row == {"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]}


def test_earlier_turns_are_not_computed_again(tuned):
    """A turn computes its own tokens and those that the template writes differently; its words are as before."""
    speaker = load_speaker(str(tuned), [], "float32", trust=False)
    talk, computed = Talk(speaker, Sampling(12, temperature=1.5, top_p=0.9), 5), []
    speaker.trunk.decoder.register_forward_pre_hook(
        lambda _module, _args, given: computed.append(given["input_ids"].numel()), with_kwargs=True
    )
    answers, lengths, news = [], [], []
    for line in ASKED:
        lengths.append(len(talk.prompt(line)))
        computed.clear()
        answers.append(talk.ask(line, lambda _piece: None).text)
        news.append(sum(computed))
    assert answers == by_hand(tuned, ASKED, Sampling(12, temperature=1.5, top_p=0.9), 5)
    assert lengths[0] <= news[0] <= lengths[0] + 12
    for before, now, new in zip(lengths, lengths[1:], news[1:], strict=False):
        assert new <= now - before + 12, "the new turn, and the answer"


def test_a_turn_of_several_lines(tuned, talk, here):
    lines = ['"""Name', "  the capital", 'of France"""', '"""/help"""', "/save talk.jsonl"]
    told = talk(tuned, lines, *WARM, terminal=Terminal)
    assert (told.status, told.err) == (0, "")
    (row,) = map(json.loads, (here / "talk.jsonl").read_text("utf-8").splitlines())
    asked = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
    assert asked == ["Name\n  the capital\nof France", "/help"]


def test_what_was_saved_is_what_sft_reads(tuned, talk, here, world):
    assert talk(tuned, [*ASKED, "/save talk.jsonl"], *WARM, terminal=Terminal).status == 0
    told = align(world.recipe(here / "sft.yaml", data={"train": [{"path": "talk.jsonl"}]}), "--show")
    assert (told.status, told.err) == (0, "")
    assert "messages" in told.out


@pytest.fixture
def interruptible():
    """SIGINT as a shell in front leaves it; a command in the background is told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(tuned, talk, monkeypatch, interruptible):
    screen = Screen()
    monkeypatch.setattr(sys, "stdin", Terminal(f"{ASKED[0]}\n"))
    monkeypatch.setattr(sys, "stdout", screen)
    chat.main([str(word) for word in (tuned, *WARM, "--max-new", 30)])
    whole = by_hand(tuned, ASKED[:1], Sampling(30, temperature=1.5, top_p=0.9), 5)[0]
    assert "".join(screen.answer).startswith(f"{whole}\n")
    assert len(screen.answer) > 4, "piece by piece"
    for presses, note in ((1, "(stopped)\n"), (2, "(stopped; this turn is not kept)\n")):
        hasty = Screen(2, presses)
        monkeypatch.setattr(sys, "stdin", Terminal(f"{ASKED[0]}\n/help\n"))
        monkeypatch.setattr(sys, "stdout", hasty)
        chat.main([str(word) for word in (tuned, *WARM, "--max-new", 30)])
        told = "".join(hasty.answer)
        assert f"\n{note}> {HELP}\n" in told
        assert not told.startswith(whole)
        assert whole.startswith(told.split("\n")[0])


def test_no_half_characters_are_told():
    tokenizer, pieces = tiny_tokenizer(), []  # one token a byte
    text = "  né 你好 🌸\n\nx \ufffd y  "
    stream, tokens = Stream(tokenizer.decode, pieces.append), tokenizer(text)["input_ids"]
    for count in range(1, len(tokens) + 1):
        stream.tell(tokens[:count])
    assert stream.finish(tokens) == "".join(pieces) == text.strip()
    assert pieces[:5] == ["n", "é", " 你", "好", " 🌸"]
    assert Stream(tokenizer.decode, pieces.append).finish(tokens[:7]) == "né \ufffd", "cut off within a character"


def test_a_result_brings_its_trunk(world, tuned, here, cache, talk):
    """One that was trained on a base with an SFT result merged into it, in a run and on its own."""
    from align import dpo

    short = {"train": {"steps": 2, "eval_every": None, "save_every": None}, "data": {"eval": {"sources": []}}}
    model = {"base": str(world.base), "dtype": "float32", "adapter": str(tuned)}
    recipe = world.preferences(here / "dpo.yaml", dpo, model=model, **short)
    assert align(recipe, stage=dpo).status == 0
    inside = talk(here / "run", ASKED, *WARM)  # the run's folder stands for its final/
    assert (inside.status, inside.err) == (0, "")
    named = talk(world.base, ASKED, *WARM, "--adapter", tuned, "--adapter", here / "run" / "final")
    assert named.out == inside.out
    assert inside.out != talk(tuned, ASKED, *WARM).out

    shutil.copytree(here / "run" / "final", here / "alone")
    assert talk(here / "alone", ASKED, *WARM).out == inside.out, "its own files tell base and adapters"
    about = json.loads((here / "alone" / "align.json").read_text())
    about["trunk"][1] |= {"name": "gone/final", "path": "/gone/final"}
    (here / "alone" / "align.json").write_text(json.dumps(about))
    alone = talk(here / "alone", ASKED, *WARM)
    assert (alone.status, alone.out) == (2, "")
    assert "was trained on a trunk with fingerprint" in alone.err
    assert "gone/final is not there" in alone.err
    assert "BASE --adapter SFT/final" in alone.err
    shutil.copytree(tuned, here / "sft alone")
    assert talk(here / "sft alone", ASKED[:1], "--max-new", 3).status == 0, "its own files tell the base"


def test_the_end_of_the_context(tuned, talk):
    speaker = load_speaker(str(tuned), [], "float32", trust=False)
    before = len(Talk(speaker, Sampling(1), 0).prompt("b")) - 1
    nearly, wholly = "b" * (508 - before), "b" * (512 - before)  # a token each
    told = talk(tuned, [nearly, "Hello", "/help"], *WARM, terminal=Terminal)
    assert told.status == 0
    assert "the model's 512 positions are full; /save keeps the talk, /reset begins anew" in told.out
    assert "fills the 512 positions of the model; begin anew (/reset)" in told.out
    assert HELP in told.out
    told = talk(tuned, ["Hello", wholly, "Hello"], *WARM)
    assert (told.status, told.out) == (2, talk(tuned, ["Hello"], *WARM).out)
    assert told.err.startswith("standard input:2: the conversation, ")
    assert len(told.err.splitlines()) == 1


def test_what_a_user_can_mend(world, tuned, here, talk):
    (here / "run").mkdir()
    (here / "run" / "recipe.yaml").write_text("stage: sft\n")
    write_rows(here / "rows.jsonl", [{}])
    scores = make_policy(world.base, here / "judge", stage="reward")
    before = tree(here)
    for argv, word in (
        ((), "the following arguments are required: MODEL"),
        (("nowhere",), "there is no model 'nowhere'; expected a local folder"),
        ((here,), "has no config.json"),
        ((here / "run",), "is a run without a final/"),
        ((scores,), "stage reward, which only scores"),
        ((world.base, "--adapter", "nowhere"), "nowhere has no align.json"),
        ((tuned, "--adapter", tuned), "is an adapter itself; name the base"),
        ((world.base, *["--adapter", tuned] * 2), "with fingerprint"),
        ((world.base, "--temperature", "-1"), "--temperature: 0 or more"),
        ((world.base, "--temperature", "nan"), "--temperature: 0 or more"),
        ((world.base, "--temperature", "warm"), "invalid float value"),
        ((world.base, "--top-p", "0"), "--top-p: above 0"),
        ((world.base, "--max-new", "0"), "--max-new: 1 or more"),
        ((world.base, "--beams", "2", "--top-p", "0.5"), "--beams: a search draws nothing"),
        ((world.base, "--seed", "-1"), "--seed: from 0"),
        ((world.base, "--sed", "1"), "unrecognized arguments: --sed"),
    ):
        told = talk(*argv[:1], [], *argv[1:]) if argv else align(stage=chat)
        assert (told.status, told.out) == (2, ""), (argv, told)
        assert word in told.err, (argv, told.err)
        assert len(told.err.splitlines()) == 1, told.err
        assert "model.base" not in told.err
        assert tree(here) == before, argv


def test_every_fault_of_the_command_line_at_once(talk):
    told = talk("nowhere", [], "--top-p", "2", "--max-new", "0")
    assert told.err.splitlines() == ["--top-p: above 0, and 1 at most", "--max-new: 1 or more"]


def test_bytes_that_are_no_text_are_read_as_such_and_told(tuned, talk, monkeypatch):
    """Each line of them; none ends the talk, and U+FFFD itself is text."""
    monkeypatch.setattr(sys, "stdin", piped(b"\xef\xbb\xbfHi\r\n\xff\xfe a\n\n\xed\xa0\x80\nAnd \xef\xbf\xbd?\n"))
    told = align(tuned, *WARM, stage=chat)
    assert told.status == 0, told.err
    what = "bytes that are not UTF-8 are read as \ufffd"
    assert told.err.splitlines() == [f"standard input:{number}: {what}" for number in (2, 4)]
    plain = talk(tuned, ["Hi", "\ufffd\ufffd a", "\ufffd\ufffd\ufffd", "And \ufffd?"], *WARM)
    assert (plain.out, plain.err) == (told.out, "")


def test_words_of_the_command_line_that_are_no_text(talk, world):
    for argv, said in (
        (("--system", "a\udcff"), "--system: this is not UTF-8 text"),
        (("--adapter", "a\0b"), "holds a NUL character"),
        (("--adapter", "a" * 300), "is too long for the name of a file"),
    ):
        told = talk(world.base, ["Hi"], *argv)
        assert (told.status, told.out) == (2, "")
        assert said in told.err
        assert len(told.err.splitlines()) == 1
    told = talk("\udcff", ["Hi"])
    assert (told.status, told.out) == (2, "")
    assert "stands for a name that is not UTF-8" in told.err


class Wall(Screen):
    """A terminal that answers are written to."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_not_given_control_characters(tuned, monkeypatch):
    """Though the model writes them; a file is given its words as they are."""
    evil = "a\x1b]52;c;bWFsd2FyZQ==\x07b\u202ec\r\n"
    monkeypatch.setattr(Talk, "ask", lambda self, text, say, stopping=None: say(evil) or Answer(evil, "ended"))
    for screen, stdin, expected in (
        (Wall(), piped("Hi\n"), "a\\x1b]52;c;bWFsd2FyZQ==\\x07b\\u202ec\\r\n\n"),
        (Screen(), piped("Hi\n"), evil + "\n"),
        (Wall(), Terminal("Hi\n"), "> a\\x1b]52;c;bWFsd2FyZQ==\\x07b\\u202ec\\r\n\n> \n"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", screen)
        chat.main([str(tuned)])
        assert screen.getvalue().endswith(expected)
        assert ("\x1b" in screen.getvalue()) == (not screen.isatty())
