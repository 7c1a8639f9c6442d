"""Have the workers measure the red cells of all images, before the first shard: they are the ruler of a smear."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from distributed import KilledWorker
from distributed.client import ClosedClientError
from prefect import get_run_logger

from leukoflow.core.counts import count_of
from leukoflow.core.errors import AttemptError, ClusterError, RunCancelledError, SourceError, StorageError
from leukoflow.flows.dispatch import unpack_ahead
from leukoflow.flows.shard_task import LOSSES, Work
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Shard
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.imaging.magnification import Magnification
from leukoflow.tasks.inference.measure import give_up_measuring, measure, settle_scales, unmeasured_shards
from leukoflow.tasks.intake.open_run import spooled
from leukoflow.tasks.store.job import attempt_prefix, started_key

DEATHS = 5
"""How many workers die of measuring a shard before its images count as without red cells."""


def measure_scales(work: Work, stop: threading.Event) -> None:
    """Measure what is not measured yet, pool it, and write the run's scales. Does nothing where they are there.

    Raises RunCancelledError after a wish to stop, ClusterError once the cluster is lost for good, StorageError,
    SourceError.
    """
    run, log = work.run, get_run_logger()
    storage = open_storage(run.root)
    if storage.exists(RunKey.SCALES):
        return
    upcoming = unpack_ahead(work, iter(unmeasured_shards(storage, run.summary)))
    on_the_way: set[Future[None]] = set()
    pool = ThreadPoolExecutor(max_workers=256)
    try:
        while True:
            on_the_way |= {pool.submit(_measure, work, shard) for shard in _next(work, upcoming, stop, len(on_the_way))}
            if not on_the_way:
                break
            done, on_the_way = wait(on_the_way, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # whoever ends the run now does not wait for them
    if stop.is_set() and unmeasured_shards(storage, run.summary):
        raise RunCancelledError(
            f"run {run.run_id} was asked to stop while red cells were measured. To take it up again: "
            f"{run.binding.command}"
        )
    try:
        log.info("run %s: %s", run.run_id, describe_scales(settle_scales(storage, run.summary)))
    except FileNotFoundError:  # another command for the same run was first
        if not storage.exists(RunKey.SCALES):
            raise


def _next(work: Work, upcoming: Iterator[Shard], stop: threading.Event, busy: int) -> Iterator[Shard]:
    """Yield as many shards as the workers should have beside those that are on their way."""
    for _ in range(work.cluster.in_flight - busy):
        if stop.is_set() or (shard := next(upcoming, None)) is None:
            return
        yield shard


def _measure(work: Work, shard: Shard) -> None:
    """Measure one shard on a worker, again where that is lost with its worker or its source cannot be reached.

    Raises StorageError, SourceError and ClusterError.
    """
    storage, limits = open_storage(work.run.root), work.run.config.limits
    deaths = failures = 0
    try:
        for _ in range(LOSSES):
            job = work.job(shard)
            try:
                name = f"measure-{shard.name}-{job.attempt}"
                work.cluster.result(work.cluster.client.submit(measure, job, key=name, pure=False))
            except KilledWorker as death:
                deaths += storage.exists(started_key(job, str(death.task)))  # else it only waited at that worker
                work.cluster.settle()
            except (AttemptError, ClosedClientError):
                work.cluster.settle()
            except ClusterError:  # a worker with other code that has just joined, and will be sent away
                work.cluster.check()
                work.cluster.settle()
            except (StorageError, SourceError):
                failures += 1
                if failures > limits.shard_retries:
                    raise
                time.sleep(limits.retry_delay_seconds)
            else:
                return
            finally:
                storage.delete(attempt_prefix(shard, job.attempt))
            if deaths == DEATHS:
                break
        give_up_measuring(storage, shard)
    finally:
        if spooled(work.run.source):
            storage.delete(work.spool_key(shard))


def describe_scales(found: list[Magnification]) -> str:
    """Say in one line what the red cells of a run's images tell."""
    known = [one for one in found if not math.isnan(one.px)]
    if not known:
        return f"no scale could be measured: too few round red cells in {count_of(len(found), 'image')}"
    scales = sorted({round(one.um_per_px, 3) for one in known})
    shown = ", ".join(f"{scale:.3g}" for scale in scales[:5]) + (", ..." if len(scales) > 5 else "")
    without = len(found) - len(known)
    more = f"; {count_of(without, 'image')} without a measured scale" if without else ""
    return f"red cells say {shown} µm per pixel for {count_of(len(known), 'image')}{more}"
