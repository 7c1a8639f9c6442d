"""Planning: from a source and an optional manifest to the frozen plan that every rerun uses.

`plan.parquet` has one row per member in the source's order and one row group per shard, so that a shard is read
without the others, however many there are. The plan's summary travels in the file's metadata.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from leukoflow.config import UrgentSettings
from leukoflow.errors import ConfigError, SourceError
from leukoflow.ledger import Selection
from leukoflow.records import Member, PlanSummary, Shard, Source, SourceKind
from leukoflow.sources import DEFAULT_MEMBER_BYTES, Listing

MANIFEST_COLUMNS = ("slide_id", "patient_id", "site", "scanner", "um_per_px")
META_PREFIX = "meta_"
_SUMMARY_KEY = "leukoflow.plan"
_EXAMPLES = 3
_SHORTEST_PATIENT_ID = 4  # a shorter one is found inside keys by chance

Sink: TypeAlias = str | Path | BinaryIO
PathLike: TypeAlias = str | os.PathLike[str]

log = logging.getLogger(__name__)


def plan_schema(meta_columns: Sequence[str] = ()) -> pa.Schema:
    """Schema of plan.parquet: the fields of `Member`; every configured extra column is a `meta_<name>`."""
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
            *_manifest_fields(meta_columns),
        ]
    )


def missing_schema(meta_columns: Sequence[str] = ()) -> pa.Schema:
    """Schema of missing.parquet: what the manifest says of images that the source does not hold."""
    return pa.schema([pa.field("image_key", pa.string(), nullable=False), *_manifest_fields(meta_columns)])


def _manifest_fields(meta_columns: Sequence[str]) -> list[pa.Field]:
    names = [*MANIFEST_COLUMNS, *(META_PREFIX + name for name in meta_columns)]
    return [pa.field(name, pa.float64() if name == "um_per_px" else pa.string()) for name in names]


# ---------------------------------------------------------------- the manifest


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of images beforehand: `table` as `missing_schema` has it, `rows` from image key to its row.

    Patients are pseudonyms already.
    """

    table: pa.Table
    rows: Mapping[str, int]

    def row_of(self, image_key: str) -> int | None:
        """Row of an image. A leading `./`, as tar likes to write it, makes no difference."""
        row = self.rows.get(image_key)
        if row is None and image_key.startswith("./"):
            row = self.rows.get(image_key[2:])
        return row


def read_manifest(path: PathLike, meta_columns: Sequence[str] = (), patient_key: bytes | None = None) -> Manifest:
    """Read a CSV (comma, semicolon or tab; UTF-8) or Parquet manifest; columns nobody asked for are dropped.

    Raises ConfigError naming the line or the keys where a key is absent or repeated, a scale is no positive number,
    a configured column is absent, or patients are named and `patient_key` is None.
    """
    if clash := sorted({"image_key", *MANIFEST_COLUMNS} & set(meta_columns)):
        raise ConfigError(f"meta_columns names {', '.join(clash)}, which every manifest may have: leave it out there")
    names = _column_names(path)
    if "image_key" not in names:
        raise ConfigError(f"{path} has no column image_key, only {', '.join(names) or 'none'}: name the images in one")
    if absent := [name for name in meta_columns if name not in names]:
        raise ConfigError(f"{path} lacks {', '.join(absent)}, which meta_columns asks for: it has {', '.join(names)}")
    wanted = [name for name in ("image_key", *MANIFEST_COLUMNS, *meta_columns) if name in names]
    table = _read_columns(path, wanted)
    rows = _index(path, table["image_key"])
    columns = {name: table[name] for name in wanted}
    if "um_per_px" in columns:
        columns["um_per_px"] = _scales(path, columns["um_per_px"])
    patients = columns.get("patient_id")
    if patients is not None and patients.null_count < len(patients):
        if not patient_key:
            raise ConfigError(
                f"{path} names patients, and there is no key to pseudonymise them: set LEUKOFLOW_PATIENT_KEY or the "
                "Prefect Secret block that holds it, or take the column patient_id out"
            )
        _warn_of_patients_in_keys(table)
        columns["patient_id"] = _pseudonyms(patients, patient_key)
    schema = missing_schema(meta_columns)
    arrays = [columns.get(field.name.removeprefix(META_PREFIX)) for field in schema]
    filled = [pa.nulls(len(table), field.type) if a is None else a for field, a in zip(schema, arrays, strict=True)]
    return Manifest(pa.table(filled, schema=schema).combine_chunks(), rows)


