"""Filters: each rule by a text that breaks it alone, with numbers worked by hand."""

from __future__ import annotations

import sys

import pytest
from data.preparing.items import item, pair, talk, text

from align.data.formats.rows import Row
from align.data.preparing.filters.published import C4Rules, FineWebRules, GopherQualityRules, GopherRepetitionRules
from align.data.preparing.filters.ratios import digits, repeated, repeated_ngrams, sentences, symbols, top_ngram
from align.data.preparing.filters.rules import Function, Languages, Length, Placeholders, Refusals, Signs, WordList
from align.data.preparing.steps import filters
from align.recipe.errors import UserError
from align.recipe.preparing.filters import C4, Filter, FineWeb, GopherQuality, GopherRepetition, Words
from align.training.borders.foreign import foreign

PROSE = (
    "The harbour was quiet in the morning and the boats lay still. A gull walked along the wall, looked at the water, "
    "and flew away to the north. Two men came with nets that they had mended the night before, and they spoke of the "
    "weather with the calm of people who have seen much of it. Later the wind rose, and with it the noise of ropes."
)


def reason(step, one) -> str:
    (verdict,) = step.look([one])
    return verdict.reason


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (PROSE, ""),
        ("the cat and the dog have to be with that", "too few words"),
        ("a of " * 60, "words too short"),  # mean length (1 + 2) / 2 = 1.5
        ("incomprehensibilities the uncharacteristically and " * 15, "words too long"),  # (21 + 3 + 20 + 3) / 4 = 11.75
        (PROSE + " #" * 20, "too many hash signs"),  # 20 over 64 words
        (PROSE.replace(",", " ..."), ""),  # 5 ellipses over 64 words
        (PROSE.replace(" the ", " the... "), "too many ellipses"),  # 9 over 64
        ("\n".join(f"• {words}" for words in PROSE.split(". ")), "too many bullets"),
        ("\n".join(f"{words} ..." for words in PROSE.split(". ")), "too many lines that end with an ellipsis"),
        (PROSE + " 12 34 56 78" * 6, "too few words with a letter"),
        ("ships sail north " * 20, "too few stop words"),
    ],
)
def test_gopher_quality(words, why):
    rules = GopherQuality(max_words=None)
    assert reason(GopherQualityRules(rules), text(words)) == why
    off = dict.fromkeys(name for name in GopherQuality.model_fields if name != "stop_words")
    assert reason(GopherQualityRules(GopherQuality(**off)), text(words)) == ""


def test_published_thresholds():
    quality, repetition = GopherQuality(), GopherRepetition()
    assert (quality.min_words, quality.max_words, quality.min_word_length, quality.max_word_length) == (
        50,
        10**5,
        3,
        10,
    )
    assert (quality.max_symbol_ratio, quality.max_bullet_lines, quality.max_ellipsis_lines) == (0.1, 0.9, 0.3)
    assert (quality.min_alphabetic_words, quality.min_stop_words) == (0.8, 2)
    assert repetition.max_top_ngrams == {"2": 0.2, "3": 0.18, "4": 0.16}
    assert repetition.max_duplicate_ngrams == {"5": 0.15, "6": 0.14, "7": 0.13, "8": 0.12, "9": 0.11, "10": 0.1}
    assert (repetition.max_duplicate_lines, repetition.max_duplicate_line_characters) == (0.3, 0.2)
    assert (FineWeb().min_punctuated_lines, FineWeb().max_short_lines, FineWeb().max_duplicate_characters) == (
        0.12, 0.67, 0.01,
    )  # fmt: skip


def test_ratios_by_hand():
    assert repeated(["ab", "c", "ab", "ab", "d"]) == (2 / 5, 4)
    assert top_ngram(["a", "b", "a", "b", "a", "c"], 2) == 2 * 2  # `a b` twice and `b a` twice, two letters each
    assert top_ngram(["a", "b", "c", "d"], 2) == 0  # none repeats
    assert repeated_ngrams(["aa", "b", "aa", "b", "aa", "b"], 2) == 6  # the second and third `aa b`, three letters each
    assert repeated_ngrams(["a", "b"], 3) == 0
    assert digits("a1 2") == 2 / 3
    assert symbols("a@b %c") == 2 / 5
    assert symbols("Wie geht’s, 你好？") == 0
    assert sentences('He came. "Why?" she said.\nNo end here') == ["He came.", '"Why?', "she said.", "No end here"]
    assert sentences("你好。再见！") == ["你好。", "再见！"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (PROSE, ""),
        ("one two three\n\n" * 3, "repeated paragraphs"),
        ("\n".join(["the same line here"] * 2 + PROSE.split(". ")), ""),
        ("\n".join(["the same line here"] * 4 + PROSE.split(". ")[:3]), "repeated lines"),  # 3 of 7
        ("red fox " * 4 + PROSE[:60], "one 2-gram too often"),
        ("in the old town hall " * 3 + PROSE, "repeated 5-grams"),
    ],
)
def test_gopher_repetition(words, why):
    rules = GopherRepetition(max_top_ngrams={"2": 0.2}, max_duplicate_ngrams={"5": 0.08})
    assert reason(GopherRepetitionRules(rules), text(words)) == why


