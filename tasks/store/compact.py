"""Compact a finished run: the many Parquet parts of its predictions become few large ones, with the same rows.

What is in force is what the manifest lists. The merged files are written aside, held against the old ones row by row,
moved beside them, and come into force in the moment that the manifest is replaced; then the old ones are deleted. A
crash anywhere leaves a run that can be read, and the same command finishes the work.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import StorageError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.lock import held
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.records import FileRef, Marker, PartRef, RunManifest
from leukoflow.storage.base import Storage
from leukoflow.tasks.store.tables import (
    MERGED_STAGE,
    finished,
    is_merged,
    leftovers,
    merged_key,
    regroup,
    shard_name,
    span,
    stream,
)

FILE_BYTES = 256 << 20
ROW_GROUP = 65_536
_SHARDS_KEY = "leukoflow.shards"


@dataclass(frozen=True, slots=True)
class Compaction:
    """What compacting has done. `files_after` equals `files_before` where there was nothing to merge."""

    run_id: str
    root: str
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    removed: int  # files that were replaced, or left behind by an interrupted compaction


# --- pure ------------------------------------------------------------------------------------------------------------


def groups_of(parts: Sequence[PartRef], file_bytes: int = FILE_BYTES) -> list[list[PartRef]]:
    """Put parts in plan order into groups whose largest table stays within `file_bytes`; a larger part stands alone."""
    groups: list[list[PartRef]] = []
    sizes: dict[str, int] = {}
    for part in sorted(parts, key=lambda p: span(p).start):
        mine = {RunKey.top(key): size for key, size, _ in part.files}
        grown = {folder: sizes.get(folder, 0) + size for folder, size in mine.items()}
        if not groups or max(grown.values(), default=0) > file_bytes:
            groups.append([])
            grown = mine
        groups[-1].append(part)
        sizes = grown
    return groups


def merged_name(group: Sequence[PartRef]) -> str:
    """Return the name of a merged part: its first and its last shard."""
    return f"{shard_name(span(group[0]).start)}-{shard_name(span(group[-1]).stop - 1)}"


def _check_names(parts: Iterable[PartRef]) -> None:
    """Check that only tables are to be merged: each part one Parquet file per folder."""
    for part in parts:
        if any(key != RunKey.part(RunKey.top(key), part.shard) for key, _, _ in part.files):
            raise StorageError(
                f"part {part.shard} of stage {part.stage} holds other things than tables ({part.files[0][0]}, ...); "
                "compact the run with the version of leukoflow that made it"
            )


# --- a run -----------------------------------------------------------------------------------------------------------


def compact_run(
    root: str, file_bytes: int = FILE_BYTES, report: Callable[[int, int], None] = lambda done, total: None
) -> Compaction:
    """Merge the parts of a finished run's predictions and cells. Doing it again finishes what was cut off, or nothing.

    Raises StorageError where the run is not finished, somebody else is at it, or a part is not what was committed; the
    run is then as it was.
    """
    storage, _ = finished(root)
    with held(storage, RunKey.LOCK, "compacting"):
        storage, manifest = finished(root)
        storage.sweep_attempts("compact")
        old = [part for part in manifest.parts if part.stage == MERGED_STAGE]
        _check_names(old)
        groups = groups_of(old, file_bytes)
        new = manifest
        if len(groups) < len(old) and not any(map(is_merged, old)):  # all parts are merged at once, or none is
            new = _merge(storage, manifest, groups, report)
        stale = leftovers(storage, new)
        for key in stale:
            storage.delete(key)
    now = [part for part in new.parts if part.stage == MERGED_STAGE]
    return Compaction(
        run_id=manifest.run_id,
        root=storage.root,
        files_before=sum(len(part.files) for part in old),
        files_after=sum(len(part.files) for part in now),
        bytes_before=sum(size for part in old for _, size, _ in part.files),
        bytes_after=sum(size for part in now for _, size, _ in part.files),
        removed=len(stale),
    )


def _merge(
    storage: Storage, manifest: RunManifest, groups: Sequence[Sequence[PartRef]], report: Callable[[int, int], None]
) -> RunManifest:
    """Write the merged parts and bring them into force; return the manifest that lists them."""
    prefix = RunKey.new_attempt("compact")
    total = sum(size for group in groups for part in group for _, size, _ in part.files)
    done = 0
    report(0, total)
    try:
        merged: list[PartRef] = []
        for group in groups:
            name, files = merged_name(group), []
            for folder in dict.fromkeys(RunKey.top(key) for part in group for key, _, _ in part.files):
                sources = [file for part in group for file in part.files if RunKey.top(file[0]) == folder]
                key = RunKey.part(folder, name)
                _write(storage, f"{prefix}/{key}", sources, [part.shard for part in group])
                files.append(storage.child(prefix).digest(key))
                done += sum(size for _, size, _ in sources)
                report(done, total)
            key = merged_key(part.key for part in group)
            merged.append(PartRef(MERGED_STAGE, name, "compact", key, tuple(files)))
        for part in merged:
            storage.promote(prefix, part.files)
        if not all(storage.intact(part.files) for part in merged):
            raise StorageError(
                f"{storage.root}: the merged files could not be put in place; run the same command again"
            )
        new = replace(manifest, parts=_replaced(manifest.parts, merged))
        if read_manifest(storage) != manifest:
            raise StorageError(
                f"{storage.uri(RunKey.MANIFEST)} was changed by somebody else meanwhile; the run is as they left it: "
                "run the same command again"
            )
        storage.write(RunKey.MANIFEST, dumps(new))
        return new
    finally:
        storage.sweep_attempts("compact")


def _replaced(parts: Sequence[PartRef], merged: Sequence[PartRef]) -> tuple[PartRef, ...]:
    """Return the parts of a manifest with the merged ones, in the order of the shards they begin with."""
    kept = [part for part in parts if part.stage != MERGED_STAGE]
    order = {stage: i for i, stage in enumerate(dict.fromkeys(part.stage for part in parts))}
    return tuple(sorted([*kept, *merged], key=lambda part: (span(part).start, order[part.stage])))


def _marker(storage: Storage, ordinal: int) -> Marker:
    key = RunKey.marker(MERGED_STAGE, shard_name(ordinal))
    try:
        return loads(Marker, storage.read(key), storage.uri(key))
    except FileNotFoundError:
        raise StorageError(f"{storage.uri(key)} is missing; `leukoflow verify` says what to do") from None


def _write(storage: Storage, key: str, sources: Sequence[FileRef], shards: Sequence[str]) -> None:
    """Write one merged file: each source is held against its digest before its rows are taken, and they against these.

    The rows of each shard are counted in the file's metadata, so that the file can be taken apart again.
    """
    counts: list[tuple[str, int]] = []
    with storage.writer(key) as sink:
        with pq.ParquetWriter(
            sink, _read(storage, sources[0]).schema, compression="zstd", use_dictionary=False
        ) as writer:
            waiting: list[pa.Table] = []
            for file, shard in zip(sources, shards, strict=True):
                table = _read(storage, file)
                if not table.schema.equals(writer.schema):
                    raise StorageError(
                        f"{storage.uri(file[0])} has other columns than the parts before it; nothing was changed"
                    )
                counts.append((shard, len(table)))
                waiting.append(table)
                while sum(map(len, waiting)) >= ROW_GROUP:
                    whole = pa.concat_tables(waiting)
                    writer.write_table(whole.slice(0, ROW_GROUP).combine_chunks())
                    waiting = [whole.slice(ROW_GROUP)]
            rest = pa.concat_tables(waiting)
            if len(rest) or not sum(n for _, n in counts):
                writer.write_table(rest.combine_chunks())
            writer.add_key_value_metadata({_SHARDS_KEY: json.dumps(counts)})
        sink.flush()
        if storage.is_local:  # the old parts are deleted soon, so the new ones must outlive a power cut
            os.fsync(sink.fileno())
    for file, again in zip(sources, regroup(stream(storage, [key]), (n for _, n in counts)), strict=True):
        table = _read(storage, file)
        if not (again.equals(table) if again is not None else len(table) == 0):
            raise StorageError(f"{storage.uri(key)} does not have the rows of {file[0]}; nothing was changed")


def _read(storage: Storage, file: FileRef) -> pa.Table:
    """Read a part, whose bytes must be what was committed."""
    key, size, sha256 = file
    try:
        data = storage.read(key)
    except FileNotFoundError:
        data = b""
    if (len(data), hashlib.sha256(data).hexdigest()) != (size, sha256):
        raise StorageError(
            f"{storage.uri(key)} is not what was committed; nothing was changed. `leukoflow verify` says what to do"
        )
    return pq.ParquetFile(io.BytesIO(data)).read()


def shard_counts_of(metadata: pq.FileMetaData) -> list[tuple[int, int]] | None:
    """Return ordinal and number of rows of the shards in a merged file, in order; None for a shard's own file."""
    stored = (metadata.metadata or {}).get(_SHARDS_KEY.encode())
    return None if stored is None else [(int(shard), int(n)) for shard, n in json.loads(stored)]


