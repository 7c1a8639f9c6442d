"""A wish to stop: the first signal lets the run finish what is on its way, the second ends it."""

from __future__ import annotations

import logging
import signal
import threading
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest

import leukoflow.flows.site_night
from leukoflow.core.errors import RunCancelledError
from leukoflow.flows.life import asked_to_stop, drain_on_signals
from leukoflow.runs.ledger import RunOutcome


class Impatient(logging.Handler):
    """Sends the signal once more while the first one is logged, as somebody who presses Ctrl-C twice does."""

    sent = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.sent:
            self.sent = True
            signal.raise_signal(signal.SIGTERM)


def test_one_signal_asks_and_leaves_the_handlers_as_they_were() -> None:
    before, stop = signal.getsignal(signal.SIGTERM), threading.Event()
    with drain_on_signals(stop):
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_counts_while_the_first_one_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("leukoflow")
    monkeypatch.setattr(logger, "handlers", [Impatient()])
    with pytest.raises(KeyboardInterrupt), drain_on_signals(threading.Event()):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_after_cancel_or_a_deadline_is_the_first_one() -> None:
    stop = threading.Event()
    with drain_on_signals(stop):
        stop.set()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


class Nothing:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


HEAD: Any = SimpleNamespace(number=0, night="2026-03-01", runs=("first", "second"))


def test_a_signal_at_the_end_of_a_run_stops_the_night_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def run(site: Any, ledger: Any, head: Any, run_id: str, deadline: Any) -> RunOutcome:
        done.append(run_id)
        with drain_on_signals(threading.Event()):
            signal.raise_signal(signal.SIGTERM)
        return RunOutcome(run_id, 0, "20 of 20 images accounted for", 20)

    monkeypatch.setattr(leukoflow.flows.site_night, "get_run_logger", Nothing)
    monkeypatch.setattr(leukoflow.flows.site_night, "_do_run", run)
    asked_to_stop.clear()
    with pytest.raises(RunCancelledError, match="stopped before run second"):
        leukoflow.flows.site_night._do_claim(Nothing(), Nothing(), HEAD, None)  # type: ignore[arg-type]
    assert done == ["first"]


def test_a_signal_in_the_last_run_of_a_claim_stops_the_night_before_it_takes_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger: Any = SimpleNamespace(read=lambda: SimpleNamespace(heads=[HEAD]), outcome=lambda number: None)
    monkeypatch.setattr(leukoflow.flows.site_night, "get_run_logger", Nothing)
    monkeypatch.setattr(leukoflow.flows.site_night, "Ledger", lambda *_: ledger)
    monkeypatch.setattr(leukoflow.flows.site_night, "_do_claim", lambda *_: asked_to_stop.set() or [])
    monkeypatch.setattr(leukoflow.flows.site_night, "take", lambda *_: pytest.fail("it took what has arrived"))
    asked_to_stop.set()  # of a night before, in the same process
    site: Any = SimpleNamespace(out="out", name="ward", next_deadline=lambda moment: None)
    with pytest.raises(RunCancelledError, match="before it took what has arrived"):
        leukoflow.flows.site_night.work_through(site, date(2026, 3, 1))
    asked_to_stop.clear()


def test_a_night_that_is_done_is_not_failed_by_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    view: Any = SimpleNamespace(of=lambda state: [], items=(), leftovers=0, expected=None)
    warned: list[str] = []
    log = SimpleNamespace(info=lambda *_: None, warning=lambda text, *rest: warned.append(text % rest))

    def away(*_: object, **__: object) -> None:
        raise OSError("the server is away")

    monkeypatch.setattr(leukoflow.flows.site_night, "get_run_logger", lambda: log)
    monkeypatch.setattr(leukoflow.flows.site_night, "load_site", lambda path: SimpleNamespace(name="ward", out="out"))
    monkeypatch.setattr(
        leukoflow.flows.site_night,
        "work_through",
        lambda *_: leukoflow.flows.site_night.NightReport("2026-03-01", (), view, 0),
    )
    monkeypatch.setattr(leukoflow.flows.site_night, "create_markdown_artifact", away)
    assert leukoflow.flows.site_night.night.fn("site.yaml", "2026-03-01").is_completed()
    assert len(warned) == 1
