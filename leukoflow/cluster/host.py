"""What the machine and the software are that compute here: what a float may depend on beside its inputs."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import socket
from functools import lru_cache
from typing import Any, cast

from leukoflow.cluster.code import code_digest
from leukoflow.runs.records import Host

SOFTWARE = (
    "leukoflow", "prefect", "dask", "distributed", "torch", "timm", "opencv-python-headless", "numpy", "zarr",
    "pyarrow",
)  # fmt: skip


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(threads: int) -> dict[str, str]:
    """Return what must be in a worker's environment before its process starts, in place of Dask's own choice.

    Dask has freed memory go back to the system at once. Networks allocate and free their activations all the time, so
    that costs more page faults than arithmetic (measured: benchmarks/LOG.md). Blocks above 32 MB still go back.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    memory = {"MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    return dict.fromkeys(names, str(threads)) | memory


def software() -> tuple[tuple[str, str], ...]:
    """Return the versions of what computes a run."""
    found = [("python", platform.python_version())]
    for name in SOFTWARE:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def this_host() -> Host:
    """Describe the machine under this process, with the threads that torch has now."""
    import torch

    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    gpus: tuple[str, ...] = ()
    cuda = ""
    if torch.cuda.is_available():
        gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        cuda = f"CUDA {torch.version.cuda}, cuDNN {cast(Any, torch.backends.cudnn).version()}"
    return Host(
        cpu=_cpu(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=cores(),
        threads=torch.get_num_threads(),
        thread_variables=tuple((name, os.environ[name]) for name in names if name in os.environ),
        gpus=gpus,
        cuda=cuda,
        blas=_blas(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        code=code_digest(),
        software=software(),
    )


@lru_cache(maxsize=1)
def _cpu() -> str:
    """Return the processor's model, as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("model name", "Model"):
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def _blas() -> str:
    """Return the BLAS that torch was built with, and its version where it is known."""
    import torch

    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    known = [line for line in lines if "Math Kernel Library" in line or "MKL-DNN" in line or "OpenBLAS" in line]
    return "; ".join(line.partition(" (")[0] for line in known) or "unknown"


def who() -> str:
    """Return the user of this process and the machine's name, for logs of who did what."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
