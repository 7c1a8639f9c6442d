"""A run's cluster: opened from its settings, watched while it is used, its workers checked as they come and go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from distributed import Client, WorkerPlugin
from distributed.client import ClosedClientError

from leukoflow.cluster.code import code_digest
from leukoflow.cluster.host import cores, worker_environment
from leukoflow.cluster.workers import OPTIONS, kubernetes_cluster, local_cluster, local_sizes, slurm_cluster
from leukoflow.core.config import ClusterSettings
from leukoflow.core.errors import AttemptError, ClusterError

IN_FLIGHT_PER_WORKER = 2
"""Shards on their way at once: one that computes, one that waits behind it, so that no worker runs dry."""
LOOK_SECONDS = 1.0
ANSWER_SECONDS = 10.0
log = logging.getLogger("leukoflow")


class WorkerSetup(WorkerPlugin):
    """Readies a worker for a run, also one that joins later or was restarted: bounds its threads, loads its models.

    `threads` is per process; 0 leaves that to the worker's own environment variables. `load` is
    called on every worker with the run's `code`, or on those that offer a GPU where `gpu` is set. `state` is `loading`,
    `ready`, or what went wrong.
    """

    def __init__(self, name: str, threads: int, gpu: bool, load: Callable[[], None]) -> None:
        self.name = name
        self.threads = threads
        self.gpu = gpu
        self.load = load
        self.code = code_digest()
        self.state = "loading"

    async def setup(self, worker: Any) -> None:
        """Ready the worker; called by Dask when it is there, and tasks wait until it is through."""
        if code_digest() != self.code:
            return  # it will be sent away
        import cv2
        import torch

        if self.threads:
            # Local workers share the terminal with the flow, which drains on Ctrl-C: they must live to finish.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            torch.set_num_threads(self.threads)
            cv2.setNumThreads(self.threads)
        try:
            if not self.gpu or worker.state.total_resources.get("GPU", 0):
                await asyncio.get_running_loop().run_in_executor(None, self.load)
        except Exception as error:
            self.state = f"{type(error).__name__}: {error}"
            raise
        self.state = "ready"


def _report(name: str, dask_worker: Any = None) -> tuple[str, str]:
    """Return, on a worker, its code's digest and the state of the plugin of that name."""
    plugin = dask_worker.plugins.get(name)
    return code_digest(), "absent" if plugin is None else plugin.state


@dataclass(frozen=True, slots=True)
class Crew:
    """Addresses of the workers that are there and were checked: those that offer a GPU, and the others."""

    gpu: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()