def pseudonym(patient_id: str, key: bytes) -> str:
    """HMAC-SHA-256 of a patient's id: the same patient stays recognisable, and nobody without the key finds out who."""
    return "p_" + hmac.new(key, patient_id.encode(), hashlib.sha256).hexdigest()[:32]


def _is_parquet(path: PathLike) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _csv_dialect(path: PathLike) -> pa_csv.ParseOptions:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    return pa_csv.ParseOptions(delimiter=max(",;\t", key=header.count), newlines_in_values=True)


@contextmanager
def _manifest_errors(path: PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the manifest {path} cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"the manifest {path} is neither UTF-8 CSV nor Parquet: {error}") from error


def _column_names(path: PathLike) -> list[str]:
    with _manifest_errors(path):
        if _is_parquet(path):
            return list(pq.read_schema(path).names)
        with pa_csv.open_csv(path, parse_options=_csv_dialect(path)) as reader:
            return list(reader.schema.names)


def _read_columns(path: PathLike, names: list[str]) -> pa.Table:
    with _manifest_errors(path):
        if _is_parquet(path):
            table = pq.read_table(path, columns=names)
            kept = [table[n] if n == "um_per_px" else table[n].cast(pa.string()) for n in names]
            return pa.table(kept, names=names)
        options = pa_csv.ConvertOptions(
            include_columns=names, column_types=dict.fromkeys(names, pa.string()), null_values=[""],
            strings_can_be_null=True,
        )  # fmt: skip
        return pa_csv.read_csv(path, parse_options=_csv_dialect(path), convert_options=options)


def manifest_keys(path: PathLike) -> list[str]:
    """The images that a manifest names; what else it says is not looked at. Raises ConfigError."""
    if "image_key" not in _column_names(path):
        raise ConfigError(f"{path} has no column image_key: name the images in one")
    return list(_index(path, _read_columns(path, ["image_key"])["image_key"]))


def _index(path: PathLike, keys: pa.ChunkedArray) -> dict[str, int]:
    rows: dict[str, int] = {}
    for chunk in keys.chunks:
        base = len(rows)
        for i, key in enumerate(chunk.to_pylist()):
            if key is None:
                raise ConfigError(f"{path}, line {base + i + 2}: no image_key; name the image or take the line out")
            rows.setdefault(key, base + i)
        if len(rows) < base + len(chunk):
            counts = Counter(keys.to_pylist())
            repeated = [key for key, count in counts.items() if count > 1]
            more = f" and {len(repeated) - _EXAMPLES} more" if len(repeated) > _EXAMPLES else ""
            examples = ", ".join(repeated[:_EXAMPLES])
            raise ConfigError(f"{path} has more than one line for {examples}{more}: keep one each")
    return rows


def _scales(path: PathLike, values: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        if pa.types.is_string(values.type):
            values = pc.utf8_trim_whitespace(values)
        scales = values.cast(pa.float64())
        if pc.all(pc.and_(pc.is_finite(scales), pc.greater(scales, 0.0))).as_py() in (True, None):
            return scales
    except pa.ArrowException:
        pass
    for i, value in enumerate(values.to_pylist()):
        try:
            good = value is None or 0.0 < float(value) < float("inf")
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"{path}, line {i + 2}: um_per_px is {value!r}, not a positive number like 0.42")
    raise ConfigError(f"{path}: um_per_px has the type {values.type}, not numbers")


