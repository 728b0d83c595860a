"""Rows with answers to compare or to judge: pairs, transcripts, ranked lists, and single answers with a label.

A canonical row holds the prompt's turns, ending with a user's or a tool's, and the answers that could come next, the
best first. Answers may be given bare or each as a whole conversation: the prompt is what stands before the last turn,
and must be the same in all.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

from align.data.formats.formats import system_of
from align.data.formats.message import Turn, said, turn_of
from align.data.formats.rows import Formats, Refused, Row, Shape
from align.data.formats.shown import a
from align.data.formats.turns import (
    alpaca_prompt,
    check,
    conversation,
    keys_of,
    remarks_of,
    settled,
    thoughts_beside,
    tools_of,
)
from align.data.formats.values import encodable, from_json
from align.data.formats.verdicts import EXPECTED, LABELS, verdict

Talk = list[Turn]

SPOKEN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
PROMPTS = ("prompt", "conversations", "messages", "instruction")  # columns that can hold the prompt


def _pair(row: dict[str, Any]) -> Row:
    """`chosen` and `rejected`, after a prompt or as whole conversations; a finite `margin`, where there is one."""
    made = _compared(row, {name: answer_turns(name, row.get(name)) for name in ("chosen", "rejected")})
    return made._replace(targets=_margin(row.get("margin")))


def _transcripts(row: dict[str, Any]) -> Row:
    """`chosen` and `rejected` as Anthropic's HH writes them: "\\n\\nHuman: …\\n\\nAssistant: …"."""
    talks = {name: _transcript(name, row.get(name)) for name in ("chosen", "rejected")}
    made = _compared({"tools": row.get("tools")}, talks)
    return made._replace(targets=_margin(row.get("margin")))


def _ranked(row: dict[str, Any]) -> Row:
    """`answers`, the best first or with scores (higher is better) or ranks (lower is better)."""
    given = from_json("answers", row.get("answers"))
    if not isinstance(given, list):
        raise Refused(f"answers: expected a list of answers, found {a(given)}")
    worth = _worth(row, given)
    order = sorted(range(len(given)), key=lambda i: worth[i])  # stable: equals keep their order
    answers, repairs, last = {}, [], None
    for i in order:
        name, talk = f"answers[{i}]", answer_turns(f"answers[{i}]", given[i])
        same = next((other for other, said in answers.items() if _bare(said) == _bare(talk)), None)
        if same:
            repairs.append(f"left out {name}: the same as {same}")
        elif last is not None and worth[i] == worth[last]:
            repairs.append(f"left out {name}: as good as answers[{last}]")
        else:
            answers[name], last = talk, i
    if len(answers) < 2:
        left = f", with {len(answers)} left after ties and repetitions" if repairs else ""
        raise Refused(f"answers: expected two or more, found {len(given)}{left}")
    made = _compared(row, answers)
    return made._replace(repairs=(*made.repairs, *repairs))


def _labelled(row: dict[str, Any]) -> Row:
    """One answer and its `label`: `completion` after a prompt, or the last turn of a conversation."""
    spoken = {name: row.get(name) for name in ("system", "conversations", "messages")}
    if row.get("completion") is not None or not (spoken["conversations"] or spoken["messages"]):
        made = _compared(row, {"completion": answer_turns("completion", row.get("completion"))})
    else:
        made = _compared({"tools": row.get("tools")}, {"the last turn": prompt_turns(spoken)})
    good = verdict(row)
    if good is None:
        column = next((name for name in LABELS if name in row), "label")
        raise Refused(f"{column}: expected {EXPECTED}, found {a(row.get(column))}")
    return made._replace(targets=(float(good),))


