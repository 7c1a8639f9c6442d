"""What must be there before the first shard, so that a run fails at once and not at three in the morning."""

from __future__ import annotations

import contextlib
import os
import shutil

import psutil

from leukoflow.core.counts import count_of
from leukoflow.core.errors import PreflightError, StorageError
from leukoflow.runs.layout import RunKey
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run

BYTES_PER_IMAGE = 120_000
"""Upper estimate of what one field leaves in Zarr and Parquet; measured runs stay below (see docs/data-format.md)."""
FLOOR_BYTES = 200 << 20
WORKER_BYTES = 1200 << 20


def preflight(run: Run, workers_here: int) -> None:
    """Check disk, memory and write access; raise PreflightError naming what is missing and the remedy."""
    storage = open_storage(run.root)
    conditional_writes(storage)
    if storage.is_local:
        need = run.summary.members * BYTES_PER_IMAGE + FLOOR_BYTES
        free = shutil.disk_usage(storage.root).free
        if free < need:
            raise PreflightError(
                f"{storage.root} has {free / 1e9:.1f} GB free, this run may need {need / 1e9:.1f} GB; "
                "free some space, or choose another --out"
            )
    available, wanted = psutil.virtual_memory().available, workers_here * WORKER_BYTES
    if available < wanted:
        raise PreflightError(
            f"{available / 1e9:.1f} GB of memory are available, "
            f"{count_of(workers_here, 'worker')} {'needs' if workers_here == 1 else 'need'} {wanted / 1e9:.1f} GB; "
            "use fewer --workers"
        )


def conditional_writes(storage: Storage) -> None:
    """Check write access, and that a key can be created only once: exactly-once rests on it. Raises PreflightError."""
    key = RunKey.new_attempt("preflight")
    try:
        storage.probe()
        first, second = storage.create(key, b"first"), storage.create(key, b"second")
        kept = storage.read(key)
    except StorageError as error:
        raise PreflightError(str(error)) from None
    except OSError as error:
        raise PreflightError(
            f"{storage.root} cannot be written: {os.strerror(error.errno) if error.errno else error}; check permissions"
        ) from None
    finally:
        with contextlib.suppress(OSError, StorageError):
            storage.delete(key)
    if not first or second or kept != b"first":
        raise PreflightError(
            f"{storage.root} does not honour conditional writes (create only if absent), so two attempts could "
            "overwrite each other; use a local disk, or an object store that supports If-None-Match"
        )
