"""Planning: from a source and an optional manifest to the frozen plan that every rerun uses.

`plan.parquet` has one row per member in the source's order and one row group per shard, so that a shard is read
without the others, however many there are. The plan's summary travels in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leukoflow.core.config import UrgentSettings
from leukoflow.core.errors import ConfigError, SourceError
from leukoflow.runs.ledger import Selection
from leukoflow.runs.records import Member, PlanSummary, Shard, Source, SourceKind
from leukoflow.sources.members import DEFAULT_MEMBER_BYTES, Listing
from leukoflow.tasks.intake.manifest import (
    MANIFEST_COLUMNS,
    META_PREFIX,
    Manifest,
    manifest_fields,
    read_manifest,
)
from leukoflow.tasks.intake.manifest_file import PathLike
from leukoflow.tasks.intake.matching import hint, match
from leukoflow.tasks.intake.patient_key import check_value
from leukoflow.tasks.intake.spelling import folded, spelled
from leukoflow.tasks.store.slides import slide_of

APART = "(not in the manifest)"
"""How the name of a folder ends that a slide of the manifest is called by, too."""

_SUMMARY_KEY = "leukoflow.plan"

Sink: TypeAlias = str | Path | BinaryIO


def plan_schema(meta_columns: Sequence[str] = ()) -> pa.Schema:
    """Return the schema of plan.parquet: the fields of `Member`; every configured extra column is a `meta_<name>`."""
    return pa.schema(
        [
            pa.field("ordinal", pa.int64(), nullable=False),
            pa.field("image_key", pa.string(), nullable=False),
            pa.field("locator", pa.string(), nullable=False),
            pa.field("offset", pa.int64(), nullable=False),
            pa.field("stored_bytes", pa.int64(), nullable=False),
            pa.field("size_bytes", pa.int64(), nullable=False),
            pa.field("method", pa.int32(), nullable=False),
            pa.field("identity", pa.string(), nullable=False),
            pa.field("refusal", pa.string()),
            *manifest_fields(meta_columns),
        ]
    )


# ---------------------------------------------------------------- the plan


def plan(
    source: Source,
    out: Sink,
    *,
    shard_size: int,
    um_per_px: float | None = None,
    manifest: PathLike | None = None,
    meta_columns: Sequence[str] = (),
    patient_key: bytes | None = None,
    member_bytes: int = DEFAULT_MEMBER_BYTES,
    missing_out: Sink | None = None,
    selection: Selection | None = None,
    remarks: Sequence[str] = (),
) -> PlanSummary:
    """List the source once and write its plan.

    `um_per_px` applies where the manifest gives no scale. `member_bytes` is the largest member that will be read.
    Images that the manifest names and the source does not hold go to `missing_out`, which is left alone if there are
    none. With a `selection`, only what it has taken is a member, and of the manifest, whose keys then begin with the
    name of an item of the inbox, only what it says of the items that were taken counts. The summary has `remarks`, and
    what is to be said about the manifest. Memory is bounded by the names
    (about 0.5 KB a member), not by the images.

    Raises SourceError where there is no member at all, ConfigError for a manifest that cannot be used. The caller
    publishes the file only after this has returned.
    """
    if shard_size < 1:
        raise ConfigError(f"shard_size is {shard_size}: it must be at least 1")
    known = read_manifest(manifest, meta_columns, patient_key) if manifest is not None else None
    entries = None
    if selection is not None:
        known = known and _manifest_of(known, selection)
        entries = selection.entries() if selection.archive is None else None
    if known is None:
        return _write_plan(source, out, Listing(source, member_bytes, entries), shard_size, um_per_px, meta_columns)
    join = _Join(known)
    with tempfile.TemporaryFile() as draft:  # which line an image has is only known when all have been seen
        listing = Listing(source, member_bytes, entries)
        _write_plan(source, draft, listing, shard_size, None, meta_columns, join)
        join.match(_own_names(source.uri))
        if selection is not None:
            _excuse(known, selection, join.found)
        join.conclude()
        absent = [row for row, found in enumerate(join.found) if not found]
        patients = known.table["patient_id"]
        assert patient_key is not None or patients.null_count == len(patients)
        summary = rewrite_plan(
            draft,
            out,
            lambda table: _with_scale(join.joined(table), um_per_px),
            missing=len(absent),
            remarks=(*listing.remarks, *known.remarks, *join.remarks, *remarks),
            patient_key_check=check_value(patient_key) if patient_key and patients.null_count < len(patients) else "",
        )
    if absent and missing_out is not None:
        rows = known.table.take(pa.array(absent, pa.int64()))
        pq.write_table(rows, missing_out, compression="zstd", use_dictionary=False)
    return summary


def _write_plan(
    source: Source,
    out: Any,
    listing: Listing,
    shard_size: int,
    um_per_px: float | None,
    meta_columns: Sequence[str],
    join: _Join | None = None,
) -> PlanSummary:
    """Write the members of a listing as a plan that knows nothing else of them; `join` looks at each shard."""
    members, count = iter(listing), 0
    schema, digest = plan_schema(meta_columns), hashlib.blake2b(digest_size=16)
    with pq.ParquetWriter(
        out, schema, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False
    ) as writer:
        while shard := list(islice(members, shard_size)):
            table = _with_scale(_shard_table(shard, schema, source.kind), um_per_px)
            if join is None:
                _digest_members(table, digest)
            else:
                join.see(shard)
            writer.write_table(table)
            count += len(shard)
        if not count:
            why = f"; {listing.truncated}" if listing.truncated else ""
            raise SourceError(f"{source.uri} holds no images ({listing.ignored:,} folders and litter){why}")
        summary = PlanSummary(
            source, count, listing.ignored, 0, listing.truncated, shard_size, digest.hexdigest(), listing.remarks
        )
        writer.add_key_value_metadata({_SUMMARY_KEY: json.dumps(asdict(summary))})
    return summary


def _with_scale(table: pa.Table, um_per_px: float | None) -> pa.Table:
    if um_per_px is None:
        return table
    i = table.schema.get_field_index("um_per_px")
    return table.set_column(i, table.schema.field(i), pc.fill_null(table["um_per_px"], um_per_px))


class _Join:
    """Which line of the manifest each member has, and what that makes of slides: decided when all have been seen.

    `found` says of each row of the manifest whether its image is there.
    """

    def __init__(self, known: Manifest) -> None:
        self.known = known
        self.found = bytearray(len(known.table))
        self.remarks: list[str] = []
        self._slides = known.table["slide_id"].to_pylist()
        self._keys = list(known.rows)  # of the images, once they are found
        self._rows = array("q")  # of each member, in order; -1 without one
        self._dotted = array("q", [-1]) * len(known.table)  # of each line, the member that has it but for a `./`
        self._unlisted: dict[int, str] = {}  # members without a line, by ordinal
        self._named: dict[str, str] = {}  # from folders to the slide that images without one there belong to

    def see(self, members: Sequence[Member]) -> None:
        """Take up the next members."""
        for member in members:
            row = self.known.row_of(member.image_key)
            if row is not None and member.image_key in self.known.rows:
                self._give_back(row, member.image_key)
            elif row is not None and not self.found[row]:
                self._dotted[row] = member.ordinal
            if row is None or self.found[row]:  # `a.jpg` and `./a.jpg` are two images, and have one line
                self._unlisted[member.ordinal] = member.image_key
                row = -1
            else:
                self.found[row] = 1
            self._rows.append(row)

    def _give_back(self, row: int, key: str) -> None:
        """Take a line from `./a.jpg` where `a.jpg` comes, too: the name that is equal to it wins."""
        ordinal = self._dotted[row]
        if ordinal >= 0:
            self._rows[ordinal], self._dotted[row] = -1, -1
            self._unlisted[ordinal] = f"./{key}"
            self.found[row] = 0

    def match(self, own_names: Sequence[str]) -> None:
        """Match what is spelled otherwise."""
        keys = self._keys
        rows = [row for row in range(len(self.found)) if not self.found[row]]
        images = list(self._unlisted)
        if rows and images:
            found = match(
                [keys[row] for row in rows],
                list(self._unlisted.values()),
                any(self.found),
                own_names,
            )
            for image, row in found.rows.items():
                self._rows[images[image]] = rows[row]
                self.found[rows[row]] = 1
                self._keys[rows[row]] = self._unlisted.pop(images[image])
            for rule in found.rules:
                places = self.known.places([rows[row] for row in rule.rows])
                self.remarks.append(f"matched to their images {rule.words}: {places} of the manifest")

    def conclude(self) -> None:
        """Say what would match, and find the slides of images that the manifest gives none."""
        absent = [row for row, found in enumerate(self.found) if not found]
        if absent and self._unlisted:
            words = hint([self._keys[row] for row in absent], list(self._unlisted.values()))
            if words is not None:
                self.remarks.append(f"{len(absent):,} images that the manifest names are not in the source; {words}")
        if absent and len(absent) == len(self.found):
            self.remarks.append("no line of the manifest names an image of the source: is it the manifest of this one?")
        slides_in: dict[str, set[str]] = defaultdict(set)
        folders_of: dict[str, set[str]] = defaultdict(set)
        without = Counter(map(_folder, self._unlisted.values()))
        for row, key in enumerate(self._keys):
            if self.found[row]:
                slide, folder = self._slides[row], _folder(key)
                if slide is None:
                    without[folder] += 1
                else:
                    slides_in[folder].add(slide)
                    folders_of[slide].add(folder)
        belonging = apart = 0
        for folder, count in without.items():
            names = (folder, folder.rpartition("/")[2])
            theirs = [n for n in names if slides_in.get(folder) == {n} and folders_of[n] == {folder}]
            if theirs:
                self._named[folder] = theirs[0]
                belonging += count
            elif folder in folders_of:
                self._named[folder] = f"{folder} {APART}"
                apart += count
        if belonging:
            self.remarks.append(
                f"{belonging:,} images to which the manifest gives no slide lie in the folder of one of its slides, "
                "and are counted to that slide, without a patient"
            )
        if apart:
            self.remarks.append(
                f"{apart:,} images to which the manifest gives no slide lie in a folder that has the name of one of "
                f"its slides and is another: they make a slide of their own, whose name ends with {APART}"
            )

    def joined(self, table: pa.Table) -> pa.Table:
        """Return a shard of the plan with what the manifest says of its images."""
        first = table["ordinal"][0].as_py()
        rows = [row if row >= 0 else None for row in self._rows[first : first + len(table)]]
        taken = self.known.table.take(pa.array(rows, pa.int64()))
        for i, column in enumerate(table.schema):
            if column.name != "image_key" and column.name in taken.column_names:
                table = table.set_column(i, column, taken[column.name])
        if not self._named:
            return table
        pairs = zip(table["slide_id"].to_pylist(), table["image_key"].to_pylist(), strict=True)
        slides = [self._named.get(_folder(key)) if slide is None else slide for slide, key in pairs]
        i = table.schema.get_field_index("slide_id")
        return table.set_column(i, table.schema.field(i), pa.array(slides, pa.string()))


def _folder(key: str) -> str:
    return slide_of(None, key)[1]


def item_of(key: str) -> str:
    """Return the entry of the inbox that an image belongs to: the first part of its path."""
    return key.partition("/")[0]


def _manifest_of(known: Manifest, selection: Selection) -> Manifest:
    """Return what the manifest of an inbox says of the items of one run; of an archive, keys are those inside of it."""
    items, archive = set(selection.table["item"].to_pylist()), selection.archive
    item_in = items_by_spelling(items)
    rows: dict[str, int] = {}
    for key, row in known.rows.items():
        if item_in(key) is None or (archive is not None and "/" not in spelled(key)):
            continue
        inside = key if archive is None else _below_item(key)
        rows[inside if inside not in rows else key] = row
    kept = list(rows.values())
    table = known.table.take(pa.array(kept, pa.int64()))
    table = table.set_column(0, known.table.schema.field(0), pa.array(list(rows), pa.string()))
    lines = array("q", (known.lines[row] for row in kept))
    return Manifest(table, {key: row for row, key in enumerate(rows)}, lines, known.unit, known.remarks)


def _below_item(key: str) -> str:
    """Return a key without the name of its item in front."""
    item, slash, inside = key.partition("/")
    return inside if slash and "\\" not in key and spelled(item) not in ("", ".") else spelled(key).partition("/")[2]


def items_by_spelling(items: Iterable[str]) -> Callable[[str], str | None]:
    """Return a function from a key of the manifest to the item it belongs to, however it is spelled; None for none."""
    names = set(items)
    forms = Counter(folded(name) for name in names)
    single = {form: name for name in names if forms[form := folded(name)] == 1}

    def find(key: str) -> str | None:
        return item if (item := item_of(key)) in names else single.get(item_of(folded(key)))

    return find


def _excuse(known: Manifest, selection: Selection, found: bytearray) -> None:
    """Excuse what is lacking of an item that was taken before: this run has the rest, and that is not missing."""
    if selection.archive is not None:
        return
    expected = items_by_spelling(selection.expected_items())
    for key, row in known.rows.items():
        if expected(key) is None:
            found[row] = 1


def _own_names(uri: str) -> tuple[str, ...]:
    """Return what a manifest may call the source: its name, with and without the ending of an archive."""
    name = PurePosixPath(uri.rstrip("/")).name
    return name, re.sub(r"(\.tar)?\.(zip|tar|gz|tgz|bz2|xz|zst)$", "", name, flags=re.IGNORECASE)


def _digested(schema: pa.Schema) -> list[str]:
    """Return the columns that say what a member is; the others say where, which may depend on the shard size."""
    return [name for name in schema.names if name not in ("ordinal", "locator", "offset", "stored_bytes", "method")]


def _digest_members(table: pa.Table, digest: Any) -> None:
    for row in zip(*(table[name].to_pylist() for name in _digested(table.schema)), strict=True):
        digest.update(json.dumps(row).encode())


def _shard_table(members: list[Member], schema: pa.Schema, kind: SourceKind) -> pa.Table:
    """Return members as one row group, without what a manifest says."""
    columns: dict[str, Any] = {
        "ordinal": [m.ordinal for m in members],
        "image_key": [m.image_key for m in members],
        "locator": [m.locator for m in members],
        "offset": _spool_offsets(members) if kind is SourceKind.COMPRESSED_TAR else [m.offset for m in members],
        "stored_bytes": [m.stored_bytes for m in members],
        "size_bytes": [m.size_bytes for m in members],
        "method": [m.method for m in members],
        "identity": [m.identity for m in members],
        "refusal": [m.refusal for m in members],
    }
    columns |= {field.name: pa.nulls(len(members), field.type) for field in schema if field.name not in columns}
    return pa.table(columns, schema=schema)


def _spool_offsets(members: list[Member]) -> list[int]:
    """Return where each member starts in its shard's spool file, in bytes: refused ones take no room."""
    offsets, position = [], 0
    for member in members:
        offsets.append(position)
        position += 0 if member.refusal else member.size_bytes
    return offsets


