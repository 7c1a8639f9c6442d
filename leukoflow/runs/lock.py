"""A lock file below a storage root: one process at a time changes what all of them read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import StorageError
from leukoflow.runs.progress import now
from leukoflow.storage.base import Storage


@dataclass(frozen=True, slots=True)
class LockHolder:
    """The holder of a lock, and its purpose."""

    pid: int
    host: str
    at: str
    purpose: str


@contextmanager
def held(storage: Storage, key: str, purpose: str) -> Iterator[None]:
    """Hold the lock file `key` for the block. Raises StorageError naming the holder when somebody else has it.

    The lock of a process of this machine that has died is taken over; one of another machine is left to people, since
    nobody can tell from here whether it lives.
    """
    me = LockHolder(os.getpid(), socket.gethostname(), now(), purpose)
    mine = dumps(me)
    if not storage.create(key, mine):
        holder = _holder(storage, key)
        if holder is not None and not _dead(holder):
            raise StorageError(
                f"{storage.uri(key)} is held for {holder.purpose} by process {holder.pid} on {holder.host} since "
                f"{holder.at}; wait for it, or delete that file if the process is gone"
            )
        if holder is not None:
            _clear(storage, key, holder, mine)
        if not storage.create(key, mine):  # also where it was released a moment ago: then others may be quicker
            raise StorageError(f"{storage.uri(key)} was taken by another process just now; run the command again")
    try:
        yield
    finally:
        if _holder(storage, key) == me:
            storage.delete(key)


def _clear(storage: Storage, key: str, dead: LockHolder, mine: bytes) -> None:
    """Remove the lock of a process that has died. One at a time does so, lest it removes the lock of the one before.

    Raises StorageError when another process is at it.
    """
    turn = f"{key}.takeover"
    if not storage.create(turn, mine):
        raise StorageError(
            f"{storage.uri(key)} is being taken over by another process; run the command again, or delete "
            f"{storage.uri(turn)} if no such process runs"
        )
    try:
        if _holder(storage, key) == dead:
            storage.delete(key)
    finally:
        storage.delete(turn)


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