def _pseudonyms(patients: pa.ChunkedArray, key: bytes) -> pa.Array:
    encoded = patients.combine_chunks().dictionary_encode()
    names = pa.array([pseudonym(patient, key) for patient in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)


def _warn_of_patients_in_keys(table: pa.Table) -> None:
    count = 0
    for batch in table.select(["image_key", "patient_id"]).to_batches(max_chunksize=65536):
        pairs = zip(batch["image_key"].to_pylist(), batch["patient_id"].to_pylist(), strict=True)
        count += sum(p is not None and len(p) >= _SHORTEST_PATIENT_ID and p in key for key, p in pairs)
    if count:
        log.warning("%d image names contain their patient's id, and names are kept as they are: rename them", count)


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
) -> PlanSummary:
    """List the source once and write its plan.

    `um_per_px` applies where the manifest gives no scale. `member_bytes` is the largest member that will be read.
    Images that the manifest names and the source does not hold go to `missing_out`, which is left alone if there are
    none. With a `selection`, only what it has taken is a member, and of the manifest, whose keys then begin with the
    name of an item of the inbox, only what it says of the items that were taken counts. Memory is bounded by the names
    (about 0.5 KB a member), not by the images.

    Raises SourceError where there is no member at all, ConfigError for a manifest that cannot be used. Whoever calls
    publishes the file only after this has returned.
    """
    if shard_size < 1:
        raise ConfigError(f"shard_size is {shard_size}: it must be at least 1")
    known = read_manifest(manifest, meta_columns, patient_key) if manifest is not None else None
    entries = None
    if selection is not None:
        known = known and _manifest_of(known, selection)
        entries = selection.entries() if selection.archive is None else None
    listing = Listing(source, member_bytes, entries)
    members = iter(listing)
    schema = plan_schema(meta_columns)
    found = bytearray(len(known.rows)) if known else bytearray()
    digest, count = hashlib.blake2b(digest_size=16), 0
    with pq.ParquetWriter(
        out, schema, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False
    ) as writer:
        while shard := list(islice(members, shard_size)):
            table = _shard_table(shard, schema, source.kind, known, um_per_px, found)
            _digest_members(table, digest)
            writer.write_table(table)
            count += len(shard)
        if not count:
            why = f"; {listing.truncated}" if listing.truncated else ""
            raise SourceError(f"{source.uri} holds no images ({listing.ignored:,} folders and litter){why}")
        if selection is not None and known is not None:
            _excuse(known, selection, found)
        missing = len(found) - sum(found)
        summary = PlanSummary(
            source, count, listing.ignored, missing, listing.truncated, shard_size, digest.hexdigest(), listing.remarks
        )
        writer.add_key_value_metadata({_SUMMARY_KEY: json.dumps(asdict(summary))})
    if known and missing and missing_out is not None:
        absent = known.table.filter(pa.array([not here for here in found], pa.bool_()))
        pq.write_table(absent, missing_out, compression="zstd", use_dictionary=False)
    return summary


def item_of(key: str) -> str:
    """The entry of the inbox that an image belongs to: the first part of its path."""
    return key.partition("/")[0]


def _manifest_of(known: Manifest, selection: Selection) -> Manifest:
    """What the manifest of an inbox says of the items of one run; of an archive, keys are those inside of it."""
    items, archive = set(selection.table["item"].to_pylist()), selection.archive
    kept = [(key, row) for key, row in known.rows.items() if item_of(key) in items]
    if archive is not None:
        kept = [(key.removeprefix(archive + "/"), row) for key, row in kept if key != archive]
    table = known.table.take(pa.array([row for _, row in kept], pa.int64()))
    keys = [key for key, _ in kept]
    table = table.set_column(0, known.table.schema.field(0), pa.array(keys, pa.string()))
    return Manifest(table, {key: row for row, key in enumerate(keys)})


def _excuse(known: Manifest, selection: Selection, found: bytearray) -> None:
    """Of an item that was taken before, this run has the rest, and what it lacks is not missing."""
    if selection.archive is not None:
        return
    expected = selection.expected_items()
    for key, row in known.rows.items():
        if item_of(key) not in expected:
            found[row] = 1


def _digested(schema: pa.Schema) -> list[str]:
    """Columns that say what a member is; the others say where it is, which may depend on the shard size."""
    return [name for name in schema.names if name not in ("ordinal", "locator", "offset", "stored_bytes", "method")]


def _digest_members(table: pa.Table, digest: Any) -> None:
    for row in zip(*(table[name].to_pylist() for name in _digested(table.schema)), strict=True):
        digest.update(json.dumps(row).encode())


