"""Cross-validation of everything that a label touches: protocols, folds, ablations, and the results of one fold.

The segmenter and the backbones have seen no label, so their features are computed once; z-score, selection, classifier,
temperature, conformal thresholds and out-of-distribution statistics are fitted inside every fold. A fold is a function
of its job alone and leaves its result in a file, so an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from leukoflow.models.bundle import Calibration
from leukoflow.tasks.evaluation.baselines import linear_baseline
from leukoflow.tasks.imaging.classify import decide, forward, ood_scores, softmax
from leukoflow.tasks.imaging.extract import Features
from leukoflow.tasks.training.classifier import Fitted, Recipe, calibrate, cross_fit, fit
from leukoflow.tasks.training.data import Labels, grouped_folds

Protocol = Literal["random", "slide", "cluster"]
PROTOCOLS: tuple[Protocol, ...] = ("random", "slide", "cluster")
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of doing it. `table` names the features that it starts from, see `load_table`."""

    name: str
    what: str
    table: str = "plain"
    backbone: str | None = None  # only this one's columns
    k: int | None = None  # columns to select, instead of the bundle's number; 0 is all
    attention: bool = True


WHOLE = Variant("whole method", "as shipped")
ABLATIONS = (
    Variant("ConvNeXt alone", "features of the ConvNeXt only", backbone="convnext"),
    Variant("NASNet-A alone", "features of the NASNet-A only", backbone="nasnet"),
    Variant("no selection", "all columns instead of those that mRMR chose", k=0),
    Variant("no attention", "tokens averaged instead of self-attention", attention=False),
    Variant("no normalisation", "crops of the fields as photographed, overlays masked", table="raw"),
    Variant("with CLAHE", "CLAHE on lightness after Reinhard's transfer", table="clahe"),
    Variant("no outlines", "features averaged over the whole window, not over the cell", table="unmasked"),
    Variant("no segmentation", "a grid of windows instead of cells", table="grid"),
)
SELECTED = (50, 100, 200, 300, 400, 0)
BASELINES = ("colour histogram", "corner only", "untrained features")


@dataclass(frozen=True, slots=True)
class FoldJob:
    """One fold of one protocol. `calibrated` folds fit temperature and thresholds too, by inner cross-fitting."""

    protocol: Protocol
    repeat: int
    fold: int
    variant: Variant
    calibrated: bool

    @property
    def key(self) -> str:
        """Name of its file."""
        kind = "calibrated" if self.calibrated else "plain"
        variant = "".join(c if c.isalnum() else "_" for c in f"{self.variant.name}_{self.variant.k}")
        return f"{self.protocol}_{self.repeat}_{self.fold}_{variant}_{kind}"


@dataclass(frozen=True, slots=True)
class FoldResult:
    """Answers for the fields of one fold."""

    rows: NDArray[np.int64]  # [n]
    probabilities: NDArray[np.float64]  # [n, C]
    sets: NDArray[np.bool_]  # [n, C]
    reasons: NDArray[np.str_]  # [n], "" where answered
    removed: NDArray[np.float64]  # [n, 2, R] answered class' probability less top, less random cells; NaN where too few
    before: NDArray[np.float64]  # [n] answered class' probability with all cells
    thresholds: NDArray[np.float64]  # [3 + C] temperature, conformal thresholds, least confidence, largest distance

    @property
    def calibration(self) -> Calibration:
        """The fold's own calibration."""
        t = [float(v) for v in self.thresholds]
        return Calibration(temperature=t[0], conformal=tuple(t[1:-2]), min_cells=1, min_confidence=t[-2], max_ood=t[-1])


REMOVED = (1, 2, 3)
"""Numbers of cells that the check of the attention removes."""


@dataclass(frozen=True, slots=True)
class Context:
    """What all folds share."""

    work: Path
    labels: Labels
    recipe: Recipe
    columns: tuple[tuple[str, int], ...]  # backbone and its number of columns, in order