def _compared(row: dict[str, Any], talks: dict[str, Talk]) -> Row:
    """The row of these answers, the best first, by their names; each bare or as a whole conversation."""
    given, repairs = settled(prompt_turns(row))
    talks, cut = _without_prompt(row, talks)
    if cut:
        repairs += ("cut off the prompt, which the answers repeated",)
    wholes = {}
    for name, talk in talks.items():
        talk, mended = settled(talk)
        repairs += mended
        if not talk:
            raise Refused(f"{name}: expected an assistant's answer, found none")
        wholes[name] = _whole(given, talk)
    for role_at, _, message, _ in (whole[-1] for whole in wholes.values()):
        if message["role"] != "assistant":
            raise Refused(f"{role_at}: expected an assistant's answer, found {message['role']}")
    best = next(iter(wholes.values()))[-1]
    if best.message.get("train") is False:  # a rejected answer may well be marked so
        raise Refused(f"{best.role_at}: this answer is marked as not to be learnt, and it is what the row teaches")
    wholes = {name: [_unmarked(turn) for turn in whole] for name, whole in wholes.items()}
    (best, first), *others = wholes.items()
    prompt = first[:-1]
    for name, whole in others:
        if _bare(prompt) != _bare(whole[:-1]):
            turns = max(len(first), len(whole))
            at = next(i for i in range(turns) if _bare(first[i : i + 1]) != _bare(whole[i : i + 1]))
            raise Refused(
                f"{name}: expected the same turns as {best} before the last, found them to part at turn {at + 1}"
                f" of {turns}"
            )
    if all(turn.message["role"] == "system" for turn in prompt):
        raise Refused(f"prompt: expected one of the columns {', '.join(PROMPTS)}, or turns before {best}, found none")
    _check(prompt, {name: whole[-1] for name, whole in wholes.items()})
    messages = encodable("messages", [turn.message for turn in prompt])
    answers = tuple(encodable(name, whole[-1].message) for name, whole in wholes.items())
    tools = encodable("tools", tools_of(row.get("tools")))
    remarks = remarks_of([turn for whole in wholes.values() for turn in whole]) + thoughts_beside(row)
    return Row("", 0, messages, None, tools, repairs, answers, remarks=remarks)


def _check(prompt: Talk, answers: dict[str, Turn]) -> None:
    """Refuse turns that `check` refuses, and answers that are the same."""
    for i, (name, answer) in enumerate(answers.items()):
        check([*prompt, answer])
        same = [other for other, earlier in list(answers.items())[:i] if _bare([earlier]) == _bare([answer])]
        if same:
            raise Refused(f"{name}: expected another answer than {same[0]}, found the same")


def prompt_turns(row: dict[str, Any]) -> Talk:
    """The turns of the prompt's column, after the `system` column's; none where there is no such column."""
    column = next((name for name in PROMPTS if row.get(name) not in (None, "", [])), None)
    if column is None:
        return system_of(row)
    if column == "instruction":
        return system_of(row) + alpaca_prompt(row)
    if column == "prompt" and isinstance(row["prompt"], str):
        return [*system_of(row), said("user", "prompt", row["prompt"])]
    return system_of(row) + conversation(row, column)


def answer_turns(at: str, value: Any) -> Talk:
    """An answer as a text, a message, a list of messages, or a text in an object beside its score."""
    if isinstance(value, list):
        return conversation({at: value}, at)
    if not isinstance(value, dict):
        return [said("assistant", at, value)]
    if "role" in value or "from" in value:
        return [turn_of(value, at, *keys_of([value]))]
    key = next((key for key in ("text", "content", "value") if key in value), None)
    if key is None:
        raise Refused(f"{at}: expected a text, a message or an object with `text`, found {a(value)}")
    return [said("assistant", f"{at}.{key}", value[key])]


