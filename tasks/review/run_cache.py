"""What the server holds of the runs of an output folder between two requests.

What is held is recognized by the manifest's stamp, or by the markers of a run in progress: nothing is ever out of date.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from leukoflow.runs.progress import ProgressReader
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.review.columns import READERS
from leukoflow.tasks.review.lines import RunLine
from leukoflow.tasks.review.snapshot import Snapshot
from leukoflow.tasks.review.verdicts import VerdictReader

T = TypeVar("T")
HELD_ROWS = 2_000_000
"""Rows of all runs that are held at the same time; those looked at last stay."""


class RunCache:
    """What is held of the runs of one output folder or prefix."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.storage = open_storage(out)
        self.lock = threading.RLock()
        self.names: dict[str, str] = {}  # run key to run id
        self.lines: dict[str, tuple[str, RunLine]] = {}  # with the manifest's stamp
        self.snapshots: OrderedDict[str, Snapshot] = OrderedDict()
        self.patients: dict[str, tuple[str, Mapping[str, str]]] = {}  # with the plan's stamp: patient key to pseudonym
        self._verdicts: dict[str, VerdictReader] = {}
        self._progress: dict[str, ProgressReader] = {}
        self._locks: dict[str, threading.Lock] = {}

    def lock_of(self, run_id: str) -> threading.Lock:
        """Return the lock under which a run is opened."""
        with self.lock:
            return self._locks.setdefault(run_id, threading.Lock())

    def keep(self, run_id: str, snapshot: Snapshot) -> None:
        """Hold a snapshot, and drop those looked at longest ago where they are too many rows together."""
        with self.lock:
            self.snapshots[run_id] = snapshot
            self.snapshots.move_to_end(run_id)
            while len(self.snapshots) > 1 and sum(len(s.frame) for s in self.snapshots.values()) > HELD_ROWS:
                self.snapshots.popitem(last=False)

    def forget(self, run_id: str) -> None:
        """Drop everything of a run."""
        with self.lock:
            for kept in (self.lines, self.snapshots, self._verdicts, self._progress, self.patients):
                kept.pop(run_id, None)

    def verdict_reader(self, run_id: str) -> VerdictReader:
        """Return the reader of a run's verdicts."""
        with self.lock:
            return self._verdicts.setdefault(run_id, VerdictReader(self.storage.child(run_id)))

    def progress_reader(self, run_id: str) -> ProgressReader:
        """Return the reader of a run's progress."""
        with self.lock:
            return self._progress.setdefault(run_id, ProgressReader(self.storage.uri(run_id)))

    def map_runs(self, call: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """Call something for each run; several at a time where each answer is waited for."""
        if self.storage.is_local or len(names) < 2:
            return [call(name) for name in names]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(call, names))


_caches: dict[str, RunCache] = {}
_caches_lock = threading.Lock()


def cache_of(out: str) -> RunCache:
    """Return the cache of an output folder or prefix, the same for all threads of this process."""
    root = open_storage(out).root
    with _caches_lock:
        return _caches.setdefault(root, RunCache(root))
