"""Read the tables of a finished run in plan order and piece by piece, whether its parts are merged or not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leukoflow.core.errors import StorageError, words_of
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.records import CLASSES, PartRef, RunManifest, Shard, Status
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage

BATCH_ROWS = 8192
THREADS = 4
_WINDOW = 256

MERGED_STAGE = Stage.PREDICTIONS
"""The stage whose parts are merged by compacting; they are Parquet and nothing else."""

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TableFile:
    """One Parquet file of a table, and the ordinals of the shards whose rows it holds."""

    key: str
    shards: range


def shard_name(ordinal: int) -> str:
    """Return the name of a shard in file names and markers."""
    return Shard(ordinal, 0, 0).name


def span(part: PartRef) -> range:
    """Return the ordinals of the shards that a part holds: one, or as many as were merged (`00000-00063`)."""
    first, _, last = part.shard.partition("-")
    try:
        return range(int(first), int(last or first) + 1)
    except ValueError:
        raise StorageError(
            f"manifest.json is damaged: it names a part {part.shard!r}; delete it and repeat the run's command"
        ) from None


def is_merged(part: PartRef) -> bool:
    """Say whether compacting wrote this part."""
    return "-" in part.shard


def merged_key(keys: Iterable[str]) -> str:
    """Return the content address of a merged part: those of its shards' parts, in order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def shard_counts(manifest: RunManifest) -> list[int]:
    """Return the number of members of every shard."""
    size, members = manifest.shard_size, manifest.members
    return [min(size, members - first) for first in range(0, members, size)]


def leftovers(storage: Storage, manifest: RunManifest) -> list[str]:
    """List the files that an interrupted compaction wrote or replaced, and which the manifest does not list.

    These are merged files that never came into force, or the shards' own files after merged ones have.
    """
    known = {key for part in manifest.parts for key, _, _ in part.files}
    folders = sorted({RunKey.top(key) for p in manifest.parts if p.stage == MERGED_STAGE for key, _, _ in p.files})
    compacted = any(is_merged(part) for part in manifest.parts)
    found = []
    for folder in folders:
        for name in storage.names(folder):
            shard = RunKey.shard_of_part(name)
            if shard and f"{folder}/{name}" not in known and ("-" in shard or compacted):
                found.append(f"{folder}/{name}")
    return found


def table_files(parts: Iterable[PartRef], folder: str) -> tuple[TableFile, ...]:
    """List the files of one table (`predictions`, `cells`, `fields`) in plan order."""
    found = [
        TableFile(key, span(part))
        for part in parts
        for key, _, _ in part.files
        if key.startswith(f"{folder}/") and key.endswith(".parquet")
    ]
    return tuple(sorted(found, key=lambda file: file.shards.start))


def stream(storage: Storage, keys: Iterable[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the rows of Parquet files, one after the other, a bounded number at a time.

    Raises StorageError naming the file that is gone or cannot be read.
    """
    for key in keys:
        try:
            with storage.open(key) as file:
                reader = pq.ParquetFile(file)
                for batch in reader.iter_batches(BATCH_ROWS, columns=list(columns) if columns else None):
                    yield pa.Table.from_batches([batch])
        except FileNotFoundError:
            raise StorageError(
                f"{storage.uri(key)} is gone; if the run was compacted just now, run the same command again, "
                "else `leukoflow verify` tells what is left"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise StorageError(
                f"{storage.uri(key)} cannot be read ({words_of(error)}); `leukoflow verify` says what to do"
            ) from None


def regroup(tables: Iterable[pa.Table], counts: Iterable[int]) -> Iterator[pa.Table | None]:
    """Cut a stream of rows into tables of so many rows each; the last ones are short where rows are wanting.

    An empty group is None when no row has been seen at all, since then there is no schema.
    """
    source = iter(tables)
    held: pa.Table | None = None
    for count in counts:
        while held is None or len(held) < count:
            more = next(source, None)
            if more is None:
                break
            held = more if held is None else pa.concat_tables([held, more])
        if held is None:
            yield None
            continue
        yield held.slice(0, count)
        held = held.slice(count)


def in_order(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Map in a few threads, in order, with a bounded number of items on their way."""
    source = iter(items)
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        while window := list(islice(source, _WINDOW)):
            yield from pool.map(function, window)


def check_intent(storage: Storage) -> None:
    """Raise StorageError where erasing or correcting a patient was cut off: what is there is half old, half new."""
    if storage.exists(RunKey.INTENT):
        out = storage.root.rpartition("/")[0]
        raise StorageError(
            f"{storage.root}: erasing or correcting a patient is under way or was cut off; finish it with the same "
            f"command (any `leukoflow erase {out} ...` or `leukoflow correct {out} ...` does)"
        )


def finished(root: str) -> tuple[Storage, RunManifest]:
    """Open a finished run. Raises StorageError where there is no run, or one that is not finished."""
    storage = open_storage(root)
    check_intent(storage)
    manifest = read_manifest(storage)
    if manifest is not None:
        if manifest.shard_size < 1 or manifest.members < 0:
            raise StorageError(
                f"{storage.uri(RunKey.MANIFEST)} is damaged; delete it and repeat the run's command, which "
                "publishes it again"
            )
        return storage, manifest
    out, _, run_id = root.rstrip("/").rpartition("/")
    if storage.exists(RunKey.BINDING):
        raise StorageError(
            f"run {run_id} is not finished (it has no manifest.json); `leukoflow status {out or '.'} {run_id}` tells "
            "how far it is and how to finish it"
        )
    raise StorageError(f"{root} holds no run; list the runs with `leukoflow status {out or '.'}`")


def answered_labels(storage: Storage, keys: Iterable[str]) -> tuple[int, int, int, int]:
    """Count the labels of the predicted rows of some files of `predictions/`, in the order of CLASSES.

    For runs of schema 1, whose manifests and receipts count the labels of abstained rows as well.
    """
    counts = dict.fromkeys(CLASSES, 0)
    for rows in stream(storage, keys, ["status", "label"]):
        predicted = rows.filter(pc.field("status") == str(Status.PREDICTED))
        for entry in pc.value_counts(predicted["label"].combine_chunks()).to_pylist():
            counts[entry["values"]] += entry["counts"]
    return counts["Benign"], counts["Early"], counts["Pre"], counts["Pro"]
