"""A wish to stop: the first signal lets the run finish what is on its way, the second ends it."""

from __future__ import annotations

import logging
import signal
import threading

import pytest

from flows.nightly import _draining


class Impatient(logging.Handler):
    """Sends the signal once more while the first one is logged, as somebody who presses Ctrl-C twice does."""

    sent = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.sent:
            self.sent = True
            signal.raise_signal(signal.SIGTERM)


def test_one_signal_asks_and_leaves_the_handlers_as_they_were() -> None:
    before, stop = signal.getsignal(signal.SIGTERM), threading.Event()
    with _draining(stop):
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_counts_while_the_first_one_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("leukoflow")
    monkeypatch.setattr(logger, "handlers", [Impatient()])
    with pytest.raises(KeyboardInterrupt), _draining(threading.Event()):
        signal.raise_signal(signal.SIGTERM)
