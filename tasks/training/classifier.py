"""Selection of columns, the attention classifier on stored features, calibration, and the bundle.

Everything that a label touches is fitted here, and only from the rows that are handed in, so that an evaluation can fit
all of it inside a fold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from leukoflow.core.method import MethodSettings
from leukoflow.models.attention_classifier import AttentionClassifier, ClassifierSpec
from leukoflow.models.bundle import Bundle, BundleSpec, Calibration, Statistics, Training, save_bundle
from leukoflow.models.hybrid_cn_nas import build_backbone
from leukoflow.models.presets import enabled_backbones
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.imaging.classify import Tokens, forward, ood_scores, softmax, standardize, tokens
from leukoflow.tasks.imaging.extract import Features
from leukoflow.tasks.training.data import Budget, Labels, Prepared, TrainConfig, balanced_weights, grouped_folds
from leukoflow.tasks.training.features import load_features, rows_of
from leukoflow.tasks.training.loop import run_steps
from leukoflow.tasks.training.segmenter import load_segmenter
from leukoflow.tasks.training.select import mrmr

BATCH = 64
BAG = 12  # cells of a field in one step, drawn again each time
NOISE = 0.1  # standard deviation added to z-scores
RATE = 3e-4  # of the attention, which shall weigh cells and not learn fields by heart
INVERSE_RIDGE = 0.01  # scikit-learn's C of the evidence, the weights of all fields together being their number
ABSENT = -30.0  # evidence for a class that the training fields do not have
CROSS_FITS = 5  # parts of whole clusters for out-of-fold calibration
MOST_FOREIGN = 0.025  # share of unseen fields that may be refused as out of distribution
MOST_AMBIGUOUS = 0.015  # and as ambiguous
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
        """Collect what the classifier reads of the given fields."""
        own = rows_of(features.offsets, rows)
        offsets = np.concatenate([[0], np.cumsum(np.diff(features.offsets)[rows])]).astype(np.int64)
        columns, statistics = tuple(int(i) for i in self.selected), self.statistics
        return tokens(
            standardize(features.field[rows], statistics.mean, statistics.std, columns),
            standardize(features.cells[own], statistics.mean, statistics.std, columns),
            offsets,
            features.area[own],
            self.max_cells,
        )


def moments(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute column means and deviations; a constant column gets deviation 1, so that it becomes 0 everywhere."""
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 1e-6, std, 1.0).astype(np.float32)


