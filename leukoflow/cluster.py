"""Where Dask comes from: local worker processes, or the address of a scheduler that somebody else runs."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
from distributed import WorkerPlugin

from leukoflow.config import ClusterSettings
from leukoflow.errors import ClusterError

PACKAGES = ("leukoflow", "tasks", "flows", "models", "apps")


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Digest (16 hex digits) of our packages' Python files as this process imports them."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BoundThreads(WorkerPlugin):
    """Runs in every worker process, also one that the nanny restarted: bounds its compute threads.

    `threads` is per process; 0 leaves that to whoever started the worker (environment variables of its own).
    """

    name = "leukoflow-threads"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def setup(self, worker: Any) -> None:
        """Called by Dask when the worker is ready."""
        import cv2
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
            cv2.setNumThreads(self.threads)


@contextmanager
def open_cluster(settings: ClusterSettings, needs_gpu: bool = False) -> Iterator[Any]:
    """A connected Dask client whose workers run our code, are ready, and offer what the run needs.

    Local workers are processes of one thread each: a stage that kills its process takes no other stage along, and
    compute threads are shared out so that cores are not oversubscribed. Raises ClusterError with the remedy.
    """
    import dask
    from distributed import Client, LocalCluster

    local = settings.address == "local"
    cluster: Any = None
    options = {
        # The worker that dies is blamed at once; Prefect decides about another attempt.
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.pause": 0.9,
        "distributed.worker.memory.terminate": 0.97,
        "distributed.comm.timeouts.connect": "30s",
    }
    with dask.config.set(options):
        try:
            if local:
                count = settings.workers or cores()
                threads = max(1, cores() // count)
                env = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
                env["MALLOC_TRIM_THRESHOLD_"] = "65536"
                limit: str | int = settings.memory_limit
                if limit == "auto":
                    limit = int(psutil.virtual_memory().total * 0.8 / max(count, 1))
                with dask.config.set({"distributed.nanny.environ": env, "distributed.nanny.pre-spawn-environ": env}):
                    cluster = LocalCluster(
                        n_workers=count,
                        threads_per_worker=1,
                        processes=True,
                        memory_limit=limit,
                        dashboard_address=_free_dashboard(),
                        resources={"GPU": 1} if needs_gpu else None,
                        silence_logs=40,
                    )
                client = Client(cluster, timeout=settings.wait_seconds)
            else:
                threads = 0
                client = Client(settings.address, timeout=settings.wait_seconds)
        except (OSError, TimeoutError) as error:
            raise ClusterError(
                f"no Dask scheduler answers at {settings.address} within {settings.wait_seconds:.0f} s ({error}); "
                "start one with `dask scheduler`, or leave out --cluster for local workers"
            ) from None
        try:
            _wait_for_workers(client, settings, 1 if not local else count)
            if needs_gpu:
                _require_gpu(client, settings)
            _same_code(client)
            client.register_plugin(BoundThreads(threads))
            yield client
        finally:
            client.close(timeout=10)
            if cluster is not None:
                cluster.close(timeout=20)


def _free_dashboard() -> str:
    """Dask's own dashboard on a free loopback port; two runs on one machine must not fight over 8787."""
    return "127.0.0.1:0"


def _wait_for_workers(client: Any, settings: ClusterSettings, count: int) -> None:
    try:
        client.wait_for_workers(count, timeout=settings.wait_seconds)
    except TimeoutError:
        raise ClusterError(
            f"{settings.address}: fewer than {count} workers arrived within {settings.wait_seconds:.0f} s; "
            "start workers with `dask worker ADDRESS --nthreads 1`, or raise cluster.wait_seconds"
        ) from None


def _require_gpu(client: Any, settings: ClusterSettings) -> None:
    deadline = time.monotonic() + settings.wait_seconds
    while time.monotonic() < deadline:
        if any(w["resources"].get("GPU", 0) >= 1 for w in client.scheduler_info(n_workers=-1)["workers"].values()):
            return
        time.sleep(0.5)
    raise ClusterError(
        "no worker offers the resource GPU, which --device cuda needs; start one worker per GPU with "
        "`dask worker ADDRESS --nthreads 1 --resources GPU=1`, or run with --device cpu"
    )


def _same_code(client: Any) -> None:
    """Workers with other code would write other numbers under this run's name: refuse them."""
    try:
        found = client.run(code_digest)
    except Exception as error:  # the worker cannot even import us
        raise ClusterError(
            f"a worker cannot import leukoflow ({type(error).__name__}: {error}); install the same wheel on all workers"
        ) from None
    mine = code_digest()
    other = {address: digest for address, digest in found.items() if digest != mine}
    if other:
        raise ClusterError(
            f"workers run other code than this flow ({mine}): {other}; install one wheel everywhere and restart them"
        )
