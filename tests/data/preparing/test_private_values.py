import time

import phonenumbers
import pytest
from data.preparing.private_values import labelled, score
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.formats.rows import Row
from align.data.preparing.privacy import KINDS, Privacy
from align.data.preparing.private.accounts import cards, ibans, luhn
from align.data.preparing.private.contacts import addresses, emails
from align.data.preparing.private.found import folded
from align.data.preparing.private.identities import SCHEMES, identities
from align.data.preparing.private.phones import COUNTRIES, phones
from align.data.preparing.private.secrets import bits, secrets
from align.data.preparing.step import Item

EXAMPLES = {  # of python-stdnum's documentation
    "us.ssn": "536-90-4399", "us.itin": "912-90-3456", "gb.nhs": "943-476-5870", "gb.utr": "1955839661",
    "de.idnr": "36 574 261 809", "fr.nir": "2 95 10 99 126 111 93", "es.dni": "54362315-K", "es.nie": "X-2482300W",
    "it.codicefiscale": "RCCMNL83S18D969H", "nl.bsn": "111222333", "be.nn": "85073003328", "ch.ssn": "756.9217.0769.85",
    "at.vnr": "1237 010180", "pt.nif": "501 964 843", "ie.pps": "6433435F", "se.personnummer": "880320-0016",
    "no.fodselsnummer": "15108695088", "dk.cpr": "211062-5629", "fi.hetu": "131052-308T", "pl.pesel": "44051401359",
    "cz.rc": "710319/2745", "ro.cnp": "1630615123457", "bg.egn": "8032056031", "hr.oib": "33392005961",
    "ee.ik": "36805280109", "lt.asmens": "33309240064", "gr.amka": "01013099997", "ru.inn": "123456789047",
    "tr.tckimlik": "17291716060", "il.idnr": "03933742-3", "za.idnr": "7503305044089", "in_.aadhaar": "2341 2341 2346",
    "in_.pan": "ACUPA7085R", "cn.ric": "360426199101010071", "kr.rrn": "971013-9019902", "jp.in_": "6214 9832 0257",
    "au.tfn": "123 456 782", "ca.sin": "123-456-782", "br.cpf": "390.533.447-05", "ar.cuit": "20-05536168-2",
    "cl.rut": "12531909-2", "mx.curp": "BOXW310820HNERXN09", "mx.rfc": "GODE561231GR8",
}  # fmt: skip


def masked(value, **options):
    return Privacy(**options).mask(value).value


def test_the_labelled_file():
    texts = labelled()
    found = [Privacy().find([("", each.text)])[0] for each in texts]
    scores = score(texts, found)
    assert scores["all"].marked >= 1100
    assert {kind for kind in scores if kind != "all"} == set(KINDS)
    for kind, each in scores.items():
        assert each.recall >= 0.98, (kind, each.missed)
        assert each.precision >= 0.95, (kind, each.wrong)


def test_every_register_has_an_example_that_is_found_and_one_digit_more_or_less_is_none():
    assert {scheme.module for scheme in SCHEMES if scheme.module} == set(EXAMPLES)
    for module, number in EXAMPLES.items():
        text = f"tax id: {number}."
        assert [text[f.start : f.end] for f in identities(text)][:1] == [number], module
        assert not list(identities(f"order {number}")), module
    for number in ("536-90-4399", "390.533.447-05", "971013-9019902", "RCCMNL83S18D969H", "756.9217.0769.85"):
        assert list(identities(f"it is {number}, he said")), "the form tells"
        assert not list(identities(f"it is 7{number}, he said"))
        assert not list(identities(f"it is {number}7, he said"))
    assert not list(identities("it is 44051401359"))


def test_countries_bound_what_is_national():
    assert not list(identities("PESEL 44051401359", ["DE"]))
    assert list(identities("PESEL 44051401359", ["PL"]))
    assert not list(phones("call 612 345 678", ["US"]))
    assert list(phones("call 612 345 678", ["ES"]))
    assert list(phones("call +34 612 345 678", ["US"])), "a country code tells by itself"


def test_every_countrys_example_number_is_found_and_means_the_same_in_both_forms():
    for country in COUNTRIES:
        number = phonenumbers.example_number_for_type(country, phonenumbers.PhoneNumberType.MOBILE)
        form = phonenumbers.PhoneNumberFormat
        world = phonenumbers.format_number(number, form.INTERNATIONAL)
        home = phonenumbers.format_number(number, form.NATIONAL)
        e164 = phonenumbers.format_number(number, form.E164)
        text = f"Ring {world} now"
        (found,) = phones(text)
        assert (text[found.start : found.end], found.value) == (world, e164), country
        assert [f.value for f in phones(f"Phone: {home}", [country])] == [e164], (country, home)


@settings(max_examples=25)
@given(st.text("0123456789", min_size=1, max_size=30))
def test_luhn_takes_exactly_one_last_digit_and_sees_every_changed_digit(digits):
    (check,) = [d for d in "0123456789" if luhn(digits + d)]
    whole = digits + check
    for i, digit in enumerate(whole):
        assert not luhn(whole[:i] + str((int(digit) + 1) % 10) + whole[i + 1 :])


