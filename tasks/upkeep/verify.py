"""Verifying a finished run: every digest, every marker, every row, and nothing there that nobody has committed.

The digests say whether bytes are what was committed. The rows are then held against the plan and the totals, so that a
run whose books were made to fit is found as well.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import LeukoflowError, StorageError, words_of
from leukoflow.runs.progress import RunBinding
from leukoflow.runs.records import CLASSES, Marker, PartRef, RunManifest, Shard, ShardReceipt, StageTiming, Status
from leukoflow.runs.schema import SCHEMA_VERSION, cells_schema, predictions_schema
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.manifest_file import META_PREFIX
from leukoflow.tasks.intake.plan import read_summary
from leukoflow.tasks.publish.publish import REASONS, SLOWEST
from leukoflow.tasks.review.verdicts import check_run
from leukoflow.tasks.store.tables import (
    finished,
    in_order,
    is_merged,
    leftovers,
    merged_key,
    regroup,
    shard_counts,
    shard_name,
    span,
    stream,
    table_files,
)

FileRef = tuple[str, int, str]
Report = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

LISTED = 200
"""Findings that are described; more are counted."""

MEMBER_TABLES = ("predictions", "fields")
"""Tables with one row for every member."""

PLAN_COLUMNS = ("image_key", "slide_id", "patient_id", "site", "scanner", "um_per_px")
_VERDICTS_LOST = (
    "predictions are not concerned; take the folder verdicts/ from a backup, or leave it and find out what happened: "
    "verdicts cannot be made anew"
)
_DIAGNOSED = (str(Status.PREDICTED), str(Status.ABSTAINED))


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: where, what, and what to do about it."""

    where: str
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What verifying a run has found. `findings` is empty when the run is exactly what was committed."""

    run_id: str
    root: str
    manifest_sha256: str
    files: int
    bytes: int
    rows: int
    cells: int
    seconds: float
    findings: tuple[Finding, ...]
    more: int  # findings beyond those that are listed
    skipped: str | None  # why the rows were not looked at
    verdicts: int = 0  # that people have given
    verdict_head: str = ""  # digest of the last one's entry

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


@dataclass(slots=True)
class _Book:
    """Findings so far; never more than `LISTED` of them are kept."""

    findings: list[Finding] = field(default_factory=list)
    more: int = 0

    def add(self, found: Iterable[Finding]) -> None:
        for finding in found:
            if len(self.findings) < LISTED:
                self.findings.append(finding)
            else:
                self.more += 1


# --- pure checks -----------------------------------------------------------------------------------------------------


def as_written(data: bytes, record: object) -> bool:
    """Whether leukoflow writes the record with these bytes, but for fields that an older version did not have yet."""
    found = json.loads(data)
    text = json.dumps(found, ensure_ascii=False, sort_keys=True, indent=1) + "\n"
    return text.encode() == data and _within(found, json.loads(dumps(record)))


def _within(found: Any, whole: Any) -> bool:
    if isinstance(found, dict) and isinstance(whole, dict):
        return all(key in whole and _within(value, whole[key]) for key, value in found.items())
    if isinstance(found, list) and isinstance(whole, list):
        return len(found) == len(whole) and all(map(_within, found, whole))
    return bool(found == whole)


def check_manifest(m: RunManifest, data: bytes, again: str) -> Iterator[Finding]:
    """Whether a manifest agrees with itself."""
    name = "manifest.json"
    if not as_written(data, m):
        yield Finding(name, "its text is not as it was written; somebody has edited it", _anew(name, again))
    if not 1 <= m.schema_version <= SCHEMA_VERSION:
        yield Finding(
            name,
            f"it has schema version {m.schema_version}, this leukoflow knows {SCHEMA_VERSION}",
            "verify it with the version of leukoflow that wrote it",
        )
    if m.predicted + m.abstained + m.rejected + m.quarantined != m.members:
        yield Finding(name, "its totals do not balance", _anew(name, again))
    if sum(m.labels) != labelled(m, m.schema_version):
        yield Finding(name, "its labels are not as many as the images that they count", _anew(name, again))
    seen: set[tuple[str, int]] = set()
    stages = list(dict.fromkeys(part.stage for part in m.parts))
    for part in m.parts:
        for ordinal in span(part):
            if (part.stage, ordinal) in seen:
                yield Finding(
                    name, f"it lists stage {part.stage} of shard {shard_name(ordinal)} twice", _anew(name, again)
                )
            seen.add((part.stage, ordinal))
    for ordinal in range(len(shard_counts(m))):
        for stage in stages:
            if (stage, ordinal) not in seen:
                yield Finding(
                    name, f"it does not list stage {stage} of shard {shard_name(ordinal)}", _anew(name, again)
                )
    if not stages and m.members:
        yield Finding(name, "it lists no parts", _anew(name, again))


def check_binding(m: RunManifest, binding: RunBinding) -> Iterator[Finding]:
    """Whether `run.json` and the manifest speak of the same run."""
    for name, mine, theirs in (
        ("run_id", binding.run_id, m.run_id),
        ("fingerprint", binding.fingerprint, m.fingerprint),
        ("source_uri", binding.source_uri, m.source.uri),
        ("members", binding.members, m.members),
        ("shard_size", binding.shard_size, m.shard_size),
        ("shards", binding.shards, len(shard_counts(m))),
        ("bundle", binding.bundle, m.bundle),
        ("bundle_digest", binding.bundle_digest, m.bundle_digest),
        ("bundle_reference", binding.bundle_reference, m.bundle_reference),
        ("shadow_of", binding.shadow_of, m.shadow_of),
        ("device", binding.device, m.device),
        ("started_at", binding.started_at, m.started_at),
        ("plan_sha256", binding.plan_sha256, {key: sha for key, _, sha in m.tables}.get("plan.parquet")),
    ):
        if mine != theirs and not (name == "plan_sha256" and mine == ""):
            yield Finding(
                "run.json",
                f"its {name} is {mine!r}, the manifest's {theirs!r}",
                "one of the two was altered: take both from a backup, or run the source anew under another --run-id",
            )


def labelled(counts: RunManifest | ShardReceipt, schema_version: int) -> int:
    """How many images the labels of a manifest or receipt count: until schema 2, abstained ones as well."""
    return counts.predicted + (counts.abstained if schema_version < 2 else 0)


def check_marker(
    marker: Marker, part: PartRef, data: bytes, stages: Collection[str], schema_version: int = SCHEMA_VERSION
) -> str | None:
    """What is wrong with a marker, given the part that the manifest lists; None when nothing is."""
    if not as_written(data, marker):
        return "its text is not as it was written"
    if not is_merged(part):
        if marker.part != part:
            return "it names other files or another origin than the manifest"
    elif marker.part.stage != part.stage or int(marker.part.shard) not in span(part):
        return "it belongs to another shard"
    receipt = marker.receipt
    if receipt is None:
        return None
    if receipt.shard.name != marker.part.shard or receipt.rows != receipt.shard.count:
        return f"it accounts for {receipt.rows} of {receipt.shard.count} members"
    if sum(receipt.labels) != labelled(receipt, schema_version):
        return "its labels are not as many as the images that they count"
    if receipt.seconds != sum(t.seconds for t in receipt.timings):
        return "its seconds are not those of its stages"
    if not set(receipt.resumed) <= set(stages):
        return "it names a stage to resume from that does not exist"
    return None


@dataclass(slots=True)
class _Totals:
    """Sums over the receipts of all shards, as publishing makes them."""

    counts: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    timings: dict[str, StageTiming] = field(default_factory=dict)
    slowest: list[tuple[str, float]] = field(default_factory=list)

    def add(self, receipt: ShardReceipt) -> None:
        self.counts.update(
            predicted=receipt.predicted,
            abstained=receipt.abstained,
            rejected=receipt.rejected,
            quarantined=receipt.quarantined,
            cells=receipt.cells,
        )
        self.labels.update(dict(zip(CLASSES, receipt.labels, strict=True)))
        self.reasons.update(dict(receipt.reasons))
        for t in receipt.timings:
            old = self.timings.get(t.stage, StageTiming(t.stage, 0.0, 0))
            self.timings[t.stage] = StageTiming(t.stage, old.seconds + t.seconds, old.images + t.images)
        self.slowest.append((receipt.shard.name, receipt.seconds))
        if len(self.slowest) > 64:
            self.slowest = self._top()

    def _top(self) -> list[tuple[str, float]]:
        return sorted(self.slowest, key=lambda item: -item[1])[:SLOWEST]

    def differences(self, m: RunManifest) -> Iterator[str]:
        """In which sums the markers and the manifest differ."""
        for name in ("predicted", "abstained", "rejected", "quarantined", "cells"):
            if self.counts[name] != getattr(m, name):
                yield f"{name} is {getattr(m, name):,}, the markers add up to {self.counts[name]:,}"
        if tuple(self.labels[c] for c in CLASSES) != m.labels:
            yield f"labels are {m.labels}, the markers add up to {tuple(self.labels[c] for c in CLASSES)}"
        if tuple(self.reasons.most_common(REASONS)) != m.reasons:
            yield "reasons are not those of the markers"
        if tuple(self.timings.values()) != m.timings:
            yield "seconds per stage are not those of the markers"
        if tuple(self._top()) != m.slowest:
            yield "the slowest shards are not those of the markers"


def check_rows(planned: pa.Table, rows: pa.Table, m: RunManifest, shard: str) -> str | None:
    """What is wrong with a shard's predictions, given its rows of the plan; None when nothing is."""
    if len(rows) < len(planned):
        return f"{len(rows)} rows for {len(planned)} members"
    for name in planned.column_names:
        if not rows[name].combine_chunks().equals(planned[name].combine_chunks()):
            return f"its {name} are not those of the plan's members"
    for name, value in (
        ("run_id", m.run_id),
        ("source_uri", m.source.uri),
        ("bundle_digest", m.bundle_digest),
        ("shard", shard),
    ):
        if pc.any(pc.not_equal(rows[name], value)).as_py():
            return f"its {name} is not {value!r} in every row"
    status = rows["status"]
    if not pc.all(pc.is_in(status, pa.array([str(s) for s in Status]))).as_py():
        return "a status is none of " + ", ".join(Status)
    diagnosed = pc.is_in(status, pa.array(_DIAGNOSED))
    for name in ("label", "confidence", "prob_benign", "prob_early", "prob_pre", "prob_pro"):
        if pc.any(pc.not_equal(diagnosed, pc.is_valid(rows[name]))).as_py():
            return f"its {name} is null in a diagnosed row, or not in one without a diagnosis"
    return None


