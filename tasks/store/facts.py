"""Store what ingest and quality found out about the members of a shard, so that later stages need no pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import DIED, Quality, Shard, Status
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.store.job import ShardJob, write_parquet


@dataclass(frozen=True, slots=True)
class Fact:
    """What ingest and quality found out about one member."""

    ordinal: int
    status: Status | None  # None while the member goes on to the model
    reason: str | None
    sha256: str | None
    width: int | None
    height: int | None
    quality: Quality | None
    n_tiles: int
    zarr_index: int | None


FACTS = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("member_sha256", pa.string()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("focus", pa.float64()),
        pa.field("exposure", pa.float64()),
        pa.field("saturated", pa.float64()),
        pa.field("foreground", pa.float64()),
        pa.field("stain", pa.float64()),
        pa.field("stain_red", pa.float64()),
        pa.field("stain_blue", pa.float64()),
        pa.field("stain_density", pa.float64()),
        pa.field("flags", pa.list_(pa.string())),
        pa.field("reasons", pa.list_(pa.string())),
        pa.field("n_tiles", pa.int32(), nullable=False),
        pa.field("zarr_index", pa.int32()),
    ]
)
"""`fields/part-<shard>.parquet`: what ingest and quality found out, so that later stages need no pixels."""


def write_facts(job: ShardJob, facts: Sequence[Fact]) -> None:
    """Write the facts of a shard's members below the attempt."""
    rows = []
    for f in facts:
        q = f.quality
        rows.append(
            {
                "ordinal": f.ordinal,
                "status": f.status,
                "reason": f.reason,
                "member_sha256": f.sha256,
                "width_px": f.width,
                "height_px": f.height,
                "focus": q and q.focus,
                "exposure": q and q.exposure,
                "saturated": q and q.saturated,
                "foreground": q and q.foreground,
                "stain": q and q.stain,
                "stain_red": q and q.stain_red,
                "stain_blue": q and q.stain_blue,
                "stain_density": q and q.stain_density,
                "flags": q and list(q.flags),
                "reasons": q and list(q.reasons),
                "n_tiles": f.n_tiles,
                "zarr_index": f.zarr_index,
            }
        )
    write_parquet(job, RunKey.part(RunKey.FIELDS, job.shard.name), pa.Table.from_pylist(rows, FACTS))


def read_facts(root: str, shard: Shard) -> list[Fact]:
    """Read the committed facts of a shard's members, in order."""
    table = pq.read_table(io.BytesIO(open_storage(root).read(RunKey.part(RunKey.FIELDS, shard.name))), schema=FACTS)
    out = []
    for r in table.to_pylist():
        quality = None
        if r["focus"] is not None:
            quality = Quality(
                r["focus"], r["exposure"], r["saturated"], r["foreground"], r["stain"], r["stain_red"], r["stain_blue"],
                r["stain_density"], tuple(r["flags"]), tuple(r["reasons"]),
            )  # fmt: skip
        status = Status(r["status"]) if r["status"] else None
        out.append(
            Fact(
                r["ordinal"],
                status,
                r["reason"],
                r["member_sha256"],
                r["width_px"],
                r["height_px"],
                quality,
                r["n_tiles"],
                r["zarr_index"],
            )
        )
    return out


def known_culprits(job: ShardJob) -> tuple[tuple[int, str], ...]:
    """Return (ordinal, reason) of the members that the committed masks leave out because they kill their worker."""
    facts = read_facts(job.root, job.shard)
    return tuple((f.ordinal, f.reason) for f in facts if f.reason is not None and f.reason.startswith(DIED))