class Cluster:
    """The client of a run, with a thread that looks after the workers.

    Every second it sees who is there. Workers that joined are checked and, with other code or other models than the
    run's, sent away. A scheduler that was lost is connected to again. What stays lost for `lost_seconds` (the
    scheduler, all workers, all GPUs) is lost for good: what waits for a result then gets a ClusterError.
    """

    def __init__(self, connect: Callable[[float], Client], settings: ClusterSettings, gpu: bool, threads: int) -> None:
        self._connect = connect
        self._settings = settings
        self._gpu = gpu
        self._threads = threads
        self._plugin: WorkerSetup | None = None
        self._scheduler = ""
        self._checked: set[str] = set()
        self._failure: ClusterError | None = None
        self._good_looks = 0
        self._news = threading.Condition()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="leukoflow-cluster", daemon=True)
        self.crew = Crew()
        self.client = connect(settings.wait_seconds)

    # --- what a run calls ---

    def prepare_workers(self, load: Callable[[], None]) -> None:
        """Have `load` called in all workers that will compute, now and whenever one joins; then begin to watch.

        Raises what `load` raises, and ClusterError.
        """
        self._plugin = WorkerSetup(f"leukoflow-{self.client.id}", self._threads, self._gpu, load)
        with _naming_lost_workers():
            self._scheduler = self._identity()["id"]
            self.client.register_plugin(self._plugin)
            self._look()
        self._thread.start()

    @property
    def in_flight(self) -> int:
        """How many shards should be on their way now. Where GPUs compute, each other worker prepares one for them."""
        crew = self.crew
        if self._gpu:
            return max(1, IN_FLIGHT_PER_WORKER * len(crew.gpu) + len(crew.cpu))
        return max(1, IN_FLIGHT_PER_WORKER * (len(crew.gpu) + len(crew.cpu)))

    def check(self) -> None:
        """Raise ClusterError once the cluster is lost for good."""
        if self._failure is not None:
            raise ClusterError(str(self._failure))

    def result(self, future: Any) -> Any:
        """Return what a future computes. Raises its error, AttemptError after a lost connection, or ClusterError."""
        while True:
            try:
                return future.result(timeout=5.0)
            except TimeoutError:
                if future.status == "error":
                    raise
                self.check()
            except (CancelledError, ClosedClientError):
                self.check()
                raise AttemptError("the connection to the scheduler was lost") from None

    def settle(self) -> None:
        """Wait until scheduler and workers have been seen in order from now on. Raises ClusterError."""
        with self._news:
            wanted = self._good_looks + 2  # the next one may have started before
            while self._good_looks < wanted:
                self.check()
                self._news.wait(LOOK_SECONDS)

    def close(self) -> None:
        """End the watch and the connection; what still waits for a result gets an error."""
        self._over.set()
        if self._failure is None:
            self._failure = ClusterError("the run has ended")
        with self._news:
            self._news.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout=3 * ANSWER_SECONDS)
        with contextlib.suppress(Exception):  # nothing here may hide why the run ends
            if self._plugin is not None and self.client.status == "running":
                self.client.sync(self.client._unregister_worker_plugin, name=self._plugin.name, callback_timeout=5)
        with contextlib.suppress(Exception):
            self.client.close(timeout=10)

    # --- the watch ---

    def _watch(self) -> None:
        bad_since: float | None = None
        while not self._over.wait(LOOK_SECONDS):
            try:
                trouble = self._look()
            except Exception as error:  # of the network or of Dask; whatever it is, it counts as not reachable
                where = self.client.scheduler.address if self.client.scheduler else self._settings.address
                trouble = f"the Dask scheduler at {where} does not answer ({type(error).__name__}); start it again"
            if self._over.is_set():
                return
            if trouble is None:
                if bad_since is not None:
                    log.info("the cluster is in order again after %.0f s", time.monotonic() - bad_since)
                bad_since = None
            elif bad_since is None:
                bad_since = time.monotonic()
                log.warning("%s; waiting for up to %.0f s", trouble, self._settings.lost_seconds)
            elif time.monotonic() - bad_since > self._settings.lost_seconds:
                self._give_up(trouble)
                return
            with self._news:
                self._good_looks += trouble is None
                self._news.notify_all()

    def _give_up(self, trouble: str) -> None:
        self._failure = ClusterError(
            f"{trouble}. Waited for {self._settings.lost_seconds:.0f} s (cluster.lost_seconds). What is "
            "committed stays; once mended, the same command goes on from there"
        )
        with self._news:
            self._news.notify_all()
        with contextlib.suppress(Exception):
            self.client.close(timeout=5)  # what waits for a result gets an error

    def _look(self) -> str | None:
        """See who is there and check who is new; return what is not in order. Raises when nobody answers."""
        assert self._plugin is not None
        if self.client.status == "closed":
            self.client = self._connect(ANSWER_SECONDS)
        identity = self._identity()
        if identity["id"] != self._scheduler:  # it was restarted and knows nothing of us
            self._scheduler = identity["id"]
            self._checked = set()
            self.client.register_plugin(self._plugin)
        workers = identity["workers"]
        self._checked &= set(workers)
        if new := [address for address in workers if address not in self._checked]:
            self._check(new)
        there = [address for address in workers if address in self._checked]
        gpu = tuple(a for a in there if workers[a]["resources"].get("GPU", 0) >= 1)
        crew = Crew(gpu, tuple(a for a in there if a not in gpu))
        if crew != self.crew and self._thread.ident is not None:
            log.info("%s workers, %s of them with a GPU", len(there), len(gpu))
        self.crew = crew
        if not there:
            return f"all workers are gone; {_remedy(self._settings)}"
        if self._gpu and not gpu:
            return f"no worker offers the resource GPU any more; {_remedy(self._settings, gpu=True)}"
        return None

    def _identity(self) -> dict[str, Any]:
        """Return what the scheduler says about itself and its workers. Raises OSError or TimeoutError without one."""
        client = self.client
        if client.status != "running" or client.scheduler is None:
            raise TimeoutError(client.status)
        found = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=ANSWER_SECONDS)
        return cast(dict[str, Any], found)

    def _check(self, new: list[str]) -> None:
        """Check workers that joined: the same code, models loaded. Others are sent away for good."""
        assert self._plugin is not None
        found = self.client.run(_report, self._plugin.name, workers=new, on_error="return")
        mine, refused = code_digest(), []
        for address, answer in found.items():
            if isinstance(answer, OSError):  # it has gone meanwhile
                continue
            if isinstance(answer, BaseException):
                refused.append((address, f"it cannot run our code ({type(answer).__name__}: {answer})"))
            elif answer[0] != mine:
                refused.append((address, f"it runs other code ({answer[0]}) than this flow ({mine})"))
            elif answer[1] == "ready":
                self._checked.add(address)
            elif answer[1] not in ("loading", "absent"):
                refused.append((address, f"it cannot load the models ({answer[1]})"))
        for address, why in refused:
            log.warning("worker %s is refused: %s; install the flow's wheel there", address, why)
        if refused:
            self.client.retire_workers([address for address, _ in refused], close_workers=True, remove=True)


