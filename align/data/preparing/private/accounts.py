"""Numbers of payment cards and bank accounts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from align.data.preparing.private.found import WORD, Found, digits
from align.data.preparing.private.hints import hint

_CARD = re.compile(rf"(?<![{WORD}/#-])(?<!\d[.,])\d(?:[ .-]?\d){{12,18}}(?![{WORD}]|[.,-]\d)")
_BRANDS = re.compile(  # issuers' first digits and the lengths of their numbers (ISO/IEC 7812)
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:6011|64[4-9]\d|65\d\d)\d{12,15}"  # Discover
    r"|35(?:2[89]|[3-8]\d)\d{12,15}"  # JCB
    r"|3(?:0[0-5]|[689]\d)\d{11,16}"  # Diners Club
    r"|(?:62|81)\d{14,17}"  # UnionPay
    r"|(?:50|5[6-9]|6[0-9])\d{11,17}"  # Maestro
    r"|220[0-4]\d{12,15}|60\d{14}|508[5-9]\d{12}"  # Mir, RuPay
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d\d(?:[ .-]?[A-Za-z0-9]){11,30}")


def cards(text: str) -> Iterator[Found]:
    """Payment cards: an issuer's digits and length, and the checksum of Luhn."""
    for match in _CARD.finditer(text):
        written = match[0]
        ends = [i for i in range(len(written), 12, -1) if not written[i : i + 1].isdigit() and written[i - 1].isdigit()]
        end = next((end for end in ends if _is_card(written[:end])), None)  # an expiry date may follow
        if end is None:
            continue
        number, said = digits(written[:end]), hint(text, match.start())
        # Maestro and Mir leave so many first digits open that one in ten of all numbers would pass; those of 13 digits
        # are mostly articles'.
        open_ended = len(number) == 13 or not re.match(r"[34]|5[1-5]|2[2-7]|6011|62|65", number)
        if said == "card" if open_ended else said not in ("other", "version"):
            yield Found(match.start(), match.start() + end, "CARD", number)


def _is_card(written: str) -> bool:
    number = digits(written)
    return bool(_BRANDS.fullmatch(number)) and luhn(number) and _grouped(written)


def ibans(text: str) -> Iterator[Found]:
    """Bank accounts by their international number (ISO 13616): a country's length and form, and the checksum."""
    from stdnum import iban  # of the extra `prepare`

    match = _IBAN.search(text)
    while match:
        written, after = match[0], match.start() + 4
        ends = [i for i in range(len(written), 14, -1) if written[i - 1].isalnum()]
        for end in ends:  # the number ends where it is valid: words may follow
            following = written[end : end + 1]
            value = re.sub("[^A-Z0-9]", "", written[:end].upper())
            if not following.isalnum() and _checks(value) and iban.is_valid(value, check_country=False):
                after = match.start() + end
                yield Found(match.start(), after, "IBAN", value)
                break
        match = _IBAN.search(text, after)


def _checks(number: str) -> bool:
    """Whether its two check digits hold: letters as two digits, the first four signs last, 1 modulo 97 (ISO 7064)."""
    return int("".join(str(int(sign, 36)) for sign in number[4:] + number[:4])) % 97 == 1


def luhn(number: str) -> bool:
    """Whether the last of these digits checks the others, as Luhn's formula (ISO/IEC 7812-1) has it."""
    doubled = [int(digit) * (1 + i % 2) for i, digit in enumerate(reversed(number))]
    return sum(n - 9 * (n > 9) for n in doubled) % 10 == 0


def _grouped(written: str) -> bool:
    """Whether it is one number: of one stretch, or in groups of three or more with the same sign between."""
    groups = re.split("[ .-]", written)
    return len({*re.findall("[ .-]", written)}) < 2 and (len(groups) == 1 or all(len(g) > 2 for g in groups[:-1]))
