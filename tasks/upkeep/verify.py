"""Verify a finished run: every digest, every marker, every row, and nothing there that nobody has committed.

The digests say whether bytes are what was committed. The rows are then held against the plan and the totals, so that a
run whose books were made to fit is found as well.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.codec import loads
from leukoflow.core.errors import LeukoflowError, StorageError, words_of
from leukoflow.runs.layout import OutKey, RunKey, Stage
from leukoflow.runs.progress import RunBinding
from leukoflow.runs.receipts import RunTotals
from leukoflow.runs.records import FileRef, Marker, RunManifest, Shard
from leukoflow.runs.schema import cells_schema, predictions_schema
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.manifest import META_PREFIX
from leukoflow.tasks.intake.plan_file import read_summary
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
from leukoflow.tasks.upkeep.checks import (
    Discrepancy,
    check_binding,
    check_cells,
    check_counts,
    check_manifest,
    check_marker,
    check_rows,
    check_stated,
    check_totals,
    compute_again,
    count_rows,
    in_manifest,
    publish_again,
)

Report = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

LISTED = 200
"""Discrepancies that are described; more are counted."""

MEMBER_TABLES = (RunKey.PREDICTIONS, RunKey.FIELDS)
"""Tables with one row for every member."""

PLAN_COLUMNS = ("image_key", "slide_id", "patient_id", "site", "scanner")
_VERDICTS_LOST = (
    "predictions are not affected; take the folder verdicts/ from a backup, or leave it and find out what happened: "
    "verdicts cannot be made again"
)


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
    findings: tuple[Discrepancy, ...]
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
    """Discrepancies so far; never more than `LISTED` of them are kept."""

    findings: list[Discrepancy] = field(default_factory=list)
    more: int = 0

    def add(self, found: Iterable[Discrepancy]) -> None:
        for finding in found:
            if len(self.findings) < LISTED:
                self.findings.append(finding)
            else:
                self.more += 1

    def note(self, where: str, what: str, remedy: str) -> None:
        self.add([Discrepancy(where, what, remedy)])


def verify_run(root: str, report: Report = lambda done, total: None) -> Verification:
    """Check everything that a finished run has committed. Raises StorageError where there is no finished run.

    Memory is bounded by the manifest and a few parts, not by the run's bytes; each byte is read once for its digest,
    and those of plan, predictions and cells once more for their rows.
    """
    started = time.monotonic()
    storage, manifest = finished(root)
    data = storage.read(RunKey.MANIFEST)
    book, said = _Book(), check_run(storage, manifest.run_id)
    again = _binding(storage, manifest, book)
    book.add(check_manifest(manifest, data, again))
    files = [file for part in manifest.parts for file in part.files] + list(manifest.tables)
    broken = _digests(storage, manifest, files, again, book, report)
    book.add(_added(storage, manifest, files))
    cells = _markers(storage, manifest, again, book)
    rows, skipped = 0, None
    if broken or len(book.findings):
        skipped = "the rows were not compared with the plan; that is done once the above is fixed"
    else:
        try:
            rows = _rows(storage, manifest, cells, again, book)
            book.add(_tables(storage, manifest, again))
        except (LeukoflowError, OSError, pa.ArrowException, KeyError, ValueError) as error:
            book.note("tables", f"they cannot be read: {words_of(error)}", compute_again(again))
    book.add(Discrepancy(key, what, _VERDICTS_LOST) for key, what in said.problems)
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
    """Return the ids of the runs below an output folder or prefix that have a manifest, and of those that have none."""
    storage = open_storage(out)
    done, unfinished = [], []
    for name in storage.names(""):
        if storage.exists(OutKey.of_run(name, RunKey.MANIFEST)):
            done.append(name)
        elif storage.exists(OutKey.of_run(name, RunKey.BINDING)):
            unfinished.append(name)
    return done, unfinished


def _binding(storage: Storage, m: RunManifest, book: _Book) -> str:
    """Hold `run.json` against the manifest; return the command that takes the run up again."""
    fallback = f"leukoflow run {m.source.uri} --run-id {m.run_id} ..."
    remedy = "take it from a backup; without it the run can be read, but not repaired or taken up again"
    try:
        binding = loads(RunBinding, storage.read(RunKey.BINDING), RunKey.BINDING)
    except FileNotFoundError:
        book.note(RunKey.BINDING, "it is missing", remedy)
        return fallback
    except StorageError:
        book.note(RunKey.BINDING, "it is damaged", remedy)
        return fallback
    book.add(check_binding(m, binding))
    return binding.command


def _digests(
    storage: Storage, m: RunManifest, files: Sequence[FileRef], again: str, book: _Book, report: Report
) -> bool:
    """Digest every file; return whether any does not hold."""
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
            book.note(key, found, remedy)
            continue
        owner = owner if owner is not None else {sha: name for name, _, sha in files}
        if found[1] in owner:
            what = f"altered: it holds what belongs in {owner[found[1]]}"
        elif found[0] != size:
            what = f"altered: {found[0]:,} bytes instead of {size:,}"
        else:
            what = "altered: same size, other bytes"
        book.note(key, what, remedy)
    return wrong


def _remedy(key: str, m: RunManifest, storage: Storage, again: str) -> str:
    if key == RunKey.PLAN:
        return f"delete it and repeat the run's command, which plans again and keeps what is committed: {again}"
    if key == RunKey.SCALES:
        return (
            "delete it and repeat the run's command, which measures red cells again and keeps what is committed: "
            f"{again}"
        )
    if key == RunKey.MISSING:
        return "take it from a backup, or run the source again under another --run-id"
    if key in {name for name, _, _ in m.tables}:
        return f"repeat the run's command, which publishes it again: {again}"
    return compute_again(again)


def _added(storage: Storage, m: RunManifest, files: Sequence[FileRef]) -> Iterator[Discrepancy]:
    """Find files in committed folders that nobody has committed, and summary tables that the manifest does not list."""
    known = {key for key, _, _ in files}
    tops = sorted({RunKey.top(key) for key in known if "/" in key})
    left = set(leftovers(storage, m))
    for top in tops:
        for key in storage.files(top, hidden=True):
            if key in known:
                continue
            if key == f"{top}/zarr.json":
                if not _is_root_group(storage.read(key)):
                    yield Discrepancy(
                        key,
                        "altered: it is not an empty group",
                        "delete it; the command of any run in this folder makes it again; the shards do not need it",
                    )
                continue
            if key in left:
                yield Discrepancy(
                    key,
                    "left behind by a compaction that was interrupted",
                    f"finish it: leukoflow compact {posixpath.dirname(storage.root)} {m.run_id}",
                )
                continue
            yield Discrepancy(
                key,
                "added: no stage has committed it",
                "move it away: programs that read whole folders take it for results",
            )
    for name in storage.names(""):
        if not (name.endswith(".parquet") or RunKey.is_store(name)) or name in known or name in tops:
            continue
        if RunKey.is_store(name) and set(storage.files(name, hidden=True)) <= {f"{name}/zarr.json"}:
            continue  # opening a run makes the root groups, before there is a shard
        yield Discrepancy(name, "added: the manifest does not list it", "move it away: it is not a result of this run")


def _is_root_group(data: bytes) -> bool:
    """Say whether this is the description of a group that holds nothing but the shards' groups."""
    try:
        found: Any = json.loads(data)
    except ValueError:
        return False
    return isinstance(found, dict) and found == {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def _markers(storage: Storage, m: RunManifest, again: str, book: _Book) -> list[int]:
    """Hold the markers against the manifest; return the number of cells of every shard."""
    parts = {(part.stage, ordinal): part for part in m.parts for ordinal in span(part)}
    stages = {stage for stage, _ in parts}
    counts = shard_counts(m)
    totals, cells = RunTotals(), [0] * len(counts)
    keys: dict[str, list[str]] = {}
    remedy = (
        "the manifest vouches for the files, so results may be used; to have the marker again, delete manifest.json "
        f"and repeat the run's command: {again}"
    )

    def read(place: tuple[str, int]) -> bytes | None:
        try:
            return storage.read(RunKey.marker(place[0], shard_name(place[1])))
        except FileNotFoundError:
            return None

    complete = True
    places = sorted(parts)
    for place, data in zip(places, in_order(read, places), strict=True):
        where, part = RunKey.marker(place[0], shard_name(place[1])), parts[place]
        if data is None:
            book.note(where, "missing", remedy)
            complete = False
            continue
        try:
            marker = loads(Marker, data, where)
        except StorageError:
            book.note(where, "damaged: it is not a marker", f"delete it. Then: {remedy}")
            complete = False
            continue
        wrong = check_marker(marker, part, data, stages, m.schema_version)
        if wrong is None and marker.part.shard != shard_name(place[1]):
            wrong = "it belongs to another shard"
        if wrong is None and place[0] == Stage.PREDICTIONS:
            planned = Shard(place[1], place[1] * m.shard_size, counts[place[1]])
            if marker.receipt is None:
                wrong = "it has no receipt"
            elif marker.receipt.shard != planned:
                wrong = "it is about other members"
        if wrong is not None:
            book.note(where, f"altered: {wrong}", f"delete it. Then: {remedy}")
            complete = False
        if is_merged(part):
            keys.setdefault(part.shard, []).append(marker.part.key)
        if marker.receipt is not None and place[0] == Stage.PREDICTIONS:
            totals.add(marker.receipt)
            cells[place[1]] = marker.receipt.cells
    if complete:
        book.add(in_manifest(what, again) for what in check_totals(totals, m))
        for part in m.parts:
            if is_merged(part) and merged_key(keys[part.shard]) != part.key:
                book.add([in_manifest(f"merged part {part.shard} is not made of its shards' parts", again)])
    for stage in storage.names(RunKey.MARKERS):
        for name in storage.names(RunKey.markers(stage)):
            shard = RunKey.shard_of_json(name)
            if stage not in stages or not shard.isdecimal() or (stage, int(shard)) not in parts:
                book.note(f"{RunKey.markers(stage)}/{name}", "added: the manifest lists no such part", "move it away")
    return cells


def _rows(storage: Storage, m: RunManifest, cells: Sequence[int], again: str, book: _Book) -> int:
    """Hold plan, predictions and cells against each other, shard by shard; return the number of rows."""
    counts = shard_counts(m)
    with storage.open(RunKey.PLAN) as file:
        plan = pq.ParquetFile(file)
        names = plan.schema_arrow.names
        metas = [name for name in names if name.startswith(META_PREFIX)]
        book.add(_shapes(storage, m, [name.removeprefix(META_PREFIX) for name in metas], cells, again))
        summary = read_summary(file)
        if (summary.members, summary.shard_size, summary.missing, summary.ignored, summary.truncated) != (
            m.members, m.shard_size, m.missing, m.ignored, m.source_truncated,
        ) or summary.source != m.source or plan.metadata.num_row_groups != len(counts):  # fmt: skip
            book.note(RunKey.PLAN, "its summary is not the manifest's", publish_again(again))
            return 0
        if book.findings:
            return 0
        stated = "um_per_px" if m.schema_version < 3 else "um_per_px_stated"
        columns = [*PLAN_COLUMNS, *metas]
        more = (stated, "run_id", "source_uri", "bundle_digest", "shard", "status", "label", "confidence", "n_cells",
                "prob_benign", "prob_early", "prob_pre", "prob_pro")  # fmt: skip
        predictions = stream(storage, (f.key for f in table_files(m.parts, RunKey.PREDICTIONS)), [*columns, *more])
        cell_rows = stream(storage, (f.key for f in table_files(m.parts, RunKey.CELLS)), ["image_key"])
        counted, total = Counter[str](), 0
        groups = zip(regroup(predictions, counts), regroup(cell_rows, cells), strict=True)
        for ordinal, (rows, own) in enumerate(groups):
            planned = plan.read_row_group(ordinal, columns=["ordinal", "um_per_px", *columns])
            first = ordinal * m.shard_size
            wrong = None
            if planned["ordinal"].to_pylist() != list(range(first, first + counts[ordinal])):
                wrong = "the plan's members are not in their order"
            if rows is None:
                wrong = "it has no rows"
            else:
                wrong = wrong or check_rows(planned.select(columns), rows, m, shard_name(ordinal))
                wrong = wrong or check_stated(planned["um_per_px"], rows[stated])
                wrong = wrong or check_cells(rows, own)
                count_rows(rows, counted, m.schema_version)
                total += len(rows)
            if wrong is not None:
                book.note(f"predictions of shard {shard_name(ordinal)}", wrong, compute_again(again))
    book.add(in_manifest(what, again) for what in check_counts(counted, m))
    return total


def _shapes(
    storage: Storage, m: RunManifest, metas: Sequence[str], cells: Sequence[int], again: str
) -> Iterator[Discrepancy]:
    """Check number of rows and schema of every Parquet part, from its footer."""
    version = m.schema_version
    expected = {RunKey.PREDICTIONS: predictions_schema(metas, version), RunKey.CELLS: cells_schema(version)}
    counts = shard_counts(m)

    def footer(key: str) -> tuple[int, pa.Schema]:
        with storage.open(key) as file:
            reader = pq.ParquetFile(file)
            return reader.metadata.num_rows, reader.schema_arrow

    folders = dict.fromkeys(RunKey.top(key) for part in m.parts for key, _, _ in part.files)
    for folder in folders:
        listed = table_files(m.parts, folder)
        for file, (rows, schema) in zip(listed, in_order(footer, (f.key for f in listed)), strict=True):
            if folder == RunKey.CELLS:
                wanted = sum(cells[i] for i in file.shards)
            elif folder in MEMBER_TABLES:
                wanted = sum(counts[i] for i in file.shards)
            else:
                continue
            if rows != wanted:
                yield Discrepancy(file.key, f"{rows:,} rows instead of {wanted:,}", compute_again(again))
            if folder in expected and not schema.equals(expected[folder]):
                yield Discrepancy(file.key, "its columns are not those of the data format", compute_again(again))


def _tables(storage: Storage, m: RunManifest, again: str) -> Iterator[Discrepancy]:
    """Check that the summary tables have as many rows as the manifest says."""
    names = {name for name, _, _ in m.tables}
    wanted: tuple[tuple[str, int], ...] = ((RunKey.DUPLICATES, m.conflicts), (RunKey.MISSING, m.missing))
    for name, rows in wanted:
        if (rows > 0) != (name in names):
            yield Discrepancy(name, f"the manifest counts {rows:,} rows of it", publish_again(again))
        elif rows:
            with storage.open(name) as file:
                found = pq.read_metadata(file).num_rows
            if found != rows:
                yield Discrepancy(name, f"{found:,} rows, the manifest counts {rows:,}", publish_again(again))
    for name in (RunKey.PLAN, RunKey.SLIDES):
        if name not in names:
            yield in_manifest(f"it does not list {name}", again)
    if RunKey.SLIDES in names:
        images = sum(sum(piece["n_images"].to_pylist()) for piece in stream(storage, [RunKey.SLIDES], ["n_images"]))
        if images != m.members:
            yield Discrepancy(RunKey.SLIDES, f"it counts {images:,} of {m.members:,} images", publish_again(again))
