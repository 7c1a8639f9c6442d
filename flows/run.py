"""The nightly run: open, preflight, dispatch shards, publish. Prefect sees shards, Dask sees stages."""

from __future__ import annotations

import itertools
import json
import shlex
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, BinaryIO, cast

import psutil
from distributed import KilledWorker
from distributed.client import ClosedClientError
from prefect import flow, get_run_logger, tags, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import TagsContext
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from leukoflow.cluster.cluster import Cluster, open_cluster
from leukoflow.cluster.code import code_digest
from leukoflow.cluster.telemetry import worker_messages
from leukoflow.cluster.workers import local_sizes
from leukoflow.core.config import ClusterSettings, RunConfig
from leukoflow.core.counts import count_of
from leukoflow.core.errors import (
    QUOTING,
    AttemptError,
    ClusterError,
    ConfigError,
    DeadlineError,
    LeukoflowError,
    RunCancelledError,
    ShardError,
    StorageError,
    place_of,
    words_of,
)
from leukoflow.flows.dashboard import Dashboard
from leukoflow.flows.deadline import watching
from leukoflow.flows.events import drift_rows, emit, run_events
from leukoflow.runs.heart import Heart, beating
from leukoflow.runs.progress import now
from leukoflow.runs.records import CLASSES, RunManifest, Shard, ShardReceipt
from leukoflow.runs.runlog import run_log
from leukoflow.sources.members import spool
from leukoflow.storage.base import Storage, is_full
from leukoflow.tasks.inference.bisect import find_culprits
from leukoflow.tasks.inference.shard import (
    ACTIVATIONS,
    ShardJob,
    adopt_stages,
    attempt_prefix,
    classify,
    committed,
    extract,
    forget,
    known_culprits,
    load_models,
    next_of,
    open_plan,
    planned,
    prepare,
    recall,
    segment,
    stage_keys,
    started_key,
    trail_of,
)
from leukoflow.tasks.intake.open_run import Run, command_about, open_run, spooled, stem
from leukoflow.tasks.intake.plan import shards, urgent_first
from leukoflow.tasks.intake.preflight import preflight
from leukoflow.tasks.monitor.drift import NAME as DRIFT
from leukoflow.tasks.monitor.drift import facts_bytes, find_reference, run_facts
from leukoflow.tasks.monitor.metrics import RunsCollector, metrics_endpoint
from leukoflow.tasks.monitor.nights import GroupDrift, compare_groups
from leukoflow.tasks.publish.partial import FOLDER as PARTIAL
from leukoflow.tasks.publish.publish import publish
from leukoflow.tasks.report.page import share
from leukoflow.tasks.report.run_report import build_report
from leukoflow.tasks.review.worklist import run_key_of

LOSSES = 20
"""How often a shard is done anew because its worker died of something else, before that is taken for a fault."""

STATE_NAMES = {0: "Completed", 3: "CompletedWithQuarantined", 4: "CompletedWithMissing"}
"""Names of the completed state by exit code, so that a night with gaps shows them in the dashboard's lists."""

SHADOW_PRIORITY = -10
"""Dask's priority of the tasks of a shadow run; those of other runs have 0."""

OF_OTHERS = ("amend-", "compact-", "expand-", "moving-")
"""How the names below `_attempts` begin that are not of shards; whoever makes them removes them."""

DEATHS_BEFORE_SEARCH = 2
"""A worker may die of a reboot; a shard that saw two die is searched for the member that kills them."""


asked_to_stop = threading.Event()
"""Set by the first signal, and cleared by a night when it begins: a wish to stop outlives the run that it came in."""


def _run_name() -> str:
    """As the dashboard lists it: the run's id where it is settled before the flow begins, else the source's name."""
    config = flow_run.parameters["config"]
    settings = config.model_dump() if isinstance(config, RunConfig) else config
    run_id = settings.get("run_id")
    return f"screening, run {run_id}" if run_id else f"screening of {stem(settings['source'])}"


