"""Measuring: the inference path without orchestration, metrics with intervals, baselines, masks and boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from leukoflow.core.geometry import field_geometry
from leukoflow.models.bundle import Bundle
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.evaluation.statistics import (
    reliability,
    risk_coverage,
    sensitivity_at_specificity,
    specificity_at_sensitivity,
)
from leukoflow.tasks.imaging.classify import Verdict, diagnose, pool_tiles
from leukoflow.tasks.imaging.normalize import normalize
from leukoflow.tasks.imaging.segment import CellTable
from leukoflow.tasks.inference.blocks import Block, extent, extract_tiles, inference_batches, segment_tiles
from leukoflow.tasks.training.data import (
    HELD_OUT_EVERY,
    MASKS_ZIP,
    masked_cell_names,
    padded,
    read_boxed_fields,
    read_masked_cells,
    scaled_to_field,
)
from leukoflow.tasks.training.features import Features

RESAMPLES = 1000
BINS = 15


def diagnose_images(
    bundle: Bundle, images: Sequence[NDArray[np.uint8]], device: str = "cpu", chunk: int = 64
) -> list[Verdict]:
    """Verdicts of RGB images uint8 [H, W, 3] of any size, by the same functions that a nightly run calls.

    The quality stage is left out: what it would reject is judged here too.
    """
    segmenter, hybrid, classifier = bundle.segmenter(device), bundle.hybrid(device), bundle.classifier(device)
    method = bundle.spec.method
    verdicts: list[Verdict] = []
    for start in range(0, len(images), chunk):
        block, n_tiles = image_block(images[start : start + chunk], bundle)
        _, cells, table, offsets = segment_tiles(segmenter, block, method.segment, device)
        whole, single = extract_tiles(hybrid, block, cells, table, offsets, method.features, device)
        area = table.cell_area_px.astype(np.float32)
        found = diagnose(bundle, classifier, whole, single, offsets, area, device)
        verdicts += pool_tiles(bundle, found, offsets, n_tiles)
    return verdicts


def image_features(
    bundle: Bundle, images: Sequence[NDArray[np.uint8]], device: str = "cpu", chunk: int = 64
) -> Features:
    """Features of RGB images that are one field each, by the same functions that a nightly run calls."""
    segmenter, hybrid, method = bundle.segmenter(device), bundle.hybrid(device), bundle.spec.method
    whole, single, areas, counts = [], [], [], [0]
    for start in range(0, len(images), chunk):
        block, _ = image_block(images[start : start + chunk], bundle)
        _, cells, table, offsets = segment_tiles(segmenter, block, method.segment, device)
        field, cell = extract_tiles(hybrid, block, cells, table, offsets, method.features, device)
        whole.append(field)
        single.append(cell)
        areas.append(table.cell_area_px.astype(np.float32))
        counts += np.diff(offsets).tolist()
    field, cell = np.concatenate(whole), np.concatenate(single)
    return Features(field, cell, np.cumsum(counts), np.concatenate(areas))


def image_block(images: Sequence[NDArray[np.uint8]], bundle: Bundle) -> tuple[Block, NDArray[np.int64]]:
    """Images brought to the model's scale, normalised and tiled; and the number of tiles of each."""
    method = bundle.spec.method
    side = method.segment.field_px
    tiles, owners, origins, cores, extents, affines, counts = [], [], [], [], [], [], []
    for i, image in enumerate(images):
        geometry = field_geometry(image.shape[1], image.shape[0], None, method.segment)
        image = scaled_to_field(image, method)
        normal = normalize(image, method.normalize)
        for (x, y), core, affine in zip(geometry.origins, geometry.cores, geometry.to_source(), strict=True):
            tiles.append(padded(normal[y : y + side, x : x + side], side))
            owners.append(i)
            origins.append((x, y))
            cores.append(core)
            extents.append(extent(normal, (x, y), side))
            affines.append(affine)
        counts.append(len(geometry.origins))
    who = np.array(owners, np.int32)
    block = Block(
        first=0,
        next=len(images),
        facts=(),
        tiles=np.stack(tiles),
        batches=inference_batches(who, method.features.field_batch),
        owners=who,
        origins=np.array(origins, np.int32),
        cores=np.array(cores, np.int32),
        extents=np.array(extents, np.int32),
        to_source=np.stack(affines),
        timings=(),
    )
    return block, np.array(counts, np.int64)


