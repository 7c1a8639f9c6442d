"""Measuring red cells on workers that die, stores that fail, and what is said of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import KilledWorker

from leukoflow.core.errors import AttemptError, StorageError
from leukoflow.flows import scales
from leukoflow.flows.scales import DEATHS, describe_scales
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Shard, SourceKind
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.imaging.magnification import Magnification
from leukoflow.tasks.store.job import started_key
from leukoflow.tasks.store.scales import read_red_cells

SHARD = Shard(0, 0, 3)


class Workers:
    """A cluster whose results are told in advance: an error, or None where the shard is measured."""

    def __init__(self, root: Path, outcomes: list[Exception | None], started: bool = True) -> None:
        self.storage, self.outcomes, self.started = open_storage(str(root)), outcomes, started
        self.client = SimpleNamespace(submit=self.submit)
        self.settled, self.asked = 0, 0

    def submit(self, function: Callable[..., Any], job: Any, **given: Any) -> Any:
        self.asked += 1
        if self.started:
            self.storage.create(started_key(job, "task"), b"")
        return job

    def result(self, job: Any) -> None:
        outcome = self.outcomes.pop(0)
        if outcome is not None:
            raise outcome

    def settle(self) -> None:
        self.settled += 1

    def check(self) -> None: ...


def work(root: Path, cluster: Workers, retries: int = 2) -> Any:
    """What is needed of the work of a run; each attempt has a name of its own."""
    limits = SimpleNamespace(shard_retries=retries, retry_delay_seconds=0.0)
    run = SimpleNamespace(
        root=str(root), config=SimpleNamespace(limits=limits), source=SimpleNamespace(kind=SourceKind.ZIP)
    )
    names = iter(range(100))
    return SimpleNamespace(
        run=run, cluster=cluster, job=lambda shard: SimpleNamespace(shard=shard, attempt=f"a{next(names)}")
    )


def killed() -> KilledWorker:
    return KilledWorker("task", SimpleNamespace(address="tcp://x"), 0)


def test_a_shard_is_measured_again_where_its_worker_is_lost(tmp_path: Path) -> None:
    cluster = Workers(tmp_path, [killed(), AttemptError("lost"), None])
    scales._measure(work(tmp_path, cluster), SHARD)
    assert (cluster.asked, cluster.settled) == (3, 2)
    assert open_storage(str(tmp_path)).files("_attempts") == []  # nothing is left of the attempts


def test_a_shard_that_many_workers_die_of_counts_as_without_red_cells(tmp_path: Path) -> None:
    cluster = Workers(tmp_path, [killed() for _ in range(DEATHS)])
    scales._measure(work(tmp_path, cluster), SHARD)
    found = read_red_cells(open_storage(str(tmp_path)), SHARD)
    assert [one.reading.cells for one in found] == [0, 0, 0]


def test_workers_that_die_of_something_else_are_not_counted(tmp_path: Path) -> None:
    cluster = Workers(tmp_path, [*[killed() for _ in range(DEATHS + 2)], None], started=False)
    scales._measure(work(tmp_path, cluster), SHARD)
    assert cluster.asked == DEATHS + 3
    assert not open_storage(str(tmp_path)).exists(RunKey.part(RunKey.RED_CELLS, SHARD.name))


def test_a_store_that_fails_is_asked_as_often_as_for_a_shard(tmp_path: Path) -> None:
    cluster = Workers(tmp_path, [StorageError("away"), StorageError("away"), None])
    scales._measure(work(tmp_path, cluster), SHARD)
    assert cluster.asked == 3
    with pytest.raises(StorageError, match="away"):
        scales._measure(work(tmp_path, Workers(tmp_path, [StorageError("away")] * 3)), SHARD)


def test_after_a_wish_to_stop_nothing_more_is_measured(tmp_path: Path) -> None:
    stop = threading.Event()
    cluster = SimpleNamespace(in_flight=4)
    assert list(scales._next(SimpleNamespace(cluster=cluster), iter([SHARD] * 9), stop, 1)) == [SHARD] * 3  # type: ignore[arg-type]
    stop.set()
    assert list(scales._next(SimpleNamespace(cluster=cluster), iter([SHARD]), stop, 0)) == []  # type: ignore[arg-type]


def test_what_was_measured_is_said_in_one_line() -> None:
    here, there = Magnification(18.0, 0.08, 90, 12), Magnification(36.0, 0.08, 80, 9)
    unknown = Magnification(math.nan, math.nan, 0, 0, "none")
    assert describe_scales([here] * 3) == "red cells say 0.4 µm per pixel for 3 images"
    assert describe_scales([here, there, unknown]) == (
        "red cells say 0.2, 0.4 µm per pixel for 2 images; 1 image without a measured scale"
    )
    assert describe_scales([unknown]) == "no scale could be measured: too few round red cells in 1 image"