def count_rows(rows: pa.Table, into: Counter[str], schema_version: int = SCHEMA_VERSION) -> None:
    """Adds a table's statuses, and the labels that a manifest of this schema version counts."""
    counted = rows if schema_version < 2 else rows.filter(pc.field("status") == str(Status.PREDICTED))
    for column in (rows["status"], counted["label"]):
        for entry in pc.value_counts(column.combine_chunks()).to_pylist():
            if entry["values"] is not None:
                into[entry["values"]] += entry["counts"]


def check_cells(rows: pa.Table, cells: pa.Table | None) -> str | None:
    """What is wrong with a shard's cells, given its predictions; None when nothing is."""
    keys = rows["image_key"].combine_chunks()
    wanted = keys.take(pa.array(np.repeat(np.arange(len(rows)), rows["n_cells"].fill_null(0).to_numpy())))
    found = pa.array([], pa.string()) if cells is None else cells["image_key"].combine_chunks()
    if found.equals(wanted):
        return None
    return "its cells are not as many as its predictions count, or not in their order"


def check_counts(counted: Mapping[str, int], m: RunManifest) -> Iterator[str]:
    """Where the rows and the manifest's totals differ."""
    for name in Status:
        if counted.get(name, 0) != getattr(m, name):
            yield f"{name} is {getattr(m, name):,}, the rows add up to {counted.get(name, 0):,}"
    labels = tuple(counted.get(c, 0) for c in CLASSES)
    if labels != m.labels:
        yield f"labels are {m.labels}, the rows add up to {labels}"


