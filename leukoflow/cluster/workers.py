"""How worker processes are started: here, as jobs of Slurm, as pods of Kubernetes. One thread each, one GPU at most."""

from __future__ import annotations

import getpass
import logging
import os
import shutil
import uuid
from typing import Any

import psutil
from distributed.deploy.adaptive import Adaptive

from leukoflow.cluster.host import cores, worker_environment
from leukoflow.core.config import ClusterSettings
from leukoflow.core.errors import ClusterError

OPTIONS: dict[str, Any] = {
    # The worker that dies is blamed at once; Prefect decides about another attempt.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.pause": 0.9,
    "distributed.worker.memory.terminate": 0.97,
    "distributed.worker.memory.monitor-interval": "500ms",
    "distributed.worker.profile.enabled": False,  # it would interrupt the computing thread every 10 ms
}
"""Dask's settings for schedulers and workers that we start."""

STAYS = "stays-"
"""Beginning of the names of workers that scaling leaves alone."""


def visible_gpus() -> list[str]:
    """Return the GPUs of this machine that torch sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = int(torch.cuda.device_count())
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if len(named) >= count else [str(i) for i in range(count)]


def elsewhere_environment(threads: int) -> dict[str, str]:
    """Return the same, and Dask's settings, for processes that somebody else starts for us: jobs and pods."""
    named = {"DASK_" + key.replace(".", "__").replace("-", "_").upper(): str(v) for key, v in OPTIONS.items()}
    return worker_environment(threads) | named


class Scaling(Adaptive):
    """Dask's scaling, but for workers that are to stay."""

    async def workers_to_close(self, target: int) -> list[str]:
        """Return the names of workers that may go."""
        return [name for name in await super().workers_to_close(target) if not str(name).startswith(STAYS)]


def scale(cluster: Any, settings: ClusterSettings, stay: int) -> None:
    """Let Dask scale between the settings' bounds; `stay` further workers are none of its business.

    A worker comes when more than a second of work waits, and goes when it was not needed for half a minute.
    """
    if settings.max_workers:
        bounds = {"minimum": settings.min_workers + stay, "maximum": settings.max_workers + stay}
        cluster.adapt(Adaptive=Scaling, target_duration="1s", wait_count=30, interval="1s", **bounds)


# --- here ------------------------------------------------------------------------------------------------------------


def local_sizes(settings: ClusterSettings, gpu: bool) -> tuple[list[str], int, int]:
    """Return the GPUs to use, CPU workers at start, and how many processes there may be at most."""
    gpus = visible_gpus() if gpu else []
    if settings.gpu_workers:
        gpus = gpus[: settings.gpu_workers]
    start = settings.workers or cores()
    if settings.max_workers:
        start = settings.min_workers
    return gpus, start, max(start, settings.max_workers) + len(gpus)


def local_cluster(settings: ClusterSettings, gpu: bool) -> Any:
    """Start worker processes on this machine; those with a GPU see one each and offer it as a resource."""
    from distributed import Nanny, Scheduler, SpecCluster

    gpus, start, most = local_sizes(settings, gpu)
    limit: str | int = settings.memory_limit
    if limit == "auto":
        limit = int(psutil.virtual_memory().total * 0.8 / most)
    common = {"nthreads": 1, "memory_limit": limit, "host": "127.0.0.1", "dashboard_address": None}
    common["silence_logs"] = logging.CRITICAL  # what fails in a stage is raised in the flow, which says it in words
    plain = {"cls": Nanny, "options": common | {"env": {"CUDA_VISIBLE_DEVICES": ""}}}
    workers: dict[Any, Any] = {
        f"{STAYS}gpu-{i}": {"cls": Nanny, "options": common | gpu_options(i, gpus)} for i in range(len(gpus))
    }
    workers |= dict.fromkeys(range(start), plain)
    # A dashboard of its own on a free loopback port: two runs on one machine must not fight over 8787.
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    cluster = SpecCluster(workers=workers, worker=plain, scheduler=scheduler, silence_logs=40, name="leukoflow")
    scale(cluster, settings, len(gpus))
    return cluster


