from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from leukoflow.core.errors import StorageError
from leukoflow.storage.base import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def put(storage: Storage, attempt: str, files: dict[str, bytes]) -> tuple[tuple[str, int, str], ...]:
    for key, data in files.items():
        storage.write(f"{attempt}/{key}", data)
    return tuple(storage.child(attempt).digest(key) for key in files)


FILES = {
    "masks.zarr/00001/zarr.json": b"{}",
    "masks.zarr/00001/cells/c/0": b"x" * 99,
    "fields/part-00001.parquet": b"p",
}


def test_other_schemes_are_refused() -> None:
    with pytest.raises(StorageError, match="only local folders and s3://"):
        Storage("gs://bucket/x")


def test_it_travels_as_its_uri(storage: Storage) -> None:
    assert pickle.loads(pickle.dumps(storage)).root == storage.root
    assert Storage("s3://lab/out/").child("a").uri("b") == "s3://lab/out/a/b"


def test_writes_replace_whole(storage: Storage) -> None:
    storage.write("a/b.json", b"one")
    storage.write("a/b.json", b"two")
    assert storage.read("a/b.json") == b"two"
    assert storage.names("a") == ["b.json"]
    assert os.listdir(storage.uri("a")) == ["b.json"]  # no scratch stays
    with pytest.raises(FileNotFoundError):
        storage.read("a/c.json")


def test_of_many_creators_one_wins(storage: Storage) -> None:
    gate = threading.Barrier(8)

    def create(i: int) -> bool:
        gate.wait()
        return storage.create("markers/x.json", str(i).encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read("markers/x.json") == str(won.index(True)).encode()
    assert os.listdir(storage.uri("markers")) == ["x.json"]


def test_what_cannot_be_written_is_named(storage: Storage) -> None:
    storage.write("a/b/c", b"x")
    with pytest.raises(StorageError, match=r"cannot write .*/a/b: Is a directory"):
        storage.write("a/b", b"x")
    assert os.listdir(storage.uri("a")) == ["b"]


def test_delete_takes_files_folders_and_nothing(storage: Storage) -> None:
    storage.write("a/b", b"1")
    storage.write("a/c/d", b"2")
    storage.delete("a/b")
    assert storage.files("") == ["a/c/d"]
    storage.delete("a")
    storage.delete("a")
    assert storage.files("") == []
    assert storage.names("nowhere") == []


def test_promotion_moves_units_and_may_be_repeated(storage: Storage) -> None:
    parts = put(storage, "_attempts/00001/one", FILES)
    assert not storage.intact(parts)
    storage.promote("_attempts/00001/one", parts)
    storage.promote("_attempts/00001/one", parts)
    assert storage.intact(parts)
    assert set(storage.files("")) == set(FILES)


def test_promotion_clears_what_is_in_the_way(storage: Storage) -> None:
    storage.write("masks.zarr/00001/cells/c/7", b"stale")
    storage.write("fields/part-00001.parquet", b"stale")
    parts = put(storage, "_attempts/00001/two", FILES)
    storage.promote("_attempts/00001/two", parts)
    assert storage.intact(parts)
    assert set(storage.files("")) == set(FILES)


def test_promotion_interrupted_between_units_is_completed(storage: Storage) -> None:
    parts = put(storage, "_attempts/00001/one", FILES)
    storage.promote("_attempts/00001/one", parts[:2])
    assert not storage.intact(parts)
    storage.promote("_attempts/00001/one", parts)
    assert storage.intact(parts)


def test_promotions_at_once_lose_nothing(storage: Storage) -> None:
    """Whoever retries a shard completes its commit, also while the first one is still about it."""
    for n in range(30):
        files = {f"masks.zarr/{n:05d}/zarr.json": b"{}", f"masks.zarr/{n:05d}/c/0": b"x"}
        parts = put(storage, f"_attempts/{n:05d}/one", files)
        gate = threading.Barrier(3)

        def promote(
            n: int = n, parts: tuple[tuple[str, int, str], ...] = parts, gate: threading.Barrier = gate
        ) -> None:
            gate.wait()
            storage.promote(f"_attempts/{n:05d}/one", parts)

        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(promote) for _ in range(3)]:
                done.result()
        assert storage.intact(parts)


@pytest.mark.parametrize("harm", ["gone", "shorter", "other", "folder"])
def test_intact_sees_every_harm(storage: Storage, harm: str) -> None:
    storage.write("a/b", b"abc")
    files = (storage.digest("a/b"),)
    assert storage.intact(files)
    storage.delete("a/b")
    if harm == "shorter":
        storage.write("a/b", b"ab")
    elif harm == "other":
        storage.write("a/b", b"abd")
    elif harm == "folder":
        storage.write("a/b/c", b"abc")
    assert not storage.intact(files)


def test_adopted_files_share_no_fate(storage: Storage, tmp_path: Path) -> None:
    other = Storage(str(tmp_path / "other"))
    storage.write("features.zarr/00000/c/0", b"abc")
    parts = (storage.digest("features.zarr/00000/c/0"),)
    other.adopt(storage, parts, "_attempts/00000/x")
    other.promote("_attempts/00000/x", parts)
    assert other.intact(parts)
    storage.delete("features.zarr")
    assert other.intact(parts)


def test_a_stamp_tells_a_new_file_from_the_old(storage: Storage) -> None:
    storage.write("plan.parquet", b"one")
    before = storage.stamp("plan.parquet")
    assert storage.stamp("plan.parquet") == before
    storage.write("plan.parquet", b"two")
    assert storage.stamp("plan.parquet") != before
    with pytest.raises(FileNotFoundError):
        storage.stamp("absent")


def test_empty_folders_are_pruned_and_others_stay(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
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
