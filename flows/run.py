"""A run, from top to bottom: open, preflight, dispatch shards, publish. Prefect sees shards, Dask sees stages."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import psutil
from prefect import flow, get_run_logger, tags
from prefect.client.schemas.objects import State
from prefect.context import TagsContext
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from leukoflow.cluster.cluster import open_cluster
from leukoflow.cluster.telemetry import worker_messages
from leukoflow.cluster.workers import local_sizes
from leukoflow.core.config import RunConfig
from leukoflow.core.errors import QUOTING, DeadlineError, LeukoflowError, RunCancelledError, place_of
from leukoflow.flows.announce import announce, headline, serve_metrics, summary, write_report
from leukoflow.flows.dashboard import Dashboard
from leukoflow.flows.deadline import watch_deadline
from leukoflow.flows.dispatch import Dispatch, pending_shards
from leukoflow.flows.life import describe_wait, drain_on_signals, open_dashboard
from leukoflow.flows.scales import measure_scales
from leukoflow.flows.shard_task import Work
from leukoflow.runs.heart import Heart, beating
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Shard
from leukoflow.runs.runlog import run_log
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.inference.worker import load_models
from leukoflow.tasks.intake.binding import Run, stem
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.intake.preflight import preflight
from leukoflow.tasks.publish.publish import publish

STATE_NAMES = {0: "Completed", 3: "CompletedWithQuarantined", 4: "CompletedWithMissing"}
"""Names of the completed state by exit code, so that a night with gaps shows them in the dashboard's lists."""

OF_OTHERS = ("amend-", "compact-", "expand-", "moving-")
"""How the names below `_attempts` begin that are not of shards; what makes them removes them."""


def _run_name() -> str:
    """Name the flow run as the dashboard lists it: by the run's id where it is settled already, else by the source."""
    config = flow_run.parameters["config"]
    settings = config.model_dump() if isinstance(config, RunConfig) else config
    run_id = settings.get("run_id")
    return f"screening, run {run_id}" if run_id else f"screening of {stem(settings['source'])}"


@flow(name="leukoflow nightly", flow_run_name=_run_name, task_runner=ThreadPoolTaskRunner(max_workers=256))  # type: ignore[arg-type]
def nightly(config: RunConfig) -> State[Any]:
    """Screen every image of a source and account for each of them, exactly once.

    Run again with the same settings, it does only what is missing.
    """
    log = get_run_logger()
    try:
        with ExitStack() as life:
            run = open_run(config, lambda root: life.enter_context(beating(root, "planning the source")))
            if run.finished is not None:
                return Completed(message=f"run {run.run_id} was finished already: {headline(run.finished)}")
            # A tag on a task asks the server for a slot before each shard, and a server that is away would end the run.
            with TagsContext(current_tags=set()):
                return _screen(run)
    except DeadlineError as late:
        log.error("%s", late)
        return Failed(name="DeadlineMissed", message=str(late), data=late)
    except RunCancelledError as cancelled:
        log.warning("%s", cancelled)
        return Cancelled(message=str(cancelled), data=cancelled)
    except LeukoflowError as error:
        log.error("%s", error)
        return Failed(message=str(error), data=error)
    except QUOTING as error:  # Prefect would write down what a library says of values
        fault = LeukoflowError(f"{place_of(error)}: this is a bug in the program; what is committed stays")
        fault.__cause__ = error
        log.error("%s", fault)
        return Failed(message=str(fault), data=fault)


def screen(config: RunConfig, *labels: str) -> State[Any]:
    """Run the flow of a run whose id is settled, with the tags by which an operator finds it in the dashboard."""
    with tags("leukoflow", f"run:{config.run_id}", *labels):
        state: State[Any] = nightly(config, return_state=True)
    return state