def gpu_options(index: int, gpus: list[str]) -> dict[str, Any]:
    """Return the options of the worker of one GPU; dask-cuda, where installed, adds the cores that are near it."""
    options: dict[str, Any] = {"resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": gpus[index]}}
    try:
        from dask_cuda.worker_spec import worker_spec
    except ImportError:
        return options
    (found,) = worker_spec(CUDA_VISIBLE_DEVICES=gpus[index], threads_per_worker=1).values()
    kept = {name: found["options"][name] for name in ("plugins", "preload", "preload_argv")}
    return options | kept


# --- Slurm -----------------------------------------------------------------------------------------------------------


def slurm_cluster(settings: ClusterSettings, gpu: bool, security: Any) -> Any:
    """Start workers as jobs of Slurm; the scheduler runs in this process. Raises ClusterError with the remedy."""
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise ClusterError(
            "a cluster on Slurm needs the package dask-jobqueue; install it here with: pip install 'leukoflow[slurm]'"
        ) from None
    if shutil.which("sbatch") is None:
        raise ClusterError("sbatch is not on the PATH; start the run on a machine from which Slurm takes jobs")
    slurm = settings.slurm
    where = {"interface": slurm.interface, "security": security, "protocol": "tls://" if security else None}
    cluster = SLURMCluster(
        name="leukoflow",
        scheduler_options={"port": slurm.port, "dashboard_address": "127.0.0.1:0"},
        **where,
        **slurm_job(settings, gpu),
    )
    helpers = settings.workers if gpu else 0
    main = settings.gpu_workers if gpu else settings.workers
    options = where | {"config_name": "slurm"} | slurm_job(settings, gpu=False)
    for i in range(helpers):
        cluster.worker_spec[f"{STAYS}cpu-{i}"] = {"cls": SLURMCluster.job_cls, "options": options}
    cluster.scale(helpers + (settings.min_workers if settings.max_workers else main or 1))
    scale(cluster, settings, helpers)
    return cluster


def slurm_job(settings: ClusterSettings, gpu: bool) -> dict[str, Any]:
    """Describe a worker's job in dask-jobqueue's words: one process of one thread, and a GPU or none."""
    slurm = settings.slurm
    count = slurm.gpu_cores if gpu else slurm.cores
    exports = [f"export {name}={value}" for name, value in elsewhere_environment(count).items()]
    return {
        "queue": slurm.partition,
        "account": slurm.account,
        "walltime": slurm.walltime,
        "cores": 1,
        "processes": 1,
        "job_cpu": count,
        "memory": slurm.gpu_memory if gpu else slurm.memory,
        "job_name": "leukoflow-gpu" if gpu else "leukoflow",
        "job_extra_directives": [*([slurm.gpu_directive] if gpu else []), *slurm.directives],
        "job_script_prologue": [*exports, *slurm.prologue],
        "worker_extra_args": ["--resources", "GPU=1"] if gpu else [],
        "python": slurm.python,
        "log_directory": slurm.log_directory,
        "local_directory": slurm.local_directory,
    }


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def kubernetes_cluster(settings: ClusterSettings, gpu: bool) -> Any:
    """Start scheduler and workers as pods of the Dask operator. Raises ClusterError with the remedy."""
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError:
        raise ClusterError(
            "a cluster on Kubernetes needs the package dask-kubernetes; install it here with: "
            "pip install 'leukoflow[kubernetes]'"
        ) from None
    spec = kubernetes_spec(settings, gpu)
    cluster = None
    try:
        cluster = KubeCluster(
            custom_cluster_spec=spec,
            namespace=settings.kubernetes.namespace,
            resource_timeout=int(settings.wait_seconds),
            quiet=True,
        )
        if gpu and settings.workers:
            cluster.add_worker_group("cpu", custom_spec=kubernetes_worker(settings, False, settings.workers))
        if settings.max_workers:
            cluster.adapt(minimum=settings.min_workers, maximum=settings.max_workers)
    except Exception as error:  # a handful of libraries' errors, and none that a program could act upon
        if cluster is not None:
            cluster.close(timeout=20)
        raise ClusterError(
            f"Kubernetes did not start the cluster ({type(error).__name__}: {error}); check that `kubectl get pods` "
            "works here, that the Dask operator is installed, and that the image can be pulled"
        ) from None
    return cluster


