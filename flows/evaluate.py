"""Evaluation of a bundle on the clusters that it was not fitted on, beside the colour histogram on the same split."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from leukoflow.errors import BundleError
from leukoflow.records import CLASSES
from models.attention_unet import segment_batch
from models.bundle import Bundle, load_bundle, write_spec
from tasks.classify import Verdict
from tasks.evaluate import (
    diagnose_images,
    evaluation,
    histogram_baseline,
    histogram_features,
    per_cluster,
    point_metrics,
    random_split_accuracy,
)
from tasks.normalize import mask_overlays, normalize
from tasks.segment import pseudo_semantic
from tasks.train_data import FIELDS_ZIP, MASKS_ZIP, Labels, mosaics, read_labels, read_masked_cells, read_members
from tasks.train_segmenter import dice

FOREIGN_ZIP = "healthy_other_source.zip"
AGREEMENT_FIELDS = 96


def held_out_rows(bundle: Bundle, labels: Labels, clusters: Sequence[str] | None) -> NDArray[np.int64]:
    """Rows to evaluate on. Raises BundleError where the bundle has seen any of the clusters, or none is left."""
    training = bundle.spec.training
    wanted = tuple(clusters) if clusters is not None else training.held_out_clusters
    seen = sorted(set(wanted) & {*training.training_clusters, *training.calibration_clusters})
    if seen:
        raise BundleError(
            f"bundle {bundle.spec.name} was fitted on clusters {seen}: a score there would be worth nothing; "
            f"it held out {list(training.held_out_clusters)}"
        )
    rows = np.flatnonzero(np.isin(labels.cluster, wanted))
    if not len(rows):
        raise BundleError(
            f"bundle {bundle.spec.name} held out no cluster of this data; train one with a fold held out to evaluate it"
        )
    return rows


@task(task_run_name="evaluate held-out fields", cache_policy=NO_CACHE, persist_result=False)
def evaluate_fields(
    bundle: Bundle, data_dir: Path, labels: Labels, rows: NDArray[np.int64], device: str
) -> dict[str, Any]:
    """Metrics of the model, its accuracy on calibration clusters, and the histogram fitted on all other fields."""
    images = list(read_members(data_dir / FIELDS_ZIP, labels.keys))
    tuned = np.flatnonzero(np.isin(labels.cluster, bundle.spec.training.calibration_clusters))
    seen = diagnose_images(bundle, [images[i] for i in tuned], device)
    started = time.perf_counter()
    verdicts = diagnose_images(bundle, [images[i] for i in rows], device)
    seconds = time.perf_counter() - started
    y, clusters = labels.y[rows], [labels.cluster[int(i)] for i in rows]
    rest = np.setdiff1d(np.arange(len(labels)), rows)
    baseline: dict[str, Any] = {}
    for name, prepared in (
        ("raw", images),
        ("normalised", [normalize(i, bundle.spec.method.normalize) for i in images]),
    ):
        table = np.stack([histogram_features(image) for image in prepared])
        scores = point_metrics(histogram_baseline(table[rest], labels.y[rest], table[rows]), y)
        baseline[name] = {**scores, "accuracy_random_split": random_split_accuracy(table, labels.y)}
    return {
        "model": evaluation(verdicts, y, clusters, bundle.spec.training.seed),
        "calibration_clusters": per_cluster(seen, labels.y[tuned], [labels.cluster[int(i)] for i in tuned]),
        "colour_histogram": baseline,
        "seconds_per_field": seconds / len(rows),
        "errors": _errors(verdicts, labels, rows),
    }


def _errors(verdicts: Sequence[Verdict], labels: Labels, rows: NDArray[np.int64]) -> dict[str, int]:
    """How often each class was taken for which other."""
    out: dict[str, int] = {}
    for verdict, truth in zip(verdicts, labels.y[rows], strict=True):
        answer = int(verdict.probabilities.argmax())
        if answer != truth:
            key = f"{CLASSES[int(truth)]} taken for {CLASSES[answer]}"
            out[key] = out.get(key, 0) + 1
    return dict(sorted(out.items(), key=lambda item: -item[1]))


@task(task_run_name="evaluate segmentation", cache_policy=NO_CACHE, persist_result=False)
def evaluate_segmentation(
    bundle: Bundle, data_dir: Path, labels: Labels, rows: NDArray[np.int64], device: str
) -> dict[str, float]:
    """Dice on mosaics of held-out hand-drawn cells; agreement with classical labels on held-out fields."""
    model, method = bundle.segmenter(device), bundle.spec.method
    if model is None:
        return {}
    cells = read_masked_cells(data_dir / MASKS_ZIP)
    drawn = mosaics(cells, "held_out", bundle.spec.training.seed, method)
    some = rows[:: max(1, len(rows) // AGREEMENT_FIELDS)]
    fields = [mask_overlays(i)[0] for i in read_members(data_dir / FIELDS_ZIP, [labels.keys[int(r)] for r in some])]
    normal = np.stack([normalize(field, method.normalize) for field in fields])
    out: dict[str, float] = {}
    for name, images, truth in (
        ("drawn", drawn[..., :3], drawn[..., 3]),
        ("classical", normal, np.stack([pseudo_semantic(field) for field in fields])),
    ):
        predicted = np.concatenate([segment_batch(model, images[i : i + 8], device) for i in range(0, len(images), 8)])
        out[f"dice_nucleus_{name}"] = dice(predicted == 2, truth == 2)
        out[f"dice_cell_{name}"] = dice(predicted > 0, truth > 0)
    return out


@task(task_run_name="evaluate foreign images", cache_policy=NO_CACHE, persist_result=False)
def evaluate_foreign(bundle: Bundle, data_dir: Path, device: str) -> dict[str, Any]:
    """What the bundle says of healthy blood from another laboratory, which it should not diagnose."""
    path = data_dir / FOREIGN_ZIP
    if not path.is_file():
        return {}
    images = list(read_members(path, None))
    verdicts = diagnose_images(bundle, images, device, chunk=16)
    kinds = [(v.abstained or "answered").split(":")[0] for v in verdicts]
    labels = [CLASSES[int(v.probabilities.argmax())] for v in verdicts if v.abstained is None]
    return {
        "images": len(images),
        "outcomes": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "labels_of_answered": {name: labels.count(name) for name in CLASSES},
        "median_distance": float(np.median([v.ood for v in verdicts])),
    }


@flow(name="evaluate", flow_run_name="evaluate {bundle}", validate_parameters=False)
def evaluate(
    bundle: str | Path,
    data_dir: Path,
    out: Path | None = None,
    clusters: Sequence[str] | None = None,
    device: str = "cpu",
    record: bool = True,
) -> dict[str, Any]:
    """Measures a bundle, writes `out` (JSON) and, with `record`, the metrics into the bundle; returns them.

    Args:
        bundle: directory or name.
        data_dir: folder with the labelled fields.
        out: where the evaluation is written; nowhere if None.
        clusters: to evaluate on, instead of those that the bundle held out; refused where it has seen them.
        device: `cpu` or `cuda`.
        record: put the metrics into `bundle.json`; its digest does not change.
    """
    opened = load_bundle(bundle)
    labels = read_labels(data_dir)
    rows = held_out_rows(opened, labels, clusters)
    result: dict[str, Any] = {
        "protocol": "whole clusters held out; calibration on other clusters than training",
        "bundle_digest": opened.digest,
        "held_out_fold": opened.spec.training.held_out_fold,
        "held_out_clusters": sorted({labels.cluster[int(i)] for i in rows}),
        **evaluate_fields(opened, data_dir, labels, rows, device),
        "segmentation": evaluate_segmentation(opened, data_dir, labels, rows, device),
        "foreign": evaluate_foreign(opened, data_dir, device),
    }
    model = result["model"]
    get_run_logger().info(
        "accuracy %.3f, macro-F1 %.3f, worst cluster %s", model["accuracy"], model["macro_f1"], model["worst_cluster"]
    )
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if record:
        write_spec(opened.path, opened.spec.model_copy(update={"metrics": result}))
    return result
