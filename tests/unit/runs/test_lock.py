"""A lock has one holder at a time, whenever others look at it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import StorageError
from leukoflow.runs import lock
from leukoflow.runs.lock import LockHolder, held
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage

KEY = "compact.lock"
DEAD = LockHolder(2**22 + 1, socket.gethostname(), "2026-03-01T00:00:00+00:00", "compacting")
OTHER = LockHolder(os.getpid(), socket.gethostname(), "2026-03-02T00:00:00+00:00", "erase")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def holder(storage: Storage) -> LockHolder:
    return loads(LockHolder, storage.read(KEY), KEY)


@pytest.mark.parametrize("released", [True, False], ids=["released", "of a dead process"])
def test_a_lock_that_another_has_taken_meanwhile_is_theirs(
    released: bool, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write(KEY, dumps(DEAD))
    original = lock._holder

    def look(storage: Storage, key: str) -> LockHolder | None:
        monkeypatch.setattr(lock, "_holder", original)
        if released:
            storage.delete(key)
        found = original(storage, key)
        storage.write(key, dumps(OTHER))
        return found

    monkeypatch.setattr(lock, "_holder", look)
    with pytest.raises(StorageError, match="taken by another process just now"), held(storage, KEY, "erase"):
        pass
    assert holder(storage) == OTHER
    assert storage.names("") == [KEY]


def test_a_dead_ones_lock_is_taken_over_by_one_at_a_time(storage: Storage) -> None:
    storage.write(KEY, dumps(DEAD))
    storage.write(f"{KEY}.takeover", dumps(OTHER))
    with pytest.raises(StorageError, match=r"is being taken over .* or delete .*takeover"), held(storage, KEY, "erase"):
        pass
    assert holder(storage) == DEAD
    storage.delete(f"{KEY}.takeover")
    with held(storage, KEY, "erase"):
        assert holder(storage).pid == os.getpid()
    assert storage.names("") == []


def test_only_ones_own_lock_is_released(storage: Storage) -> None:
    with held(storage, KEY, "erase"):
        storage.write(KEY, dumps(OTHER))  # somebody has deleted it by hand, and another has come
    assert holder(storage) == OTHER