@flow(name="leukoflow nightly", flow_run_name=_run_name, task_runner=ThreadPoolTaskRunner(max_workers=256))  # type: ignore[arg-type]
def nightly(config: RunConfig) -> State[Any]:
    """Screens every image of a source and accounts for each of them, exactly once.

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
        fault = LeukoflowError(f"{place_of(error)}: this is a fault of the program; what is committed stays")
        fault.__cause__ = error
        log.error("%s", fault)
        return Failed(message=str(fault), data=fault)


def _screen(run: Run) -> State[Any]:
    """Does what is missing of an opened run; returns the state in which it has ended. Raises LeukoflowError."""
    log, config, stop = get_run_logger(), run.config, threading.Event()
    with (
        run_log(run.root, run.run_id),
        _metrics(run),
        beating(run.root, "looking for what is done already") as heart,
        _draining(stop),
        _dashboard(run, stop) as dashboard,
    ):
        heart.dashboard = PREFECT_UI_URL.value() or ""
        log.info("run %s: %s images in %s shards", run.run_id, run.summary.members, run.summary.shards)
        for remark in run.summary.remarks:
            log.warning("%s", remark)
        with _no_uploads_left(run):
            with watching(run, stop, heart.note):
                done = _process(run, stop, dashboard, heart)
            heart.phase("writing tables and manifest")
            manifest = publish(run, *done, notes=dashboard.notes())
        _clear_attempts(Storage(run.root))
        Storage(run.root).delete(PARTIAL)
        _report(run, manifest)
        if config.shadow_of is None:  # a shadow run is not the night's result
            dashboard.summary(summary(run, manifest), f"What became of {stem(config.source)}")
            _tell(run, manifest, answers=not dashboard.away)
        log.info("run %s: %s", run.run_id, headline(manifest))
        heart.say("finished", headline(manifest), manifest.exit_code)
        if dashboard.cancelled():  # too late, but Prefect lets a run that is being cancelled end as nothing else
            return Cancelled(message=f"it was finished when Cancel was pressed: {headline(manifest)}")
    return Completed(name=STATE_NAMES[manifest.exit_code], message=headline(manifest))


def _clear_attempts(storage: Storage) -> None:
    """Removes what shards have left; not what others are about to put in place in a run that is finished."""
    for name in storage.names("_attempts"):
        if not name.startswith(OF_OTHERS):
            storage.delete(f"_attempts/{name}")
    storage.prune("_attempts")


def screen(config: RunConfig, *labels: str) -> State[Any]:
    """The flow of a run whose id is settled, with the tags by which an operator finds it in the dashboard."""
    with tags("leukoflow", f"run:{config.run_id}", *labels):
        state: State[Any] = nightly(config, return_state=True)
    return state


# --- shards: what Prefect sees ---------------------------------------------------------------------------------------


@task(name="shard", cache_policy=NO_CACHE, persist_result=False)
def process_shard(work: _Work, shard: Shard) -> ShardReceipt:
    """One shard through its stages; an attempt that fails is repeated with what is committed left alone."""
    log = get_run_logger()
    for _ in range(LOSSES):
        try:
            receipt = _attempt(work, shard)
        except QUOTING as error:  # Prefect would write down what a library says of values
            raise ShardError(f"shard {shard.name}: {place_of(error)}") from None
        if receipt is not None:
            break
        log.info("shard %s: its worker was lost to something else; the shard is started again", shard.name)
        work.cluster.settle()
    else:
        raise ShardError(
            f"shard {shard.name}: {LOSSES} workers were lost before they began with it; something on the workers' "
            "machines ends them: look for the out-of-memory killer in the system's log, and use fewer --workers"
        )
    storage = Storage(work.run.root)
    storage.delete(f"failures/{shard.name}.json")
    stages = ", ".join(f"{t.stage} {t.seconds:.1f} s" for t in receipt.timings)
    bare = "features" in receipt.resumed and ACTIVATIONS not in receipt.resumed
    log.info(
        "shard %s: %s predicted, %s abstained, %s rejected, %s quarantined (%s)%s%s",
        shard.name, receipt.predicted, receipt.abstained, receipt.rejected, receipt.quarantined, stages,
        f"; kept: {', '.join(receipt.resumed)}" if receipt.resumed else "",
        "; no activation maps: no pixels were read" if bare else "",
    )  # fmt: skip
    return receipt


def _attempt(work: _Work, shard: Shard) -> ShardReceipt | None:
    """One attempt at what is missing of a shard; None when it was lost through no fault of the shard."""
    job, storage = work.job(shard), Storage(work.run.root)
    keys = stage_keys(work.run.bundle, planned(job.root, shard), job.device)
    done = committed(storage, shard, keys)
    if work.run.config.reuse:
        done = adopt_stages(job, Storage(work.run.config.out).child(work.run.config.reuse), keys, done)
    if "masks" in done and "features" not in done:
        known = known_culprits(job)
        if set(job.culprits) - set(known):  # the masks were made before it was known what kills the next stage
            forget(storage, shard)
            done = {}
        else:
            job = replace(job, culprits=known)
    try:
        receipt = _chain(work.cluster, job, tuple(done), SHADOW_PRIORITY if work.run.config.shadow_of else 0)
    except AttemptError:
        return None
    except ClusterError:  # a worker with other code that has just joined, and will be sent away
        work.cluster.check()
        return None
    except KilledWorker as death:
        if not storage.exists(started_key(job, str(death.task))):
            return None  # it only waited at the worker that died
        work.deaths[shard.ordinal] += 1
        raise ShardError(f"shard {shard.name}: {_obituary(storage, job)}") from None
    storage.delete(attempt_prefix(shard, job.attempt))
    return receipt


def _chain(cluster: Cluster, job: ShardJob, done: tuple[str, ...], priority: int = 0) -> ShardReceipt:
    """The shard's chain of Dask tasks, block after block; only the receipt comes back here.

    Where GPUs compute, images are read and normalised by the workers without one, while there are some: a GPU that
    waits for a decoder stands still. On workers that several runs share, tasks of higher priority come first.
    """
    gpu = {"GPU": 1} if job.device == "cuda" else None
    client, helpers = cluster.client, list(cluster.crew.cpu) if gpu else []
    held: list[Any] = []
    numbers = itertools.count()

    def submit(function: Any, *args: Any, **where: Any) -> Any:
        name = f"{function.__name__}-{job.shard.name}-{job.attempt}-{next(numbers)}"
        try:
            held.append(client.submit(function, *args, key=name, priority=priority, pure=False, **where))
        except ClosedClientError:
            raise AttemptError(f"shard {job.shard.name}: the connection to the scheduler was lost") from None
        return held[-1]

    on_gpu: dict[str, Any] = {"resources": gpu}
    on_helper: dict[str, Any] = {"workers": helpers, "allow_other_workers": True} if helpers else {}
    try:
        features: Any = None
        if "features" not in done:
            first, seen = job.shard.first, None
            while first < job.shard.first + job.shard.count:
                block = submit(prepare, job, first, **on_helper)
                segmented = submit(recall if "masks" in done else segment, job, block, seen, **on_gpu)
                seen, earlier = submit(trail_of, segmented), features
                features = submit(extract, job, segmented, earlier, **on_gpu)
                first = cluster.result(submit(next_of, block, **on_helper))
                # The pixels of this block are let go as soon as its features are computed; at most two are held.
                del block, segmented
                held[:] = [f for f in held if f in (seen, features)]
                if earlier is not None:
                    cluster.result(earlier)
        return cast(ShardReceipt, cluster.result(submit(classify, job, features, done, **on_gpu)))
    except BaseException:
        with suppress(ClosedClientError):
            client.cancel(held, force=True)
        raise


def _worth_a_retry(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Not when the cluster is lost for good: every further attempt would end the same way.

    Prefect asks only where attempts are left, so that this is where one is promised.
    """
    if isinstance(state.data, ClusterError):
        return False
    get_logger().warning("%s; the shard is tried again", _why(state))
    return True


