"""Planning: from a source and an optional manifest to the frozen plan that every rerun uses."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leukoflow.core.errors import ConfigError, SourceError
from leukoflow.runs.ledger import Selection
from leukoflow.runs.records import PlanSummary, Source
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import DEFAULT_MEMBER_BYTES
from leukoflow.tasks.intake.manifest import read_manifest
from leukoflow.tasks.intake.manifest_file import PathLike
from leukoflow.tasks.intake.manifest_join import Join, excuse, manifest_of, own_names
from leukoflow.tasks.intake.patient_key import check_value
from leukoflow.tasks.intake.plan_file import SUMMARY_KEY, Sink, digest_members, plan_schema, rewrite_plan, shard_table


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
        known = known and manifest_of(known, selection)
        entries = selection.entries() if selection.archive is None else None
    if known is None:
        return _write_plan(source, out, Listing(source, member_bytes, entries), shard_size, um_per_px, meta_columns)
    join = Join(known)
    with tempfile.TemporaryFile() as draft:  # which line an image has is only known when all have been seen
        listing = Listing(source, member_bytes, entries)
        _write_plan(source, draft, listing, shard_size, None, meta_columns, join)
        join.match(own_names(source.uri))
        if selection is not None:
            excuse(known, selection, join.found)
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
    join: Join | None = None,
) -> PlanSummary:
    """Write the members of a listing as a plan that knows nothing else of them; `join` looks at each shard."""
    members, count = iter(listing), 0
    schema, digest = plan_schema(meta_columns), hashlib.blake2b(digest_size=16)
    with pq.ParquetWriter(
        out, schema, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False
    ) as writer:
        while shard := list(islice(members, shard_size)):
            table = _with_scale(shard_table(shard, schema, source.kind), um_per_px)
            if join is None:
                digest_members(table, digest)
            else:
                join.see(shard)
            writer.write_table(table)
            count += len(shard)
        if not count:
            why = f"; {listing.truncated}" if listing.truncated else ""
            raise SourceError(
                f"{source.uri} holds no images ({listing.ignored:,} folders and files that are not images){why}"
            )
        summary = PlanSummary(
            source, count, listing.ignored, 0, listing.truncated, shard_size, digest.hexdigest(), listing.remarks
        )
        writer.add_key_value_metadata({SUMMARY_KEY: json.dumps(asdict(summary))})
    return summary


def _with_scale(table: pa.Table, um_per_px: float | None) -> pa.Table:
    if um_per_px is None:
        return table
    i = table.schema.get_field_index("um_per_px")
    return table.set_column(i, table.schema.field(i), pc.fill_null(table["um_per_px"], um_per_px))
