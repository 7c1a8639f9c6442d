"""Turn diagnoses into rows: one of `predictions/` for each member, one of `cells/` for each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from leukoflow.core.errors import BundleError
from leukoflow.core.geometry import scale_of
from leukoflow.core.method import SegmentSettings
from leukoflow.models.bundle import Bundle, BundleSpec
from leukoflow.runs.records import ImageScale, Member, Status
from leukoflow.runs.schema import CELLS, PROBABILITY_OF, predictions_schema
from leukoflow.tasks.imaging.cells import CellTable, square_micrometres
from leukoflow.tasks.imaging.classify import ImageDiagnosis
from leukoflow.tasks.store.facts import Fact
from leukoflow.tasks.store.job import ShardJob


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the rows say of one image. `probabilities` and `prediction_set` are empty where nothing was diagnosed."""

    status: Status
    reason: str | None
    label: str | None = None
    probabilities: tuple[float, ...] = ()
    prediction_set: tuple[str, ...] = ()
    ood: float | None = None


def check_storable(bundle: Bundle) -> None:
    """Raise BundleError unless the bundle's classes are those of the stored tables' columns, in that order.

    Pages and exports read probabilities by their place, so another order would show those of another class.
    """
    classes = bundle.spec.classes
    if tuple(classes) != tuple(PROBABILITY_OF):
        raise BundleError(
            f"bundle {bundle.spec.name} names the classes {', '.join(classes)}; a run can store "
            f"{', '.join(PROBABILITY_OF)}: choose a bundle of these, in this order"
        )


def outcome(fact: Fact, diagnosis: ImageDiagnosis | None, classes: Sequence[str], scale: ImageScale) -> Outcome:
    """Say what became of an image: its diagnosis or abstention, else what ingest and quality say.

    Args:
        fact: of the image.
        diagnosis: of the image, None where there is none.
        classes: the bundle's, in the order of the diagnosis.
        scale: of the image; in doubt about it nothing is answered, whatever the numbers at this scale say.
    """
    if diagnosis is None:
        return Outcome(fact.status or Status.QUARANTINED, fact.reason)
    abstained = scale.doubt or diagnosis.abstained
    return Outcome(
        Status.ABSTAINED if abstained else Status.PREDICTED,
        abstained,
        classes[int(np.argmax(diagnosis.probabilities))],
        tuple(float(p) for p in diagnosis.probabilities),
        tuple(c for c, inside in zip(classes, diagnosis.prediction_set, strict=True) if inside),
        diagnosis.ood,
    )


def prediction_rows(
    job: ShardJob,
    members: Sequence[Member],
    facts: Sequence[Fact],
    diagnoses: Mapping[int, ImageDiagnosis],
    spec: BundleSpec,
) -> pa.Table:
    """Make the rows of `predictions/`: one per member, in plan order.

    Args:
        job: of the shard.
        members: of the shard.
        facts: of each member.
        diagnoses: of the diagnosed members, by ordinal.
        spec: of the bundle; its classes are in the order of the diagnoses, see `check_storable`.
    """
    classes = spec.classes
    columns = [PROBABILITY_OF[name] for name in classes]
    rows: list[dict[str, Any]] = []
    for member, fact in zip(members, facts, strict=True):
        diagnosis = diagnoses.get(fact.ordinal)
        found = outcome(fact, diagnosis, classes, member.scale)
        quality, scale = fact.quality, member.scale
        row: dict[str, Any] = {
            "run_id": job.run_id,
            "image_key": member.image_key,
            "source_uri": job.source.uri,
            "member_sha256": fact.sha256,
            "slide_id": member.slide_id,
            "patient_id": member.patient_id,
            "site": member.site,
            "scanner": member.scanner,
            "um_per_px": used_um_per_px(scale, fact, spec.method.segment),
            "um_per_px_source": None if fact.width is None else str(scale.source),
            "um_per_px_sd": None if fact.width is None else scale.sd,
            "um_per_px_stated": scale.stated,
            "status": str(found.status),
            "reason": found.reason,
            "n_cells": None if diagnosis is None else diagnosis.n_cells,
            "shard": job.shard.name,
            "zarr_index": fact.zarr_index,
            "n_tiles": fact.n_tiles,
            "width_px": fact.width,
            "height_px": fact.height,
            "focus": quality and quality.focus,
            "exposure": quality and quality.exposure,
            "quality_flags": [*quality.flags, *([scale.remark] if scale.remark else [])] if quality else None,
            "bundle_digest": job.bundle_digest,
        }
        if diagnosis is not None:
            row |= dict(zip(columns, found.probabilities, strict=True))
            row |= {
                "label": found.label,
                "confidence": max(found.probabilities),
                "prediction_set": list(found.prediction_set),
                "ood_score": found.ood,
            }
        row |= dict(member.meta)
        rows.append(row)
    return pa.Table.from_pylist(rows, predictions_schema(job.meta_columns))


def used_um_per_px(scale: ImageScale, fact: Fact, settings: SegmentSettings) -> float | None:
    """Return the micrometres per source pixel that an image was judged at, None where it was not decoded."""
    if not fact.width or not fact.height:
        return None
    if scale.um_per_px is not None:
        return scale.um_per_px
    return settings.um_per_px * scale_of(fact.width, fact.height, None, settings)


def cell_rows(
    table: CellTable,
    offsets: NDArray[np.int64],
    keys: Sequence[str],
    images: Sequence[ImageDiagnosis],
    to_source: NDArray[np.float32],
    um_per_px: Sequence[float | None],
    run_id: str = "",
) -> pa.Table:
    """Make the rows of `cells/`, one per cell.

    Args:
        table: cells, grouped by tile.
        offsets: int64 [t + 1] into the table.
        keys: the image of each tile [t].
        images: diagnoses of each image, in the same order.
        to_source: float32 [t, 2, 3], from a mask's pixel to the source pixel.
        um_per_px: micrometres per source pixel of each tile's image [t], None where unknown.
        run_id: of the run that writes them; empty outside of a run.
    """
    counts = np.diff(offsets)
    scales = np.repeat(np.array([math.nan if s is None else s for s in um_per_px], np.float64), counts)
    affines = np.repeat(to_source, counts, axis=0)
    columns = {f.name: getattr(table, f.name) for f in fields(CellTable) if f.name in CELLS.names}
    for name in ("nucleus_area", "cell_area"):
        area = square_micrometres(columns[f"{name}_px"], affines, scales)
        columns[f"{name}_um2"] = pa.array(area, pa.float32(), mask=np.isnan(area))
    columns["run_id"] = pa.array([run_id] * int(counts.sum()), pa.string())
    columns["image_key"] = np.repeat(np.array(keys, object), counts)
    columns["attention"] = np.concatenate([d.attention for d in images]) if images else np.zeros(0, np.float32)
    columns["zarr_index"] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in CELLS], schema=CELLS)