def _why(state: State[Any]) -> str:
    """Why a task has failed, without Prefect's words around it."""
    error = getattr(state.data, "result", state.data)
    if isinstance(error, LeukoflowError):
        return str(error)
    return (state.message or "it failed").removeprefix("Task run encountered an exception ")


def _obituary(storage: Storage, job: ShardJob) -> str:
    """Why the worker died, if its last note says so."""
    try:
        note = json.loads(storage.read(f"{attempt_prefix(job.shard, job.attempt)}/timeout.json"))
    except FileNotFoundError:
        return "its worker process died (out of memory, killed, or a poisonous image)"
    return f"{note['message']}; its worker was ended"


@dataclass(slots=True)
class _Work:
    """What the shard tasks of one run share."""

    run: Run
    cluster: Cluster
    deaths: Counter[int] = field(default_factory=Counter)
    culprits: dict[int, tuple[tuple[int, str], ...]] = field(default_factory=dict)
    spool: str = field(default_factory=lambda: f"_attempts/spool-{uuid.uuid4().hex[:8]}")
    """Where members of a compressed tar lie while their shard is processed; no other session writes there."""

    def spool_key(self, shard: Shard) -> str:
        """Key of a shard's spooled members."""
        return f"{self.spool}/{shard.name}.bin"

    def job(self, shard: Shard) -> ShardJob:
        """A new attempt at a shard; members that are known to kill their worker are left out."""
        run = self.run
        job = ShardJob(
            root=run.root,
            run_id=run.run_id,
            source=run.source,
            shard=shard,
            attempt=uuid.uuid4().hex[:12],
            bundle=run.bundle_uri,
            bundle_digest=run.bundle.digest,
            device=run.device,
            code=code_digest(),
            limits=run.config.limits,
            meta_columns=run.config.meta_columns,
            spool=self.spool_key(shard) if spooled(run.source) else None,
            culprits=self.culprits.get(shard.ordinal, ()),
        )
        if self.deaths[shard.ordinal] < DEATHS_BEFORE_SEARCH or shard.ordinal in self.culprits:
            return job
        log = get_run_logger()
        log.warning("shard %s: searching for the image that kills its worker", shard.name)
        # Suspects die in processes of their own, so a search that is lost went down with another shard's worker.
        for number in range(LOSSES):
            name = f"find-culprits-{shard.name}-{job.attempt}-{number}"
            try:
                search = self.cluster.client.submit(find_culprits, job, key=name, pure=False)
                self.culprits[shard.ordinal] = self.cluster.result(search)
            except (KilledWorker, AttemptError, ClosedClientError):
                log.info("shard %s: the search was lost with its worker and is started again", shard.name)
                self.cluster.settle()
            else:
                return self.job(shard)
        raise ShardError(f"shard {shard.name}: {LOSSES} workers died while they searched it")