def rewrite_plan(plan_file: Any, out: Sink, change: Callable[[pa.Table], pa.Table], **more: Any) -> PlanSummary:
    """Write a plan again with its members' rows changed, shard by shard; the summary gets their digest and `more`."""
    reader = pq.ParquetFile(plan_file)
    digest = hashlib.blake2b(digest_size=16)
    schema = reader.schema_arrow.remove_metadata()
    with pq.ParquetWriter(
        out, schema, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False
    ) as writer:
        for i in range(reader.num_row_groups):
            table = change(reader.read_row_group(i).replace_schema_metadata(None))
            _digest_members(table, digest)
            writer.write_table(table.combine_chunks())
        summary = replace(read_summary(plan_file), digest=digest.hexdigest(), **more)
        writer.add_key_value_metadata({_SUMMARY_KEY: json.dumps(asdict(summary))})
    return summary


# ---------------------------------------------------------------- reading it back


def read_summary(file: Sink) -> PlanSummary:
    """Read the summary of a plan, from the file's footer alone. Raises ConfigError where the file is no plan."""
    stored = (pq.read_metadata(file).metadata or {}).get(_SUMMARY_KEY.encode())
    if stored is None:
        raise ConfigError(f"{file} is not a plan: it carries no summary")
    fields = cast(dict[str, Any], json.loads(stored))
    source, remarks = fields.pop("source"), tuple(fields.pop("remarks", ()))
    return PlanSummary(source=Source(**{**source, "kind": SourceKind(source["kind"])}), remarks=remarks, **fields)