def test_an_iban_ends_where_it_is_valid():
    text = "IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF"
    (found,) = ibans(text)
    assert text[found.start : found.end] == "DE89 3704 0044 0532 0130 00"
    assert found.value == "DE89370400440532013000"
    assert not list(ibans("DE88 3704 0044 0532 0130 00"))


def test_bits_of_a_text():
    assert bits("aaaa") == 0
    assert bits("abab") == pytest.approx(1)
    assert bits("abcdefgh") == pytest.approx(3)


def test_places_in_a_folded_text():
    plain, places = folded("a\u200b\uff11\u00a0b")
    assert plain == "a1 b"
    assert places == [0, 2, 3, 4]
    assert folded("春天 plain") == ("春天 plain", None)


def test_a_value_has_one_placeholder_throughout_a_row_however_it_is_written():
    row = {
        "messages": [
            {"role": "user", "content": "I am Ann.Lee@Example.org, card 4111 1111 1111 1111, call +1 202-555-0143"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {
                            "name": "pay",
                            "arguments": {
                                "card": 4111111111111111,
                                "phone": "2025550143",
                                "cc": {"bob@example.org": ["ann.lee@example.org"]},
                            },
                        },
                    }
                ],
            },
        ]
    }
    found = Privacy().mask(row)
    user, call = found.value["messages"]
    assert user["content"] == "I am <EMAIL_1>, card <CARD_1>, call <PHONE_1>"
    assert call["tool_calls"][0]["function"]["arguments"] == {
        "card": "<CARD_1>",
        "phone": "<PHONE_1>",
        "cc": {"<EMAIL_2>": ["<EMAIL_1>"]},
    }
    assert found.counts == {"EMAIL": 3, "CARD": 2, "PHONE": 2}
    assert masked(found.value) == found.value, "a second time changes nothing"


def test_what_is_told_in_one_text_is_masked_in_all_of_its_row():
    said = ["My phone is 612345678.", "Noted: 612345678", "1612345678 is another"]
    assert masked(said) == ["My phone is <PHONE_1>.", "Noted: <PHONE_1>", "1612345678 is another"]
    assert masked([said[1]]) == [said[1]]


def test_placeholders_of_an_earlier_run_keep_their_numbers():
    assert masked("<EMAIL_3> wrote to a@example.org") == "<EMAIL_3> wrote to <EMAIL_4>"


def test_kinds_that_are_not_asked_for_stay():
    text = "a@example.org at 203.0.113.7"
    assert masked(text, kinds=["IP"]) == "a@example.org at <IP_1>"


def test_parts_of_a_name_are_the_person_that_came_before():
    def names(texts):
        from align.data.preparing.private.found import Found

        return [
            [Found(t.find(n), t.find(n) + len(n), "NAME", n.lower()) for n in ("Ann Lee", "Lee", "Bo") if n in t][:1]
            for t in texts
        ]

    assert masked(["Ann Lee came.", "Lee left.", "Bo stayed."], names=names) == [
        "<NAME_1> came.",
        "<NAME_1> left.",
        "<NAME_2> stayed.",
    ]


def test_the_step_changes_every_part_of_a_row_and_shows_no_value():
    row = Row(
        "f.jsonl", 1, [{"role": "user", "content": "Mail a@example.org"}], None,
        [{"type": "function", "function": {"name": "f", "description": "asks a@example.org"}}],
        answers=({"role": "assistant", "content": "a@example.org is good"}, {"role": "assistant", "content": "no"}),
    )  # fmt: skip
    clean = row._replace(file="g.jsonl", messages=[{"role": "user", "content": "hello"}], tools=None, answers=())
    items = [Item(0, 0, "pairs", row, {"url": "mailto:a@example.org"}), Item(1, 0, "messages", clean, {})]
    changed, kept = Privacy().look(items)
    assert "a@example.org" not in str(changed)
    assert changed.counts == {"EMAIL": 4}
    assert changed.item.row.answers[0]["content"] == "<EMAIL_1> is good"
    assert changed.item.record == {"url": "mailto:<EMAIL_1>"}
    assert "<EMAIL_1>" in changed.example
    assert kept.item is items[1]


def test_what_a_report_may_say():
    hide = Privacy().hide
    assert hide("content: expected text, found the text 'ann.lee@example.org'") == (
        "content: expected text, found the text '<EMAIL_1>'"
    )
    assert "ann.lee" not in hide("found the text 'write to ann.lee@exam …'")
    assert "1111" not in hide("…1111 1111 1111 is it")


@pytest.mark.parametrize(
    "part",
    ["a", "1", "1-", "a@", "a.b@c.", "12:", "+1 (2", "eyJ", "password=", "password a ", "A1 ", "DE89 ", "://", "tel ",
     " at dot", "-----BEGIN PRIVATE KEY-----\n", "4111 ", "春", "0 "],
)  # fmt: skip
def test_no_text_takes_long(part):
    """What takes quadratic time takes minutes here."""
    begun = time.process_time()
    for finder in (emails, addresses, cards, ibans, identities, phones, secrets):
        list(finder(part * (30_000 // len(part))))
    assert time.process_time() - begun < 3