# --- the run ---------------------------------------------------------------------------------------------------------


def _process(run: Run, stop: threading.Event, dashboard: Dashboard, heart: Heart) -> tuple[float, float, int]:
    """Does what is missing; returns seconds of start-up, seconds of processing and how many members it did.

    Raises RunCancelledError, ShardError, PreflightError, ClusterError.
    """
    pending = _pending(run)
    first = next(pending, None)
    born = psutil.Process().create_time()
    if first is None:
        return time.time() - born, 0.0, 0
    settings, gpu = run.config.cluster, run.device == "cuda"
    preflight(run, local_sizes(settings, gpu)[-1] if settings.address == "local" else 0)
    heart.phase(_awaited(settings, gpu))
    with open_cluster(settings, gpu) as cluster:
        heart.phase("loading the models in the workers")
        cluster.ready(partial(load_models, run.bundle_uri, run.bundle.digest, run.device))
        started = time.time()
        work = _Work(run, cluster)
        heart.phase("screening images")
        try:
            with worker_messages(cluster.client, run.run_id):
                images = _dispatch(work, first, pending, stop, dashboard)
        finally:
            Storage(run.root).delete(work.spool)
    return started - born, time.time() - started, images


def _awaited(settings: ClusterSettings, gpu: bool) -> str:
    """What a run waits for before its first shard, in words."""
    if "://" in settings.address:
        return f"waiting for the workers of the Dask scheduler at {settings.address}"
    if settings.address != "local":
        return f"waiting for workers from {settings.address}"
    gpus, count, _ = local_sizes(settings, gpu)
    count += len(gpus)
    return f"starting {count_of(count, 'worker')}"


