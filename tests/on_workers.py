"""What tests have workers do; importing it costs a worker nothing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distributed import get_worker


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


# --- stages that only take their time and say where and when they ran -------------------------------------------------


@dataclass
class Pixels:
    """What a block is to its chain: something large, and where the next one begins."""

    next: int
    pixels: np.ndarray[Any, Any]


def _take(job: Any, stage: str, seconds: float) -> None:
    began = time.monotonic()
    time.sleep(seconds)
    words = f"{stage} {job.shard.name} {get_worker().address} {began} {time.monotonic()}\n"
    (Path(job.root) / f"{stage}-{job.shard.name}").write_text(words)


def prepare(job: Any, first: int) -> Pixels:
    _take(job, "prepare", 0.1)
    return Pixels(job.shard.first + job.shard.count, np.zeros((64, 224, 224, 3), np.uint8))


def next_of(block: Pixels) -> int:
    return block.next


def segment(job: Any, block: Pixels, before: Any) -> Pixels:
    _take(job, "segment", 0.15)
    return block


def written_by(segmented: Pixels) -> int:
    return 1


def extract(job: Any, segmented: Pixels, before: Any) -> int:
    _take(job, "extract", 0.15)
    return 2


def classify(job: Any, written: Any, done: Any) -> str:
    _take(job, "classify", 0.01)
    return str(job.shard.name)
