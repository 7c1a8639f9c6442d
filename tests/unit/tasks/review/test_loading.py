"""Runs in all conditions: in progress, compacted, older, newer, damaged."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from review_world import MARY, NIGHT

from leukoflow.core.codec import dumps
from leukoflow.core.errors import NotFoundError, StorageError
from leukoflow.runs.progress import Heartbeat, now, read_manifest
from leukoflow.runs.schema import SCHEMA_VERSION
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.review.keys import patient_key_of
from leukoflow.tasks.review.loading import known_missing
from leukoflow.tasks.review.query import Query
from leukoflow.tasks.review.runs import list_runs, open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.timeline import timeline
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add
from leukoflow.tasks.store.compact import compact_run


def test_a_run_in_progress_shows_what_is_committed(copy: Path, tmp_path: Path) -> None:
    m = read_manifest(open_storage(str(copy)))
    assert m is not None
    (copy / "manifest.json").unlink()
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for shard in ("00001", "00002"):
        (copy / f"markers/predictions/{shard}.json").rename(hidden / f"{shard}.json")
        (copy / f"predictions/part-{shard}.parquet").rename(hidden / f"{shard}.parquet")
    (copy / "heartbeat.json").write_bytes(
        dumps(Heartbeat(os.getpid(), socket.gethostname(), now(), "running", phase="screening images"))
    )
    out = str(copy.parent)
    table = open_run_table(out, NIGHT)
    found = table.reconciliation()
    assert (found.received, found.waiting, found.finished, found.state) == (38, 22, False, "running")
    assert (found.balanced, found.missing) == (False, 1)
    assert table.fields().total == 16
    (line,) = list_runs(out)
    assert (line.state, line.done, line.members, line.missing) == ("running", 16, 38, 1)
    assert line.phase == "screening images"
    add(out, table.verdict_on_field(3, Action.FLAG, "dr. grey"))
    with pytest.raises(NotFoundError, match="no field 20"):
        table.field(20)
    # the third shard before the second: ordinals stay those of the plan
    (hidden / "00002.json").rename(copy / "markers/predictions/00002.json")
    assert open_run_table(out, NIGHT).fields().total == 16  # committed, but not in its place yet
    (hidden / "00002.parquet").rename(copy / "predictions/part-00002.parquet")
    table = open_run_table(out, NIGHT)
    assert table.fields().total == 22
    assert table.field(32).image_key == pq.read_table(copy / "plan.parquet")["image_key"][32].as_py()
    assert table.field(3).standing.flagged
    with pytest.raises(NotFoundError):
        table.field(20)
    assert timeline(out, patient_key_of(MARY)).points[0].finished is False


def test_a_run_that_has_just_started(copy: Path) -> None:
    for name in ("manifest.json", "plan.parquet"):
        (copy / name).unlink()
    shutil.rmtree(copy / "markers")
    shutil.rmtree(copy / "predictions")
    table = open_run_table(str(copy.parent), NIGHT)
    assert (table.fields().total, table.slides().total, table.patients().total) == (0, 0, 0)
    assert table.reconciliation().waiting == 38
    assert list_runs(str(copy.parent))[0].source_kind == ""


def test_a_compacted_run_looks_the_same(night: Run, copy: Path, opened: RunTable) -> None:
    compact_run(str(copy))
    table = open_run_table(str(copy.parent), NIGHT)
    assert table.slides(Query(limit=500)) == opened.slides(Query(limit=500))
    assert table.fields(Query(limit=500)) == opened.fields(Query(limit=500))
    for ordinal in (0, 31, 37):
        assert table.field(ordinal) == opened.field(ordinal)
        assert table.cells(ordinal).equals(opened.cells(ordinal))


def test_a_run_of_an_older_version(copy: Path) -> None:
    path = copy / "manifest.json"
    found = json.loads(path.read_text())
    for name in ("hosts", "config", "bundle_reference", "shadow_of", "notes"):
        found.pop(name)
    path.write_text(json.dumps(found, ensure_ascii=False, sort_keys=True, indent=1) + "\n")
    for part in (copy / "predictions").iterdir():
        table = pq.read_table(part).drop_columns(["ood_score", "scanner", "quality_flags", "meta_ward"])
        pq.write_table(table, part, use_dictionary=False)
    table = open_run_table(str(copy.parent), NIGHT)
    line = table.field(0)
    assert (line.ood, line.scanner, table.fields().total) == (None, None, 38)
    assert line.details is not None
    assert line.details.quality_flags == ()
    assert list_runs(str(copy.parent))[0].shadow_of is None


def test_a_run_of_a_newer_version_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'))
    with pytest.raises(StorageError, match="newer leukoflow"):
        open_run_table(str(copy.parent), NIGHT)


def test_damaged_parts_are_said(copy: Path) -> None:
    (copy / "predictions" / "part-00001.parquet").write_bytes(b"PAR1?")
    with pytest.raises(StorageError, match="leukoflow verify"):
        open_run_table(str(copy.parent), NIGHT)


def test_without_a_manifest_nobody_knows_what_is_known_to_be_missing() -> None:
    assert known_missing(0, '{"manifest": null}') is None
    assert known_missing(0, '{"manifest": "night.csv"}') == 0
    assert known_missing(2, '{"manifest": "night.csv"}') == 2
    assert known_missing(0, "") == 0  # a run of before: its settings were not kept