@contextmanager
def _no_uploads_left(run: Run) -> Iterator[None]:
    """Aborts, however the block ends, the multipart uploads that lost answers and killed workers have left."""
    try:
        yield
    finally:
        try:
            if count := Storage(run.root).abort_uploads():
                get_run_logger().info("run %s: %s unfinished uploads were aborted", run.run_id, count)
        except LeukoflowError as error:  # not every store can list them; the operating guide has a rule for those
            get_run_logger().warning("unfinished uploads could not be looked for: %s", error)


def _dispatch(work: _Work, first: Shard, pending: Iterator[Shard], stop: threading.Event, dashboard: Dashboard) -> int:
    """Keeps as many shards on their way as the workers want; drains when asked to stop. Returns the members done."""
    run = work.run
    total, done, failures = run.summary.shards, 0, 0
    options = run.config.limits
    dashboard.progress(0.0, "starting")
    started, shown = time.monotonic(), 0.0
    on_the_way: dict[PrefectFuture[ShardReceipt], Shard] = {}
    upcoming: Iterator[Shard] = _with_spool(work, _chained(first, pending))
    exhausted = full = False
    images = 0
    while True:
        while not exhausted and not stop.is_set() and len(on_the_way) < work.cluster.in_flight:
            shard = next(upcoming, None)
            if shard is None:
                exhausted = True
                break
            named = process_shard.with_options(
                task_run_name=f"shard {shard.name}, images {shard.first + 1} to {shard.first + shard.count}",
                retries=options.shard_retries,
                retry_delay_seconds=options.retry_delay_seconds,
                retry_condition_fn=_worth_a_retry,
            )
            on_the_way[named.submit(quote(work), shard)] = shard  # type: ignore[call-overload]
        if not on_the_way:
            break
        try:
            work.cluster.check()
        except ClusterError as lost:
            wait(list(on_the_way), timeout=60)  # they are told the same, and end
            raise ClusterError(f"run {run.run_id}: {lost}: {run.binding.command}") from None
        finished = wait(list(on_the_way), timeout=0.2).done
        for future in finished:
            shard = on_the_way.pop(future)
            if spooled(run.source):
                Storage(run.root).delete(work.spool_key(shard))
            future.wait()  # takes over the final state; without it the server is asked, which may lag behind
            if not future.state.is_completed():
                failures += 1
                words = _why(future.state)
                if is_full(words):  # it would be so for every further shard
                    full = exhausted = True
                    continue
                _remember_failure(run, shard, words)
                continue
            done += 1
            images += shard.count
        if finished and (time.monotonic() - shown > 2.0 or not on_the_way):
            shown = time.monotonic()
            ahead = total - done - failures
            rate = images / (shown - started)
            dashboard.progress(
                100.0 * (total - max(0, ahead)) / total,
                f"{count_of(done, 'shard')} done in this session, {failures} failed, {rate:.1f} images/s",
            )
    if full:
        raise StorageError(
            f"the disk that holds {run.root} is full; finished in this session, and kept: "
            f"{count_of(done, 'shard')}. Make room there, then take it up again: {run.binding.command}"
        )
    if stop.is_set() and not exhausted and next(upcoming, None) is not None:
        raise RunCancelledError(
            f"run {run.run_id} was asked to stop and has drained; finished in this session: {count_of(done, 'shard')}. "
            f"To take it up again: {run.binding.command}"
        )
    if failures:
        raise ShardError(
            f"run {run.run_id}: {failures} of {total} shards failed after "
            f"{count_of(options.shard_retries + 1, 'attempt')} each; the others "
            f"are committed. What failed and why: {command_about(run, 'status')}. "
            f"Once mended: {run.binding.command}"
        )
    dashboard.progress(100.0, f"all {total} shards are committed")
    return images


def _chained(first: Shard, rest: Iterator[Shard]) -> Iterator[Shard]:
    yield first
    yield from rest


