"""A signal raises Stopped where it comes, or is kept until it is looked for; a later one ends the process."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest

from align.training.borders.stops import Signals, Stopped, signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_is_raised_at_once_past_all_that_catches_exceptions(number):
    before = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP is ignored
    try:
        with Signals() as found, pytest.raises(Stopped), suppress(Exception):
            signal.raise_signal(number)
        assert found.asked == [number]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_under_nohup_the_end_of_the_terminal_is_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as found:
            signal.raise_signal(signal.SIGHUP)
        assert found.asked == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_it_is_kept_while_it_would_lose_something():
    with Signals(together=60) as found:
        found.heed()
        with found.deferred() as asked:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # a launcher passes on what the terminal has sent already
            assert asked == [signal.SIGTERM]
            with pytest.raises(Stopped):
                found.heed("news")


def test_within_what_may_be_broken_off_it_is_raised_at_once():
    went_on = []
    with Signals() as found, found.deferred():
        for begins in (True, False):  # the second time it came before
            with suppress(Stopped), found.at_once():
                went_on += ["began"]
                signal.raise_signal(signal.SIGTERM)
                went_on += ["ended"]
            assert went_on == ["began"], begins


def test_code_that_swallows_it_is_not_gone_on_with():
    with Signals() as found, found.deferred(), pytest.raises(Stopped), found.at_once(), suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def interruptible():
    """Python's own handler; a shell's background has none, for SIGINT is ignored there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_later_one_ends_the_process(interruptible):
    with signals() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