# --- and back --------------------------------------------------------------------------------------------------------


def expand_run(storage: Storage, manifest: RunManifest) -> None:
    """Take merged parts apart into those of the shards, for a run that is about to be repaired.

    A shard's rows are put back only where its file comes out with the very bytes that its marker names. The others are
    done again when the run is repaired, from the features that are stored.
    """
    prefix = RunKey.new_attempt("expand")
    for part in manifest.parts:
        if not is_merged(part):
            continue
        if storage.intact(part.files):
            for file in part.files:
                _take_apart(storage, file, part, prefix)
        for key, _, _ in part.files:
            storage.delete(key)
    storage.delete(prefix)


def _as_written(schema: pa.Schema) -> pa.Schema:
    """Return the schema with which a stage wrote its part: Parquet names entries of lists otherwise than Arrow does."""
    types = [pa.list_(f.type.value_type) if pa.types.is_list(f.type) else f.type for f in schema]
    return pa.schema([pa.field(f.name, t, f.nullable) for f, t in zip(schema, types, strict=True)])


def _take_apart(storage: Storage, file: FileRef, part: PartRef, prefix: str) -> None:
    with storage.open(file[0]) as source:
        stored = (pq.read_metadata(source).metadata or {}).get(_SHARDS_KEY.encode(), b"[]")
    counts = [(str(s), int(n)) for s, n in json.loads(stored)]
    wanted = [(RunKey.part(RunKey.top(file[0]), shard), n) for shard, n in counts]
    with storage.open(file[0]) as source:
        schema = _as_written(pq.read_schema(source))
    pieces = regroup(stream(storage, [file[0]]), (n for _, n in wanted))
    for ordinal, (key, _), piece in zip(span(part), wanted, pieces, strict=True):
        table = schema.empty_table() if piece is None else piece.cast(schema).combine_chunks()
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", use_dictionary=False, store_schema=True)
        try:
            committed = _marker(storage, ordinal).part.files
        except StorageError:
            continue
        if (key, len(sink.getvalue()), hashlib.sha256(sink.getvalue()).hexdigest()) in committed:
            storage.write(f"{prefix}/{key}", sink.getvalue())
            storage.promote(prefix, [f for f in committed if f[0] == key])