# --- opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def open_cluster(settings: ClusterSettings, gpu: bool = False) -> Iterator[Cluster]:
    """Open a cluster whose workers run our code, are there, and offer what the run needs.

    Args:
        settings: where it comes from. A scheduler that somebody else starts should run with
            `distributed.scheduler.allowed-failures: 0`, since each attempt at a shard multiplies it.
        gpu: whether the run needs workers that offer the resource GPU.

    Workers are processes of one thread each: a stage that kills its process takes no other stage along, and compute
    threads are shared out so that cores are not oversubscribed. Raises ClusterError with the remedy.
    """
    import dask

    security = _security(settings)
    threads, count = 0, 1
    if settings.address == "local":
        gpus, start, most = local_sizes(settings, gpu)
        threads, count = max(1, cores() // most), start + len(gpus)
        if gpu and not gpus:
            raise ClusterError("torch sees no GPU on this machine; check `leukoflow doctor`, or use --device cpu")
    options = OPTIONS | {
        "distributed.comm.timeouts.connect": "30s",
        "distributed.nanny.pre-spawn-environ": worker_environment(max(1, threads)),
    }
    with dask.config.set(options), _started(settings, gpu, security) as dask_cluster:
        where = settings.address if dask_cluster is None else dask_cluster

        def connect(seconds: float) -> Client:
            return Client(where, timeout=seconds, security=security, set_as_default=False)

        try:
            cluster = Cluster(connect, settings, gpu, threads)
        except (OSError, TimeoutError) as error:
            refused = ", or it does not accept our certificate" if security is not None else ""
            raise ClusterError(
                f"no Dask scheduler answers at {settings.address} within {settings.wait_seconds:.0f} s{refused} "
                f"({error}); start one with `dask scheduler`, or leave out --cluster for local workers"
            ) from None
        try:
            with _naming_lost_workers():
                _wait_for_workers(cluster.client, settings, count)
                if gpu:
                    _require_gpu(cluster.client, settings)
                _require_same_code(cluster.client)
            yield cluster
        finally:
            cluster.close()


@contextmanager
def _started(settings: ClusterSettings, gpu: bool, security: Any) -> Iterator[Any]:
    """Start workers for the block and yield Dask's cluster object; None where somebody else starts them."""
    if "://" in settings.address:
        yield None
        return
    try:
        if settings.address == "local":
            found = local_cluster(settings, gpu)
        elif settings.address == "slurm":
            found = slurm_cluster(settings, gpu, security)
        else:
            found = kubernetes_cluster(settings, gpu)
    except RuntimeError as error:  # Dask's word for a worker or scheduler that died while it was started
        raise ClusterError(
            f"the {settings.address} workers did not start ({error}); run the same command again, with fewer --workers "
            "if the memory is short"
        ) from None
    try:
        yield found
    finally:
        found.close(timeout=20)


def _security(settings: ClusterSettings) -> Any:
    """Return Dask's TLS settings, None for connections without. Raises ClusterError naming what is missing."""
    from distributed.security import Security

    tls = settings.tls
    given = {"ca_file": tls.ca_file, "cert": tls.cert, "key": tls.key}
    if settings.address == "local" or not (settings.address.startswith("tls://") or any(given.values())):
        return None
    for name, path in given.items():
        if path is not None and not Path(path).is_file():
            raise ClusterError(f"cluster.tls.{name}: there is no file {path}; put it there, or correct the path")
    roles = ("client", "scheduler", "worker")
    files = {f"tls_{role}_{name}": given[name] for role in roles for name in ("cert", "key") if given[name]}
    if tls.ca_file:
        files["tls_ca_file"] = tls.ca_file
    try:
        security = Security(require_encryption=True, **files)
        context = security.get_connection_args("client").get("ssl_context")
    except (ssl.SSLError, OSError) as error:
        raise ClusterError(
            f"the TLS files cannot be used ({error}); ca_file, cert and key must be PEM files, and key belong to cert"
        ) from None
    if context is None:
        raise ClusterError(
            f"{settings.address} wants a certificate of ours, and none is configured; set cluster.tls.ca_file, cert "
            "and key, or Dask's distributed.comm.tls (DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__CLIENT__CERT, "
            "...__CLIENT__KEY)"
        )
    return security


@contextmanager
def _naming_lost_workers() -> Iterator[None]:
    try:
        yield
    except (OSError, TimeoutError) as error:
        raise ClusterError(f"a worker went away before the first shard ({error}); run the same command again") from None


def _remedy(settings: ClusterSettings, gpu: bool = False) -> str:
    """Say what brings workers back, or those with a GPU, by where they come from."""
    if settings.address == "local":
        device = "look at the GPUs with `nvidia-smi`, then " if gpu else ""
        return f"{device}run the same command again, with fewer --workers if the memory is short"
    if settings.address == "slurm":
        return (
            "see what `squeue --me` says of the jobs and what their output says: a job ends with its time limit, "
            f"cluster.slurm.walltime ({settings.slurm.walltime})"
        )
    if settings.address == "kubernetes":
        return "see what `kubectl get pods` says"
    if gpu:
        return f"start one worker per GPU with `dask worker {settings.address} --nthreads 1 --resources GPU=1`"
    return f"start workers with `dask worker {settings.address} --nthreads 1`"


def _wait_for_workers(client: Any, settings: ClusterSettings, count: int) -> None:
    remedy = _remedy(settings)
    if settings.address != "local":
        remedy += ", or raise cluster.wait_seconds"
    try:
        client.wait_for_workers(count, timeout=settings.wait_seconds)
    except TimeoutError:
        raise ClusterError(
            f"{settings.address}: fewer than {count} workers arrived within {settings.wait_seconds:.0f} s; {remedy}"
        ) from None


def _require_gpu(client: Any, settings: ClusterSettings) -> None:
    deadline = time.monotonic() + settings.wait_seconds
    while time.monotonic() < deadline:
        if any(w["resources"].get("GPU", 0) >= 1 for w in client.scheduler_info(n_workers=-1)["workers"].values()):
            return
        time.sleep(0.5)
    raise ClusterError(
        f"no worker offers the resource GPU, which --device cuda needs; {_remedy(settings, gpu=True)}, or run with "
        "--device cpu"
    )


def _require_same_code(client: Any) -> None:
    """Refuse workers with other code, which would write other numbers under this run's name."""
    try:
        found = client.run(code_digest)
    except OSError:
        raise
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