def test_c4_takes_lines_out_of_texts_alone():
    lines = "A first line that ends well.\nmenu | home\nEnable javascript to go on.\nWe use cookies here.\nTwo.\n"
    good = "It was late. Nobody came. The rain fell. He waited. She left."
    step = C4Rules(C4())
    (verdict,) = step.look([text(lines + good)])
    assert verdict.item.row.text == f"A first line that ends well.\n{good}"
    assert verdict.counts == {"lines taken out": 4}
    assert reason(step, text("if (a) { b }")) == "a curly bracket"
    assert reason(step, text("Lorem ipsum dolor.")) == "lorem ipsum"
    assert reason(step, text("One. Two.")) == "too few sentences"
    (verdict,) = step.look([talk(lines, good)])
    assert verdict.item.row.messages[0]["content"] == lines


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (PROSE, ""),
        ("\n".join(["a long line of words without an end to it"] * 9), "too few lines end with punctuation"),
        ("\n".join(["Short one."] * 3 + [PROSE]), "too many short lines"),
        ("\n".join([PROSE, PROSE]), "characters in repeated lines"),
        (PROSE + "\n" * 30 + PROSE[:40] + ".", "too few lines end with punctuation"),
    ],
)  # fmt: skip
def test_fineweb(words, why):
    assert reason(FineWebRules(FineWeb()), text(words)) == why


def test_lengths_count_what_each_language_writes():
    step = Length(Filter(min_words=3, max_words=5, max_turns=2, max_characters=60))
    assert reason(step, text("one two")) == "fewer than 3 words"
    assert reason(step, text("one, two - three!")) == ""
    assert reason(step, text("今天天气")) == ""  # four words of a letter each
    assert reason(step, text("今天天气很好")) == "more than 5 words"
    assert reason(step, text("x" * 61)) == "more than 60 characters"
    assert reason(step, talk("a", "b", "c")) == "more than 2 turns"


def test_signs():
    step = Signs(Filter(max_symbols=0.3, max_digits=0.5))
    assert reason(step, text("price: 12 €")) == ""
    assert reason(step, text("@#$%^&* ab")) == "too many symbols"
    assert reason(step, text("a 12345")) == "too many digits"


def test_languages():
    step = Languages(["en", "de"], 0.5)
    assert reason(step, text("The weather is fine this morning, and the boats are out.")) == ""
    assert reason(step, text("Das Wetter ist heute schön, und die Boote sind draußen.")) == ""
    assert reason(step, text("今天天气很好，船都出海了。")) == "another language"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("I am {{name}}, made by {{ author }}.", True),
        ("Dear [Your Name], thank you.", True),
        ("Write to <insert address>.", True),
        ("f(x) = {{1, 2}, {3}}", False),
        ("a [1] b [citation needed] <your>x", True),
        ("arr[i] and <div>", False),
    ],
)
def test_placeholders(words, found):
    assert bool(reason(Placeholders(), talk("who are you?", words))) == found


@pytest.mark.parametrize(
    ("said", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I am sorry, but as an AI language model, I cannot do so.", True),
        ("As an AI language model, I do not have feelings.", True),
        ("I cannot provide that information.", True),
        ("很抱歉，我无法回答这个问题。", True),
        ("作为一个人工智能语言模型，我没有感情。", True),
        ("Sorry to hear that! Here is what you can do.", False),
        ("As an AI researcher she wrote many papers.", False),
        ("Most people say I'm sorry, but I can't tell why they do.", False),
        ("I cannot recommend this book highly enough.", False),
    ],
)
def test_refusals(said, refuses):
    assert bool(reason(Refusals(), talk("please", said))) == refuses
    assert reason(Refusals(), talk(said, "of course")) == ""  # the user may say so


def test_a_rejected_or_undesirable_answer_may_refuse():
    no = "I'm sorry, but I can't help with that."
    assert reason(Refusals(), pair("please", "of course", no)) == ""
    assert reason(Refusals(), pair("please", no, "of course")) != ""
    row = Row("", 0, [{"role": "user", "content": "a"}], None, None, (), ({"role": "assistant", "content": no},))
    assert reason(Refusals(), item(row._replace(targets=(0.0,)))) == ""
    assert reason(Refusals(), item(row._replace(targets=(1.0,)))) != ""


def test_word_lists(tmp_path):
    (tmp_path / "bad.txt").write_text("Bad Word\n\n脏话\n", "utf-8")
    step = WordList(Words(words=["hell"], file=str(tmp_path / "bad.txt"), max=1), "filter.words.0")
    assert reason(step, text("hell, shell, hello")) == ""  # once, and not inside others
    assert reason(step, text("HELL and bad\n  word")) == "words of the list 'words'"
    assert reason(step, text("说脏话，脏话")) == "words of the list 'words'"
    with pytest.raises(UserError, match="no such file"):
        WordList(Words(file="nowhere.txt"), "filter.words.0")


def test_functions_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine_filters.py").write_text(
        "import sys\n"
        "def long(row): return len(row['text']) > 3 or 'too short for me'\n"
        "def meddles(row):\n    row['record'].clear()\n    return True\n"
        "def leaves(row): sys.exit(3)\n"
        "def odd(row): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_filters", raising=False)
    (step,) = filters(Filter(functions=["mine_filters:long"]), foreign)
    assert [reason(step, text(words)) for words in ("long enough", "ab")] == ["", "too short for me"]
    (step,) = filters(Filter(functions=["mine_filters:meddles"]), foreign)
    one = text("abc", id=7)
    step.look([one])
    assert one.record == {"id": 7}
    for name, told in (("leaves", "SystemExit"), ("odd", "returned the number 3")):
        with pytest.raises(UserError, match=rf"rows.jsonl:1: .*{told}"):
            Function(f"mine_filters:{name}", "filter.functions.0", foreign).look([text("a")])
    with pytest.raises(UserError, match="has no function 'none'"):
        filters(Filter(functions=["mine_filters:none"]), foreign)