def shards(summary: PlanSummary) -> Iterator[Shard]:
    """Yield all shards of a plan, in order."""
    for ordinal in range(summary.shards):
        first = ordinal * summary.shard_size
        yield Shard(ordinal, first, min(summary.shard_size, summary.members - first))


def urgent_first(plan_file: pq.ParquetFile, summary: PlanSummary, rule: UrgentSettings) -> list[Shard]:
    """Return all shards, most urgent images first, else in order. Raises ConfigError for an unknown column."""
    listed = list(shards(summary))
    if not rule.image_keys and rule.column is None:
        return listed
    names = {name.removeprefix(META_PREFIX): name for name in plan_file.schema_arrow.names}
    if rule.column is not None and rule.column not in (*MANIFEST_COLUMNS, *names):
        raise ConfigError(
            f"urgent.column is {rule.column!r}, which the plan does not have: name one of "
            f"{', '.join(MANIFEST_COLUMNS)}, or one that meta_columns lists"
        )
    columns = list(dict.fromkeys(["image_key", *([names[rule.column]] if rule.column else [])]))
    counts = [_count_urgent(plan_file.read_row_group(s.ordinal, columns=columns), rule, columns[-1]) for s in listed]
    return sorted(listed, key=lambda shard: -counts[shard.ordinal])


def _count_urgent(table: pa.Table, rule: UrgentSettings, column: str) -> int:
    keys = table["image_key"].to_pylist()
    values = table[column].to_pylist() if rule.column else [None] * len(keys)
    return sum(
        any(fnmatchcase(key, pattern) for pattern in rule.image_keys)
        or (value is not None and any(fnmatchcase(str(value), pattern) for pattern in rule.values))
        for key, value in zip(keys, values, strict=True)
    )


def read_shard(plan_file: pq.ParquetFile, ordinal: int) -> list[Member]:
    """Read the members of one shard, in order, from its row group."""
    table = plan_file.read_row_group(ordinal)
    metas = [name for name in table.column_names if name.startswith(META_PREFIX)]
    values = {name: table[name].to_pylist() for name in table.column_names}
    meta = [tuple((name, values[name][i]) for name in metas) for i in range(len(table))]
    columns: list[list[Any]] = [values[name] for name in table.column_names if name not in metas]
    return list(map(Member, *columns, meta))
