"""Selection of columns, the attention classifier on stored features, calibration, and the bundle.

Everything that a label touches is fitted here, and only from the rows that are handed in, so that an evaluation can fit
all of it inside a fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from torch.nn import functional as F

from leukoflow.method import MethodSettings
from leukoflow.records import CLASSES
from models.attention_classifier import AttentionClassifier, ClassifierSpec
from models.bundle import Bundle, BundleSpec, Calibration, Statistics, Training, enabled_backbones, save_bundle
from models.hybrid_cn_nas import build_backbone
from tasks.classify import Tokens, forward, ood_scores, softmax, standardize, tokens
from tasks.select import mrmr
from tasks.train_data import Budget, Labels, Prepared, TrainConfig, balanced_weights
from tasks.train_features import Features, load_features, rows_of
from tasks.train_loop import run_steps
from tasks.train_segmenter import load_segmenter

BATCH = 64
BAG = 12  # cells of a field in one step, drawn anew each time
FIELD_DROPOUT = 0.5  # share of fields without their field token
NOISE = 0.15  # standard deviation added to z-scores
DIRECTIONS = 48  # principal directions of the out-of-distribution score
CROSS_FITS = 5  # parts of whole clusters for out-of-fold calibration
MOST_FOREIGN = 0.02  # share of unseen fields that may be refused as foreign
MOST_AMBIGUOUS = 0.02  # and as ambiguous
SELECTIVE_ACCURACY = 0.98  # wanted among answered fields; no more are refused than that takes


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides a fit besides the data."""

    method: MethodSettings
    classifier_width: int
    classifier_layers: int
    steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Fitted:
    """Statistics, selection and classifier, fitted on some fields."""

    classifier: AttentionClassifier
    statistics: Statistics
    selected: NDArray[np.int64]
    max_cells: int

    def tokens(self, features: Features, rows: NDArray[np.int64]) -> Tokens:
        """What the classifier reads of the given fields."""
        own = rows_of(features.offsets, rows)
        offsets = np.concatenate([[0], np.cumsum(np.diff(features.offsets)[rows])]).astype(np.int64)
        columns, statistics = tuple(int(i) for i in self.selected), self.statistics
        return tokens(
            standardize(features.field[rows], statistics.field_mean, statistics.field_std, columns),
            standardize(features.cells[own], statistics.cell_mean, statistics.cell_std, columns),
            offsets,
            features.area[own],
            self.max_cells,
        )


