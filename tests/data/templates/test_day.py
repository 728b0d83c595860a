"""Chat templates that write today's date write one day, in training and in what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from data.voices import SMOLLM, tiny_tokenizer
from pydantic import ValidationError
from transformers.utils import chat_template_utils

from align.data.store import writer_of
from align.data.templates.day import USUAL, asks_the_day, day_of
from align.data.templates.templates import chat_tokenizer
from align.recipe.errors import UserError
from align.recipe.schema import Model

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PLAIN = (
    "{# strftime_now writes today #}{%- if not day is defined %}{%- if strftime_now is defined %}"
    "{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = '?' %}{%- endif %}{%- endif %}Today: {{ day }}\n"
    '{%- macro of(m) %}<|im_start|>{{ m.role }} {{ strftime_now("%Y-%m-%d") }}\n{{ m.content }}<|im_end|>\n'
    "{% endmacro %}{% for m in messages %}{{ of(m) }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant 2024-07-26\n{% endif %}"
)


def dated(template=PLAIN, **settings):
    tokenizer = tiny_tokenizer(SMOLLM)
    tokenizer.chat_template = template
    return chat_tokenizer(tokenizer, None, **settings)


def said(tokenizer, **options):
    return tokenizer.apply_chat_template(TALK, tokenize=False, **options)


@pytest.fixture
def tomorrow(monkeypatch):
    """transformers' clock."""

    class Clock:
        @staticmethod
        def now():
            class Day:
                strftime = staticmethod(lambda form: "tomorrow")

            return Day

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_the_same_on_every_day(tomorrow):
    bare = tiny_tokenizer(SMOLLM)
    bare.chat_template = PLAIN
    assert "Today: tomorrow" in said(bare)
    tokenizer = dated()
    assert said(tokenizer).startswith("Today: 26 Jul 2024<|im_start|>user 2024-07-26\nq<|im_end|>\n")
    assert day_of(tokenizer.chat_template) == USUAL
    assert said(tokenizer, day="x").startswith("Today: x<|im_start|>")
    assert said(dated(day="2026-11-30")).startswith("Today: 30 Nov 2026<|im_start|>user 2026-11-30\nq")
    assert writer_of(dated(day="2026-11-30")) != writer_of(tokenizer) == writer_of(dated())


def test_what_was_trained_with_a_day_keeps_it():
    """An adapter's template has it; a recipe may say another, and options of the earlier run stay."""
    first = dated(day="2026-11-30", options={"day": "never"})
    assert said(first).startswith("Today: never<|im_start|>user 2026-11-30")
    again = dated(first.chat_template)
    assert again.chat_template == first.chat_template
    other = dated(first.chat_template, day="2027-01-02")
    assert said(other).startswith("Today: never<|im_start|>user 2027-01-02")
    options = dated(first.chat_template, options={"day": "soon"})
    assert said(options).startswith("Today: soon<|im_start|>user 2026-11-30")


def test_a_template_without_a_date_stays_as_it_is():
    plain = PLAIN.replace("strftime_now('%d %b %Y')", "'x'").replace('strftime_now("%Y-%m-%d")', "'x'")
    assert not asks_the_day(plain)
    assert dated(plain, day="2026-11-30").chat_template == plain


def test_a_format_that_is_computed_is_refused():
    with pytest.raises(UserError, match="in a format that it computes"):
        dated(PLAIN.replace("strftime_now('%d %b %Y')", "strftime_now('%d' + form)"))


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer"])
def test_published_templates(name, tomorrow):
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    assert asks_the_day(template)
    tokenizer = dated(template, day="2026-11-30")
    assert any(day in said(tokenizer) for day in ("30 Nov 2026", "2026-11-30", "30 November 2026", "November 30, 2026"))
    assert "tomorrow" not in said(tokenizer)


def test_a_day_is_a_day():
    assert Model(base="b", template_day="2026-11-30").template_day == "2026-11-30"
    with pytest.raises(ValidationError, match="expected a day as YYYY-MM-DD"):
        Model(base="b", template_day="30.11.2026")
