"""The new files of one run that is changed: tables, Zarr groups, plan, slides, verdicts, markers and manifest.

They are written below a prefix and are not in force yet; `tasks/upkeep/amend.py` brings them into force.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import StorageError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import read_binding
from leukoflow.runs.records import FileRef, Marker, PartRef, RunManifest
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.plan_file import rewrite_plan
from leukoflow.tasks.publish.ranking import find_conflicts, rank_slides
from leukoflow.tasks.review.verdict_record import Target, slide_target
from leukoflow.tasks.review.verdicts import without
from leukoflow.tasks.store.slides import slide_of
from leukoflow.tasks.store.tables import MERGED_STAGE, is_merged, merged_key, shard_name, span, stream, table_files
from leukoflow.tasks.upkeep.amendment import Amendment, Intent, blank_cells, rows_of


class Draft:
    """The new files of one run, below a prefix."""

    def __init__(self, run: Storage, manifest: RunManifest, prefix: str, amendment: Amendment) -> None:
        self.run, self.manifest, self.prefix, self.amendment = run, manifest, prefix, amendment
        self.conflicts = manifest.conflicts
        self.parts: dict[str, FileRef] = {}
        self.books: dict[str, FileRef] = {}
        self.stale: list[str] = []
        self.shards: set[int] = set()  # those with an image that is concerned
        self.keys: list[str] = []
        self.targets: set[Target] = set()  # fields and slides of which verdicts may speak
        self.places: dict[int, list[tuple[int, int]]] = {}  # of shards: first and last tile of each image

    def write(self) -> Intent:
        """Write all of them. Raises StorageError where something is not what was committed."""
        self._find()
        files = {f[0]: f for part in self.manifest.parts for f in part.files} | {f[0]: f for f in self.manifest.tables}
        changes: list[tuple[str, Callable[[pa.Table], pa.Table]]] = [("predictions", self.amendment.changed)]
        if self.amendment.blanks:
            changes.append(("cells", lambda t: blank_cells(t, self.keys)))
        for folder, change in changes:
            for table in table_files(self.manifest.parts, folder):
                if self.shards.intersection(table.shards):
                    self._check(files[table.key])
                    self._table(table.key, change)
                    self.parts[table.key] = self._digest(table.key)
        for part in self.manifest.parts if self.amendment.blanks else ():
            if not is_merged(part) and int(part.shard) in self.shards:
                self._groups(part)
        self._plan(files)
        for name in (RunKey.MISSING, RunKey.DUPLICATES) if self.amendment.blanks else (RunKey.MISSING,):
            if name in files:
                self._check(files[name])
                self._table(name, self.amendment.changed)
                self.books[name] = self._digest(name)
        self._slides()
        if not self.amendment.blanks:
            self._duplicates(files)
        self._verdicts()  # late: anyone who gave a verdict while the lock was taken has finished by now
        self._markers_and_manifest()
        return Intent(
            self.amendment.done, self.prefix, tuple(self.parts.values()), tuple(self.books.values()), tuple(self.stale)
        )

    def _find(self) -> None:
        columns = ["image_key", "patient_id", "slide_id", "shard", "zarr_index", "n_tiles"]
        keys = (f.key for f in table_files(self.manifest.parts, RunKey.PREDICTIONS))
        for piece in stream(self.run, keys, columns):
            for row in piece.filter(self.amendment.concerned(piece)).to_pylist():
                ordinal = int(row["shard"])
                self.shards.add(ordinal)
                self.keys.append(row["image_key"])
                grouping, slide = slide_of(row["slide_id"], row["image_key"])
                self.targets |= {("image", row["image_key"]), slide_target(grouping, slide)}
                if row["zarr_index"] is not None:
                    place = row["zarr_index"], row["zarr_index"] + row["n_tiles"]
                    self.places.setdefault(ordinal, []).append(place)

    def _check(self, file: FileRef) -> None:
        if not self.run.intact([file]):
            raise StorageError(
                f"{self.run.uri(file[0])} is not what was committed, and nothing was changed in this run; `leukoflow "
                "verify` says what to do, then run the same command again"
            )

    def _digest(self, key: str) -> FileRef:
        return self.run.child(self.prefix).digest(key)

    def _put(self, key: str, data: bytes) -> None:
        self.run.write(f"{self.prefix}/{key}", data)
        self.books[key] = self._digest(key)

    def _table(self, key: str, change: Callable[[pa.Table], pa.Table]) -> None:
        """Write a table with the same row groups and metadata, its rows changed."""
        with self.run.open(key) as source, self.run.writer(f"{self.prefix}/{key}") as sink:
            reader = pq.ParquetFile(source)
            schema = reader.schema_arrow
            with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False) as writer:
                for i in range(reader.num_row_groups):
                    writer.write_table(change(reader.read_row_group(i)).combine_chunks())

    def _groups(self, part: PartRef) -> None:
        """Copy a shard's Zarr groups and blank the tiles and cells that are concerned in them."""
        stored = [f for f in part.files if RunKey.is_store(RunKey.top(f[0]))]
        for top in dict.fromkeys(RunKey.top(f[0]) for f in stored):
            mine = [f for f in stored if f[0].startswith(f"{top}/")]
            for file in mine:
                self._check(file)
                self.run.write(f"{self.prefix}/{file[0]}", self.run.read(file[0]))
            root = RunKey.group(top, part.shard)
            self._blank(top, root, self._offsets(part.shard), self.places.get(int(part.shard), []))
            fresh = []
            for key, _, _ in mine:
                with suppress(FileNotFoundError):  # a chunk that holds nothing but zeros by now is not stored
                    fresh.append(self._digest(key))
            self.parts |= {f[0]: f for f in fresh}
            self.stale += sorted({f[0] for f in mine} - {f[0] for f in fresh})

    def _offsets(self, shard: str) -> NDArray[np.int64]:
        group: Any = zarr.open_group(self.run.zarr(RunKey.group(RunKey.MASKS, shard), read_only=True), mode="r")
        return np.asarray(group["cell_offsets"][:], np.int64)

    def _blank(self, top: str, root: str, offsets: NDArray[np.int64], places: Iterable[tuple[int, int]]) -> None:
        group = zarr.open_group(self.run.zarr(f"{self.prefix}/{root}"), mode="r+")
        for name, array in _arrays(group):
            kind = rows_of(top, name, array.shape[0], len(offsets) - 1, int(offsets[-1]))
            for first, last in places:
                rows = (first, last) if kind == "tiles" else (int(offsets[first]), int(offsets[last]))
                if kind is not None and rows[1] > rows[0]:
                    array[rows[0] : rows[1]] = 0

    def _plan(self, files: dict[str, FileRef]) -> None:
        self._check(files[RunKey.PLAN])
        sink = io.BytesIO()
        with self.run.open(RunKey.PLAN) as source:
            rewrite_plan(source, sink, self.amendment.changed)
        self._put(RunKey.PLAN, sink.getvalue())

    def _slides(self) -> None:
        self._summary(RunKey.SLIDES, rank_slides(row for piece in self._rows() for row in piece.to_pylist()))

    def _rows(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the predictions as they will be."""
        keys = [f.key for f in table_files(self.manifest.parts, RunKey.PREDICTIONS)]
        return stream(self.run, (f"{self.prefix}/{key}" if key in self.parts else key for key in keys), columns)

    def _summary(self, key: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", use_dictionary=False)
        self._put(key, sink.getvalue())

    def _duplicates(self, files: dict[str, FileRef]) -> None:
        """List which images are now found under more than one patient; there may be more of them, fewer, or none."""
        found = find_conflicts(self._rows)
        self.conflicts = len(found)
        if len(found):
            self._summary(RunKey.DUPLICATES, found)
        elif RunKey.DUPLICATES in files:
            self.stale.append(RunKey.DUPLICATES)

    def _verdicts(self) -> None:
        """Remove what people said of the images, and of slides that they are on: it goes with the patient."""
        for key, data in without(self.run, self.targets) if self.amendment.blanks else ():
            self._put(key, data)

    def _markers_and_manifest(self) -> None:
        """Write the books, with the digests of what was written; changed parts get keys that nothing else has."""
        renewed: dict[str, str] = {}
        parts = []
        for part in self.manifest.parts:
            unchanged = not self.amendment.blanks and part.stage != MERGED_STAGE
            if unchanged or not self.shards.intersection(span(part)):
                parts.append(part)
                continue
            keys = []
            for ordinal in span(part):
                place = RunKey.marker(part.stage, shard_name(ordinal))
                marker = loads(Marker, self.run.read(place), self.run.uri(place))
                if ordinal in self.shards:
                    files = marker.part.files if is_merged(part) else self._files(part)
                    mine = replace(marker.part, key=self.amendment.key(marker.part.key), files=files)
                    marker = replace(marker, part=mine)
                    self._put(place, dumps(marker))
                renewed[place] = marker.part.key
                keys.append(marker.part.key)
            key = merged_key(keys) if is_merged(part) else keys[0]
            parts.append(replace(part, key=key, files=self._files(part)))
        listed = list(dict.fromkeys([*(key for key, _, _ in self.manifest.tables), *self.books]))
        known = {f[0]: f for f in self.manifest.tables} | self.books
        summaries = [key for key in listed if key.endswith(".parquet") and "/" not in key and key not in self.stale]
        tables = tuple(known[key] for key in summaries)
        binding = read_binding(self.run)
        self._put(RunKey.BINDING, dumps(replace(binding, plan_sha256=self.books[RunKey.PLAN][2])))
        self._put(
            RunKey.MANIFEST, dumps(replace(self.manifest, parts=tuple(parts), tables=tables, conflicts=self.conflicts))
        )

    def _files(self, part: PartRef) -> tuple[FileRef, ...]:
        """Return a part's files: the new ones where there are such, the others as they were."""
        gone = set(self.stale)
        groups = {"/".join(key.split("/")[:2]) + "/" for key, _, _ in part.files if RunKey.is_store(RunKey.top(key))}
        found = {f[0]: self.parts.get(f[0], f) for f in part.files if f[0] not in gone}
        found |= {key: f for key, f in self.parts.items() if any(key.startswith(g) for g in groups)}
        return tuple(found.values())


def _arrays(group: zarr.Group) -> Iterator[tuple[str, Any]]:
    for name, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            yield name, member