def bag_loss(logits: Tensor, cell_logits: Tensor, valid: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the field plus half the mean cross-entropy of its cells, which share the field's label."""
    cells = F.cross_entropy(
        cell_logits.transpose(1, 2), y[:, None].expand(valid.shape), reduction="none", label_smoothing=0.05
    )
    return F.cross_entropy(logits, y, label_smoothing=0.05) + 0.5 * (cells * valid).sum() / valid.sum()


def moments(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Column means and deviations; a constant column gets deviation 1, so that it becomes 0 everywhere."""
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 1e-6, std, 1.0).astype(np.float32)


def fit_temperature(
    logits: NDArray[np.float64], y: NDArray[np.int64], clusters: NDArray[np.str_] | None = None
) -> float:
    """Temperature of least negative log-likelihood (Guo et al. 2017); classes, and clusters within one, weigh alike."""
    groups = clusters if clusters is not None else y.astype(np.str_)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1 / sizes[group]
    weight /= np.bincount(y, weight)[y]

    def loss(log_temperature: float) -> float:
        p = softmax(logits, float(np.exp(log_temperature)))[np.arange(len(y)), y]
        return float(-(weight * np.log(np.maximum(p, 1e-12))).sum() / weight.sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded").x))


def conformal_thresholds(
    probabilities: NDArray[np.float64], y: NDArray[np.int64], alpha: float
) -> tuple[float, float, float, float]:
    """Per class, the (n + 1)(1 - alpha) / n quantile of 1 - p of the true class; 1 where there are too few fields."""
    out = []
    for k in range(4):
        scores = np.sort(1 - probabilities[y == k, k])
        rank = int(np.ceil((len(scores) + 1) * (1 - alpha)))
        out.append(float(scores[rank - 1]) if rank <= len(scores) else 1.0)
    return out[0], out[1], out[2], out[3]


def confidence_threshold(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """Smallest confidence above which unseen fields are right often enough, within what may be refused."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    order = np.argsort(confidence, kind="stable")
    most = int(MOST_AMBIGUOUS * len(y))
    for refused in range(most + 1):
        if refused == most or right[order[refused:]].mean() >= SELECTIVE_ACCURACY:
            return float(confidence[order[refused]]) if refused else 0.0
    return 0.0


def fit_ood(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Mean, principal directions and deviations (the last: of the rest) of training tokens [n, 2 K]."""
    mean = x.mean(0, dtype=np.float64)
    centred = x.astype(np.float64) - mean
    count = min(DIRECTIONS, len(x) - 1, x.shape[1])
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    directions = rows[:count].T
    along = singular[:count] / np.sqrt(len(x))
    rest = np.sqrt(np.maximum((centred**2).sum(1) - ((centred @ directions) ** 2).sum(1), 0).mean())
    scale = np.maximum(np.append(along, rest), 1e-6)
    return mean.astype(np.float32), directions.astype(np.float32), scale.astype(np.float32)


def fit(
    recipe: Recipe,
    features: Features,
    labels: Labels,
    rows: NDArray[np.int64],
    checkpoint: Path | None = None,
    log: Callable[[str], None] = print,
) -> Fitted:
    """z-score, mRMR, classifier and out-of-distribution statistics from the given fields alone."""
    method, y = recipe.method, labels.y[rows]
    own = rows_of(features.offsets, rows)
    versions = [(features.field[rows], features.cells[own])]
    versions += [(f[rows], c[own]) for f, c in zip(features.field_copies, features.cell_copies, strict=True)]
    field_mean, field_std = moments(np.concatenate([f for f, _ in versions]))
    cell_mean, cell_std = moments(np.concatenate([c for _, c in versions]))
    total = features.cells.shape[1]
    if method.select.enabled and method.select.k < total:
        every = tuple(range(total))
        table = np.concatenate([standardize(f, field_mean, field_std, every) for f, _ in versions])
        selected = mrmr(table, np.tile(y, len(versions)), method.select.k, method.select.scheme)
    else:
        selected = np.arange(total)
    spec = ClassifierSpec(
        inputs=len(selected),
        width=recipe.classifier_width,
        layers=recipe.classifier_layers,
        attention=method.classify.attention,
    )
    nothing = np.zeros(0, np.float32)
    statistics = Statistics(field_mean, field_std, cell_mean, cell_std, nothing, nothing, nothing)
    untrained = Fitted(AttentionClassifier(spec), statistics, selected, method.classify.max_cells)
    packed = [untrained.tokens(version, rows) for version in _versions(features)]
    weights = balanced_weights(labels, rows)
    classifier = _train(spec, packed, y, recipe, weights, checkpoint, log)
    ood = fit_ood(np.concatenate([_ood_input(p) for p in packed]))
    return Fitted(
        classifier,
        Statistics(field_mean, field_std, cell_mean, cell_std, *ood),
        selected,
        method.classify.max_cells,
    )


def _versions(features: Features) -> list[Features]:
    """The features themselves and each augmented copy, as tables of their own."""
    empty = (features.field_copies[:0], features.cell_copies[:0])
    pairs = [
        (features.field, features.cells),
        *zip(features.field_copies, features.cell_copies, strict=True),
    ]
    return [Features(field, cells, *empty, features.offsets, features.area) for field, cells in pairs]


def _train(
    spec: ClassifierSpec,
    packed: list[Tokens],
    y: NDArray[np.int64],
    recipe: Recipe,
    weights: NDArray[np.float64],
    checkpoint: Path | None,
    log: Callable[[str], None],
) -> AttentionClassifier:
    """One classifier on versions of the same fields, drawn with the given weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 11)
        model = AttentionClassifier(spec)

        def loss_of(step: int, progress: float) -> Tensor:
            rng = np.random.default_rng((recipe.seed, 3, step))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            torch.manual_seed(int(rng.integers(2**62)))  # of dropout
            rows = rng.choice(len(y), BATCH, p=weights)
            version = packed[int(rng.integers(len(packed)))]
            # The largest cells come first where there are many; a bag is a random choice among them.
            order = np.argsort(rng.random(version.valid[rows].shape) - version.valid[rows], axis=1)[:, :BAG]
            cells = np.take_along_axis(version.cells[rows], order[..., None], axis=1)
            valid = torch.from_numpy(np.take_along_axis(version.valid[rows], order, axis=1))
            use_field = (torch.rand(BATCH, generator=generator) >= FIELD_DROPOUT) & valid.any(1)
            field, cell = torch.from_numpy(version.field[rows]), torch.from_numpy(cells)
            field = field + NOISE * torch.randn(field.shape, generator=generator)
            cell = cell + NOISE * torch.randn(cell.shape, generator=generator)
            result = model(field, cell, valid, use_field)
            return bag_loss(result.logits, result.cell_logits, valid, torch.from_numpy(y[rows]))

        budget = Budget(steps=recipe.steps, minutes=30)
        best = run_steps(model, loss_of, budget, checkpoint, rate=1e-3, decay=0.98, weight_decay=0.1, log=log)
    assert isinstance(best, AttentionClassifier)
    return best


def _ood_input(packed: Tokens) -> NDArray[np.float32]:
    """[field, mean of cells], as `ood_scores` sees it."""
    return np.concatenate([packed.field, packed.cells.sum(1) / np.maximum(packed.valid.sum(1, keepdims=True), 1)], 1)


@dataclass(frozen=True, slots=True)
class Unseen:
    """What models that never saw a field's cluster say of it; rows as handed in."""

    logits: NDArray[np.float64]  # [n, 4]
    distance: NDArray[np.float64]  # [n]


def cross_fit(recipe: Recipe, features: Features, labels: Labels, rows: NDArray[np.int64]) -> Unseen:
    """Out-of-fold logits and distances of the given fields: whole clusters held out in turn, stratified by class."""
    logits, distance = np.zeros((len(rows), len(CLASSES))), np.zeros(len(rows))
    groups = np.array([labels.cluster[int(i)] for i in rows])
    splitter = StratifiedGroupKFold(CROSS_FITS, shuffle=True, random_state=recipe.seed)
    for train, test in splitter.split(rows, labels.y[rows], groups):
        fitted = fit(recipe, features, labels, rows[train], log=_silent)
        packed = fitted.tokens(features, rows[test])
        logits[test] = forward(fitted.classifier, packed)[0]
        distance[test] = ood_scores(packed, fitted.statistics)
    return Unseen(logits, distance)


def _silent(line: str) -> None:
    """Inner fits are too many to be told of."""


def calibrate(unseen: Unseen, labels: Labels, rows: NDArray[np.int64]) -> Calibration:
    """Temperature and thresholds from out-of-fold answers: photographs that the answering model has not seen."""
    y, clusters = labels.y[rows], np.array(labels.cluster)[rows]
    temperature = fit_temperature(unseen.logits, y, clusters)
    probabilities = softmax(unseen.logits, temperature)
    return Calibration(
        temperature=temperature,
        conformal=conformal_thresholds(probabilities, y, Calibration().alpha),
        min_cells=1,
        min_confidence=confidence_threshold(probabilities, y),
        max_ood=float(np.quantile(unseen.distance, 1 - MOST_FOREIGN)),
    )


def recipe_of(config: TrainConfig, method: MethodSettings, steps: int | None = None) -> Recipe:
    """The recipe that a training configuration asks for."""
    chosen = config.architecture()
    return Recipe(
        method, chosen.classifier_width, chosen.classifier_layers, steps or config.classifier_steps, config.seed
    )


def make_bundle(
    config: TrainConfig,
    data: Prepared,
    work: Path,
    out: Path,
    name: str,
    command: str,
    log: Callable[[str], None] = print,
) -> Bundle:
    """Fits the classifier on all stored features of a work directory, calibrates it out of fold, writes the bundle."""
    chosen, labels = config.architecture(), data.labels
    backbones = enabled_backbones(chosen.backbones, data.method.features)
    features = load_features(work, tuple(b.name for b in backbones))
    rows = np.arange(len(labels))
    recipe = recipe_of(config, data.method)
    unseen = cross_fit(recipe, features, labels, rows)
    calibration = calibrate(unseen, labels, rows)
    accuracy = float((unseen.logits.argmax(1) == labels.y).mean())
    log(f"classifier: temperature {calibration.temperature:.2f}, accuracy {accuracy:.3f} out of fold")
    fitted = fit(recipe, features, labels, rows, work / "classifier.pt", log)
    modules: dict[str, nn.Module] = {b.name: build_backbone(b, work / f"{b.name}.safetensors") for b in backbones}
    unet = chosen.unet if data.method.segment.enabled else None
    if unet is not None:
        modules["segmenter"] = load_segmenter(unet, work, "cpu")
    modules["classifier"] = fitted.classifier
    spec = BundleSpec(
        name=name,
        preset=config.preset,
        method=data.method,
        unet=unet,
        backbones=backbones,
        classifier=fitted.classifier.spec,
        selected=tuple(int(i) for i in fitted.selected),
        calibration=calibration,
        training=Training(
            data_digest=labels.digest,
            seed=config.seed,
            fields=len(labels),
            clusters=tuple(sorted(set(labels.cluster))),
            command=command,
            minutes=_minutes(work),
        ),
    )
    return save_bundle(out, spec, modules, fitted.statistics)


def _minutes(work: Path) -> dict[str, float]:
    """Minutes of each network's training, from its checkpoint."""
    out = {}
    for name in ("segmenter", "convnext", "nasnet", "classifier"):
        path = work / f"{name}.pt"
        if path.is_file():
            out[name] = round(torch.load(path, weights_only=True, map_location="cpu")["seconds"] / 60, 1)
    return out