# --- a run -----------------------------------------------------------------------------------------------------------


def verify_run(root: str, report: Report = lambda done, total: None) -> Verification:
    """Checks everything that a finished run has committed. Raises StorageError where there is no finished run.

    Memory is bounded by the manifest and a few parts, not by the run's bytes; each byte is read once for its digest,
    and those of plan, predictions and cells once more for their rows.
    """
    started = time.monotonic()
    storage, manifest = finished(root)
    data = storage.read("manifest.json")
    book, said = _Book(), check_run(storage, manifest.run_id)
    again = _binding(storage, manifest, book)
    book.add(check_manifest(manifest, data, again))
    files = [file for part in manifest.parts for file in part.files] + list(manifest.tables)
    broken = _digests(storage, manifest, files, again, book, report)
    book.add(_added(storage, manifest, files))
    cells = _markers(storage, manifest, again, book)
    rows, skipped = 0, None
    if broken or len(book.findings):
        skipped = "the rows were not held against the plan; that is done once the above is mended"
    else:
        try:
            rows = _rows(storage, manifest, cells, again, book)
            book.add(_tables(storage, manifest, again))
        except (LeukoflowError, OSError, pa.ArrowException, KeyError, ValueError) as error:
            book.add([Finding("tables", f"they cannot be read: {words_of(error)}", _parts_anew(again))])
    book.add(Finding(key, what, _VERDICTS_LOST) for key, what in said.problems)
    return Verification(
        run_id=manifest.run_id,
        root=storage.root,
        manifest_sha256=hashlib.sha256(data).hexdigest(),
        files=len(files),
        bytes=sum(size for _, size, _ in files),
        rows=rows,
        cells=manifest.cells,
        seconds=time.monotonic() - started,
        findings=tuple(book.findings),
        more=book.more,
        skipped=skipped,
        verdicts=said.verdicts,
        verdict_head=said.head if said.verdicts else "",
    )


