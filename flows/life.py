"""Signs of life of a run, and the wish to stop it: signals, Cancel in Prefect, and what a run waits for."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.runtime import flow_run

from leukoflow.cluster.workers import local_sizes
from leukoflow.core.config import ClusterSettings
from leukoflow.core.counts import count_of
from leukoflow.flows.dashboard import Dashboard
from leukoflow.tasks.intake.binding import Run

logger = logging.getLogger("leukoflow")

asked_to_stop = threading.Event()
"""Set by the first signal, and cleared by a night when it starts: a wish to stop outlives the run that it came in."""


@contextmanager
def drain_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set `stop`, so that the run takes up no more shards, on SIGTERM and Ctrl-C, as Cancel in Prefect does.

    A second signal ends the flow at once; what was committed stays.
    """
    asked = False  # `stop` is no sign of a first signal: Cancel and a deadline set it too

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True  # first, since the second signal may come while this one is logged
        asked_to_stop.set()
        if not stop.is_set():
            stop.set()
        logger.warning("%s: finishing what is in progress, then stopping", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_dashboard(run: Run, stop: threading.Event) -> Dashboard:
    """Make what talks to Prefect beside the task runs; it sets `stop` when somebody presses Cancel there."""
    return Dashboard(
        run.run_id,
        str(flow_run.id),
        stop,
        lambda words: logger.warning("%s", words),
        "nightly-progress" if run.config.shadow_of is None else "shadow-progress",
    )


def describe_wait(settings: ClusterSettings, gpu: bool) -> str:
    """Say what a run waits for before its first shard."""
    if "://" in settings.address:
        return f"waiting for the workers of the Dask scheduler at {settings.address}"
    if settings.address != "local":
        return f"waiting for workers from {settings.address}"
    gpus, count, _ = local_sizes(settings, gpu)
    count += len(gpus)
    return f"starting {count_of(count, 'worker')}"