def _screen(run: Run) -> State[Any]:
    """Do what is missing of an opened run; return the state in which it has ended. Raises LeukoflowError."""
    log, config, stop = get_run_logger(), run.config, threading.Event()
    with (
        run_log(run.root, run.run_id),
        serve_metrics(run),
        beating(run.root, "looking for what is done already") as heart,
        drain_on_signals(stop),
        open_dashboard(run, stop) as dashboard,
    ):
        heart.dashboard = PREFECT_UI_URL.value() or ""
        log.info("run %s: %s images in %s shards", run.run_id, run.summary.members, run.summary.shards)
        for remark in run.summary.remarks:
            log.warning("%s", remark)
        with _abort_uploads_at_the_end(run):
            with watch_deadline(run, stop, heart.note):
                done = _process_shards(run, stop, dashboard, heart)
            heart.phase("writing tables and manifest")
            manifest = publish(run, *done, notes=dashboard.notes())
        clear_attempts(open_storage(run.root))
        open_storage(run.root).delete(RunKey.PARTIAL)
        write_report(run, manifest)
        if config.shadow_of is None:  # a shadow run is not the night's result
            dashboard.summary(summary(run, manifest), f"What became of {stem(config.source)}")
            announce(run, manifest, answers=not dashboard.away)
        log.info("run %s: %s", run.run_id, headline(manifest))
        heart.say("finished", headline(manifest), manifest.exit_code)
        if dashboard.cancelled():  # too late, but Prefect lets a run that is being cancelled end as nothing else
            return Cancelled(message=f"it was finished when Cancel was pressed: {headline(manifest)}")
    return Completed(name=STATE_NAMES[manifest.exit_code], message=headline(manifest))


def _process_shards(run: Run, stop: threading.Event, dashboard: Dashboard, heart: Heart) -> tuple[float, float, int]:
    """Do what is missing; return seconds of start-up, seconds of processing and how many images were processed.

    Raises RunCancelledError, ShardError, PreflightError, ClusterError, StorageError.
    """
    born = psutil.Process().create_time()
    pending: Iterator[Shard] | None = None
    if open_storage(run.root).exists(RunKey.SCALES):
        known = pending_shards(run)
        first = next(known, None)
        if first is None:
            return time.time() - born, 0.0, 0
        pending = itertools.chain([first], known)
    settings, gpu = run.config.cluster, run.device == "cuda"
    preflight(run, local_sizes(settings, gpu)[-1] if settings.address == "local" else 0)
    heart.phase(describe_wait(settings, gpu))
    with open_cluster(settings, gpu) as cluster:
        heart.phase("loading the models in the workers")
        cluster.prepare_workers(partial(load_models, run.bundle_uri, run.bundle.digest, run.device))
        started = time.time()
        work = Work(run, cluster)
        try:
            with worker_messages(cluster.client, run.run_id):
                heart.phase("measuring red cells for the scale")
                measure_scales(work, stop)
                heart.phase("screening images")
                images = Dispatch(work, stop, dashboard).process(pending or pending_shards(run))
        finally:
            open_storage(run.root).delete(work.spool)
    return started - born, time.time() - started, images


@contextmanager
def _abort_uploads_at_the_end(run: Run) -> Iterator[None]:
    """Abort, however the block ends, the multipart uploads that lost answers and killed workers have left."""
    try:
        yield
    finally:
        try:
            if count := open_storage(run.root).abort_uploads():
                get_run_logger().info("run %s: %s unfinished uploads were aborted", run.run_id, count)
        except LeukoflowError as error:  # not every store can list them; the operating guide has a rule for those
            get_run_logger().warning("unfinished uploads could not be looked for: %s", error)


def clear_attempts(storage: Storage) -> None:
    """Remove what attempts at shards have left; not what others are about to put in place in a finished run."""
    for name in storage.names(RunKey.ATTEMPTS):
        if not name.startswith(OF_OTHERS):
            storage.delete(RunKey.attempt(name))
    storage.prune(RunKey.ATTEMPTS)
