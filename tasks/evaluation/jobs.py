"""Do the parts of an evaluation, each a function of the setting that leaves its result in the work folder.

They run in worker processes; one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from leukoflow.core.errors import ConfigError
from leukoflow.models.bundle import Bundle, load_bundle
from leukoflow.tasks.evaluation.baselines import corner_features, histogram_features
from leukoflow.tasks.evaluation.feature_tables import alternative_table, classes_of, plain_table
from leukoflow.tasks.evaluation.images import diagnose_images, image_features, masks_of
from leukoflow.tasks.evaluation.metrics import BENIGN
from leukoflow.tasks.evaluation.probes import DEGRADATIONS, cells_only, colours_of, moved_bar, painted_out, pasted_bar
from leukoflow.tasks.evaluation.protocols import (
    FOLDS,
    WHOLE,
    Context,
    FoldJob,
    FoldResult,
    Protocol,
    load_table,
    run_baseline,
    run_fold,
    save_table,
    split,
)
from leukoflow.tasks.evaluation.segmentation import segmentation_metrics
from leukoflow.tasks.imaging.classify import decide, forward, ood_scores, softmax
from leukoflow.tasks.imaging.overlays import mask_overlays
from leukoflow.tasks.training.classifier import Fitted, Recipe, fit
from leukoflow.tasks.training.data import FIELDS_ZIP, Labels, read_labels, read_members

FOREIGN_ZIP = "healthy_other_source.zip"
PROBE_EVERY = 12  # every so many fields are changed on purpose
SEGMENT_PARTS = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """What every task of an evaluation shares; small enough to travel."""

    bundle: str
    data_dir: Path
    work: Path
    steps: int


@lru_cache(maxsize=1)
def opened(setting: Setting) -> tuple[Bundle, Context]:
    """Open the bundle and the context of its folds, once per process."""
    torch.set_num_threads(1)
    bundle = load_bundle(setting.bundle)
    spec = bundle.spec
    recipe = Recipe(spec.method, spec.classifier.width, spec.classifier.layers, setting.steps, spec.training.seed)
    columns = tuple((b.name, b.num_features) for b in spec.backbones)
    return bundle, Context(setting.work, read_labels(setting.data_dir, spec.classes), recipe, columns)


def _fields(setting: Setting, labels: Labels) -> list[NDArray[np.uint8]]:
    """Read the labelled fields."""
    return list(read_members(setting.data_dir / FIELDS_ZIP, labels.keys))


def make_classes(setting: Setting, part: int) -> None:
    """Segment one of `SEGMENT_PARTS` parts of all fields, unless that has been done."""
    path = setting.work / f"classes_{part}.npy"
    if path.is_file():
        return
    bundle, context = opened(setting)
    keys = np.array_split(np.array(context.labels.keys, object), SEGMENT_PARTS)[part]
    found = classes_of(bundle, list(read_members(setting.data_dir / FIELDS_ZIP, list(keys))))
    temporary = path.with_suffix(".part.npy")
    np.save(temporary, found)
    temporary.rename(path)


def make_table(setting: Setting, name: str) -> None:
    """Make one table of features of all fields, unless it is there."""
    path = setting.work / f"table_{name}.npz"
    if path.is_file():
        return
    bundle, context = opened(setting)
    images = _fields(setting, context.labels)
    classes = np.concatenate([np.load(setting.work / f"classes_{part}.npy") for part in range(SEGMENT_PARTS)])
    if name == "plain":
        save_table(path, plain_table(bundle, images, classes))
    else:
        save_table(path, alternative_table(bundle, images, classes, name))


def make_baselines(setting: Setting) -> None:
    """Make the tables of the baselines that know no cells."""
    _, context = opened(setting)
    images = _fields(setting, context.labels)
    for name, function in (("histogram", histogram_features), ("corner", corner_features)):
        np.save(setting.work / f"baseline_{name}.npy", np.stack([function(image) for image in images]))


def fold(setting: Setting, job: FoldJob) -> FoldResult:
    """Run one fold."""
    return run_fold(opened(setting)[1], job)


def baseline(setting: Setting, name: str, protocol: Protocol, repeat: int) -> NDArray[np.float64]:
    """Run one baseline under one protocol."""
    return run_baseline(opened(setting)[1], name, protocol, repeat)


def probe_rows(labels: Labels) -> NDArray[np.int64]:
    """Choose the fields that the probes change: a fixed twelfth."""
    return np.arange(0, len(labels), PROBE_EVERY)


PROBES = (
    ("untouched", "the same fields as they are"),
    ("scale bar removed", "burned-in bar and text painted over before the run"),
    ("scale bar moved", "moved to the top left corner"),
    ("scale bar of another class", "replaced by the bar of a field of another class"),
    ("colours of another class", "mean and deviation of Lab taken from a field of another class"),
    ("cells only", "everything but white cells in one colour"),
    ("cells painted out", "white cells replaced by their surroundings; an answer is forced"),
)


def changed(setting: Setting, name: str, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Make the change of that name to the probes' fields. Raises ConfigError for another name."""
    bundle, context = opened(setting)
    labels = context.labels
    rows = probe_rows(labels)
    for degradation in DEGRADATIONS:
        if name == f"{degradation.kind} {degradation.severity}":
            return [degradation.apply(images[i]) for i in rows]
    rng = np.random.default_rng(0)
    donors = [int(rng.choice(np.flatnonzero(labels.y != labels.y[i]))) for i in rows]
    match name:
        case "untouched":
            return [images[i] for i in rows]
        case "scale bar removed":
            return [mask_overlays(images[i])[0] for i in rows]
        case "scale bar moved":
            return [moved_bar(images[i]) for i in rows]
        case "scale bar of another class":
            return [pasted_bar(images[i], images[d]) for i, d in zip(rows, donors, strict=True)]
        case "colours of another class":
            return [colours_of(images[i], images[d]) for i, d in zip(rows, donors, strict=True)]
        case "cells only":
            return [cells_only(images[i], masks_of(bundle, images[i])[0] > 0) for i in rows]
        case "cells painted out":
            return [painted_out(images[i], masks_of(bundle, images[i])[0] > 0) for i in rows]
    raise ConfigError(f"no probe named {name!r}")