def _transcript(at: str, value: Any) -> Talk:
    """The turns of a transcript, without the blanks around their words."""
    before, *spoken = SPOKEN.split(value) if isinstance(value, str) else (None,)
    if not spoken or before.strip():
        raise Refused(f"{at}: expected a transcript that begins with Human:, found {a(value)}")
    places = [f"{at}, turn {i + 1}" for i in range(len(spoken) // 2)]
    turns = zip(places, spoken[::2], spoken[1::2], strict=True)
    return [said(SPEAKERS[speaker], place, words.strip()) for place, speaker, words in turns]


def _whole(given: Talk, talk: Talk) -> Talk:
    """The whole conversation: an answer put to the given prompt, or one that holds the prompt, or its end, itself."""
    (system, asked), (own_system, head) = _parted(given), _parted(talk[:-1])
    if not given or (head and _bare(head) == _bare(asked) and not own_system):
        return given[: len(system)] + talk
    if talk[0].message["role"] == "assistant" or len(talk) == 1:
        if given[-1].message["role"] == "assistant":
            raise Refused(f"{given[-1].role_at}: expected user or tool before the answer, found assistant")
        return given + talk
    longer, shorter = sorted((head, asked), key=len, reverse=True)
    same = not (system and own_system) or _bare(system) == _bare(own_system)
    if not same or _bare(longer[len(longer) - len(shorter) :]) != _bare(shorter):
        raise Refused(f"{talk[0].content_at}: expected the turns of the prompt before the answer, found others")
    return [*(system or own_system), *longer, talk[-1]]


def _parted(talk: Talk) -> tuple[Talk, Talk]:
    """The system's turn, where it comes first, and the others."""
    count = int(bool(talk) and talk[0].message["role"] == "system")
    return talk[:count], talk[count:]


def _without_prompt(row: dict[str, Any], talks: dict[str, Talk]) -> tuple[dict[str, Talk], bool]:
    """The answers without the prompt where all, each a text, repeat it at their head; and whether they do."""
    prompt = row.get("prompt")
    texts = [talk[0].message["content"] for talk in talks.values() if talk[0].content_at in talks]
    if len(texts) < max(len(talks), 2) or not isinstance(prompt, str) or not re.search(r"\w\W", prompt):
        return talks, False  # answers to a single word, such as "Hi", may well begin with it
    rests = [text.removeprefix(prompt) for text in texts if text.startswith(prompt)]
    apart = all(rest.strip() and not (prompt[-1].isalnum() and rest[0].isalnum()) for rest in rests)
    if len(rests) < len(texts) or not apart:
        return talks, False
    return {name: [said("assistant", name, rest.lstrip())] for name, rest in zip(talks, rests, strict=True)}, True


def _worth(row: dict[str, Any], answers: list[Any]) -> list[float]:
    """A number for each answer, lower for a better one: of its score or rank, or else its place."""
    for name, sign in (("score", -1.0), ("rank", 1.0)):
        column = from_json(f"{name}s", row.get(f"{name}s") or None)
        inside = [answer.get(name) if isinstance(answer, dict) else None for answer in answers]
        if column is not None:
            if not isinstance(column, list) or len(column) != len(answers):
                raise Refused(f"{name}s: expected a list of {len(answers)} numbers, one an answer, found {a(column)}")
            return [sign * _number(f"{name}s[{i}]", value) for i, value in enumerate(column)]
        if any(value is not None for value in inside):
            return [sign * _number(f"answers[{i}].{name}", value) for i, value in enumerate(inside)]
    return [float(i) for i in range(len(answers))]


def _margin(value: Any) -> tuple[float, ...]:
    return () if value is None or value == "" else (_number("margin", value), 0.0)


def _number(at: str, value: Any) -> float:
    """The value, which must be a finite number, or the text of one as in CSV."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) < 1e38:  # a float32 holds no more
        raise Refused(f"{at}: expected a finite number, found {a(value)}")
    return number


def _unmarked(turn: Turn) -> Turn:
    """Without its mark: what is learnt of a row with answers is its answers."""
    return turn._replace(message={key: value for key, value in turn.message.items() if key != "train"})


def _bare(turns: Talk) -> list[dict[str, Any]]:
    """What the turns say, for comparison."""
    said = [_unmarked(turn).message for turn in turns]
    return [{key: v.strip() if isinstance(v, str) else v for key, v in message.items()} for message in said]


def _has_a_list(row: dict[str, Any]) -> bool:
    return isinstance(row.get("output"), list) or bool(row.keys() & {"answers", *_LISTS})


_CONTEXT = ("system", "tools", "prompt", "conversations", "messages", "instruction", "input", "history")
_NAMES = {"question": "prompt", "chosen_messages": "chosen", "rejected_messages": "rejected"}
_LISTS = ("responses", "completions")

COMPARED: Formats = {  # answers side by side
    "transcripts": Shape(("chosen", "rejected"), ("margin", "tools"), ("Human:", "Assistant:"), _transcripts),
    "pairs": Shape(("chosen", "rejected"), ("margin", *_CONTEXT), (), _pair, also=_NAMES),
    "ranked": Shape(
        ("answers",),
        ("scores", "ranks", *_CONTEXT),
        (),
        _ranked,
        either=PROMPTS,
        also={"question": "prompt", "output": "answers"} | dict.fromkeys(_LISTS, "answers"),
        when=_has_a_list,
    ),
}
JUDGED: Formats = {  # one answer with a label
    "labelled": Shape(
        ("label",),
        ("completion", *_CONTEXT),
        (),
        _labelled,
        either=("completion", "messages", "conversations"),
        also={"kto_tag": "label", "output": "completion"},
    ),
}


def _best(read: Any, row: dict[str, Any]) -> Row:
    made = read(row)
    context = [m | {"train": False} if m["role"] == "assistant" else m for m in made.messages]
    return made._replace(messages=[*context, made.answers[0]], answers=(), targets=())


BEST: Formats = {  # the same for a stage that learns from one answer
    name: shape._replace(read=partial(_best, shape.read), note="; the best answer is learnt")
    for name, shape in COMPARED.items()
}
