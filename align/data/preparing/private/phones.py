"""Telephone numbers, by libphonenumber's plans of all countries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from align.data.preparing.private.found import WORD, Found, digits
from align.data.preparing.private.hints import told, told_after

# Countries whose national way of writing numbers is tried, those first whose numbers are most often met.
COUNTRIES = (
    "US", "GB", "DE", "FR", "ES", "IT", "CN", "IN", "BR", "JP", "KR", "RU", "NL", "BE", "AT", "CH", "PL", "SE", "NO",
    "DK", "FI", "PT", "IE", "CZ", "RO", "GR", "HU", "TR", "UA", "IL", "ZA", "AU", "NZ", "MX", "AR", "CL", "CO", "PE",
    "SG", "HK", "TW", "MY", "TH", "VN", "ID", "PH", "PK", "BD", "EG", "NG", "KE", "SA", "AE",
)  # fmt: skip
MOST_GROUPS = 7  # of digits in one number
_NUMBER = re.compile(
    rf"(?<![{WORD}/#$€£¥〒])(?<!\d[.,])(?<!-(?=[\d(]))"
    r"(?:(?P<plus>\+)|00)?(?:\d{1,3}[ .-]?)?(?:\(\d{1,5}\)[ .\-/]{0,2}|\d{2,5} ?[-/] ?)?\d(?:[ .\-/]?\d){3,14}"
    r"(?:,?\s?(?:ext|extension|extensión|poste|toestel|ramal|interno|доб|x|durchwahl|#)\.?\s?\d{1,6})?"
    rf"(?![{WORD}]|[.:-]\d|\s?[%€$£¥])(?(plus)|(?!,\d))",
    re.IGNORECASE,
)
_AFTER_NUMBER = re.compile(r"(?:ext|poste|toestel|ramal|interno|доб|x|durchwahl|#|,).*", re.IGNORECASE)
_NORTH_AMERICA = re.compile(r"(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}")
_AREA_IN_BRACKETS = re.compile(r"(?:\d[ -]?)?\(0?\d{1,5}\)[ -]?\d[\d -]+\d|0\d{1,4}\(\d{1,4}\)\d{4}")
_PAIRS = re.compile(r"\d\d(?: \d\d)+")  # five of them are a French number; others are lists
_TRUNK_PREFIX = re.compile(r"0[1-9]\d{0,4}(?: ?[/-] ?| )\d[\d /-]+\d|0[1-9](?:\.\d\d){4}|0 [1-9]\d\d \d{3} \d\d \d\d")
_BRAZILIAN_MOBILE = re.compile(r"\d\d 9\d{4}-\d{4}")
_MOBILE = re.compile(r"0[67]\d{8}|07\d{9}|01[567]\d{8,9}|04\d{8}")  # of several countries, in one stretch
_CHINESE_MOBILE = re.compile(r"1[3-9]\d{9}|1[3-9]\d[ -]\d{4}[ -]\d{4}")
_SHORT = re.compile(r"\d{3}[ .-]\d{4}")
_OTHER = re.compile(  # dates, years from and to, IP addresses, fractions, Brazil's postal codes
    r"(?:\d{4}([-./])\d\d?\1\d\d?|\d\d?([-./])\d\d?\2\d{4})(?:$|[ T]\d| ?-)"
    r"|(?:(?:1[5-9]|20)\d\d ?- ?(?:1[5-9]|20)\d\d|\d{1,3}(?:\.\d{1,3}){3}|\d{1,4}/\d{1,4}|\d{5}-\d{3})$"
)
_ISBN = re.compile(r"\d{1,5}([ -])\d+\1\d+\1\d")
_ANY_NUMBER = re.compile(r"\d{7,8}")  # it takes a word right before it
_BESIDE = re.compile(r"(?:\s(?:me|us|him|her|at|on|no|nr|number|nummer|is|now))*[^\w]{0,4}", re.IGNORECASE)
_HAN = re.compile("[\u4e00-\u9fff]")


def phones(text: str, countries: Sequence[str] = COUNTRIES) -> Iterator[Found]:
    """Telephone numbers with a country code, and in the national form of one of `countries` (ISO 3166).

    A national number takes a form that little else has (brackets round the area, a trunk prefix before groups), or a
    word such as "call" before it; else it could be any number.
    """
    if not any(letter.isdigit() for letter in text):
        return
    for match in _NUMBER.finditer(text):
        written = match[0]
        number = _AFTER_NUMBER.sub("", written).rstrip()
        groups = re.findall(r"\d+", number)
        if not 7 <= len(digits(number)) <= 17 or len(groups) > MOST_GROUPS or _OTHER.match(number):
            continue
        word = told(text, match.start())
        bare = word and word.hint == "phone" and _ANY_NUMBER.fullmatch(number)
        if bare and not _BESIDE.fullmatch(text, word.end, match.start()):
            continue
        said = word.hint if word else told_after(text, match.end())
        value = _value(number, said, bool(_HAN.search(text)), tuple(countries))
        if value:
            yield Found(match.start(), match.end(), "PHONE", value)


def _value(number: str, said: str | None, chinese: bool, countries: tuple[str, ...]) -> str | None:
    """The number in E.164, or its digits where its country is not known; None for what is no telephone number."""
    if number.startswith("+"):
        return _valid(number, None) or (digits(number) if 8 <= len(digits(number)) <= 15 else None)
    if said == "phone":
        if number.startswith("00") and (value := _valid(f"+{number[2:]}", None)):
            return value
        value = next(filter(None, (_valid(number, country) for country in countries)), None)
        value = value or (_valid(f"+{number}", None) if re.fullmatch(r"[1-9]\d{9,14}", number) else None)
        return value or (digits(number) if _SHORT.fullmatch(number) else None)
    if said not in (None, "address"):
        return None
    if number.startswith("00"):
        return _valid(f"+{number[2:]}", None) if re.search(r"[ /-]", number) else None
    if _NORTH_AMERICA.fullmatch(number):
        return next(filter(None, (_valid(number, country) for country in countries if country == "US")), None)
    if chinese and _CHINESE_MOBILE.fullmatch(number):
        return _valid(number, "CN") if "CN" in countries else None
    if _BRAZILIAN_MOBILE.fullmatch(number):
        return _valid(number, "BR") if "BR" in countries else None
    if _MOBILE.fullmatch(number):
        return next(filter(None, (_valid(number, country, True) for country in countries)), None)
    national = _AREA_IN_BRACKETS.fullmatch(number) or (
        _TRUNK_PREFIX.fullmatch(number)
        and len(digits(number)) >= 9
        and not _is_book(number)
        and (len(number) == 14 or not _PAIRS.fullmatch(number))
    )
    return next(filter(None, (_valid(number, country) for country in countries)), None) if national else None


@lru_cache(maxsize=4096)
def _valid(number: str, country: str | None, mobile: bool = False) -> str | None:
    """The number in E.164 where it is one of `country`, or of the world with a country code; or a `mobile` one."""
    phonenumbers = _library()
    try:
        parsed = phonenumbers.parse(number, country)
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_valid_number(parsed):
        return None
    if mobile and phonenumbers.number_type(parsed) != phonenumbers.PhoneNumberType.MOBILE:
        return None
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)


def _library() -> Any:
    import phonenumbers  # of the extra `prepare`

    return phonenumbers


def _is_book(number: str) -> bool:
    """Whether it is written as a book's number of ten digits (ISO 2108), and its checksum holds."""
    figures = reversed(digits(number))
    return bool(_ISBN.fullmatch(number)) and sum(i * int(digit) for i, digit in enumerate(figures, 1)) % 11 == 0
