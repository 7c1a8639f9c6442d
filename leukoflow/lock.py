"""A lock file below a storage root: one process at a time changes what all of them read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from leukoflow.codec import dumps, loads
from leukoflow.errors import StorageError
from leukoflow.progress import now
from leukoflow.storage import Storage


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Who holds a lock, and what for."""

    pid: int
    host: str
    at: str
    purpose: str


@contextmanager
def held(storage: Storage, key: str, purpose: str) -> Iterator[None]:
    """Holds the lock file `key` for the block. Raises StorageError naming the holder when somebody else has it.

    The lock of a process of this machine that has died is taken over; one of another machine is left to people, since
    nobody can tell from here whether it lives.
    """
    mine = dumps(LockHolder(os.getpid(), socket.gethostname(), now(), purpose))
    if not storage.create(key, mine):
        holder = _holder(storage, key)
        if holder is not None and not _dead(holder):
            raise StorageError(
                f"{storage.uri(key)} is held for {holder.purpose} by process {holder.pid} on {holder.host} since "
                f"{holder.at}; wait for it, or delete that file if the process is gone"
            )
        storage.delete(key)
        if not storage.create(key, mine):
            raise StorageError(f"{storage.uri(key)} was taken by another process just now; give the command again")
    try:
        yield
    finally:
        storage.delete(key)


def _holder(storage: Storage, key: str) -> LockHolder | None:
    try:
        return loads(LockHolder, storage.read(key), storage.uri(key))
    except FileNotFoundError:
        return None


def _dead(holder: LockHolder) -> bool:
    if holder.host != socket.gethostname():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
