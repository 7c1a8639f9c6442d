from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from leukoflow.core.codec import dumps
from leukoflow.core.errors import StorageError
from leukoflow.runs.progress import Heartbeat, ProgressReader, RunBinding, list_runs, now, read_progress
from leukoflow.runs.records import Marker, PartRef, Shard, ShardReceipt
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage

BINDING = RunBinding(
    "night", "f", "in.zip", 40, 3, 16, "pocket", "d", "cpu", "2026-03-01T20:00:00+00:00", "leukoflow run in.zip"
)


def receipt(shard: int, count: int) -> Marker:
    done = ShardReceipt(Shard(shard, 16 * shard, count), count - 3, 1, 1, 1, 5, (1, 1, 1, 1), (), 1.0)
    return Marker(PartRef("predictions", f"{shard:05d}", "a", "k", ()), done)


@pytest.fixture
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(str(tmp_path_factory.mktemp("out") / "night"))
    storage.write("run.json", dumps(BINDING))
    return storage


def beat(storage: Storage, **changes: object) -> None:
    base = Heartbeat(os.getpid(), socket.gethostname(), now(), "running", "", "http://here")
    storage.write("heartbeat.json", dumps(replace(base, **changes)))  # type: ignore[arg-type]


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def test_counts_are_those_of_committed_shards(storage: Storage) -> None:
    storage.write("markers/predictions/00000.json", dumps(receipt(0, 16)))
    storage.write("markers/predictions/00002.json", dumps(receipt(2, 8)))
    storage.write("markers/masks/00001.json", dumps(receipt(1, 16)))
    storage.write("failures/00001.json", b'{"shard": "00001", "message": "the disk is full", "at": "x"}')
    beat(storage)
    p = read_progress(storage.root)
    assert (p.state, p.members, p.shards, p.done, p.shards_done) == ("running", 40, 3, 24, 2)
    assert (p.counts.predicted, p.counts.abstained, p.counts.rejected, p.counts.quarantined) == (18, 2, 2, 2)
    assert p.failed_shards == (("00001", "the disk is full"),)
    assert (p.command, p.dashboard) == ("leukoflow run in.zip", "http://here")


def test_a_reader_sees_shards_come_and_go(storage: Storage) -> None:
    reader = ProgressReader(storage.root)
    assert reader.read().done == 0
    storage.write("markers/predictions/00000.json", dumps(receipt(0, 16)))
    assert reader.read().done == 16
    storage.delete("markers/predictions/00000.json")
    assert reader.read().done == 0


def test_states_of_a_live_dead_and_stopped_flow(storage: Storage) -> None:
    assert read_progress(storage.root).state == "unknown"
    beat(storage)
    assert read_progress(storage.root).state == "running"
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    beat(storage, pid=gone.pid)
    assert read_progress(storage.root).state == "killed"
    for state in ("cancelled", "failed"):
        beat(storage, state=state, message="why", exit_code=2)
        p = read_progress(storage.root)
        assert (p.state, p.message, p.exit_code) == (state, "why", 2)


def test_what_a_run_did_when_its_process_went_away_is_said(storage: Storage) -> None:
    beat(storage, phase="starting 2 workers")
    assert (read_progress(storage.root).state, read_progress(storage.root).phase) == ("running", "starting 2 workers")
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    beat(storage, pid=gone.pid, phase="starting 2 workers")
    p = read_progress(storage.root)
    assert (p.state, p.exit_code) == ("killed", None)
    where = f"process {gone.pid} on {socket.gethostname()} is gone"
    assert p.message == f"it stopped while starting 2 workers, without a last word: {where}"


def test_another_process_with_the_number_of_a_dead_one_is_not_taken_for_it(storage: Storage) -> None:
    """As after the machine was started again: numbers are given out from the beginning."""
    beat(storage, at=ago(86_400))  # this very process, which did not live a day ago
    assert read_progress(storage.root).state == "killed"


def test_a_heartbeat_of_an_earlier_version_is_read(storage: Storage) -> None:
    old = {"pid": os.getpid(), "host": socket.gethostname(), "at": now(), "state": "failed", "message": "why"}
    storage.write("heartbeat.json", json.dumps(old).encode())
    p = read_progress(storage.root)
    assert (p.state, p.message, p.phase, p.exit_code) == ("failed", "why", "", None)


@pytest.mark.parametrize(("age", "state"), [(5, "running"), (600, "killed")])
def test_a_flow_elsewhere_is_judged_by_its_heartbeat(storage: Storage, age: float, state: str) -> None:
    beat(storage, host="another-machine", at=ago(age))
    assert read_progress(storage.root).state == state


def test_a_damaged_heartbeat_is_no_heartbeat(storage: Storage) -> None:
    storage.write("heartbeat.json", b"{")
    assert read_progress(storage.root).state == "unknown"


def test_no_run_there(storage: Storage) -> None:
    with pytest.raises(StorageError, match="holds no run"):
        read_progress(storage.uri("below"))


def test_runs_are_listed_by_their_binding(storage: Storage) -> None:
    out = storage.root.rpartition("/")[0]
    open_storage(out).write("not-a-run/file", b"")
    open_storage(out).write("stray.txt", b"")
    assert list_runs(out) == ["night"]
    assert list_runs(out + "/absent") == []
