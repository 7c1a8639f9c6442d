"""Changing what the finished runs of an output folder say of a patient: erasing one, correcting one.

All of a run's new files are written aside first; then a note of intent is left, with which a change that was cut off
can be finished by the same command, and the files come into force, the manifest last. `tasks/upkeep/erase.py` and
`tasks/upkeep/correct.py` say what changes.
"""

from __future__ import annotations

import hashlib
import io
import re
import secrets
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import ConfigError, LeukoflowError, StorageError, words_of
from leukoflow.runs.lock import held
from leukoflow.runs.progress import RunBinding, list_runs, read_manifest, read_state
from leukoflow.runs.records import Marker, PartRef, RunManifest
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.patient_key import PATIENT_KEY, check_value, pseudonyms
from leukoflow.tasks.intake.plan import rewrite_plan
from leukoflow.tasks.publish.publish import find_conflicts, rank_slides
from leukoflow.tasks.review.verdicts import Target, slide_target, without
from leukoflow.tasks.store.compact import LOCK as COMPACT_LOCK
from leukoflow.tasks.store.slides import slide_of
from leukoflow.tasks.store.tables import (
    INTENT,
    MERGED_STAGE,
    is_merged,
    merged_key,
    shard_name,
    span,
    stream,
    table_files,
)
from leukoflow.tasks.upkeep.audit import LOCK, append

FileRef = tuple[str, int, str]
_PSEUDONYM = re.compile(r"p_[0-9a-f]{32}")
_KEPT_CELL_COLUMNS = ("run_id", "image_key", "cell_id", "zarr_index")
_ROWS_ARE = {
    ("masks.zarr", "semantic"): "tiles",
    ("masks.zarr", "cells"): "tiles",
    ("masks.zarr", "cell_table"): "cells",
    ("features.zarr", "hybrid"): "tiles",
    ("features.zarr", "cells"): "cells",
    ("activations.zarr", "maps"): "cells",
}
_GEOMETRY = ("to_source", "cell_offsets")
"""Arrays that say where things lie, and nothing of the image."""


@dataclass(frozen=True, slots=True)
class Intent:
    """`amend.json`: what was written aside and is to come into force."""

    done: str  # the word for the audit log when it is: `erased`, `corrected`
    prefix: str
    parts: tuple[FileRef, ...]
    books: tuple[FileRef, ...]  # tables, markers, run.json; the manifest is the last
    stale: tuple[str, ...]  # files that have no successor


@dataclass(frozen=True, slots=True)
class Amended:
    """What a change does, or has done, to one run."""

    run_id: str
    images: int
    missing: int  # rows of missing.parquet
    files: int  # rewritten
    manifest_before: str
    manifest_after: str | None  # None when nothing was changed


class Amendment(ABC):
    """What changes of the images that are concerned, and which these are."""

    doing: str
    """Word for the audit log before a run is changed, and in its lock: `erase`, `correct`."""
    done: str
    """Word for the audit log afterwards."""
    blanks = False
    """Whether the images' cells, masks, features and activation maps become zeros."""

    @abstractmethod
    def concerned(self, table: pa.Table) -> pa.ChunkedArray:
        """Which rows are concerned, of a table that has `patient_id` and `slide_id`."""

    @abstractmethod
    def changed(self, table: pa.Table) -> pa.Table:
        """The same rows of a table that has `patient_id`; those that are concerned changed."""

    @abstractmethod
    def key(self, key: str) -> str:
        """Content address of a part that was changed, given that of the part before."""

    @abstractmethod
    def details(self) -> dict[str, str]:
        """What the audit log tells of it; neither patients nor slides by name."""


def salted(name: str) -> str:
    """A salt, and the SHA-256 of salt and name: whoever knows the name can find it in the log, nobody else."""
    salt = secrets.token_hex(8)
    return f"{salt}:{hashlib.sha256((salt + name).encode()).hexdigest()}"


# --- pure ------------------------------------------------------------------------------------------------------------