def _pending(run: Run) -> Iterator[Shard]:
    """Shards that are not wholly committed, in order. What is there is checked in threads, ahead of the consumer."""
    storage = Storage(run.root)

    def is_done(shard: Shard) -> bool:
        found = committed(storage, shard, stage_keys(run.bundle, planned(run.root, shard), run.device))
        return "predictions" in found

    listed = _in_order(run)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for shard, done in zip(listed, pool.map(is_done, listed), strict=True):
            if not done:
                yield shard


def _in_order(run: Run) -> list[Shard]:
    """Shards with urgent images first. Of a compressed tar, which is unpacked in one pass, in the order of the plan."""
    if spooled(run.source):
        return list(shards(run.summary))
    return urgent_first(open_plan(run.root), run.summary, run.config.urgent)


def _with_spool(work: _Work, pending: Iterator[Shard]) -> Iterator[Shard]:
    """Unpacks a compressed tar in one linear pass, as far ahead as shards are asked for; other sources need nothing."""
    run = work.run
    if not spooled(run.source):
        yield from pending
        return
    storage = Storage(run.root)

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


def _remember_failure(run: Run, shard: Shard, message: str) -> None:
    body = json.dumps({"shard": shard.name, "message": message, "at": now()}, ensure_ascii=False)
    Storage(run.root).write(f"failures/{shard.name}.json", body.encode())


# --- signs of life, and the wish to stop -----------------------------------------------------------------------------


def _dashboard(run: Run, stop: threading.Event) -> Dashboard:
    """What Prefect is told beside the task runs; `stop` is set when somebody presses Cancel there."""
    return Dashboard(
        run.run_id,
        str(flow_run.id),
        stop,
        lambda words: get_logger().warning("%s", words),
        "nightly-progress" if run.config.shadow_of is None else "shadow-progress",
    )


def get_logger() -> Any:
    """The run's logger outside of Prefect's contexts."""
    import logging

    return logging.getLogger("leukoflow")


@contextmanager
def _draining(stop: threading.Event) -> Iterator[None]:
    """Sets the event that tells the run to take up no more shards on SIGTERM and Ctrl-C, as Cancel in Prefect does.

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
        get_logger().warning("%s: finishing what is on its way, then stopping", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(run: Run, manifest: RunManifest) -> None:
    """Writes report.html. A report that fails must not turn a finished night into a failed one."""
    try:
        Storage(run.root).write("report.html", build_report(run.root, manifest).encode())
    except Exception as error:
        get_run_logger().warning(
            "the report could not be built (%s: %s); build it again with: %s",
            type(error).__name__, words_of(error), command_about(run, "report"),
        )  # fmt: skip


# --- what others are told ---------------------------------------------------------------------------------------------


@contextmanager
def _metrics(run: Run) -> Iterator[None]:
    """Serves the run's figures to Prometheus where a port is set. A port that is taken must not cost the night."""
    config = run.config
    if config.metrics_port is None:
        yield
        return
    with ExitStack() as stack:
        try:
            collector = RunsCollector(config.out, only=run.run_id, deadline=config.deadline)
            port = stack.enter_context(metrics_endpoint(collector, config.metrics_port, config.metrics_address))
            get_run_logger().info("metrics: http://%s:%s/metrics", config.metrics_address, port)
        except ConfigError as error:
            get_run_logger().warning("%s; the run goes on without", error)
        yield


def _tell(run: Run, manifest: RunManifest, answers: bool) -> None:
    """Sums the run up for drift, then artifacts and events. None of it may turn a finished night into a failed one."""
    drifts: tuple[GroupDrift, ...] = ()
    try:
        facts = run_facts(run.root, run.run_id, manifest, manifest.bundle_digest)
        Storage(run.root).write(DRIFT, facts_bytes(facts))
        reference = find_reference(run.config.out, str(run.bundle.path), run.config.drift_reference)
        if reference is not None:
            drifts = compare_groups([facts], [reference[0]], "reference")
    except Exception as error:
        get_run_logger().warning("drift could not be told (%s: %s)", type(error).__name__, words_of(error))
    if not answers:
        get_run_logger().warning("the table of drift and the link to the report are not in Prefect, which is away")
        return
    try:
        if drifts:
            create_table_artifact(drift_rows(drifts), key="nightly-drift", description="Drift against the reference")
        create_markdown_artifact(where_the_report_is(run), key="nightly-report", description=f"Report of {run.run_id}")
    except Exception as error:
        get_run_logger().warning("artifacts could not be written (%s: %s)", type(error).__name__, words_of(error))
    for event, payload in run_events(manifest, drifts, run.config.alerts):
        emit(event, run.run_id, payload)


