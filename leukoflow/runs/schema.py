"""Arrow schemas of everything that a run publishes in Parquet. Units are in the column names; strings are plain."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from leukoflow.runs.records import CLASSES

SCHEMA_VERSION = 3
"""Of what a run stores. Since 2, `cells/` and slides name their run, areas are given in square micrometres as well, and
labels are counted over the predicted images alone. Since 3, `um_per_px` of the predictions is the scale in use, with
its source, uncertainty and what was stated; before, it was what was stated."""

PROBABILITY_OF = dict(zip(CLASSES, ("prob_benign", "prob_early", "prob_pre", "prob_pro"), strict=True))
"""Class to the column of its probability. What is stored is bound to these four classes: the tables by their columns,
receipts and manifests by counting labels in the order of `CLASSES`. All else takes the classes from the bundle."""

PREDICTIONS = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("image_key", pa.string(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("member_sha256", pa.string()),
        pa.field("slide_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("site", pa.string()),
        pa.field("scanner", pa.string()),
        pa.field("um_per_px", pa.float64()),
        pa.field("um_per_px_source", pa.string()),
        pa.field("um_per_px_sd", pa.float64()),
        pa.field("um_per_px_stated", pa.float64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("label", pa.string()),
        pa.field("confidence", pa.float64()),
        pa.field("prob_benign", pa.float64()),
        pa.field("prob_early", pa.float64()),
        pa.field("prob_pre", pa.float64()),
        pa.field("prob_pro", pa.float64()),
        pa.field("prediction_set", pa.list_(pa.string())),
        pa.field("ood_score", pa.float64()),
        pa.field("n_cells", pa.int32()),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("zarr_index", pa.int32()),
        pa.field("n_tiles", pa.int32(), nullable=False),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("focus", pa.float64()),
        pa.field("exposure", pa.float64()),
        pa.field("quality_flags", pa.list_(pa.string())),
        pa.field("bundle_digest", pa.string(), nullable=False),
    ]
)
"""One row for every member of the source."""

CELLS = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("image_key", pa.string(), nullable=False),
        pa.field("cell_id", pa.int32(), nullable=False),
        pa.field("bbox_xmin_px", pa.float32(), nullable=False),
        pa.field("bbox_ymin_px", pa.float32(), nullable=False),
        pa.field("bbox_xmax_px", pa.float32(), nullable=False),
        pa.field("bbox_ymax_px", pa.float32(), nullable=False),
        pa.field("centroid_x_px", pa.float32(), nullable=False),
        pa.field("centroid_y_px", pa.float32(), nullable=False),
        pa.field("nucleus_area_px", pa.float32(), nullable=False),
        pa.field("cell_area_px", pa.float32(), nullable=False),
        pa.field("nucleus_area_um2", pa.float32()),
        pa.field("cell_area_um2", pa.float32()),
        pa.field("nc_ratio", pa.float32(), nullable=False),
        pa.field("eccentricity", pa.float32(), nullable=False),
        pa.field("touches_border", pa.bool_(), nullable=False),
        pa.field("attention", pa.float32(), nullable=False),
        pa.field("zarr_index", pa.int32(), nullable=False),
    ]
)
"""One row per cell. Boxes and centroids are in source pixels; `_area_px` counts pixels of the mask, `_area_um2` is the
same area in square micrometres, null where the image's scale is not known."""

SLIDES = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("grouping", pa.string(), nullable=False),
        pa.field("patient_id", pa.string()),
        pa.field("site", pa.string()),
        pa.field("urgency", pa.float64(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("malignant_score", pa.float64()),
        pa.field("prob_benign", pa.float64()),
        pa.field("prob_early", pa.float64()),
        pa.field("prob_pre", pa.float64()),
        pa.field("prob_pro", pa.float64()),
        pa.field("n_images", pa.int32(), nullable=False),
        pa.field("n_predicted", pa.int32(), nullable=False),
        pa.field("n_abstained", pa.int32(), nullable=False),
        pa.field("n_rejected", pa.int32(), nullable=False),
        pa.field("n_quarantined", pa.int32(), nullable=False),
        pa.field("n_malignant", pa.int32(), nullable=False),
        pa.field("n_cells", pa.int64(), nullable=False),
        pa.field("top_image_key", pa.string()),
        pa.field("top_confidence", pa.float64()),
    ]
)
"""One row per slide, most urgent first. `grouping` says where the slide id came from: `manifest` or `folder`."""

DUPLICATES = pa.schema(
    [
        pa.field("member_sha256", pa.string(), nullable=False),
        pa.field("image_key", pa.string(), nullable=False),
        pa.field("patient_id", pa.string()),
        pa.field("shard", pa.string(), nullable=False),
    ]
)
"""Identical images that belong to more than one patient: a mix-up to clear before anything is acted upon."""


VERDICTS = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("image_key", pa.string()),
        pa.field("slide_id", pa.string()),
        pa.field("grouping", pa.string()),
        pa.field("action", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("comment", pa.string()),
        pa.field("who", pa.string(), nullable=False),
        pa.field("at", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("seen_status", pa.string()),
        pa.field("seen_label", pa.string()),
        pa.field("seen_confidence", pa.float64()),
        pa.field("seen_bundle_digest", pa.string()),
        pa.field("salt", pa.string(), nullable=False),
    ]
)
"""What people said of a field (`image_key`) or a slide (`slide_id`, `grouping`), and of which prediction."""


SINCE_3 = ("um_per_px_source", "um_per_px_sd", "um_per_px_stated")
"""Columns of `predictions/` that runs of schema 1 and 2 do not have."""

SINCE_2 = ("run_id", "nucleus_area_um2", "cell_area_um2")
"""Columns of `cells/` that runs of schema 1 do not have."""


def cells_schema(schema_version: int) -> pa.Schema:
    """Return the schema of `cells/` in a run whose manifest has this schema version."""
    if schema_version >= 2:
        return CELLS
    return pa.schema([f for f in CELLS if f.name not in SINCE_2])


def as_cells(table: pa.Table, run_id: str) -> pa.Table:
    """Return rows of a run's `cells/` in the columns of `CELLS`; what an older run does not have is null."""
    known = {"run_id": pa.array([run_id] * len(table), pa.string())} if "run_id" not in table.column_names else {}
    absent = {f.name: pa.nulls(len(table), f.type) for f in CELLS if f.name not in table.column_names} | known
    columns = [absent[f.name] if f.name in absent else table[f.name] for f in CELLS]
    return pa.table(columns, schema=CELLS)


def predictions_schema(meta_columns: Sequence[str] = (), schema_version: int = SCHEMA_VERSION) -> pa.Schema:
    """Return the schema of `predictions/` in a run whose manifest has this schema version.

    The manifest columns that the settings list come last, as `meta_<name>`.
    """
    schema = PREDICTIONS
    if schema_version < 3:
        schema = pa.schema([f for f in schema if f.name not in SINCE_3])
    for name in meta_columns:
        schema = schema.append(pa.field(f"meta_{name}", pa.string()))
    return schema
