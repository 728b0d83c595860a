"""What the words before a number say it is: a phone number, a card, an order.

The same digits can be any of these, and checksums of one digit let a tenth of all numbers through. So where the form of
a number does not tell, the nearest such word before it does.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from align.data.preparing.private.found import LETTERS, WORD

Hint = Literal["phone", "card", "iban", "identity", "address", "version", "other"]

REACH = 48  # characters before a number in which its hint may stand

_STEMS: dict[Hint, str] = {  # the beginnings of words, in the languages in which data sets are mostly written
    "phone": (
        "phone telephone tel tél telefon telefoon teléfono telefone téléphone mobile mobil móvil mobiel cell cellphone "
        "celular cellulare cep call dial ring fax whatsapp sms reach contact kontakt contacto hotline helpline handy "
        "anruf ruf durchwahl festnetz portable appel joign llám llam chiam ligue ligar bel telemóvel komórk zadzwo "
        "puhelin soita gsm natel ringe bellen freephone freecall msisdn zap contato volej zavolej volaj hívj sună "
        "тел телефон моб звон позвон τηλ κινητ καλέστε "
        "हेल्पलाइन फोन फ़ोन मोबाइल"
    ),
    "card": (
        "card visa mastercard amex maestro discover diners jcb credit debit karte kreditkarte carte tarjeta carta "
        "cartão cartao kaart karta kart kort карт कार्ड"
    ),
    "iban": "iban bic swift konto bankverbindung",
    "identity": (
        "ssn social sécu secu sozialversicherung national identity identification tax taxpayer tin itin nino "
        "utr insurance nhs steuer idnr ausweis nir insee dni nie nif cpf cédula cedula curp rfc aadhaar aadhar uidai "
        "pan pesel personnummer personbeteckning henkilötunnus hetu cpr fødselsnummer personnr bsn burgerservicenummer "
        "rijksregister niss ahv avs codice fiscale cnp rodné rodne sin tfn pps ppsn egn егн oib isikukood asmens amka "
        "αμκα contribuin contribuen инн снилс паспорт kimlik tckn rut cuit cuil passport आधार"
    ),
    "address": (
        "src dst ip ipv4 ipv6 address adresse host hostname server ping ssh client remote dirección indirizzo адрес"
    ),
    "version": (
        "v ver version versión versione versão versie release section chapter clause paragraph oid firmware kernel "
        "driver build revision rev update upgrade patch abschnitt kapitel версия"
    ),
    "other": (
        "order invoice ticket ref reference receipt tracking shipment parcel isbn issn ean upc gtin sku asin serial "
        "model part article item product batch lot commit hash checksum timestamp unix epoch doi arxiv pmid patent "
        "issue bug case docket policy booking reservation confirmation flight imei iccid vin latitude "
        "longitude coordinates transaction uuid fedex ups usps dhl siren siret hrb zip "
        "population bestell rechnung kundennummer artikel auftrag sendung "
        "serien aktenzeichen mitglied chargen pn catalog catalogue drawing boleto "
        "commande facture référence suivi pedido factura referencia seguimiento ordine fattura "
        "riferimento encomenda fatura bestelling factuur zamówien faktur sipariş tilaus ordre заказ счёт счет артикул "
        "ऑर्डर"
    ),
}  # fmt: skip
_COMPOUNDS: dict[Hint, str] = {  # whose last word alone says something else
    "phone": r"(?:my|our|his|her|mi|su|mon|notre|meine|unsere|der|mijn|mio|meu|mitt) "
    r"(?:number|num\b|número|numéro|nummer|numero)(?! (?:of|de|d['’]))|toll[ -]free",
    "identity": r"(?:identity|identification|id|pan|aadhaar|social insurance|social security|tax|health) card|"
    r"(?:national|personal|citizen|south african|sa) id\b|id (?:number|no\b)|"
    r"sv[ -]?(?:nummer|nr)|t\.?c\.? (?:kimlik )?no\b",
    "other": r"(?:sim|sd|graphics|library|gift|loyalty|membership|report|score) card|"
    r"(?:customer|member|order|ticket|case|call|contact)[ _-]?(?:id\b|number|reference|no\b|nr\b)",
}
_WHOLE = (
    "v ver tel tin nie nir sin rut pan pps ref rev lot ip oid part cell ring bel ruf cep kart rfc case ups dhl src dst "
    "pn zap"
)
_WITHOUT_SPACES: dict[Hint, str] = {  # of scripts that put none between words
    "phone": (
        "電話番号 携帯番号 電話號碼 手機號碼 电话 電話 手机 手機 联系方式 联系我 致电 拨打 传真 携帯 ファックス 전화 "
        "휴대폰 핸드폰 연락처 热线 熱線 总机 總機 座机 هاتف جوال اتصل"
    ),
    "card": "信用卡 银行卡 卡号 カード番号 カード 카드번호 카드 بطاقة",
    "identity": '身份证 身分證 证件号 個人番号 マイナンバー 주민등록 주민번호 זהות ת"ז ת״ז ת.ז الهوية',
    "address": "地址 アドレス 주소 عنوان",
    "version": "版本 バージョン 버전 第",
    "other": "订单 訂單 编号 編號 单号 序列号 流水号 条码 货号 発注 注文 番号 品番 型番 주문 송장 상품 제품 طلب",
}


_HUMP = "(?-i:(?<=[a-z]{2})(?=[A-Z]))"  # where a word begins within a name of code: altPhone


def _pattern() -> re.Pattern[str]:
    whole = set(_WHOLE.split())
    groups = []
    for hint, stems in _STEMS.items():
        words = [
            re.escape(stem) + rf"(?![{LETTERS}])" if stem in whole else stem + rf"[{LETTERS}]*"
            for stem in stems.split()
        ]
        others = _WITHOUT_SPACES.get(hint, "").split()
        compounds = [_COMPOUNDS[hint]] if hint in _COMPOUNDS else []
        begun = (
            rf"(?:(?<![{LETTERS}])|{_HUMP})(?:" + "|".join([*compounds, *sorted(words, key=len, reverse=True)]) + ")"
        )
        groups.append(f"(?P<{hint}>" + "|".join([begun, *map(re.escape, others)]) + ")")
    return re.compile("|".join(groups), re.IGNORECASE)


_HINTS = _pattern()
_SAID_AFTER = re.compile(
    r"[\s,;:–-]{0,3}(?:\(|(?:(?:that|this|it)(?:['’]s| is)|is|was|ist|es|est|è|é)\s"
    r"(?:(?:my|our|his|her|the|meine?|mi|mon)\s)?)",
    re.IGNORECASE,
)
_ENDS = re.compile(r"[!?。！？]|\n\s*\n")
_AND = (  # what joins the numbers of a list
    r"(?:and|or|at|on|und|oder|unter|sonst|et|ou|au|y|o|al|alla|oppure|e|en|of|op|och|og|eller|på|lub|albo|ja|i|и|или|ve"
    r"|veya|ext|home|work|office|desk|büro|privat|bureau|casa|oficina|trabajo|ufficio|kantoor|thuis)"
)
_SPENT = re.compile(
    rf"\d{{3}}(?=.*?(?<![{WORD}])(?!{_AND}(?![{LETTERS}]))[^\W\d_]{{2,}}(?!\d))", re.DOTALL | re.IGNORECASE
)


class Told(NamedTuple):
    """A telling word before a number."""

    hint: Hint
    end: int  # of the word


def told(text: str, start: int) -> Told | None:
    """The nearest telling word in the `REACH` characters before `start`; None where there is none.

    A word tells of the number that comes next, and of others in a list with it; not beyond the end of a question or
    a paragraph.
    """
    begin = max([max(0, start - REACH), *(end.end() for end in _ENDS.finditer(text, max(0, start - REACH), start))])
    last = None
    for last in _HINTS.finditer(text, begin, start):  # noqa: B007
        pass
    return Told(last.lastgroup, last.end()) if last and not _SPENT.search(text, last.end(), start) else None


def told_after(text: str, end: int) -> Hint | None:
    """What words right after a number say it is: "…, that's my cell", "… (mobile)"."""
    said = _SAID_AFTER.match(text, end)
    word = said and _HINTS.match(text, said.end())
    return word.lastgroup if word else None


def hint(text: str, start: int) -> Hint | None:
    """What that word says."""
    found = told(text, start)
    return found and found.hint
