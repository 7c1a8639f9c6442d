"""What worker processes report about their stages: messages for the run's log, figures on the worker's own /metrics.

Messages travel as Dask events, so that they arrive from any machine without a log server. They name run, shard and
stage, never an image.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

TOPIC = "leukoflow"
WORKER_LOGGER = "leukoflow.workers"
WORKER_METRICS = {
    "leukoflow_stage_seconds": "Time of one stage over one block of a shard.",
    "leukoflow_stage_failures": "Stages that ended with an error.",
}
"""What a worker exports beside Dask's own figures; each has the label stage."""

_BUCKETS = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 900, 1800)


@lru_cache(maxsize=1)
def _figures() -> tuple[Any, Any]:
    """Register the figures, once per process, when the first stage runs; Dask serves the process's registry."""
    from prometheus_client import Counter, Histogram

    seconds, failures = WORKER_METRICS
    return (
        Histogram(seconds, WORKER_METRICS[seconds], ["stage"], buckets=_BUCKETS),
        Counter(failures, WORKER_METRICS[failures], ["stage"]),
    )


@contextmanager
def stage_telemetry(run_id: str, shard: str, stage: str) -> Iterator[None]:
    """Report that a stage of a shard begins here, and how it ends. Outside of a Dask worker only figures are kept."""
    seconds, failures = _figures()
    started = time.perf_counter()
    _send(run_id, shard, stage, logging.INFO, "started")
    try:
        yield
    except BaseException as error:
        failures.labels(stage).inc()
        _send(run_id, shard, stage, logging.WARNING, f"failed ({type(error).__name__})")
        raise
    spent = time.perf_counter() - started
    seconds.labels(stage).observe(spent)
    _send(run_id, shard, stage, logging.INFO, f"finished in {spent:.2f} s")


def _send(run_id: str, shard: str, stage: str, level: int, message: str) -> None:
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:
        return
    worker.log_event(
        TOPIC,
        {"run": run_id, "shard": shard, "stage": stage, "level": level, "message": message, "worker": worker.name},
    )


@contextmanager
def worker_messages(client: Any, run_id: str) -> Iterator[None]:
    """Hand what workers report about a run to the logger `leukoflow.workers` while the block runs."""
    logger = logging.getLogger(WORKER_LOGGER)

    def handle(event: tuple[float, Any]) -> None:
        said = event[1]
        if said.get("run") != run_id:  # a cluster may work on several runs
            return
        extra = {name: str(said[name]) for name in ("run", "shard", "stage", "worker")}
        message = f"shard {said['shard']}: {said['stage']} {said['message']}"
        logger.log(said["level"], message, extra=extra)

    client.subscribe_topic(TOPIC, handle)
    try:
        yield
    finally:
        client.unsubscribe_topic(TOPIC)