def expected_calibration_error(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """ECE of the top label over equally wide bins (Guo et al. 2017)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = [
        (place == b).mean() * abs(right[place == b].mean() - confidence[place == b].mean())
        for b in range(BINS)
        if (place == b).any()
    ]
    return float(sum(gaps))


def auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks (Mann and Whitney 1947); NaN where one side is empty."""
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def confusion(predicted: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts [true class, predicted class]."""
    k = len(CLASSES)
    return np.bincount(y * k + predicted, minlength=k * k).reshape(k, k)


def point_metrics(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, macro-F1 and macro one-vs-rest AUC over the classes that occur, MCC (Gorodkin 2004) and ECE."""
    table = confusion(probabilities.argmax(1), y).astype(np.float64)
    n, hits, truth, answers = table.sum(), np.trace(table), table.sum(1), table.sum(0)
    occurs = truth > 0
    f1 = 2 * np.diag(table) / np.maximum(truth + answers, 1)
    spread = np.sqrt((n**2 - (answers**2).sum()) * (n**2 - (truth**2).sum()))
    aucs = np.array([auc(probabilities[:, k], y == k) for k in np.flatnonzero(occurs)])
    return {
        "accuracy": float(hits / n),
        "macro_f1": float(f1[occurs].mean()),
        "mcc": float((hits * n - (answers * truth).sum()) / spread) if spread else 0.0,
        "auc_ovr": float(np.nanmean(aucs)) if np.isfinite(aucs).any() else float("nan"),
        "ece": expected_calibration_error(probabilities, y),
    }


def class_metrics(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Sensitivity, specificity, AUC and number of fields per class."""
    predicted = probabilities.argmax(1)
    out: dict[str, dict[str, float]] = {}
    for k, name in enumerate(CLASSES):
        own = y == k
        out[name] = {
            "fields": int(own.sum()),
            "sensitivity": float((predicted[own] == k).mean()) if own.any() else float("nan"),
            "specificity": float((predicted[~own] != k).mean()) if (~own).any() else float("nan"),
            "auc": auc(probabilities[:, k], own),
        }
    return out


def cluster_bootstrap(
    statistic: Callable[[NDArray[np.int64]], dict[str, float]], clusters: Sequence[str], seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals from drawing whole clusters with replacement.

    `statistic` maps row numbers to named values. With few clusters the intervals are wide, which is the truth.
    """
    rng = np.random.default_rng(seed)
    names = sorted(set(clusters))
    members = [np.flatnonzero(np.array(clusters) == name) for name in names]
    draws: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        rows = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        for key, value in statistic(rows).items():
            draws.setdefault(key, []).append(value)
    return {
        key: (float(np.nanpercentile(values, 2.5)), float(np.nanpercentile(values, 97.5)))
        for key, values in draws.items()
    }


def histogram_features(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """6x6x6 colour histogram with channel means and deviations: float32 [222]. The baseline that knows no cells."""
    histogram = cv2.calcHist([rgb], [0, 1, 2], None, [6, 6, 6], [0, 256] * 3).ravel() / (rgb.shape[0] * rgb.shape[1])
    mean, std = (part.ravel() / 255 for part in cv2.meanStdDev(rgb))
    out: NDArray[np.float32] = np.concatenate([histogram, mean, std]).astype(np.float32)
    return out


CORNER_PX = (24, 40)


def corner_features(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The bottom right corner, where a scale bar may be burned in, at half size: float32 [720]."""
    height, width = CORNER_PX
    corner = cv2.resize(rgb[-height:, -width:], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    out: NDArray[np.float32] = np.asarray(corner, np.float32).ravel() / np.float32(255)
    return out


def linear_baseline(
    train: NDArray[np.float32], y_train: NDArray[np.int64], test: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Class probabilities [n, 4] of logistic regression on standardised columns; 0 for a class not trained on."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train, y_train)
    out = np.zeros((len(test), len(CLASSES)))
    out[:, model.classes_] = model.predict_proba(test)
    return out


def per_group(
    probabilities: NDArray[np.float64], answered: NDArray[np.bool_], y: NDArray[np.int64], groups: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Class, number of fields, accuracy and share answered of each group; rows may repeat fields."""
    right, names = probabilities.argmax(1) == y, np.array(groups)
    return {
        g: {
            "label": CLASSES[int(np.bincount(y[names == g]).argmax())],
            "fields": int((names == g).sum()),
            "accuracy": float(right[names == g].mean()),
            "answered": float(answered[names == g].mean()),
        }
        for g in sorted(set(groups))
    }


def summary(
    probabilities: NDArray[np.float64], y: NDArray[np.int64], groups: Sequence[str], smallest: int, seed: int = 0
) -> dict[str, Any]:
    """Metrics that a baseline has too: JSON-ready. `smallest` is the least size of a group that may be the worst."""

    def values(rows: NDArray[np.int64]) -> dict[str, float]:
        return point_metrics(probabilities[rows], y[rows])

    table = per_group(probabilities, np.ones(len(y), np.bool_), y, groups)
    large = {name: row for name, row in table.items() if row["fields"] >= smallest} or table
    worst = min(sorted(large), key=lambda name: float(large[name]["accuracy"]))
    return {
        "fields": len(y),
        **point_metrics(probabilities, y),
        "intervals_95": cluster_bootstrap(values, groups, seed),
        "per_group": table,
        "worst_group": {"group": worst, "accuracy": large[worst]["accuracy"], "fields": large[worst]["fields"]},
    }


def full_summary(
    probabilities: NDArray[np.float64],
    sets: NDArray[np.bool_],
    reasons: Sequence[str],
    y: NDArray[np.int64],
    groups: Sequence[str],
    smallest: int,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of answers out of fold: JSON-ready. Metrics answer for every field, also those abstained from."""
    answered = np.array([not r for r in reasons], np.bool_)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    inside = sets[np.arange(len(y)), y]
    kinds = [r.split(":")[0] for r in reasons if r]
    malignant, score = y != CLASSES.index("Benign"), 1 - probabilities[:, CLASSES.index("Benign")]
    return {
        **summary(probabilities, y, groups, smallest, seed),
        "per_group": per_group(probabilities, answered, y, groups),
        "per_class": class_metrics(probabilities, y),
        "malignant": {
            "sensitivity_at_specificity_0.95": sensitivity_at_specificity(score, malignant, 0.95),
            "sensitivity_at_specificity_0.99": sensitivity_at_specificity(score, malignant, 0.99),
            "specificity_at_sensitivity_0.99": specificity_at_sensitivity(score, malignant, 0.99),
        },
        "reliability": [asdict(b) for b in reliability(confidence, right)],
        "risk_coverage": risk_coverage(confidence, right),
        "confusion": confusion(probabilities.argmax(1), y).tolist(),
        "coverage": float(inside.mean()),
        "coverage_per_class": {name: float(inside[y == k].mean()) for k, name in enumerate(CLASSES) if (y == k).any()},
        "mean_set_size": float(sets.sum(1).mean()),
        "abstention_rate": float(1 - answered.mean()),
        "abstained": {k: kinds.count(k) for k in sorted(set(kinds))},
        "accuracy_answered": float(right[answered].mean()) if answered.any() else None,
        "accuracy_abstention_is_error": float((right & answered).mean()),
    }


def dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Dice coefficient of two masks; 1 when both are empty."""
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


def masks_of(bundle: Bundle, image: NDArray[np.uint8], device: str = "cpu") -> tuple[NDArray[np.uint8], CellTable]:
    """Semantic classes at the image's own size, uint8 [H, W], and its cells; for an image that is one field."""
    block, _ = image_block([image], bundle)
    semantic, _, table, _ = segment_tiles(bundle.segmenter(device), block, bundle.spec.method.segment, device)
    geometry = field_geometry(image.shape[1], image.shape[0], None, bundle.spec.method.segment)
    own = semantic[0][: geometry.height, : geometry.width]
    back = cv2.resize(own, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(back, np.uint8), table


def matched_boxes(found: NDArray[np.float32], truth: NDArray[np.float32], iou: float = 0.5) -> int:
    """Largest number of pairs of boxes [k, 4] (xmin, ymin, xmax, ymax) that overlap by at least `iou`."""
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
    """Dice on held-out hand-drawn masks by source, at source resolution, and F1 of white cells on held-out boxes."""
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
