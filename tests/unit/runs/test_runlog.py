"""A run's log: plain text for people and JSON lines for programs, workers included."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import typer

from leukoflow.apps.cli.common import reported
from leukoflow.cluster.telemetry import TOPIC, WORKER_LOGGER, worker_messages
from leukoflow.core.errors import QUOTING, StorageError, place_of, words_of
from leukoflow.runs.runlog import _LogFile, run_log


class Client:
    """Takes a subscription as Dask's client does."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def subscribe_topic(self, topic: str, handler: Any) -> None:
        self.handlers[topic] = handler

    def unsubscribe_topic(self, topic: str) -> None:
        del self.handlers[topic]

    def tell(self, message: str, level: int = logging.INFO, run: str = "night") -> None:
        record = {"run": run, "shard": "00003", "stage": "segment", "level": level, "message": message, "worker": 2}
        self.handlers[TOPIC]((0.0, record))


@pytest.fixture(autouse=True)
def _files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the handlers that Prefect adds once it is imported: they want a flow run."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])


def logs(root: Path) -> tuple[str, list[dict[str, Any]]]:
    (plain,), (lines,) = (list((root / "logs").glob(f"*{ending}")) for ending in (".log", ".jsonl"))
    return plain.read_text(), [json.loads(line) for line in lines.read_text().splitlines()]


def test_both_files_tell_what_the_flow_says(tmp_path: Path) -> None:
    flow = logging.getLogger("prefect.flow_runs")
    with run_log(str(tmp_path), "night"):
        flow.warning("48 images in %s shards", 3)
        flow.warning("shard 00002: 16 predicted")
        record = logging.LogRecord("prefect.task_runs", logging.ERROR, "", 1, "it is tried again", (), None)
        record.task_run_name = "shard 00007, images 113 to 128"
        logging.getLogger("prefect.task_runs").handle(record)
    flow.warning("after the run")
    plain, lines = logs(tmp_path)
    assert "WARNING 48 images in 3 shards" in plain
    assert [line["message"] for line in lines] == [
        "48 images in 3 shards", "shard 00002: 16 predicted", "it is tried again"
    ]  # fmt: skip
    assert [line["shard"] for line in lines] == [None, "00002", "00007"]
    assert lines[2]["level"] == "ERROR"
    assert {line["run"] for line in lines} == {"night"}
    assert all(line["time"].endswith("+00:00") for line in lines)
    assert set(lines[0]) == {"time", "level", "run", "shard", "stage", "message"}


def test_an_error_is_one_line_with_its_kind(tmp_path: Path) -> None:
    words = "two\nlines"
    with run_log(str(tmp_path), "night"):
        try:
            raise ValueError(words)
        except ValueError:
            logging.getLogger("leukoflow").exception("it failed")
    plain, (line,) = logs(tmp_path)
    assert "it failed" in plain
    assert plain.rstrip().endswith("\nValueError")
    assert words not in plain
    assert line["exception"] == "ValueError"  # what a library says of values may name a patient


def test_stages_of_workers_fill_the_json_lines_and_only_warnings_the_text(tmp_path: Path) -> None:
    client = Client()
    with run_log(str(tmp_path), "night"), worker_messages(client, "night"):
        client.tell("finished in 4.10 s")
        client.tell("failed (MemoryError)", logging.WARNING)
        client.tell("started", run="another night on the same cluster")
    assert client.handlers == {}
    plain, lines = logs(tmp_path)
    assert "finished" not in plain
    assert "WARNING shard 00003: segment failed (MemoryError)" in plain
    assert [(line["shard"], line["stage"], line["worker"], line["message"]) for line in lines] == [
        ("00003", "segment", "2", "shard 00003: segment finished in 4.10 s"),
        ("00003", "segment", "2", "shard 00003: segment failed (MemoryError)"),
    ]


def test_loggers_are_left_as_they_were(tmp_path: Path) -> None:
    names = ("leukoflow", "prefect.flow_runs", "prefect.task_runs", WORKER_LOGGER)

    def state() -> list[Any]:
        return [(list(g.handlers), g.level, g.propagate) for g in map(logging.getLogger, names)]

    before = state()
    with run_log(str(tmp_path), "night"):
        assert state() != before
    assert state() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_loses_lines_and_raises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    handler = _LogFile("/dev/full")
    handler.emit(logging.makeLogRecord({"msg": "short, so that closing finds it unwritten"}))
    handler.close()
    assert capsys.readouterr() == ("", "")


def test_what_may_be_passed_on_of_an_error() -> None:
    quoting = pa.ArrowInvalid("CSV parse error: Expected 3 columns, got 4: a.jpg,S1,Family, Given")
    with pytest.raises(pa.ArrowInvalid) as raised:
        raise quoting
    assert words_of(raised.value) == "ArrowInvalid"
    assert place_of(raised.value).startswith("ArrowInvalid at test_runlog.py:")
    assert isinstance(quoting, QUOTING)
    assert words_of(StorageError("the disk is full; make room")) == "the disk is full; make room"
    assert words_of(PermissionError(13, "Permission denied", "/in/Family.jpg")) == "Permission denied"


def test_an_unforeseen_error_on_the_terminal_quotes_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), reported():
        raise pa.ArrowInvalid("got 4: a.jpg,S1,Family, Given")
    printed = capsys.readouterr().err
    assert "error: ArrowInvalid (test_runlog.py, line" in printed
    assert "Family" not in printed