def finished_runs(out: str) -> tuple[list[str], list[str]]:
    """Run ids below an output folder or prefix that have a manifest, and those that have none."""
    storage = Storage(out)
    done, unfinished = [], []
    for name in storage.names(""):
        if storage.exists(f"{name}/manifest.json"):
            done.append(name)
        elif storage.exists(f"{name}/run.json"):
            unfinished.append(name)
    return done, unfinished


def _anew(name: str, again: str) -> str:
    return f"delete {name} and give the run's command again, which publishes it anew: {again}"


def _parts_anew(again: str) -> str:
    return f"give the run's command again, which computes again what does not hold: {again}"


def _binding(storage: Storage, m: RunManifest, book: _Book) -> str:
    """Holds `run.json` against the manifest; returns the command that takes the run up again."""
    fallback = f"leukoflow run {m.source.uri} --run-id {m.run_id} ..."
    remedy = "take it from a backup; without it the run can be read, but not repaired or taken up again"
    try:
        binding = loads(RunBinding, storage.read("run.json"), "run.json")
    except FileNotFoundError:
        book.add([Finding("run.json", "it is missing", remedy)])
        return fallback
    except StorageError:
        book.add([Finding("run.json", "it is damaged", remedy)])
        return fallback
    book.add(check_binding(m, binding))
    return binding.command


def _digests(
    storage: Storage, m: RunManifest, files: Sequence[FileRef], again: str, book: _Book, report: Report
) -> bool:
    """Digests every file; returns whether any does not hold."""
    total, done, wrong = sum(size for _, size, _ in files), 0, False
    owner: dict[str, str] | None = None
    report(0, total)

    def look(file: FileRef) -> tuple[int, str] | str:
        try:
            return storage.digest(file[0])[1:]
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return "missing"
        except OSError as error:
            return f"not readable ({error.strerror or error})"

    for (key, size, sha256), found in zip(files, in_order(look, files), strict=True):
        done += size
        report(done, total)
        if found == (size, sha256):
            continue
        wrong = True
        remedy = _remedy(key, m, storage, again)
        if isinstance(found, str):
            book.add([Finding(key, found, remedy)])
            continue
        owner = owner if owner is not None else {sha: name for name, _, sha in files}
        if found[1] in owner:
            what = f"altered: it holds what belongs into {owner[found[1]]}"
        elif found[0] != size:
            what = f"altered: {found[0]:,} bytes instead of {size:,}"
        else:
            what = "altered: same size, other bytes"
        book.add([Finding(key, what, remedy)])
    return wrong


def _remedy(key: str, m: RunManifest, storage: Storage, again: str) -> str:
    if key == "plan.parquet":
        return f"delete it and give the run's command again, which plans anew and keeps what is committed: {again}"
    if key == "missing.parquet":
        return "take it from a backup, or run the source anew under another --run-id"
    if key in {name for name, _, _ in m.tables}:
        return f"give the run's command again, which publishes it anew: {again}"
    return _parts_anew(again)


