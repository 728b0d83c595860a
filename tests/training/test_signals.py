"""A signal raises Stopped where it comes, or is kept until it is looked for; a later one ends the process."""

from __future__ import annotations

import signal
import time
from contextlib import suppress

import pytest

from align.training import stops
from align.training.stops import Signals, Stopped, signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_raised_at_once_past_all_that_catches_exceptions(number):
    before = signal.getsignal(number)
    with Signals() as found, pytest.raises(Stopped), suppress(Exception):
        signal.raise_signal(number)
    assert found.asked == [number]
    assert signal.getsignal(number) is before


def test_it_is_kept_while_it_would_lose_something():
    with Signals() as found:
        found.heed()
        with found.deferred() as asked:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # a launcher passes on what the terminal has sent already
            assert asked == [signal.SIGTERM]
            with pytest.raises(Stopped):
                found.heed("news")


def test_a_later_one_ends_the_process(monkeypatch):
    monkeypatch.setattr(stops, "ONE", 0.01)
    with signals() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        time.sleep(0.02)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