def fit_temperature(
    logits: NDArray[np.float64], y: NDArray[np.int64], clusters: NDArray[np.str_] | None = None
) -> float:
    """Find the temperature of least negative log-likelihood (Guo et al. 2017).

    Classes weigh alike, and so do the clusters within one.
    """
    groups = clusters if clusters is not None else y.astype(np.str_)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1 / sizes[group]
    weight /= np.bincount(y, weight)[y]

    def loss(log_temperature: float) -> float:
        p = softmax(logits, float(np.exp(log_temperature)))[np.arange(len(y)), y]
        return float(-(weight * np.log(np.maximum(p, 1e-12))).sum() / weight.sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded").x))


def conformal_thresholds(
    probabilities: NDArray[np.float64], y: NDArray[np.int64], clusters: NDArray[np.str_], alpha: float
) -> tuple[float, float, float, float]:
    """Return, per class, the 1 - alpha quantile of 1 - p of the true class; 1 where there are too few fields for one.

    Fields of a cluster resemble each other, so clusters weigh by the square root of their size, and one more field of
    mean weight at infinity stands for the one to come (weighted quantiles as in Tibshirani et al. 2019).
    """
    out = []
    for k in range(4):
        own = np.flatnonzero(y == k)
        if not len(own):
            out.append(1.0)
            continue
        _, group, sizes = np.unique(clusters[own], return_inverse=True, return_counts=True)
        scores, weight = 1 - probabilities[own, k], 1 / np.sqrt(sizes[group])
        order = np.argsort(scores, kind="stable")
        reached = np.cumsum(weight[order]) / (weight.sum() + weight.mean())
        at = int(np.searchsorted(reached, 1 - alpha - 1e-12))
        out.append(float(scores[order[at]]) if at < len(own) else 1.0)
    return out[0], out[1], out[2], out[3]


def confidence_threshold(probabilities: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """Find the smallest confidence above which unseen fields are right often enough, within what may be refused."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    order = np.argsort(confidence, kind="stable")
    most = int(MOST_AMBIGUOUS * len(y))
    for refused in range(most + 1):
        if refused == most or right[order[refused:]].mean() >= SELECTIVE_ACCURACY:
            return float(confidence[order[refused]]) if refused else 0.0
    return 0.0


def fit_ood(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fit mean [K] and whitening [K, K] to fields [n, K], the covariance shrunk after Ledoit and Wolf (2004)."""
    shrunken = LedoitWolf().fit(x.astype(np.float64))
    # precision = L L^T, so |(x - mean) L|^2 is the squared Mahalanobis distance.
    whitening = np.linalg.cholesky(shrunken.precision_)
    return shrunken.location_.astype(np.float32), whitening.astype(np.float32)


def fit(
    recipe: Recipe,
    features: Features,
    labels: Labels,
    rows: NDArray[np.int64],
) -> Fitted:
    """Fit z-score, mRMR, evidence, attention and out-of-distribution statistics to the given fields alone.

    The evidence is ridge-regularised multinomial logistic regression on the fields' features, which are their cells'
    averages by area: convex, so the same everywhere. The attention then learns with the evidence held fast.
    """
    method, y = recipe.method, labels.y[rows]
    known = np.diff(features.offsets)[rows] > 0  # a field without cells teaches nothing
    rows, y = rows[known], y[known]
    mean, std = moments(features.field[rows])
    total = features.cells.shape[1]
    if method.select.enabled and method.select.k < total:
        table = standardize(features.field[rows], mean, std, tuple(range(total)))
        selected = mrmr(table, y, method.select.k, method.select.scheme)
    else:
        selected = np.arange(total)
    spec = ClassifierSpec(
        inputs=len(selected),
        width=recipe.classifier_width,
        layers=recipe.classifier_layers,
        attention=method.classify.attention,
    )
    nothing = np.zeros(0, np.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 11)
        model = AttentionClassifier(spec)
    started = Fitted(model, Statistics(mean, std, nothing, nothing), selected, method.classify.max_cells)
    packed = started.tokens(features, rows)
    weights = balanced_weights(labels, rows)
    fit_evidence(model.evidence, packed.field, y, weights)
    if method.classify.attention:
        model = _train_attention(model, packed, y, recipe, weights)
    statistics = Statistics(mean, std, *fit_ood(packed.field))
    return Fitted(model.eval(), statistics, selected, method.classify.max_cells)


def fit_evidence(layer: nn.Linear, x: NDArray[np.float32], y: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
    """Fill the layer with the optimum of weighted, regularised logistic regression; absent classes get no evidence."""
    model = LogisticRegression(C=INVERSE_RIDGE, max_iter=2000)
    model.fit(x.astype(np.float64), y, sample_weight=weights * len(y))
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps one row then
        coefficients, intercepts = (
            np.concatenate([-coefficients, coefficients]) / 2,
            np.append(-intercepts, intercepts) / 2,
        )
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(ABSENT)
        for row, k in enumerate(model.classes_):
            layer.weight[k] = torch.from_numpy(coefficients[row]).float()
            layer.bias[k] = float(intercepts[row])


def _train_attention(
    model: AttentionClassifier,
    packed: Tokens,
    y: NDArray[np.int64],
    recipe: Recipe,
    weights: NDArray[np.float64],
) -> AttentionClassifier:
    """Train everything but the evidence, on bags of fields drawn with the given weights.

    It takes seconds, so it starts over each time.
    """
    model.evidence.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):

        def loss_of(step: int, progress: float) -> Tensor:
            rng = np.random.default_rng((recipe.seed, 3, step))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            torch.manual_seed(int(rng.integers(2**62)))  # of dropout
            rows = rng.choice(len(y), BATCH, p=weights)
            # The largest cells come first where there are many; a bag is a random choice among them.
            order = np.argsort(rng.random(packed.valid[rows].shape) - packed.valid[rows], axis=1)[:, :BAG]
            cells = torch.from_numpy(np.take_along_axis(packed.cells[rows], order[..., None], axis=1))
            area, valid = (
                torch.from_numpy(np.take_along_axis(part[rows], order, axis=1)) for part in (packed.area, packed.valid)
            )
            cells = cells + NOISE * torch.randn(cells.shape, generator=generator)
            return F.cross_entropy(model(cells, area, valid).logits, torch.from_numpy(y[rows]))

        budget = Budget(steps=recipe.steps, minutes=30)
        best = run_steps(model, loss_of, budget, None, rate=RATE, decay=0.98, weight_decay=0.1)
    assert isinstance(best, AttentionClassifier)
    return best


@dataclass(frozen=True, slots=True)
class Unseen:
    """What models that never saw a field's cluster say of it; rows as handed in."""

    logits: NDArray[np.float64]  # [n, 4]
    distance: NDArray[np.float64]  # [n]


def cross_fit(recipe: Recipe, features: Features, labels: Labels, rows: NDArray[np.int64]) -> Unseen:
    """Compute out-of-fold logits and distances: whole clusters are held out in turn, stratified by class."""
    logits, distance = np.zeros((len(rows), len(CLASSES))), np.zeros(len(rows))
    groups = np.array([labels.cluster[int(i)] for i in rows])
    for train, test in grouped_folds(labels.y[rows], groups, CROSS_FITS, recipe.seed):
        fitted = fit(recipe, features, labels, rows[train])
        packed = fitted.tokens(features, rows[test])
        logits[test] = forward(fitted.classifier, packed)[0]
        distance[test] = ood_scores(packed, fitted.statistics)
    return Unseen(logits, distance)


def calibrate(unseen: Unseen, labels: Labels, rows: NDArray[np.int64]) -> Calibration:
    """Fit temperature and thresholds to out-of-fold answers: about images that the answering model has not seen."""
    y, clusters = labels.y[rows], np.array(labels.cluster)[rows]
    temperature = fit_temperature(unseen.logits, y, clusters)
    probabilities = softmax(unseen.logits, temperature)
    return Calibration(
        temperature=temperature,
        conformal=conformal_thresholds(probabilities, y, clusters, Calibration().alpha),
        min_cells=1,
        min_confidence=confidence_threshold(probabilities, y),
        max_ood=float(np.quantile(unseen.distance, 1 - MOST_FOREIGN)),
    )


def recipe_of(config: TrainConfig, method: MethodSettings, steps: int | None = None) -> Recipe:
    """Return the recipe that a training configuration asks for."""
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
    """Fit the classifier on all stored features of a work directory, calibrate it out of fold, write the bundle."""
    chosen, labels = config.architecture(), data.labels
    backbones = enabled_backbones(chosen.backbones, data.method.features)
    features = load_features(work, tuple(b.name for b in backbones))
    rows = np.arange(len(labels))
    recipe = recipe_of(config, data.method)
    unseen = cross_fit(recipe, features, labels, rows)
    calibration = calibrate(unseen, labels, rows)
    accuracy = float((unseen.logits.argmax(1) == labels.y).mean())
    log(f"classifier: temperature {calibration.temperature:.2f}, accuracy {accuracy:.3f} out of fold")
    fitted = fit(recipe, features, labels, rows)
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
            notes=_notes(config, {b.name: modules[b.name] for b in backbones}),
            minutes=_minutes(work),
        ),
    )
    return save_bundle(out, spec, modules, fitted.statistics)


def _notes(config: TrainConfig, backbones: Mapping[str, nn.Module]) -> str:
    """Say what the command does not: which weights were given instead of being distilled."""
    if config.weights is None:
        return ""
    lines = []
    for name, network in backbones.items():
        digest = hashlib.sha256()
        for key, value in sorted(network.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        lines.append(f"{name} {digest.hexdigest()[:16]}")
    return f"The backbones were given, not distilled in this training; digests of their weights: {', '.join(lines)}."


def _minutes(work: Path) -> dict[str, float]:
    """Read the minutes of each network's training from its checkpoint."""
    out = {}
    for name in ("segmenter", "convnext", "nasnet"):
        path = work / f"{name}.pt"
        if path.is_file():
            out[name] = round(torch.load(path, weights_only=True, map_location="cpu")["seconds"] / 60, 1)
    return out
