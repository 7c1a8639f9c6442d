"""The deadline: the forecast, what is handed over, and which shards are worked first."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import leukoflow.flows.deadline
from leukoflow.core.config import RunConfig, UrgentSettings, load_config
from leukoflow.core.errors import ConfigError, DeadlineError, RunCancelledError
from leukoflow.runs.progress import RunProgress, read_progress
from leukoflow.runs.receipts import Counts
from leukoflow.runs.records import PlanSummary, Source, SourceKind
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.plan_file import urgent_first
from leukoflow.tasks.publish.partial import Pace, hand_over, lateness

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def progress(done: int, members: int = 1000) -> RunProgress:
    return RunProgress(
        "r", "running", "", "", members, Counts(predicted=done), 10, 1, NOON.isoformat(), NOON.isoformat(), (), "again"
    )


@pytest.mark.parametrize(
    ("done", "pace", "expected"),
    [
        (0, Pace(0, 10.0), None),
        (200, Pace(100, 0.0), None),
        (200, Pace(100, 100.0), timedelta(seconds=800 - 3600)),
        (200, Pace(100, 1000.0), timedelta(seconds=8000 - 3600)),
    ],
)
def test_the_forecast(done: int, pace: Pace, expected: timedelta | None) -> None:
    assert lateness(progress(done), pace, NOON + timedelta(hours=1), NOON) == expected


def test_a_late_run_is_warned_of_once_and_the_note_follows_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    artifacts: list[str] = []
    log = SimpleNamespace(warning=lambda text, *rest: warned.append(text % rest))
    monkeypatch.setattr(leukoflow.flows.deadline, "get_run_logger", lambda: log)
    monkeypatch.setattr(leukoflow.flows.deadline, "create_markdown_artifact", lambda text, **_: artifacts.append(text))
    notes: list[str] = []
    run: Any = SimpleNamespace(run_id="r", root="/nowhere", config=None)
    watch = leukoflow.flows.deadline._Watch(run, NOON + timedelta(hours=1), threading.Event(), notes.append)
    watch.look(progress(100), NOON, 0.0)  # of an earlier session
    watch.look(progress(100), NOON, 50.0)
    watch.look(progress(116), NOON, 100.0)  # the clock starts with the first shard of this session
    assert notes == []
    watch.look(progress(126), NOON, 200.0)
    assert len(warned) == len(artifacts) == 1
    assert "0.1 images/s" in notes[-1]
    assert "by 86 min" in notes[-1]
    watch.look(progress(127), NOON, 210.0)
    assert len(warned) == 1
    watch.look(progress(900), NOON, 300.0)
    assert notes[-1] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at_deadline", "ahead", "stops"), [("stop", 0.05, True), ("continue", 0.05, False), ("stop", -5.0, False)]
)
def test_at_its_deadline_a_run_hands_over_and_stops_where_it_is_asked_to(
    copy: Path, night: Run, monkeypatch: pytest.MonkeyPatch, at_deadline: Any, ahead: float, stops: bool
) -> None:
    """A deadline that had passed when the session began was that of an earlier one: it stops nothing."""
    monkeypatch.setattr(leukoflow.flows.deadline, "get_run_logger", lambda: SimpleNamespace(warning=lambda *_: None))
    monkeypatch.setattr(leukoflow.flows.deadline, "create_markdown_artifact", lambda *_, **__: None)
    (copy / "manifest.json").unlink()
    deadline = datetime.now(UTC) + timedelta(seconds=ahead)
    config = night.config.model_copy(update={"deadline": deadline, "at_deadline": at_deadline})
    run = replace(night, root=str(copy), config=config)
    stop, handed_over = threading.Event(), threading.Event()

    def note(words: str) -> None:
        if words.startswith("handed over"):
            handed_over.set()

    def body() -> None:
        with leukoflow.flows.deadline.watch_deadline(run, stop, note):
            assert handed_over.wait(30)
            if stop.wait(30 if stops else 0.2):
                raise RunCancelledError("drained")

    if stops:
        with pytest.raises(DeadlineError, match=r"has reached its deadline .* leukoflow rerun"):
            body()
    else:
        body()
        assert not stop.is_set()
        with pytest.raises(RunCancelledError) as caught, leukoflow.flows.deadline.watch_deadline(run, stop, note):
            raise RunCancelledError("somebody pressed Cancel")
        assert not isinstance(caught.value, DeadlineError)
    assert (copy / "partial" / "slides.parquet").exists()


def test_a_second_ctrl_c_does_not_wait_for_the_hand_over(night: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leukoflow.flows.deadline, "get_run_logger", lambda: SimpleNamespace(warning=lambda *_: None))
    busy, release, waits = threading.Event(), threading.Event(), list[float | None]()

    def follow(watch: Any) -> None:
        busy.set()
        release.wait(60)

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        waits.append(timeout)

    monkeypatch.setattr(leukoflow.flows.deadline._Watch, "follow", follow)
    run = replace(night, config=night.config.model_copy(update={"deadline": datetime.now(UTC)}))

    def body(how: type[BaseException]) -> None:
        with (
            monkeypatch.context() as patch,
            leukoflow.flows.deadline.watch_deadline(run, threading.Event(), lambda words: None),
        ):
            assert busy.wait(30)
            patch.setattr(threading.Thread, "join", join)
            raise how

    for how, patience in ((KeyboardInterrupt, 0.0), (RunCancelledError, 600.0)):
        with pytest.raises(how):
            body(how)
        assert waits.pop() == patience
    release.set()


def test_what_is_done_is_handed_over_and_labelled(copy: Path, night: Run) -> None:
    (copy / "manifest.json").unlink()
    (copy / "markers" / "predictions" / "00002.json").unlink()
    (copy / "slides.parquet").unlink()
    done = hand_over(str(copy))
    assert (done.done, done.members) == (32, night.summary.members)
    table = pq.read_table(copy / "partial" / "slides.parquet")
    label = table.schema.metadata[b"leukoflow.partial"].decode()
    assert label.startswith(f"32 of {night.summary.members} images of run night, as of ")
    rows = {(r["grouping"], r["slide_id"]): r for r in table.to_pylist()}
    assert sum(r["n_images"] for r in rows.values()) == 32
    whole = pq.read_table(Path(night.root) / "slides.parquet").to_pylist()
    planned = {(r["grouping"], r["slide_id"]): r["n_images"] for r in whole}
    assert {key: r["n_planned"] for key, r in rows.items()} == {key: planned[key] for key in rows}
    page = (copy / "partial" / "report.html").read_text()
    assert "Not a final result" in page
    assert "A partial ranking" in page
    assert read_progress(str(copy)).done == 32


@pytest.fixture
def plan_file(tmp_path: Path) -> pq.ParquetFile:
    """Three shards of two; images of slide S2 in the second and, more of them, in the third."""
    with pq.ParquetWriter(tmp_path / "plan.parquet", pa.schema({"image_key": pa.string(), "slide_id": pa.string(),
                          "meta_priority": pa.string()})) as writer:  # fmt: skip
        for keys, slides, priority in (
            (["a/1", "a/2"], ["S1", None], ["low", None]),
            (["b/1", "c/1"], ["S1", "S2"], ["low", "STAT"]),
            (["c/2", "c/3"], ["S2", "S2"], ["low", "low"]),
        ):
            writer.write_table(pa.table({"image_key": keys, "slide_id": slides, "meta_priority": priority}))
    return pq.ParquetFile(tmp_path / "plan.parquet")


SUMMARY = PlanSummary(Source("x", SourceKind.ZIP, "i", 1), 6, 0, 0, None, 2, "d")


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (UrgentSettings(), [0, 1, 2]),
        (UrgentSettings(image_keys=("c/*",)), [2, 1, 0]),
        (UrgentSettings(column="slide_id", values=("S2",)), [2, 1, 0]),
        (UrgentSettings(column="priority", values=("STAT", "urgent")), [1, 0, 2]),
        (UrgentSettings(image_keys=("a/2",), column="slide_id", values=("S2",)), [2, 0, 1]),
        (UrgentSettings(image_keys=("nothing",)), [0, 1, 2]),
        (UrgentSettings(column="image_key", values=("b/*",)), [1, 0, 2]),
    ],
)
def test_urgent_shards_come_first(plan_file: pq.ParquetFile, rule: UrgentSettings, order: list[int]) -> None:
    assert [s.ordinal for s in urgent_first(plan_file, SUMMARY, rule)] == order


def test_an_urgent_column_that_nobody_has_is_refused(plan_file: pq.ParquetFile) -> None:
    with pytest.raises(ConfigError, match="'ward', which the plan does not have"):
        urgent_first(plan_file, SUMMARY, UrgentSettings(column="ward", values=("x",)))
    with pytest.raises(ConfigError, match="column and values go together"):
        load_config(source="a", out="b", urgent={"values": ["x"]})


def test_deadline_and_urgency_are_no_part_of_the_fingerprint() -> None:
    plain = load_config(source="a", out="b")
    other = load_config(
        source="a", out="b", deadline="2026-03-02T06:00:00+01:00", at_deadline="stop", urgent={"image_keys": ["x"]}
    )
    assert plain.fingerprint("i", "b", "cpu", "") == other.fingerprint("i", "b", "cpu", "")
    assert plain.fingerprint("i", "b", "cpu", "", "s") != plain.fingerprint("i", "b", "cpu", "")
    with pytest.raises(ConfigError, match="deadline"):
        load_config(source="a", out="b", deadline="2026-03-02T06:00:00")
    assert RunConfig.model_validate_json(other.model_dump_json()) == other


def test_a_resumed_run_keeps_what_decides_and_takes_the_rest_from_now() -> None:
    bound = load_config(source="a", out="b", bundle="one", shard_size=16, limits={"max_megapixels": 50})
    today = load_config(source="a", out="b", bundle="two", limits={"max_megapixels": 60, "stage_seconds": 7})
    taken_up = today.bound_as(bound)
    assert (taken_up.bundle, taken_up.shard_size, taken_up.limits.max_megapixels) == ("one", 16, 50)
    assert taken_up.limits.stage_seconds == 7
    key = ("i", "b", "cpu", "")
    assert taken_up.fingerprint(*key) == bound.fingerprint(*key) != today.fingerprint(*key)