@lru_cache(maxsize=FOLDS)
def fitted_fold(setting: Setting, number: int) -> Fitted:
    """Fit the model of a cluster-grouped fold again: a function of its rows and the seed."""
    _, context = opened(setting)
    train, _ = split("cluster", context.labels, 0)[number]
    return fit(context.recipe, load_table(setting.work, "plain"), context.labels, train)


def probe(setting: Setting, name: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Diagnose changed fields by models that saw neither the field nor its cluster.

    Returns:
        Probabilities [n, C] of all fields in `probe_rows`, the answer being forced, and whether it would be given.
    """
    bundle, context = opened(setting)
    path = setting.work / "folds" / f"probe_{name.replace(' ', '_')}.npz"
    if path.is_file():
        with np.load(path) as stored:
            return stored["probabilities"], stored["answered"]
    rows = probe_rows(context.labels)
    features = image_features(bundle, changed(setting, name, _fields(setting, context.labels)))
    probabilities, answered = np.zeros((len(rows), len(context.labels.classes))), np.zeros(len(rows), np.bool_)
    for number, (_, test) in enumerate(split("cluster", context.labels, 0)):
        known = run_fold(context, FoldJob("cluster", 0, number, WHOLE, calibrated=True))
        fitted = fitted_fold(setting, number)
        mine = np.flatnonzero(np.isin(rows, test))
        packed = fitted.tokens(features, mine)
        found = softmax(forward(fitted.classifier, packed)[0], known.calibration.temperature)
        reasons = decide(
            known.calibration, found, ood_scores(packed, fitted.statistics), np.diff(features.offsets)[mine]
        )[1]
        probabilities[mine], answered[mine] = found, [r is None for r in reasons]
    np.savez(path, probabilities=probabilities, answered=answered)
    return probabilities, answered


def measure_segmentation(setting: Setting) -> dict[str, float]:
    """Measure the bundle on masks and boxes that were held out."""
    return segmentation_metrics(opened(setting)[0], setting.data_dir)


def measure_foreign(setting: Setting) -> dict[str, Any]:
    """Count what the shipped bundle says of healthy blood from another laboratory."""
    path = setting.data_dir / FOREIGN_ZIP
    if not path.is_file():
        return {}
    bundle = opened(setting)[0]
    classes, benign = bundle.spec.classes, bundle.spec.classes.index(BENIGN)
    found = diagnose_images(bundle, list(read_members(path, None)), chunk=16)
    kinds = [(d.abstained or "answered").split(":")[0] for d in found]
    labels = [classes[int(d.probabilities.argmax())] for d in found if d.abstained is None]
    harmless = sum(d.abstained is not None or int(d.probabilities.argmax()) == benign for d in found)
    return {
        "images": len(found),
        "abstained_or_benign": harmless / len(found),
        "outcomes": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "labels_of_answered": {name: labels.count(name) for name in classes},
        "median_distance": float(np.median([d.ood for d in found])),
    }