def split(protocol: Protocol, labels: Labels, repeat: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Split rows into training and test rows of each fold; slides or clusters stay whole, classes are stratified."""
    if protocol == "random":
        plain = StratifiedKFold(FOLDS, shuffle=True, random_state=repeat)
        return [(a, b) for a, b in plain.split(labels.y, labels.y)]
    groups = np.array(labels.slide if protocol == "slide" else labels.cluster)
    return grouped_folds(labels.y, groups, FOLDS, repeat)


def save_table(path: Path, features: Features) -> None:
    """Store features; complete or not at all."""
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, **{f.name: getattr(features, f.name) for f in fields(features)})
    temporary.rename(path)


@lru_cache(maxsize=3)
def load_table(work: Path, name: str) -> Features:
    """Load features of all fields: `plain`, or the tables of ablations."""
    with np.load(work / f"table_{name}.npz") as stored:
        return Features(**{f.name: stored[f.name] for f in fields(Features)})


def variant_features(context: Context, variant: Variant) -> Features:
    """Choose the features that a variant starts from."""
    features = load_table(context.work, variant.table)
    if variant.backbone is None:
        return features
    start = 0
    for name, width in context.columns:
        if name == variant.backbone:
            return features.columns(np.arange(start, start + width))
        start += width
    return features


def variant_recipe(recipe: Recipe, variant: Variant) -> Recipe:
    """Return the recipe with the variant's switches."""
    method = recipe.method
    select = method.select
    if variant.k is not None:
        select = select.model_copy(update={"enabled": variant.k > 0, **({"k": variant.k} if variant.k else {})})
    classify = method.classify.model_copy(update={"attention": variant.attention})
    method = method.model_copy(update={"select": select, "classify": classify})
    return Recipe(method, recipe.classifier_width, recipe.classifier_layers, recipe.steps, recipe.seed)


def run_fold(context: Context, job: FoldJob) -> FoldResult:
    """Fit on the training rows and diagnose the test rows; or open what an earlier call left."""
    torch.set_num_threads(1)
    folder = context.work / "folds"
    folder.mkdir(exist_ok=True)
    path = folder / f"{job.key}.npz"
    if path.is_file():
        with np.load(path) as stored:
            return FoldResult(**{f.name: stored[f.name] for f in fields(FoldResult)})
    train, test = split(job.protocol, context.labels, job.repeat)[job.fold]
    features = variant_features(context, job.variant)
    recipe = variant_recipe(context.recipe, job.variant)
    fitted = fit(recipe, features, context.labels, train)
    packed = fitted.tokens(features, test)
    logits, attention = forward(fitted.classifier, packed)
    calibration = Calibration()
    if job.calibrated:
        calibration = calibrate(cross_fit(recipe, features, context.labels, train), context.labels, train)
        probabilities = softmax(logits, calibration.temperature)
        sets, reasons = decide(
            calibration, probabilities, ood_scores(packed, fitted.statistics), np.diff(features.offsets)[test]
        )
        before, removed = without_cells(fitted, features, test, attention, calibration.temperature, job.fold)
    else:
        probabilities = softmax(logits, 1.0)
        sets, reasons = probabilities >= probabilities.max(1, keepdims=True), (None,) * len(test)
        before, removed = np.zeros(len(test)), np.full((len(test), 2, len(REMOVED)), np.nan)
    thresholds = np.array(
        [calibration.temperature, *calibration.conformal, calibration.min_confidence, calibration.max_ood]
    )
    words = np.array([r or "" for r in reasons], np.str_)
    result = FoldResult(test, probabilities, sets, words, removed, before, thresholds)
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, **{f.name: getattr(result, f.name) for f in fields(FoldResult)})
    temporary.rename(path)
    return result


def without_cells(
    fitted: Fitted,
    features: Features,
    rows: NDArray[np.int64],
    attention: NDArray[np.float32],
    temperature: float,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Check that attention is faithful: the answer's probability before and after taking away cells.

    Returns:
        float64 [n] before, and float64 [n, 2, R] after removing the top 1, 2, 3 and as many random cells; NaN for
        fields that would keep fewer than two.
    """
    rng = np.random.default_rng(seed)
    packed = fitted.tokens(features, rows)
    whole = softmax(forward(fitted.classifier, packed)[0], temperature)
    answer = whole.argmax(1)
    after = np.full((len(rows), 2, len(REMOVED)), np.nan)
    starts = np.concatenate([[0], np.cumsum(np.diff(features.offsets)[rows])])
    enough = np.flatnonzero(packed.valid.sum(1) >= max(REMOVED) + 2)
    if not len(enough):
        return whole.max(1), after
    for r, count in enumerate(REMOVED):
        for kind in range(2):
            kept: list[NDArray[np.int64]] = []
            for i in enough:
                own = np.flatnonzero(packed.valid[i])
                order = np.argsort(-attention[i, own], kind="stable") if kind == 0 else rng.permutation(len(own))
                first = int(features.offsets[rows[i]])
                everything = np.arange(first, int(features.offsets[rows[i] + 1]))
                # Sources count within the packed rows; the cells of a field keep their order there.
                gone = packed.source[i, own[order[:count]]] - starts[i] + first
                kept.append(np.setdiff1d(everything, gone))
            offsets = np.concatenate([[0], np.cumsum([len(k) for k in kept])]).astype(np.int64)
            chosen = np.concatenate(kept)
            cells, area = features.cells[chosen], features.area[chosen]
            rest = Features.of_cells(cells, offsets, area)
            tokens = fitted.tokens(rest, np.arange(len(enough)))
            found = softmax(forward(fitted.classifier, tokens)[0], temperature)
            after[enough, kind, r] = found[np.arange(len(enough)), answer[enough]]
    return whole.max(1), after


def run_baseline(context: Context, name: str, protocol: Protocol, repeat: int) -> NDArray[np.float64]:
    """Compute out-of-fold probabilities [n, C] of logistic regression on a table without cells, or without training."""
    path = context.work / "folds" / f"baseline_{''.join(c for c in name if c.isalnum())}_{protocol}_{repeat}.npy"
    path.parent.mkdir(exist_ok=True)
    if path.is_file():
        return np.asarray(np.load(path), np.float64)
    if name == "untrained features":
        table = load_table(context.work, "untrained").field
    else:
        table = np.load(context.work / f"baseline_{'corner' if name == 'corner only' else 'histogram'}.npy")
    classes = len(context.labels.classes)
    out = np.zeros((len(context.labels), classes))
    for train, test in split(protocol, context.labels, repeat):
        out[test] = linear_baseline(table[train], context.labels.y[train], table[test], classes)
    np.save(path, out)
    return out