def blank_cells(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """The same rows of `cells/`; those of the images say nothing but that there was a cell."""
    theirs = pc.is_in(table["image_key"], pa.array(keys, pa.string()))
    for i, field in enumerate(table.schema):
        if field.name not in _KEPT_CELL_COLUMNS:
            nothing = pa.scalar(False if pa.types.is_boolean(field.type) else 0, field.type)
            table = table.set_column(i, field, pc.if_else(theirs, nothing, table[field.name]))
    return table


def rows_of(top: str, name: str, length: int, tiles: int, cells: int) -> str | None:
    """Whether an array's rows are tiles or cells; None where they say nothing of an image. Raises StorageError."""
    if name in _GEOMETRY or name.endswith("_offsets"):
        return None
    if known := _ROWS_ARE.get((top, name)):
        return known
    if (length == tiles) != (length == cells):
        return "tiles" if length == tiles else "cells"
    raise StorageError(
        f"{top}: it is not known what the rows of the array {name} are, so the patient cannot be erased from them; "
        "erase with the version of leukoflow that made the run"
    )


# --- an output folder ------------------------------------------------------------------------------------------------


def patient_names(patient: str, key: bytes | None) -> tuple[str, ...]:
    """The pseudonyms of a patient, who is given as such or as in the manifest. Raises ConfigError without the key.

    There are two where blanks were typed around the id: runs of older versions took them for a part of it.
    """
    if _PSEUDONYM.fullmatch(patient):
        return (patient,)
    if not key:
        raise ConfigError(
            f"patients are known by pseudonyms here, and there is no key to find this one's: set {PATIENT_KEY} "
            "to the key of those runs, or give the pseudonym (p_...) itself"
        )
    return pseudonyms(patient, key)


def patient_name(patient: str, key: bytes | None) -> str:
    """The pseudonym of a patient, who is given as such or as in the manifest. Raises ConfigError without the key."""
    return patient_names(patient, key)[0]


def runs_of_other_keys(out: str, patient: str, key: bytes | None, runs: Sequence[str] | None = None) -> tuple[str, ...]:
    """Runs (by default all) whose patients have pseudonyms by another key, so that this patient is not found there.

    Empty where the patient is given as a pseudonym. Runs of older versions do not say what key they were made with.
    Raises ConfigError where every run that says it says another one.
    """
    if key is None or _PSEUDONYM.fullmatch(patient):
        return ()
    storage, checks = Storage(out), {}
    for name in list_runs(out) if runs is None else runs:
        if storage.exists(f"{name}/run.json"):
            run = storage.child(name)
            checks[name] = loads(RunBinding, run.read("run.json"), run.uri("run.json")).patient_key_check
    others = tuple(name for name, check in checks.items() if check not in ("", check_value(key)))
    if others and not any(check == check_value(key) for check in checks.values()):
        raise ConfigError(
            f"{PATIENT_KEY} holds another key than the one that made the pseudonyms of {_named(others)}, so nobody "
            "would be found there: set it to the key of those runs, or give the pseudonym (p_...) itself"
        )
    return others


def other_keys_in_words(others: Sequence[str]) -> str:
    """What is to be done about runs in which a patient could not be looked for."""
    return (
        f"not looked for in {_named(others)}: made with another patient key. Set {PATIENT_KEY} to that one, and give "
        "the same command again"
    )


def _named(runs: Sequence[str]) -> str:
    more = f" and {len(runs) - 3} more runs" if len(runs) > 3 else ""
    return ", ".join(runs[:3]) + more


def amend_runs(out: str, amendment: Amendment, dry_run: bool = False, key: bytes | None = None) -> tuple[Amended, ...]:
    """Changes all runs of an output folder; returns what was done to those that are concerned.

    `key` is the one that made the pseudonyms of the amendment, where that is known. Raises StorageError before anything
    is changed where a run that may be concerned is not finished or damaged, ConfigError where one has another key.
    """
    check = check_value(key) if key else ""
    storage = Storage(out)
    names = list_runs(out)
    if not names:
        raise ConfigError(
            f"{out} holds no run; {amendment.doing} needs the folder or prefix that was given to `run --out`"
        )
    if dry_run:
        return tuple(e for e in (_look(storage.child(n), n, amendment, check) for n in names) if e is not None)
    with held(storage, LOCK, amendment.doing):
        for name in names:
            run = storage.child(name)
            if run.exists(INTENT):
                done = loads(Intent, run.read(INTENT), run.uri(INTENT)).done
                _apply(run)
                after = _sha256(run.read("manifest.json"))
                append(storage, done, name, after, {"why": "a change that was cut off is finished"})
            run.sweep_attempts("amend")
        found = [e for e in (_look(storage.child(n), n, amendment, check) for n in names) if e is not None]
        changed = []
        for amended in found:
            details = {**amendment.details(), "images": str(amended.images)}
            run = storage.child(amended.run_id)
            with held(run, COMPACT_LOCK, amendment.doing):
                append(storage, amendment.doing, amended.run_id, amended.manifest_before, details)
                files = _amend(run, amendment)
                after = _sha256(run.read("manifest.json"))
                append(storage, amendment.done, amended.run_id, after, details)
            changed.append(replace(amended, files=files, manifest_after=after))
        return tuple(changed)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _look(run: Storage, name: str, amendment: Amendment, check: str) -> Amended | None:
    """How a run is concerned; None for nothing. Raises StorageError where that cannot be told or mended."""
    try:
        state = read_state(run.root)
        with run.open("plan.parquet") as file:
            images = _count(pq.ParquetFile(file), amendment)
        missing = 0
        if run.exists("missing.parquet"):
            with run.open("missing.parquet") as file:
                missing = _count(pq.ParquetFile(file), amendment)
        theirs = loads(RunBinding, run.read("run.json"), run.uri("run.json")).patient_key_check
    except (LeukoflowError, OSError, pa.ArrowException) as error:
        raise StorageError(
            f"run {name}: whether it knows the patient cannot be told ({words_of(error)}); mend or delete it first. "
            "Nothing was changed"
        ) from None
    if not images and not missing:
        return None
    if check and theirs not in ("", check):
        raise ConfigError(
            f"run {name} is concerned, and its pseudonyms were made with another patient key: set {PATIENT_KEY} to "
            "that one, or give pseudonyms (p_...). Nothing was changed"
        )
    if state.state != "finished":
        raise StorageError(
            f"run {name} knows the patient and is not finished ({state.state}): give its command "
            "again (leukoflow status), or delete it. Nothing "
            "was changed"
        )
    return Amended(name, images, missing, 0, _sha256(run.read("manifest.json")), None)


def _count(table: pq.ParquetFile, amendment: Amendment) -> int:
    batches = table.iter_batches(columns=["patient_id", "slide_id"])
    return sum(pc.sum(amendment.concerned(pa.Table.from_batches([b]))).as_py() or 0 for b in batches)


# --- a run -----------------------------------------------------------------------------------------------------------


def _amend(run: Storage, amendment: Amendment) -> int:
    """Writes everything aside, leaves the note, and brings it into force; returns the number of files rewritten."""
    manifest = read_manifest(run)
    assert manifest is not None
    draft = _Draft(run, manifest, f"_attempts/amend-{uuid.uuid4().hex[:8]}", amendment)
    intent = draft.write()
    run.write(INTENT, dumps(intent))
    _apply(run)
    return len(intent.parts) + len(intent.books)


def _apply(run: Storage) -> None:
    """Brings what was written aside into force; doing it again after a crash is harmless."""
    intent = loads(Intent, run.read(INTENT), run.uri(INTENT))
    run.promote(intent.prefix, intent.parts)
    for key in intent.stale:
        run.delete(key)
    if not run.intact(intent.parts):
        raise StorageError(f"{run.root}: changed parts could not be put in place; give the same command again")
    for key, _, _ in intent.books:
        run.write(key, run.read(f"{intent.prefix}/{key}"))
    run.delete("report.html")  # it shows slides and pixels; `leukoflow report` builds it anew
    run.delete(INTENT)
    run.sweep_attempts("moving")  # what a crash has left there is what was to be changed
    run.sweep_attempts("amend")


class _Draft:
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
        """Writes all of them. Raises StorageError where something is not what was committed."""
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
        for name in ("missing.parquet", "duplicates.parquet") if self.amendment.blanks else ("missing.parquet",):
            if name in files:
                self._check(files[name])
                self._table(name, self.amendment.changed)
                self.books[name] = self._digest(name)
        self._slides()
        if not self.amendment.blanks:
            self._duplicates(files)
        self._verdicts()  # late: whoever gave a verdict while the lock was taken has finished by now
        self._markers_and_manifest()
        return Intent(
            self.amendment.done, self.prefix, tuple(self.parts.values()), tuple(self.books.values()), tuple(self.stale)
        )

    def _find(self) -> None:
        columns = ["image_key", "patient_id", "slide_id", "shard", "zarr_index", "n_tiles"]
        keys = (f.key for f in table_files(self.manifest.parts, "predictions"))
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
                "verify` tells what to do, then give the same command again"
            )

    def _digest(self, key: str) -> FileRef:
        return self.run.child(self.prefix).digest(key)

    def _put(self, key: str, data: bytes) -> None:
        self.run.write(f"{self.prefix}/{key}", data)
        self.books[key] = self._digest(key)

    def _table(self, key: str, change: Callable[[pa.Table], pa.Table]) -> None:
        """A table with the same row groups and metadata, its rows changed."""
        with self.run.open(key) as source, self.run.writer(f"{self.prefix}/{key}") as sink:
            reader = pq.ParquetFile(source)
            schema = reader.schema_arrow
            with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False) as writer:
                for i in range(reader.num_row_groups):
                    writer.write_table(change(reader.read_row_group(i)).combine_chunks())

    def _groups(self, part: PartRef) -> None:
        """Copies a shard's Zarr groups and blanks the tiles and cells that are concerned in them."""
        stored = [f for f in part.files if f[0].split("/")[0].endswith(".zarr")]
        for top in dict.fromkeys(f[0].split("/")[0] for f in stored):
            mine = [f for f in stored if f[0].startswith(f"{top}/")]
            for file in mine:
                self._check(file)
                self.run.write(f"{self.prefix}/{file[0]}", self.run.read(file[0]))
            root = f"{top}/{part.shard}"
            self._blank(top, root, self._offsets(part.shard), self.places.get(int(part.shard), []))
            fresh = []
            for key, _, _ in mine:
                with suppress(FileNotFoundError):  # a chunk that holds nothing but zeros by now is not stored
                    fresh.append(self._digest(key))
            self.parts |= {f[0]: f for f in fresh}
            self.stale += sorted({f[0] for f in mine} - {f[0] for f in fresh})

    def _offsets(self, shard: str) -> NDArray[np.int64]:
        group: Any = zarr.open_group(self.run.zarr(f"masks.zarr/{shard}", read_only=True), mode="r")
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
        self._check(files["plan.parquet"])
        sink = io.BytesIO()
        with self.run.open("plan.parquet") as source:
            rewrite_plan(source, sink, self.amendment.changed)
        self._put("plan.parquet", sink.getvalue())

    def _slides(self) -> None:
        self._summary("slides.parquet", rank_slides(row for piece in self._rows() for row in piece.to_pylist()))

    def _rows(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The predictions as they will be."""
        keys = [f.key for f in table_files(self.manifest.parts, "predictions")]
        return stream(self.run, (f"{self.prefix}/{key}" if key in self.parts else key for key in keys), columns)

    def _summary(self, key: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", use_dictionary=False)
        self._put(key, sink.getvalue())

    def _duplicates(self, files: dict[str, FileRef]) -> None:
        """Which images are now found under more than one patient; there may be more of them, fewer, or none."""
        found = find_conflicts(self._rows)
        self.conflicts = len(found)
        if len(found):
            self._summary("duplicates.parquet", found)
        elif "duplicates.parquet" in files:
            self.stale.append("duplicates.parquet")

    def _verdicts(self) -> None:
        """What people said of the images, and of slides that they are on, goes with the patient."""
        for key, data in without(self.run, self.targets) if self.amendment.blanks else ():
            self._put(key, data)

    def _markers_and_manifest(self) -> None:
        """The books, with the digests of what was written; parts that were changed get keys that nothing else has."""
        renewed: dict[str, str] = {}
        parts = []
        for part in self.manifest.parts:
            unchanged = not self.amendment.blanks and part.stage != MERGED_STAGE
            if unchanged or not self.shards.intersection(span(part)):
                parts.append(part)
                continue
            keys = []
            for ordinal in span(part):
                place = f"markers/{part.stage}/{shard_name(ordinal)}.json"
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
        binding = loads(RunBinding, self.run.read("run.json"), self.run.uri("run.json"))
        self._put("run.json", dumps(replace(binding, plan_sha256=self.books["plan.parquet"][2])))
        self._put(
            "manifest.json", dumps(replace(self.manifest, parts=tuple(parts), tables=tables, conflicts=self.conflicts))
        )

    def _files(self, part: PartRef) -> tuple[FileRef, ...]:
        """A part's files: the new ones where there are such, the others as they were."""
        gone = set(self.stale)
        groups = {"/".join(key.split("/")[:2]) + "/" for key, _, _ in part.files if key.split("/")[0].endswith(".zarr")}
        found = {f[0]: self.parts.get(f[0], f) for f in part.files if f[0] not in gone}
        found |= {key: f for key, f in self.parts.items() if any(key.startswith(g) for g in groups)}
        return tuple(found.values())


def _arrays(group: zarr.Group) -> Iterator[tuple[str, Any]]:
    for name, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            yield name, member