def kubernetes_spec(settings: ClusterSettings, gpu: bool) -> dict[str, Any]:
    """Return the DaskCluster resource: the scheduler and the group of workers that may be scaled."""
    from dask_kubernetes.operator.kubecluster.kubecluster import make_cluster_spec

    pods = settings.kubernetes
    name = pods.name.format(user=getpass.getuser(), uuid=uuid.uuid4().hex[:8])
    count = settings.min_workers if settings.max_workers else (settings.gpu_workers if gpu else settings.workers) or 1
    limits = {"cpu": pods.cores, "memory": pods.memory}
    spec: dict[str, Any] = make_cluster_spec(
        name=name,
        image=pods.image,
        env=_pod_environment(settings, 1),
        resources={"limits": limits, "requests": dict(limits)},
    )
    spec["spec"]["worker"] = kubernetes_worker(settings, gpu, count)
    _complete(spec["spec"]["scheduler"]["spec"], settings, gpu=False)
    return spec


def kubernetes_worker(settings: ClusterSettings, gpu: bool, count: int) -> dict[str, Any]:
    """Return a group of `count` worker pods, with a GPU each or without."""
    from dask_kubernetes.operator.kubecluster.kubecluster import make_worker_spec

    pods = settings.kubernetes
    limits = {"cpu": pods.gpu_cores if gpu else pods.cores, "memory": pods.gpu_memory if gpu else pods.memory}
    if gpu:
        limits[pods.gpu_resource] = "1"
    spec: dict[str, Any] = make_worker_spec(
        image=pods.image,
        n_workers=count,
        resources={"limits": limits, "requests": dict(limits)},
        env=_pod_environment(settings, _whole_cores(limits["cpu"])),
        worker_command=["dask-worker", "--nthreads", "1", *(["--resources", "GPU=1"] if gpu else [])],
    )
    _complete(spec["spec"], settings, gpu)
    return spec


def _whole_cores(text: str) -> int:
    """Return the compute threads for a CPU quantity: `4`, `2.5` or `1500m`."""
    try:
        return max(1, int(float(text[:-1]) / 1000 if text.endswith("m") else float(text)))
    except ValueError:
        raise ClusterError(f"{text!r} is no CPU quantity of Kubernetes; write it as 4, 2.5 or 1500m") from None


def _pod_environment(settings: ClusterSettings, threads: int) -> dict[str, str]:
    return elsewhere_environment(threads) | settings.kubernetes.env


def _complete(pod: dict[str, Any], settings: ClusterSettings, gpu: bool) -> None:
    """Add to a pod what the operator's helpers have no argument for."""
    pods = settings.kubernetes
    (container,) = pod["containers"]
    # The program as `command`, or an image with an entry point of its own would take it for an argument.
    container["command"], container["args"] = container["args"][:1], container["args"][1:]
    if pods.env_secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in pods.env_secrets]
    if selector := pods.gpu_node_selector if gpu else pods.node_selector:
        pod["nodeSelector"] = dict(selector)
    if gpu and pods.gpu_tolerations:
        pod["tolerations"] = [{"key": key, "operator": "Exists"} for key in pods.gpu_tolerations]
    if pods.service_account:
        pod["serviceAccountName"] = pods.service_account
    if pods.image_pull_secret:
        pod["imagePullSecrets"] = [{"name": pods.image_pull_secret}]
