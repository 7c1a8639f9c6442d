"""Where Dask comes from: local worker processes, or the address of a scheduler that somebody else runs."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
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


def visible_gpus() -> int:
    """GPUs of this machine that torch sees."""
    import torch

    return int(torch.cuda.device_count())


class BoundThreads(WorkerPlugin):
    """Runs in every worker process, also one that the nanny restarted: bounds its compute threads.

    `threads` is per process; 0 leaves that to whoever started the worker (environment variables of its own).
    """

    name = "leukoflow-threads"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def setup(self, worker: Any) -> None:
        """Called by Dask when the worker is ready."""
        if self.threads:  # else nothing is imported: it would keep the worker from telling that it lives
            import cv2
            import torch

            # Local workers share the terminal with the flow, which drains on Ctrl-C: they must live to finish.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            torch.set_num_threads(self.threads)
            cv2.setNumThreads(self.threads)


@contextmanager
def open_cluster(settings: ClusterSettings, gpus: int = 0) -> Iterator[Any]:
    """A connected Dask client whose workers run our code, are ready, and offer what the run needs.

    Args:
        settings: local processes, or the address of a scheduler. An own scheduler should run with
            `distributed.scheduler.allowed-failures: 0`, since each attempt at a shard multiplies it.
        gpus: how many GPUs of this machine to use, one process each; with an address, any number above 0 asks for
            at least one worker that offers the resource GPU.

    Local workers are processes of one thread each: a stage that kills its process takes no other stage along, and
    compute threads are shared out so that cores are not oversubscribed. Raises ClusterError with the remedy.
    """
    import dask
    from distributed import Client

    local = settings.address == "local"
    count = (settings.workers or cores()) + gpus if local else 1
    cluster: Any = None
    with dask.config.set(OPTIONS | {"distributed.nanny.pre-spawn-environ": _environment(max(1, cores() // count))}):
        try:
            if local:
                cluster = _local_cluster(settings, count, gpus)
            client = Client(cluster if local else settings.address, timeout=settings.wait_seconds)
        except RuntimeError as error:  # Dask's word for a worker that died while it was started
            raise ClusterError(
                f"the local workers did not start ({error}); run the same command again, with fewer --workers if the "
                "memory is short"
            ) from None
        except (OSError, TimeoutError) as error:
            if cluster is not None:
                cluster.close()
            raise ClusterError(
                f"no Dask scheduler answers at {settings.address} within {settings.wait_seconds:.0f} s ({error}); "
                "start one with `dask scheduler`, or leave out --cluster for local workers"
            ) from None
        try:
            try:
                _wait_for_workers(client, settings, count)
                if gpus:
                    _require_gpu(client, settings)
                _same_code(client)
                client.register_plugin(BoundThreads(max(1, cores() // count) if local else 0))
            except OSError as error:
                raise ClusterError(
                    f"a worker went away before the first shard ({error}); run the same command again"
                ) from None
            yield client
        finally:
            client.close(timeout=10)
            if cluster is not None:
                cluster.close(timeout=20)


OPTIONS = {
    # The worker that dies is blamed at once; Prefect decides about another attempt.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.pause": 0.9,
    "distributed.worker.memory.terminate": 0.97,
    "distributed.worker.memory.monitor-interval": "500ms",
    "distributed.worker.profile.enabled": False,  # it would interrupt the computing thread every 10 ms
    "distributed.comm.timeouts.connect": "30s",
}


def _environment(threads: int) -> dict[str, str]:
    """What must be in a local worker's environment before its process starts, in place of Dask's own choice.

    Dask has freed memory go back to the system at once. Networks allocate and free their activations all the time, so
    that costs more page faults than arithmetic (measured: benchmarks/LOG.md). Blocks above 32 MB still go back.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    memory = {"MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    return dict.fromkeys(names, str(threads)) | memory


def _local_cluster(settings: ClusterSettings, count: int, gpus: int) -> Any:
    """`count` worker processes here; the first `gpus` of them see one GPU each and offer it as a resource."""
    from distributed import Nanny, Scheduler, SpecCluster

    limit: str | int = settings.memory_limit
    if limit == "auto":
        limit = int(psutil.virtual_memory().total * 0.8 / count)
    common = {"nthreads": 1, "memory_limit": limit, "host": "127.0.0.1", "dashboard_address": None, "silence_logs": 40}
    workers = {
        i: {
            "cls": Nanny,
            "options": common
            | ({"resources": {"GPU": 1}} if i < gpus else {})
            | {"env": {"CUDA_VISIBLE_DEVICES": str(i) if i < gpus else ""}},
        }
        for i in range(count)
    }
    # A dashboard of its own on a free loopback port: two runs on one machine must not fight over 8787.
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=40, name="leukoflow")


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
