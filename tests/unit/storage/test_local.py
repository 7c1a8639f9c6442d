"""What only a folder of this machine has: renames, scratch, folders to clear away."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from attempts import FILES, put

from leukoflow.core.errors import StorageError
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def test_writes_replace_whole(storage: Storage) -> None:
    storage.write("a/b.json", b"one")
    storage.write("a/b.json", b"two")
    assert storage.read("a/b.json") == b"two"
    assert storage.names("a") == ["b.json"]
    assert os.listdir(storage.uri("a")) == ["b.json"]  # no scratch stays
    with pytest.raises(FileNotFoundError):
        storage.read("a/c.json")


def test_what_cannot_be_written_is_named(storage: Storage) -> None:
    storage.write("a/b/c", b"x")
    with pytest.raises(StorageError, match=r"cannot write .*/a/b: Is a directory"):
        storage.write("a/b", b"x")
    assert os.listdir(storage.uri("a")) == ["b"]


def test_promotion_clears_what_is_in_the_way(storage: Storage) -> None:
    storage.write("masks.zarr/00001/cells/c/7", b"stale")
    storage.write("fields/part-00001.parquet", b"stale")
    parts = put(storage, "_attempts/00001/two", FILES)
    storage.promote("_attempts/00001/two", parts)
    assert storage.intact(parts)
    assert set(storage.files("")) == set(FILES)


def test_empty_folders_are_pruned_and_others_stay(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("_attempts/00001/a/file", b"x")
    storage.write("_attempts/00002/b/file", b"x")
    storage.delete("_attempts/00001/a")
    storage.prune("_attempts/00001")
    assert storage.names("_attempts") == ["00002"]
    storage.delete("_attempts/00002/b")
    storage.prune("_attempts/00002")
    assert not storage.exists("_attempts")


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("move", range(6))
@pytest.mark.parametrize("how", [Killed(), OSError(28, "No space left on device")], ids=["killed", "full"])
def test_a_promotion_that_ends_at_any_move_is_completed_by_the_next_one(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, move: int, how: BaseException
) -> None:
    storage.write("masks.zarr/00001/cells/c/7", b"stale")
    parts = put(storage, "_attempts/00001/two", FILES)
    moves: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            original = getattr(os, name)

            def stepped(source: Any, target: Any, original: Any = original, **more: Any) -> None:
                moves.append(str(target))
                if len(moves) > move:
                    raise how
                original(source, target, **more)

            patch.setattr(os, name, stepped)
        if isinstance(how, Killed):  # nor does it clear up
            patch.setattr(shutil, "rmtree", lambda *args, **more: None)
        with contextlib.suppress(Killed, StorageError):
            storage.promote("_attempts/00001/two", parts)
    storage.promote("_attempts/00001/two", parts)
    assert storage.intact(parts)


def test_a_promotion_that_has_cleared_away_what_another_put_there_puts_it_back(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("masks.zarr/00001/cells/c/7", b"stale")
    parts = put(storage, "_attempts/00001/two", FILES)
    original = Path.is_dir

    def is_dir(path: Path, **more: Any) -> bool:
        found = original(path, **more)
        if path.name == "00001" and path.parent.name == "masks.zarr":
            monkeypatch.undo()
            storage.promote("_attempts/00001/two", parts)
        return found

    monkeypatch.setattr(Path, "is_dir", is_dir)
    storage.promote("_attempts/00001/two", parts)
    assert storage.intact(parts)
    assert storage.files("_attempts") == []
