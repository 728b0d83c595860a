"""The day that a chat template writes, as those of Llama 3.2 and gpt-oss do: the same on every day.

transformers gives templates `strftime_now`, which writes today. What is trained, sampled and evaluated would then
depend on when that is done, and a run that goes on tomorrow would be of other data.
"""

from __future__ import annotations

import json
import re
from datetime import date

from align.recipe.errors import UserError

USUAL = "2024-07-26"  # which Llama's templates write where no day is given
NAME = "strftime_now"
USES = re.compile(rf"\b{NAME}\b(?!\s+is\b)")
CALL = re.compile(rf"""\b{NAME}\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
FIXED = re.compile(rf"\{{%- macro {NAME}\(form\) -%\}}.*?\{{%- endmacro -%\}}\{{#- (\S+) -#\}}", re.DOTALL)


def asks_the_day(template: str) -> bool:
    """Whether what a template writes depends on today."""
    return bool(USES.search(COMMENT.sub("", template)))


def of_day(template: str, day: str) -> str:
    """Jinja that has a template write this day, YYYY-MM-DD, in each of its formats. Raises UserError where a format is
    not known before it writes."""
    code = COMMENT.sub("", template)
    calls = CALL.findall(code)
    if len(calls) != len(USES.findall(code)):
        raise UserError(
            "the chat template writes today's date in a format that it computes, so what is trained would be another "
            "each day; give one that names its format, or the date, in model.chat_template"
        )
    formats = dict.fromkeys(call[1:-1] for call in calls)
    written = {form: date.fromisoformat(day).strftime(form) for form in formats}
    pairs = ", ".join(f"{json.dumps(form)}: {json.dumps(text)}" for form, text in written.items())
    return f"{{%- macro {NAME}(form) -%}}{{{{- {{{pairs}}}[form] -}}}}{{%- endmacro -%}}{{#- {day} -#}}"


def day_of(template: str) -> str | None:
    """The day that `of_day` fixed, YYYY-MM-DD."""
    found = FIXED.search(template)
    return found[1] if found else None
