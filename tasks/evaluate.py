"""Measuring a bundle: the inference path without orchestration, metrics with intervals, and the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from leukoflow.geometry import field_geometry
from leukoflow.records import CLASSES
from models.bundle import Bundle
from tasks.classify import Verdict, diagnose, pool_tiles
from tasks.normalize import normalize
from tasks.shard import Block, extract_tiles, inference_batches, segment_tiles

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
        block, n_tiles = _block(images[start : start + chunk], bundle)
        _, _, table, offsets = segment_tiles(segmenter, block, method.segment, device)
        whole, single = extract_tiles(hybrid, block, table, offsets, method.features, device)
        area = table.cell_area_px.astype(np.float32)
        found = diagnose(bundle, classifier, whole, single, offsets, area, device)
        verdicts += pool_tiles(bundle, found, offsets, n_tiles)
    return verdicts


def _block(images: Sequence[NDArray[np.uint8]], bundle: Bundle) -> tuple[Block, NDArray[np.int64]]:
    """Images brought to the model's scale, normalised and tiled; and the number of tiles of each."""
    method = bundle.spec.method
    side = method.segment.field_px
    tiles, owners, origins, cores, affines, counts = [], [], [], [], [], []
    for i, image in enumerate(images):
        geometry = field_geometry(image.shape[1], image.shape[0], None, method.segment)
        if image.shape[:2] != (geometry.height, geometry.width):
            way = cv2.INTER_AREA if geometry.width < image.shape[1] else cv2.INTER_LINEAR
            size = (geometry.width, geometry.height)
            image = np.asarray(cv2.resize(image, size, interpolation=way), np.uint8)
        normal = normalize(image, method.normalize)
        for (x, y), core, affine in zip(geometry.origins, geometry.cores, geometry.to_source(), strict=True):
            piece = normal[y : y + side, x : x + side]
            beyond = ((0, side - piece.shape[0]), (0, side - piece.shape[1]), (0, 0))
            tiles.append(np.pad(piece, beyond, mode="symmetric"))
            owners.append(i)
            origins.append((x, y))
            cores.append(core)
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
    return np.concatenate([histogram, mean, std]).astype(np.float32)


def histogram_baseline(
    train: NDArray[np.float32], y_train: NDArray[np.int64], test: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Class probabilities [n, 4] of logistic regression on standardised histograms; 0 for a class not trained on."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train, y_train)
    out = np.zeros((len(test), len(CLASSES)))
    out[:, model.classes_] = model.predict_proba(test)
    return out


def random_split_accuracy(features: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """The baseline's accuracy under a random 5-fold split, which measures photography as much as haematology."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float((cross_val_predict(model, features, y, cv=folds) == y).mean())


def per_cluster(
    verdicts: Sequence[Verdict], y: NDArray[np.int64], clusters: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Class, number of fields, accuracy and share answered of each cluster."""
    right = np.array([v.probabilities.argmax() for v in verdicts]) == y
    answered, groups = np.array([v.abstained is None for v in verdicts]), np.array(clusters)
    return {
        c: {
            "label": CLASSES[int(y[groups == c][0])],
            "fields": int((groups == c).sum()),
            "accuracy": float(right[groups == c].mean()),
            "answered": float(answered[groups == c].mean()),
        }
        for c in sorted(set(clusters))
    }


def evaluation(
    verdicts: Sequence[Verdict], y: NDArray[np.int64], clusters: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """All metrics of held-out fields: JSON-ready. Metrics answer for every field, also those abstained from."""
    probabilities = np.stack([v.probabilities for v in verdicts])
    sets = np.stack([v.prediction_set for v in verdicts])
    answered = np.array([v.abstained is None for v in verdicts])
    inside = sets[np.arange(len(y)), y]
    right = probabilities.argmax(1) == y
    kinds = [(v.abstained or "answered").split(":")[0] for v in verdicts]
    groups = np.array(clusters)
    worst = min(sorted(set(clusters)), key=lambda c: float(right[groups == c].mean()))

    def values(rows: NDArray[np.int64]) -> dict[str, float]:
        return point_metrics(probabilities[rows], y[rows])

    return {
        "fields": len(y),
        "clusters": len(set(clusters)),
        **point_metrics(probabilities, y),
        "intervals_95": cluster_bootstrap(values, clusters, seed),
        "per_class": class_metrics(probabilities, y),
        "per_cluster": per_cluster(verdicts, y, clusters),
        "worst_cluster": {"cluster": worst, "accuracy": float(right[groups == worst].mean())},
        "confusion": confusion(probabilities.argmax(1), y).tolist(),
        "coverage": float(inside.mean()),
        "coverage_per_class": {name: float(inside[y == k].mean()) for k, name in enumerate(CLASSES) if (y == k).any()},
        "mean_set_size": float(sets.sum(1).mean()),
        "abstention_rate": float(1 - answered.mean()),
        "abstained": {k: kinds.count(k) for k in sorted(set(kinds)) if k != "answered"},
        "accuracy_answered": float(right[answered].mean()) if answered.any() else None,
        "cells_per_field": float(np.mean([v.n_cells for v in verdicts])),
    }