def _added(storage: Storage, m: RunManifest, files: Sequence[FileRef]) -> Iterator[Finding]:
    """Files in committed folders that nobody has committed, and summary tables that the manifest does not list."""
    known = {key for key, _, _ in files}
    tops = sorted({key.split("/")[0] for key in known if "/" in key})
    left = set(leftovers(storage, m))
    for top in tops:
        for key in storage.files(top, hidden=True):
            if key in known:
                continue
            if key == f"{top}/zarr.json":
                if not _is_root_group(storage.read(key)):
                    yield Finding(
                        key,
                        "altered: it is not an empty group",
                        "delete it; any run in this folder's command makes it anew, and the shards do not need it",
                    )
                continue
            if key in left:
                yield Finding(
                    key,
                    "left behind by a compaction that was interrupted",
                    f"finish it: leukoflow compact {posixpath.dirname(storage.root)} {m.run_id}",
                )
                continue
            yield Finding(
                key,
                "added: no stage has committed it",
                "move it away: programs that read whole folders take it for results",
            )
    for name in storage.names(""):
        if not name.endswith((".parquet", ".zarr")) or name in known or name in tops:
            continue
        if name.endswith(".zarr") and set(storage.files(name, hidden=True)) <= {f"{name}/zarr.json"}:
            continue  # opening a run makes the root groups, before there is a shard
        yield Finding(name, "added: the manifest does not list it", "move it away: it is no result of this run")


