"""Measure segmentation against masks and boxes that were drawn by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from leukoflow.models.bundle import Bundle
from leukoflow.tasks.evaluation.images import masks_of
from leukoflow.tasks.training.data import (
    HELD_OUT_EVERY,
    MASKS_ZIP,
    masked_cell_names,
    read_boxed_fields,
    read_masked_cells,
)


def dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return the Dice coefficient of two masks; 1 when both are empty."""
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


def matched_boxes(found: NDArray[np.float32], truth: NDArray[np.float32], iou: float = 0.5) -> int:
    """Return the largest number of pairs of boxes [k, 4] (xmin, ymin, xmax, ymax) that overlap by at least `iou`."""
    if not len(found) or not len(truth):
        return 0
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(2)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(1) for b in (found, truth)]
    overlap = common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-9)
    first, second = linear_sum_assignment(-(overlap >= iou).astype(np.float64))
    return int((overlap[first, second] >= iou).sum())


def segmentation_metrics(bundle: Bundle, data_dir: Path, device: str = "cpu") -> dict[str, float]:
    """Return Dice on held-out masks by source, at source resolution, and F1 of white cells on held-out boxes."""
    names = masked_cell_names(data_dir / MASKS_ZIP)
    pairs: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {}
    for i, (name, (image, truth)) in enumerate(zip(names, read_masked_cells(data_dir / MASKS_ZIP), strict=True)):
        if i % HELD_OUT_EVERY == 0:
            pairs.setdefault(name.split("/")[0], []).append((masks_of(bundle, image, device)[0], truth))
    out: dict[str, float] = {}
    for source, both in sorted(pairs.items()):
        for kind, least in (("nucleus", 2), ("cell", 1)):
            scores = [dice(found >= least, truth >= least) for found, truth in both]
            out[f"dice_{kind}_{source}"] = float(np.mean(scores))
        out[f"images_{source}"] = len(both)
    hits = found_total = truth_total = 0
    for i, field in enumerate(read_boxed_fields(data_dir)):
        if i % HELD_OUT_EVERY == 0:
            table = masks_of(bundle, field.rgb, device)[1]
            boxes = np.stack([table.bbox_xmin_px, table.bbox_ymin_px, table.bbox_xmax_px, table.bbox_ymax_px], axis=1)
            hits += matched_boxes(boxes, field.boxes)
            found_total, truth_total = found_total + len(boxes), truth_total + len(field.boxes)
    out["boxes_f1"] = 2 * hits / max(found_total + truth_total, 1)
    out["boxes_precision"], out["boxes_recall"] = hits / max(found_total, 1), hits / max(truth_total, 1)
    return out