def where_the_report_is(run: Run) -> str:
    """How people come to the report, Markdown: a browser follows no link from here to a file."""
    file = f"File: `{Storage(run.root).uri('report.html')}`"
    if run.config.web_url is None:
        command = shlex.join(["leukoflow", "serve", Storage(run.config.out).root])
        return f"{file}\n\nIn the browser: `{command}`, then open run {run.run_id} there."
    page = f"{run.config.web_url.rstrip('/')}/runs/{run_key_of(run.run_id)}"
    return f"[{run.run_id} in the web application]({page})\n\n{file}"


# --- what people read ------------------------------------------------------------------------------------------------


def headline(manifest: RunManifest) -> str:
    """One line: how many came in and what became of them."""
    m = manifest
    extra = f", {m.missing} missing" if m.missing else ""
    cut = "; the source is truncated" if m.source_truncated else ""
    return (
        f"{m.members} of {m.members} images accounted for: {m.predicted} predicted, {m.abstained} abstained, "
        f"{m.rejected} rejected, {m.quarantined} quarantined{extra}{cut}"
    )


def summary(run: Run, manifest: RunManifest) -> str:
    """The summary artifact, Markdown."""
    m = manifest
    rate = m.processed / m.processing_seconds if m.processing_seconds else 0.0
    lines = [
        f"## Run {m.run_id}",
        "",
        headline(m) + ".",
        "",
        f"Source `{m.source.uri}`, bundle `{m.bundle}` ({m.bundle_digest[:12]}), {m.device}. "
        f"{rate:.1f} images/s after a start-up of {m.startup_seconds:.0f} s.",
        "",
        "| handed over | predicted | abstained | rejected | quarantined | missing | ignored |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        f"| {m.members} | {m.predicted} | {m.abstained} | {m.rejected} | {m.quarantined} | {m.missing} | {m.ignored} |",
        "",
        "| label of the predicted | images | share |",
        "|---|---:|---:|",
    ]
    lines += [f"| {name} | {n} | {share(n, sum(m.labels))} |" for name, n in zip(CLASSES, m.labels, strict=True)]
    lines += ["", "| stage | images/s per worker | seconds, all shards |", "|---|---:|---:|"]
    lines += [
        f"| {t.stage} | {t.images / t.seconds if t.seconds else 0:.1f} | {t.seconds:.0f} |" for t in m.timings
    ]  # fmt: skip
    lines += [
        "",
        "Slowest shards: " + ", ".join(f"{shard} ({seconds:.0f} s)" for shard, seconds in m.slowest[:5]) + ".",
        "",
    ]
    if m.reasons:
        lines += ["| why there is no prediction | images |", "|---|---:|"]
        lines += [f"| {reason} | {count} |" for reason, count in m.reasons]
        # Names of images stay out of the dashboard: they may name patients.
        lines += ["", "Which ones:", "```sql", "SELECT image_key, status, reason"]
        lines += [f"FROM '{run.root}/predictions/*.parquet' WHERE status <> 'predicted'", "```", ""]
    if m.conflicts:
        lines += [f"**{m.conflicts} images were found under more than one patient: see `duplicates.parquet`.**", ""]
    lines += [f"**Note:** {note}.\n" for note in m.notes]
    lines += [
        f"Report: `{run.root}/report.html` · predictions: `{run.root}/predictions/` · slides: "
        f"`{run.root}/slides.parquet`",
        "",
        "Research use only.",
    ]
    return "\n".join(lines)