def _is_root_group(data: bytes) -> bool:
    """Whether this is the description of a group that holds nothing but the shards' groups."""
    try:
        found: Any = json.loads(data)
    except ValueError:
        return False
    return isinstance(found, dict) and found == {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def _markers(storage: Storage, m: RunManifest, again: str, book: _Book) -> list[int]:
    """Holds the markers against the manifest; returns the number of cells of every shard."""
    parts = {(part.stage, ordinal): part for part in m.parts for ordinal in span(part)}
    stages = {stage for stage, _ in parts}
    counts = shard_counts(m)
    totals, cells = _Totals(), [0] * len(counts)
    keys: dict[str, list[str]] = {}
    remedy = (
        "the manifest vouches for the files, so results may be used; to have the marker anew, delete manifest.json and "
        f"give the run's command again: {again}"
    )

    def read(place: tuple[str, int]) -> bytes | None:
        try:
            return storage.read(f"markers/{place[0]}/{shard_name(place[1])}.json")
        except FileNotFoundError:
            return None

    complete = True
    places = sorted(parts)
    for place, data in zip(places, in_order(read, places), strict=True):
        where, part = f"markers/{place[0]}/{shard_name(place[1])}.json", parts[place]
        if data is None:
            book.add([Finding(where, "missing", remedy)])
            complete = False
            continue
        try:
            marker = loads(Marker, data, where)
        except StorageError:
            book.add([Finding(where, "damaged: it is no marker", f"delete it. Then: {remedy}")])
            complete = False
            continue
        wrong = check_marker(marker, part, data, stages, m.schema_version)
        if wrong is None and marker.part.shard != shard_name(place[1]):
            wrong = "it belongs to another shard"
        if wrong is None and place[0] == "predictions":
            shard = Shard(place[1], place[1] * m.shard_size, counts[place[1]])
            if marker.receipt is None:
                wrong = "it has no receipt"
            elif marker.receipt.shard != shard:
                wrong = "it speaks of other members"
        if wrong is not None:
            book.add([Finding(where, f"altered: {wrong}", f"delete it. Then: {remedy}")])
            complete = False
        if is_merged(part):
            keys.setdefault(part.shard, []).append(marker.part.key)
        if marker.receipt is not None and place[0] == "predictions":
            totals.add(marker.receipt)
            cells[place[1]] = marker.receipt.cells
    if complete:
        book.add(Finding("manifest.json", what, _anew("manifest.json", again)) for what in totals.differences(m))
        for part in m.parts:
            if is_merged(part) and merged_key(keys[part.shard]) != part.key:
                book.add(
                    [Finding("manifest.json", f"merged part {part.shard} is not made of its shards' parts", _anew(
                        "manifest.json", again))]
                )  # fmt: skip
    for stage in storage.names("markers"):
        for name in storage.names(f"markers/{stage}"):
            stem = name.removesuffix(".json")
            if stage not in stages or not stem.isdecimal() or (stage, int(stem)) not in parts:
                book.add([Finding(f"markers/{stage}/{name}", "added: the manifest lists no such part", "move it away")])
    return cells


def _rows(storage: Storage, m: RunManifest, cells: Sequence[int], again: str, book: _Book) -> int:
    """Holds plan, predictions and cells against each other, shard by shard; returns the number of rows."""
    counts = shard_counts(m)
    with storage.open("plan.parquet") as file:
        plan = pq.ParquetFile(file)
        names = plan.schema_arrow.names
        metas = [name for name in names if name.startswith(META_PREFIX)]
        book.add(_shapes(storage, m, [name.removeprefix(META_PREFIX) for name in metas], cells, again))
        summary = read_summary(file)
        if (summary.members, summary.shard_size, summary.missing, summary.ignored, summary.truncated) != (
            m.members, m.shard_size, m.missing, m.ignored, m.source_truncated,
        ) or summary.source != m.source or plan.metadata.num_row_groups != len(counts):  # fmt: skip
            book.add([Finding("plan.parquet", "its summary is not the manifest's", _anew("manifest.json", again))])
            return 0
        if book.findings:
            return 0
        columns = [*PLAN_COLUMNS, *metas]
        more = ("run_id", "source_uri", "bundle_digest", "shard", "status", "label", "confidence", "n_cells",
                "prob_benign", "prob_early", "prob_pre", "prob_pro")  # fmt: skip
        predictions = stream(storage, (f.key for f in table_files(m.parts, "predictions")), [*columns, *more])
        cell_rows = stream(storage, (f.key for f in table_files(m.parts, "cells")), ["image_key"])
        counted, total = Counter[str](), 0
        groups = zip(regroup(predictions, counts), regroup(cell_rows, cells), strict=True)
        for ordinal, (rows, own) in enumerate(groups):
            planned = plan.read_row_group(ordinal, columns=["ordinal", *columns])
            first = ordinal * m.shard_size
            wrong = None
            if planned["ordinal"].to_pylist() != list(range(first, first + counts[ordinal])):
                wrong = "the plan's members are not in their order"
            if rows is None:
                wrong = "it has no rows"
            else:
                wrong = wrong or check_rows(planned.select(columns), rows, m, shard_name(ordinal))
                wrong = wrong or check_cells(rows, own)
                count_rows(rows, counted, m.schema_version)
                total += len(rows)
            if wrong is not None:
                book.add([Finding(f"predictions of shard {shard_name(ordinal)}", wrong, _parts_anew(again))])
    book.add(Finding("manifest.json", what, _anew("manifest.json", again)) for what in check_counts(counted, m))
    return total


def _shapes(
    storage: Storage, m: RunManifest, metas: Sequence[str], cells: Sequence[int], again: str
) -> Iterator[Finding]:
    """Number of rows and schema of every Parquet part, from its footer."""
    expected = {"predictions": predictions_schema(metas), "cells": cells_schema(m.schema_version)}
    counts = shard_counts(m)

    def footer(key: str) -> tuple[int, pa.Schema]:
        with storage.open(key) as file:
            reader = pq.ParquetFile(file)
            return reader.metadata.num_rows, reader.schema_arrow

    folders = dict.fromkeys(key.split("/")[0] for part in m.parts for key, _, _ in part.files)
    for folder in folders:
        listed = table_files(m.parts, folder)
        for file, (rows, schema) in zip(listed, in_order(footer, (f.key for f in listed)), strict=True):
            if folder == "cells":
                wanted = sum(cells[i] for i in file.shards)
            elif folder in MEMBER_TABLES:
                wanted = sum(counts[i] for i in file.shards)
            else:
                continue
            if rows != wanted:
                yield Finding(file.key, f"{rows:,} rows instead of {wanted:,}", _parts_anew(again))
            if folder in expected and not schema.equals(expected[folder]):
                yield Finding(file.key, "its columns are not those of the data format", _parts_anew(again))


def _tables(storage: Storage, m: RunManifest, again: str) -> Iterator[Finding]:
    """Whether the summary tables have as many rows as the manifest says."""
    names = {name for name, _, _ in m.tables}
    wanted: tuple[tuple[str, int], ...] = (("duplicates.parquet", m.conflicts), ("missing.parquet", m.missing))
    for name, rows in wanted:
        if (rows > 0) != (name in names):
            yield Finding(name, f"the manifest counts {rows:,} rows of it", _anew("manifest.json", again))
        elif rows:
            with storage.open(name) as file:
                found = pq.read_metadata(file).num_rows
            if found != rows:
                yield Finding(name, f"{found:,} rows, the manifest counts {rows:,}", _anew("manifest.json", again))
    for name in ("plan.parquet", "slides.parquet"):
        if name not in names:
            yield Finding("manifest.json", f"it does not list {name}", _anew("manifest.json", again))
    if "slides.parquet" in names:
        images = sum(sum(piece["n_images"].to_pylist()) for piece in stream(storage, ["slides.parquet"], ["n_images"]))
        if images != m.members:
            yield Finding(
                "slides.parquet", f"it counts {images:,} of {m.members:,} images", _anew("manifest.json", again)
            )
