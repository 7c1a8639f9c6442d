"""Which events a finished run sends, and that their payloads are figures."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import pytest
from made_up_nights import facts, manifest
from prefect.settings import PREFECT_API_URL, temporary_settings

from leukoflow.core.config import AlertSettings, load_config
from leukoflow.flows import events
from leukoflow.flows.events import drift_rows, emit, run_events
from leukoflow.tasks.monitor.nights import GroupDrift, compare_groups
from leukoflow.tasks.review.keys import run_key_of

STARTED = "2026-03-01T22:00:00+00:00"


def drifts(shift: float) -> tuple[GroupDrift, ...]:
    return compare_groups([facts("tonight", 5, shift)], [facts("a", 1), facts("b", 2)], "reference")


def test_an_ordinary_night_only_finishes() -> None:
    ((name, payload),) = run_events(manifest("night", STARTED), drifts(0.0), AlertSettings())
    assert name == "leukoflow.run.finished"
    assert payload == {
        "members": 96, "predicted": 76, "abstained": 12, "rejected": 4, "quarantined": 4, "missing": 0,
        "abstained_share": 0.125, "quarantined_share": 0.0417, "label_benign": 34, "label_early": 26, "label_pre": 8,
        "label_pro": 8, "drift_level": "none", "drift_quantity": "stain_red", "drift_excess": payload["drift_excess"],
        "exit_code": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "alerts", "event"),
    [
        ({"quarantined": 5}, {}, "leukoflow.run.quarantined-too-many"),
        ({}, {"quarantined_share": 0.04}, "leukoflow.run.quarantined-too-many"),
        ({"abstained": 25}, {}, "leukoflow.run.abstained-too-many"),
    ],
)
def test_too_many_call_somebody(changes: dict[str, int], alerts: dict[str, float], event: str) -> None:
    events = dict(run_events(replace(manifest("night", STARTED), **changes), (), AlertSettings(**alerts)))
    assert set(events) == {"leukoflow.run.finished", event}
    assert events["leukoflow.run.finished"]["drift_level"] == "unknown"
    assert "threshold" in events[event]


def test_drift_calls_somebody_and_says_where() -> None:
    events = dict(run_events(manifest("night", STARTED), drifts(5.0), AlertSettings()))
    payload = events["leukoflow.run.drift"]
    assert payload["drift_level"] == "act"
    assert {"site Site-B"} <= {row["fields of"] for row in payload["drifted"]}
    assert all(row["quantity"] == "stain: red over green" for row in payload["drifted"])
    assert "leukoflow.run.drift" not in dict(run_events(manifest("n", STARTED), drifts(5.0), AlertSettings(drift=99)))


def test_the_table_has_all_fields_and_elsewhere_what_drifts() -> None:
    rows = drift_rows(drifts(5.0))
    assert len([row for row in rows if row["fields of"] == "all"]) == 12
    assert {row["level"] for row in rows if row["fields of"] != "all"} <= {"watch", "act"}


def test_an_event_that_cannot_be_sent_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent = []
    monkeypatch.setattr(events, "emit_event", lambda **said: sent.append(said))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        emit("leukoflow.run.finished", "night", {"members": 1})
    assert sent == [
        {
            "event": "leukoflow.run.finished",
            "resource": {"prefect.resource.id": "leukoflow.run.night", "prefect.resource.name": "night"},
            "payload": {"members": 1},
        }
    ]

    def broken(**said: object) -> None:
        raise OSError("no server")

    monkeypatch.setattr(events, "emit_event", broken)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        emit("leukoflow.run.finished", "night", {})
    assert "leukoflow.run.finished was not sent (OSError)" in caplog.text


def test_without_a_server_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect would start a temporary server, whose farewell goes to a log that may be closed by then."""
    sent: list[object] = []
    monkeypatch.setattr(events, "emit_event", lambda **said: sent.append(said))
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        emit("leukoflow.run.finished", "night", {})
    assert sent == []


def test_the_report_is_named_so_that_a_browser_can_come_to_it() -> None:
    """No link to a file: a page that came over http may not open one."""
    from leukoflow.flows.announce import where_the_report_is

    def run(**more: Any) -> Any:
        config = load_config(source="night.zip", out="/data/my results", **more)
        return types.SimpleNamespace(config=config, root="/data/my results/night-1", run_id="night-1")

    words = where_the_report_is(run())
    assert "file://" not in words
    assert "`/data/my results/night-1/report.html`" in words
    assert "`leukoflow serve '/data/my results'`" in words
    linked = where_the_report_is(run(web_url="https://smears.lab/leukoflow/"))
    assert f"(https://smears.lab/leukoflow/runs/{run_key_of('night-1')})" in linked
