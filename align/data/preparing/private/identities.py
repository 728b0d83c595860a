"""Numbers that states give to people: for tax, insurance, health and registers; by their forms and checksums."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

from align.data.preparing.private.found import WORD, Found
from align.data.preparing.private.hints import hint


class Scheme(NamedTuple):
    """The numbers of one register."""

    country: str  # ISO 3166
    module: str  # of python-stdnum, which checks them; "" where the form is all there is
    form: str  # a pattern
    told: bool = True  # by the form; else it takes a word such as "tax id" before it

    @property
    def pattern(self) -> re.Pattern[str]:
        """The form, where nothing goes on before or after it."""
        return re.compile(rf"(?<![{WORD}])(?<![{WORD}][.,/-])(?:{self.form})(?![{WORD}]|[.,/-][{WORD}])", re.IGNORECASE)


SCHEMES = (
    Scheme("US", "us.ssn", r"\d{3}-\d\d-\d{4}"),
    Scheme("US", "us.itin", r"9\d\d-\d\d-\d{4}"),
    Scheme("US", "us.ssn", r"\d{9}|\d{3} \d\d \d{4}", False),
    Scheme("GB", "", r"(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]"),
    Scheme("GB", "gb.nhs", r"\d{3}[ -]?\d{3}[ -]?\d{4}", False),
    Scheme("GB", "gb.utr", r"\d{5} ?\d{5}", False),
    Scheme("DE", "de.idnr", r"\d\d ?\d{3} ?\d{3} ?\d{3}", False),
    Scheme("FR", "fr.nir", r"[1-478] ?\d\d ?\d\d ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d"),
    Scheme("ES", "es.dni", r"\d{8}[ -]?[A-Z]"),
    Scheme("ES", "es.nie", r"[XYZ][ -]?\d{7}[ -]?[A-Z]"),
    Scheme("IT", "it.codicefiscale", r"[A-Z]{3} ?[A-Z]{3} ?\d\d[A-Z]\d\d ?[A-Z]\d{3} ?[A-Z]"),
    Scheme("NL", "nl.bsn", r"\d{9}|\d{4}[. ]\d\d[. ]\d{3}", False),
    Scheme("BE", "be.nn", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d"),
    Scheme("BE", "be.nn", r"\d{11}|\d\d \d\d \d\d \d{3} \d\d", False),
    Scheme("CH", "ch.ssn", r"756\.?\d{4}\.?\d{4}\.?\d\d"),
    Scheme("AT", "at.vnr", r"\d{4} ?\d{6}", False),
    Scheme("PT", "pt.nif", r"\d{3} ?\d{3} ?\d{3}", False),
    Scheme("IE", "ie.pps", r"\d{7}[A-W][A-IWT]?", False),
    Scheme("SE", "se.personnummer", r"(?:\d\d)?\d{6}[-+]\d{4}"),
    Scheme("SE", "se.personnummer", r"(?:\d\d)?\d{10}", False),
    Scheme("NO", "no.fodselsnummer", r"\d{6} ?\d{5}"),
    Scheme("DK", "dk.cpr", r"\d{6}-\d{4}"),
    Scheme("DK", "dk.cpr", r"\d{6} ?\d{4}", False),
    Scheme("FI", "fi.hetu", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Y]"),
    Scheme("PL", "pl.pesel", r"\d{11}", False),
    Scheme("CZ", "cz.rc", r"\d{6}/\d{3,4}"),
    Scheme("RO", "ro.cnp", r"[1-9]\d{12}", False),
    Scheme("BG", "bg.egn", r"\d{10}", False),
    Scheme("HR", "hr.oib", r"\d{11}", False),
    Scheme("EE", "ee.ik", r"\d{11}", False),
    Scheme("LT", "lt.asmens", r"\d{11}", False),
    Scheme("GR", "gr.amka", r"\d{11}", False),
    Scheme("RU", "ru.inn", r"\d{12}", False),
    Scheme("TR", "tr.tckimlik", r"[1-9]\d{10}", False),
    Scheme("IL", "il.idnr", r"\d{8}-?\d", False),
    Scheme("ZA", "za.idnr", r"\d{6} ?\d{4} ?\d{3}", False),
    Scheme("IN", "in_.aadhaar", r"[2-9]\d{3}[ -]\d{4}[ -]\d{4}"),
    Scheme("IN", "in_.aadhaar", r"[2-9]\d{11}", False),
    Scheme("IN", "in_.pan", r"[A-Z]{3}[ABCFGHJLPT][A-Z]\d{4}[A-Z]"),
    Scheme("CN", "cn.ric", r"\d{17}[\dX]"),
    Scheme("KR", "kr.rrn", r"\d{6}-\d{7}"),
    Scheme("JP", "jp.in_", r"\d{4}[ -]?\d{4}[ -]?\d{4}", False),
    Scheme("AU", "au.tfn", r"\d{3} ?\d{3} ?\d{2,3}", False),
    Scheme("CA", "ca.sin", r"\d{3}[ -]?\d{3}[ -]?\d{3}", False),
    Scheme("BR", "br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d"),
    Scheme("BR", "br.cpf", r"\d{11}", False),
    Scheme("AR", "ar.cuit", r"2[03467]-\d{8}-\d"),
    Scheme("AR", "ar.cuit", r"2[03467]\d{9}", False),
    Scheme("CL", "cl.rut", r"\d{1,2}\.\d{3}\.\d{3}-[\dK]"),
    Scheme("CL", "cl.rut", r"\d{7,8}-?[\dK]", False),
    Scheme("MX", "mx.curp", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[A-Z0-9]\d"),
    Scheme("MX", "mx.rfc", r"[A-Z]{4}[ -]?\d{6}[ -]?[A-Z0-9]{3}", False),
)
_PATTERNS = [(scheme, scheme.pattern) for scheme in SCHEMES]
_TWO_DIGITS = re.compile(r"\d\d")
BEFORE, AFTER = 24, 40  # characters around two digits; no number goes on for so long without two more


def identities(text: str, countries: Sequence[str] | None = None) -> Iterator[Found]:
    """Personal numbers of `countries` (ISO 3166; default: of all that are known)."""
    patterns = [each for each in _PATTERNS if countries is None or each[0].country in countries]
    for begin, end in _stretches(text):
        for scheme, pattern in patterns:
            for match in pattern.finditer(text, begin, end):
                if _valid(scheme.module, match[0]) and _is_told(scheme, hint(text, match.start())):
                    yield Found(match.start(), match.end(), "ID", re.sub(r"[^\w+]", "", match[0]).upper())


def _stretches(text: str) -> Iterator[tuple[int, int]]:
    """Where in a text there are digits, with what is around them."""
    begin = end = -1
    for match in _TWO_DIGITS.finditer(text):
        if match.start() - BEFORE > end:
            if end > 0:
                yield begin, end
            begin = max(0, match.start() - BEFORE)
        end = match.end() + AFTER
    if end > 0:
        yield begin, end


def _is_told(scheme: Scheme, said: str | None) -> bool:
    return said == "identity" or (scheme.told and said not in ("other", "version"))


@lru_cache(maxsize=4096)
def _valid(module: str, written: str) -> bool:
    if not module:
        return True
    check, bare = _checker(module), re.sub(r"\W", "", written)
    if module == "cn.ric":  # the library's list of places is not whole
        return _is_day(bare[6:14]) and check.calc_check_digit(bare) == bare[-1].upper()
    return check.is_valid(written) or check.is_valid(bare)


def _is_day(written: str) -> bool:
    try:
        return datetime.strptime(written, "%Y%m%d").year >= 1900
    except ValueError:
        return False


@cache
def _checker(module: str) -> Any:
    return import_module(f"stdnum.{module}")  # of the extra `prepare`
