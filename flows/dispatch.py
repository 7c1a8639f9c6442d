"""Which shards are on their way at once, in order of urgency, and what becomes of a run in which some of them fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from prefect.futures import PrefectFuture, wait
from prefect.utilities.annotations import quote

from leukoflow.core.counts import count_of
from leukoflow.core.errors import ClusterError, RunCancelledError, ShardError, StorageError
from leukoflow.flows.dashboard import Dashboard
from leukoflow.flows.shard_task import Work, is_worth_a_retry, process_shard, reason_of_failure
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import now
from leukoflow.runs.records import Shard, ShardReceipt
from leukoflow.sources.spool import spool
from leukoflow.storage.local import is_full
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.inference.worker import open_plan, planned, scaled
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.commands import command_about
from leukoflow.tasks.intake.open_run import spooled
from leukoflow.tasks.intake.plan_file import shards, urgent_first
from leukoflow.tasks.store.commit import committed, stage_keys


class Dispatch:
    """Keeps as many shards of a run on their way as the workers want.

    After a wish to stop, and once the disk is full, what is on its way ends and nothing more is taken up.
    """

    def __init__(self, work: Work, stop: threading.Event, dashboard: Dashboard) -> None:
        self._work = work
        self._stop = stop
        self._dashboard = dashboard
        self._on_the_way: dict[PrefectFuture[ShardReceipt], Shard] = {}
        self._done = self._failed = self._images = 0
        self._exhausted = self._disk_full = False
        self._started = self._shown = 0.0

    def process(self, pending: Iterator[Shard]) -> int:
        """Process shards until none is left or the run is to stop; return how many images they have.

        Raises ShardError where shards have failed for good, ClusterError, RunCancelledError and StorageError, each with
        the command that takes the run up again.
        """
        self._dashboard.progress(0.0, "starting")
        self._started = time.monotonic()
        upcoming = unpack_ahead(self._work, pending)
        self._fill(upcoming)
        while self._on_the_way:
            self._check_cluster()
            finished = wait(list(self._on_the_way), timeout=0.2).done
            for future in finished:
                self._take_over(future)
            if finished:
                self._show_progress()
            self._fill(upcoming)
        self._require_success(upcoming)
        self._dashboard.progress(100.0, f"all {self._work.run.summary.shards} shards are committed")
        return self._images

    def _fill(self, upcoming: Iterator[Shard]) -> None:
        """Submit shards until the workers have enough."""
        limits = self._work.run.config.limits
        while not self._exhausted and not self._stop.is_set() and len(self._on_the_way) < self._work.cluster.in_flight:
            shard = next(upcoming, None)
            if shard is None:
                self._exhausted = True
                return
            named = process_shard.with_options(
                task_run_name=f"shard {shard.name}, images {shard.first + 1} to {shard.first + shard.count}",
                retries=limits.shard_retries,
                retry_delay_seconds=limits.retry_delay_seconds,
                retry_condition_fn=is_worth_a_retry,
            )
            self._on_the_way[named.submit(quote(self._work), shard)] = shard  # type: ignore[call-overload]

    def _check_cluster(self) -> None:
        """Raise ClusterError once the cluster is lost for good and the shards on their way have ended."""
        run = self._work.run
        try:
            self._work.cluster.check()
        except ClusterError as lost:
            wait(list(self._on_the_way), timeout=60)  # they learn the same, and end
            raise ClusterError(f"run {run.run_id}: {lost}: {run.binding.command}") from None

    def _take_over(self, future: PrefectFuture[ShardReceipt]) -> None:
        """Count what has become of a shard, and record why it has failed."""
        run, shard = self._work.run, self._on_the_way.pop(future)
        if spooled(run.source):
            open_storage(run.root).delete(self._work.spool_key(shard))
        future.wait()  # takes over the final state; without it the server is asked, which may lag behind
        if future.state.is_completed():
            self._done += 1
            self._images += shard.count
            return
        self._failed += 1
        reason = reason_of_failure(future.state)
        if is_full(reason):  # it would be so for every further shard
            self._disk_full = self._exhausted = True
        else:
            record_failure(run, shard, reason)

    def _show_progress(self) -> None:
        """Pass progress on to the dashboard, at most every two seconds and once more when nothing is on its way."""
        moment = time.monotonic()
        if moment - self._shown <= 2.0 and self._on_the_way:
            return
        self._shown = moment
        total = self._work.run.summary.shards
        ahead = max(0, total - self._done - self._failed)
        rate = self._images / (moment - self._started)
        self._dashboard.progress(
            100.0 * (total - ahead) / total,
            f"{count_of(self._done, 'shard')} done in this session, {self._failed} failed, {rate:.1f} images/s",
        )

    def _require_success(self, upcoming: Iterator[Shard]) -> None:
        """Raise what ends the run unless every shard is committed: the disk is full, a wish to stop, or failures."""
        run = self._work.run
        done = count_of(self._done, "shard")
        if self._disk_full:
            raise StorageError(
                f"the disk that holds {run.root} is full; finished in this session, and kept: {done}. "
                f"Make room there, then take it up again: {run.binding.command}"
            )
        if self._stop.is_set() and not self._exhausted and next(upcoming, None) is not None:
            raise RunCancelledError(
                f"run {run.run_id} was asked to stop and has drained; finished in this session: {done}. "
                f"To take it up again: {run.binding.command}"
            )
        if self._failed:
            raise ShardError(
                f"run {run.run_id}: {self._failed} of {run.summary.shards} shards failed after "
                f"{count_of(run.config.limits.shard_retries + 1, 'attempt')} each; the others "
                f"are committed. What failed and why: {command_about(run, 'status')}. "
                f"Once that is fixed: {run.binding.command}"
            )


# --- what is left to do ----------------------------------------------------------------------------------------------


def pending_shards(run: Run) -> Iterator[Shard]:
    """Yield the shards that are not wholly committed, in order. What is there is checked in threads, ahead of them."""
    storage, settings = open_storage(run.root), run.bundle.spec.method.segment

    def is_done(shard: Shard) -> bool:
        found = committed(storage, shard, stage_keys(run.bundle, scaled(run.root, shard, settings), run.device))
        return "predictions" in found

    listed = in_order_of_urgency(run)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for shard, done in zip(listed, pool.map(is_done, listed), strict=True):
            if not done:
                yield shard


def in_order_of_urgency(run: Run) -> list[Shard]:
    """Return all shards, those with urgent images first.

    Those of a compressed tar, which is unpacked in one pass, stay in the order of the plan.
    """
    if spooled(run.source):
        return list(shards(run.summary))
    return urgent_first(open_plan(run.root), run.summary, run.config.urgent)


def unpack_ahead(work: Work, pending: Iterator[Shard]) -> Iterator[Shard]:
    """Yield the shards; a compressed tar is unpacked in one linear pass, as far ahead as shards are asked for.

    Raises StorageError when the disk is full.
    """
    run = work.run
    if not spooled(run.source):
        yield from pending
        return
    storage = open_storage(run.root)

    def sink(shard: Shard) -> BinaryIO:
        return storage.writer(work.spool_key(shard))

    try:
        yield from spool(run.source, ((shard, planned(run.root, shard)) for shard in pending), sink)
    except OSError as error:
        if not is_full(str(error)):
            raise
        raise StorageError(
            f"the disk that holds {run.root} is full: the archive's images are unpacked there. Make room there, then "
            f"take it up again: {run.binding.command}"
        ) from error


def record_failure(run: Run, shard: Shard, message: str) -> None:
    """Write down in the run why a shard has failed, for `leukoflow status`."""
    body = json.dumps({"shard": shard.name, "message": message, "at": now()}, ensure_ascii=False)
    open_storage(run.root).write(RunKey.failure(shard.name), body.encode())