def _shard_table(
    members: list[Member],
    schema: pa.Schema,
    kind: SourceKind,
    known: Manifest | None,
    um_per_px: float | None,
    found: bytearray,
) -> pa.Table:
    """One row group. Marks the manifest's rows that it used in `found`."""
    rows = [known.row_of(m.image_key) if known else None for m in members]
    for row in rows:
        if row is not None:
            found[row] = 1
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
    extra = [field for field in schema if field.name not in columns]
    if known:
        taken = known.table.take(pa.array(rows, pa.int64()))
        columns |= {field.name: taken[field.name] for field in extra}
    else:
        columns |= {field.name: pa.nulls(len(members), field.type) for field in extra}
    if um_per_px is not None:
        columns["um_per_px"] = pc.fill_null(columns["um_per_px"], um_per_px)
    return pa.table(columns, schema=schema)


def _spool_offsets(members: list[Member]) -> list[int]:
    """Where each member starts in its shard's spool file: refused ones take no room."""
    offsets, position = [], 0
    for member in members:
        offsets.append(position)
        position += 0 if member.refusal else member.size_bytes
    return offsets


def rewrite_plan(plan_file: Any, out: Sink, change: Callable[[pa.Table], pa.Table]) -> PlanSummary:
    """Write a plan anew with its members' rows changed, shard by shard; the summary gets the digest of these."""
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
        summary = replace(read_summary(plan_file), digest=digest.hexdigest())
        writer.add_key_value_metadata({_SUMMARY_KEY: json.dumps(asdict(summary))})
    return summary


# ---------------------------------------------------------------- reading it back


def read_summary(file: Sink) -> PlanSummary:
    """The summary of a plan, from the file's footer alone. Raises ConfigError where the file is no plan."""
    stored = (pq.read_metadata(file).metadata or {}).get(_SUMMARY_KEY.encode())
    if stored is None:
        raise ConfigError(f"{file} is not a plan: it carries no summary")
    fields = cast(dict[str, Any], json.loads(stored))
    source = fields.pop("source")
    fields["remarks"] = tuple(fields.get("remarks", ()))  # plans of older versions have none
    return PlanSummary(source=Source(**{**source, "kind": SourceKind(source["kind"])}), **fields)


def shards(summary: PlanSummary) -> Iterator[Shard]:
    """All shards of a plan, in order."""
    for ordinal in range(summary.shards):
        first = ordinal * summary.shard_size
        yield Shard(ordinal, first, min(summary.shard_size, summary.members - first))


def urgent_first(plan_file: pq.ParquetFile, summary: PlanSummary, rule: UrgentSettings) -> list[Shard]:
    """All shards, those with most urgent images first, else in order. Raises ConfigError for an unknown column."""
    listed = list(shards(summary))
    if not rule.image_keys and rule.column is None:
        return listed
    names = {name.removeprefix(META_PREFIX): name for name in plan_file.schema_arrow.names}
    if rule.column is not None and rule.column not in (*MANIFEST_COLUMNS, *names):
        raise ConfigError(
            f"urgent.column is {rule.column!r}, which the plan does not have: name one of "
            f"{', '.join(MANIFEST_COLUMNS)}, or one that meta_columns lists"
        )
    columns = ["image_key"] + ([names[rule.column]] if rule.column else [])
    counts = [_count_urgent(plan_file.read_row_group(s.ordinal, columns=columns), rule) for s in listed]
    return sorted(listed, key=lambda shard: -counts[shard.ordinal])


def _count_urgent(table: pa.Table, rule: UrgentSettings) -> int:
    keys = table["image_key"].to_pylist()
    values = table.column(1).to_pylist() if rule.column else [None] * len(keys)
    return sum(
        any(fnmatchcase(key, pattern) for pattern in rule.image_keys)
        or (value is not None and any(fnmatchcase(str(value), pattern) for pattern in rule.values))
        for key, value in zip(keys, values, strict=True)
    )


def read_shard(plan_file: pq.ParquetFile, ordinal: int) -> list[Member]:
    """Members of one shard, in order, from its row group."""
    table = plan_file.read_row_group(ordinal)
    metas = [name for name in table.column_names if name.startswith(META_PREFIX)]
    values = {name: table[name].to_pylist() for name in table.column_names}
    meta = [tuple((name, values[name][i]) for name in metas) for i in range(len(table))]
    columns: list[list[Any]] = [values[name] for name in table.column_names if name not in metas]
    return list(map(Member, *columns, meta))
