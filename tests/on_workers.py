"""What tests have workers do; importing it costs a worker nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path


def surroundings() -> tuple[int, str | None, str]:
    """Compute threads, visible GPUs, and the environment as the kernel has it from the process's start."""
    import torch

    born_with = Path("/proc/self/environ").read_text() if Path("/proc/self/environ").exists() else ""
    return torch.get_num_threads(), os.environ.get("CUDA_VISIBLE_DEVICES"), born_with


def note(folder: str) -> None:
    """What a run has its workers load: here, a file per process."""
    (Path(folder) / str(os.getpid())).touch()


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()
