"""What Prefect sees of a shard: one task run, whose attempts are chains of Dask tasks; and why one has failed."""

from __future__ import annotations

import itertools
import json
import logging
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

from distributed import KilledWorker
from distributed.client import ClosedClientError
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from leukoflow.cluster.cluster import Cluster
from leukoflow.cluster.code import code_digest
from leukoflow.core.errors import QUOTING, AttemptError, ClusterError, LeukoflowError, ShardError, place_of
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Shard, ShardReceipt
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.inference.bisect import find_culprits
from leukoflow.tasks.inference.stages import classify, extract, next_of, prepare, recall, segment, written_by
from leukoflow.tasks.inference.worker import scaled
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.open_run import spooled
from leukoflow.tasks.store.commit import ACTIVATIONS, adopt_stages, committed, forget, stage_keys
from leukoflow.tasks.store.facts import known_culprits
from leukoflow.tasks.store.job import ShardJob, attempt_prefix, started_key

LOSSES = 20
"""How often a shard is started again because its worker died of something else, before that is taken for a fault."""

SHADOW_PRIORITY = -10
"""Dask's priority of the tasks of a shadow run; those of other runs have 0."""

DEATHS_BEFORE_SEARCH = 2
"""A worker may die of a reboot; a shard that saw two die is searched for the image that kills them."""

logger = logging.getLogger("leukoflow")


@dataclass(slots=True)
class Work:
    """Hold what the shard tasks of one run share."""

    run: Run
    cluster: Cluster
    deaths: Counter[int] = field(default_factory=Counter)
    culprits: dict[int, tuple[tuple[int, str], ...]] = field(default_factory=dict)
    spool: str = field(default_factory=lambda: RunKey.new_attempt("spool"))
    """Where members of a compressed tar lie while their shard is processed; no other session writes there."""

    def spool_key(self, shard: Shard) -> str:
        """Return the key of a shard's spooled members."""
        return f"{self.spool}/{shard.name}.bin"

    def job(self, shard: Shard) -> ShardJob:
        """Make a new attempt at a shard; images that are known to kill their worker are left out.

        Raises ShardError when the search for such an image is lost again and again.
        """
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


@task(name="shard", cache_policy=NO_CACHE, persist_result=False)
def process_shard(work: Work, shard: Shard) -> ShardReceipt:
    """Take a shard through its stages; an attempt that fails is repeated with what is committed left alone.

    Raises ShardError, StorageError and ClusterError.
    """
    log = get_run_logger()
    for _ in range(LOSSES):
        try:
            receipt = _attempt(work, shard)
        except QUOTING as error:  # Prefect would write down what a library says of values
            raise ShardError(f"shard {shard.name}: {place_of(error)}") from None
        if receipt is not None:
            break
        log.info("shard %s: its worker was lost for another reason; the shard is started again", shard.name)
        work.cluster.settle()
    else:
        raise ShardError(
            f"shard {shard.name}: {LOSSES} workers were lost before they started on it; something on the workers' "
            "machines kills them: look for the out-of-memory killer in the system log, and use fewer --workers"
        )
    storage = open_storage(work.run.root)
    storage.delete(RunKey.failure(shard.name))
    stages = ", ".join(f"{t.stage} {t.seconds:.1f} s" for t in receipt.timings)
    bare = "features" in receipt.resumed and ACTIVATIONS not in receipt.resumed
    log.info(
        "shard %s: %s predicted, %s abstained, %s rejected, %s quarantined (%s)%s%s",
        shard.name, receipt.predicted, receipt.abstained, receipt.rejected, receipt.quarantined, stages,
        f"; kept: {', '.join(receipt.resumed)}" if receipt.resumed else "",
        "; no activation maps: no pixels were read" if bare else "",
    )  # fmt: skip
    return receipt


def _attempt(work: Work, shard: Shard) -> ShardReceipt | None:
    """Try what is missing of a shard; return None when it was lost through no fault of the shard."""
    job, storage = work.job(shard), open_storage(work.run.root)
    members = scaled(job.root, shard, work.run.bundle.spec.method.segment)
    keys = stage_keys(work.run.bundle, members, job.device)
    done = committed(storage, shard, keys)
    if work.run.config.reuse:
        done = adopt_stages(job, open_storage(work.run.config.out).child(work.run.config.reuse), keys, done)
    if "masks" in done and "features" not in done:
        known = known_culprits(job)
        if set(job.culprits) - set(known):  # the masks were made before it was known what kills the next stage
            forget(storage, shard)
            done = {}
        else:
            job = replace(job, culprits=known)
    try:
        receipt = run_chain(work.cluster, job, tuple(done), SHADOW_PRIORITY if work.run.config.shadow_of else 0)
    except AttemptError:
        return None
    except ClusterError:  # a worker with other code that has just joined, and will be sent away
        work.cluster.check()
        return None
    except KilledWorker as death:
        if not storage.exists(started_key(job, str(death.task))):
            return None  # it only waited at the worker that died
        work.deaths[shard.ordinal] += 1
        raise ShardError(f"shard {shard.name}: {cause_of_death(storage, job)}") from None
    storage.delete(attempt_prefix(shard, job.attempt))
    return receipt


def run_chain(cluster: Cluster, job: ShardJob, done: tuple[str, ...], priority: int = 0) -> ShardReceipt:
    """Run the shard's chain of Dask tasks, block after block; only the receipt comes back here.

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
                seen, earlier = submit(written_by, segmented), features
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


def is_worth_a_retry(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Return False when the cluster is lost for good: every further attempt would end the same way.

    Prefect asks only where attempts are left, so that this is where one is promised.
    """
    if isinstance(state.data, ClusterError):
        return False
    logger.warning("%s; the shard is tried again", reason_of_failure(state))
    return True


def reason_of_failure(state: State[Any]) -> str:
    """Return why a task has failed, without Prefect's words around it."""
    error = getattr(state.data, "result", state.data)
    if isinstance(error, LeukoflowError):
        return str(error)
    return (state.message or "it failed").removeprefix("Task run encountered an exception ")


def cause_of_death(storage: Storage, job: ShardJob) -> str:
    """Return why a shard's worker died, as its last note says where it has left one."""
    try:
        note = json.loads(storage.read(f"{attempt_prefix(job.shard, job.attempt)}/timeout.json"))
    except FileNotFoundError:
        return "its worker process died (out of memory, killed, or a poisonous image)"
    return f"{note['message']}; its worker was ended"
