"""An attempt at a shard, as files written aside: for the tests of storage."""

from __future__ import annotations

from leukoflow.storage.base import Storage


def put(storage: Storage, attempt: str, files: dict[str, bytes]) -> tuple[tuple[str, int, str], ...]:
    for key, data in files.items():
        storage.write(f"{attempt}/{key}", data)
    return tuple(storage.child(attempt).digest(key) for key in files)


FILES = {
    "masks.zarr/00001/zarr.json": b"{}",
    "masks.zarr/00001/cells/c/0": b"x" * 99,
    "fields/part-00001.parquet": b"p",
}
