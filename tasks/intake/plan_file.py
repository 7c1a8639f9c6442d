"""`plan.parquet`: one row per member in the source's order and one row group per shard, so that a shard is read alone.

The plan's summary travels in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.config import UrgentSettings
from leukoflow.core.errors import ConfigError
from leukoflow.runs.records import Member, PlanSummary, Shard, Source, SourceKind
from leukoflow.tasks.intake.manifest import MANIFEST_COLUMNS, META_PREFIX, manifest_fields

SUMMARY_KEY = "leukoflow.plan"

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


# --- writing it -------------------------------------------------------------------------------------------------------


def shard_table(members: list[Member], schema: pa.Schema, kind: SourceKind) -> pa.Table:
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


def _digested(schema: pa.Schema) -> list[str]:
    """Return the columns that say what a member is; the others say where, which may depend on the shard size."""
    return [name for name in schema.names if name not in ("ordinal", "locator", "offset", "stored_bytes", "method")]


def digest_members(table: pa.Table, digest: Any) -> None:
    """Add the members of a shard to a plan's digest."""
    for row in zip(*(table[name].to_pylist() for name in _digested(table.schema)), strict=True):
        digest.update(json.dumps(row).encode())


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
            digest_members(table, digest)
            writer.write_table(table.combine_chunks())
        summary = replace(read_summary(plan_file), digest=digest.hexdigest(), **more)
        writer.add_key_value_metadata({SUMMARY_KEY: json.dumps(asdict(summary))})
    return summary


# --- reading it back --------------------------------------------------------------------------------------------------


def read_summary(file: Sink) -> PlanSummary:
    """Read the summary of a plan, from the file's footer alone. Raises ConfigError where the file is no plan."""
    stored = (pq.read_metadata(file).metadata or {}).get(SUMMARY_KEY.encode())
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
