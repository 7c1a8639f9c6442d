"""Selection of columns, training of the attention classifier on stored features, calibration, and the bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn

from leukoflow.records import CLASSES
from models.attention_classifier import AttentionClassifier, ClassifierSpec
from models.bundle import Bundle, BundleSpec, Calibration, Statistics, Training, enabled_backbones, save_bundle
from models.hybrid_cn_nas import build_backbone
from tasks.classify import Tokens, forward, ood_scores, softmax, standardize, tokens
from tasks.select import mrmr
from tasks.train_backbone import bag_loss
from tasks.train_data import Budget, Prepared, TrainConfig, balanced_weights
from tasks.train_features import Features, load_features, rows_of
from tasks.train_loop import run_steps
from tasks.train_segmenter import load_segmenter

BATCH = 64
FIELD_DROPOUT = 0.5  # share of fields without their field token: it carries photography more than cells do
CELL_DROPOUT = 0.3
NOISE = 0.15  # standard deviation added to z-scores
DIRECTIONS = 48  # principal directions of the out-of-distribution score
OOD_QUANTILE = 0.99
OUT_OF_FOLD = 3  # classifiers trained for the temperature alone
SELECTIVE_ACCURACY = 0.95  # wanted among answered calibration fields
MOST_AMBIGUOUS = 0.10  # but no larger a share of calibration fields than this is refused for it


@dataclass(frozen=True, slots=True)
class Fitted:
    """What this phase makes."""

    classifier: AttentionClassifier
    statistics: Statistics
    selected: NDArray[np.int64]
    calibration: Calibration


def moments(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Column means and deviations; a constant column gets deviation 1, so that it becomes 0 everywhere."""
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 1e-6, std, 1.0).astype(np.float32)


def field_means(cells: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean over each field's cells; zeros for a field without any: float32 [n, D]."""
    out = np.zeros((len(offsets) - 1, cells.shape[1]), np.float32)
    for i, (first, last) in enumerate(pairwise(offsets)):
        if last > first:
            out[i] = cells[first:last].mean(0)
    return out


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
    """Smallest confidence above which calibration fields are right often enough, within what may be refused."""
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


def fit_classifier(
    config: TrainConfig, data: Prepared, features: Features, work: Path, log: Callable[[str], None] = print
) -> Fitted:
    """Fits selection, classifier, temperature and thresholds; runs on the processor in a few minutes."""
    method, train, y = data.method, data.split.train, data.labels.y
    copies = len(features.field_copies)
    members = rows_of(features.offsets, train)
    counts = np.diff(features.offsets)[train]
    own_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    versions = [(features.field[train], features.cells[members])]
    versions += [(features.field_copies[i], features.cell_copies[i]) for i in range(copies)]
    field_mean, field_std = moments(np.concatenate([f for f, _ in versions]))
    cell_mean, cell_std = moments(np.concatenate([c for _, c in versions]))
    total = features.cells.shape[1]
    if method.select.enabled:
        everything = tuple(range(total))
        table = np.concatenate(
            [field_means(standardize(c, cell_mean, cell_std, everything), own_offsets) for _, c in versions]
        )
        k = min(method.select.k, total)
        selected = mrmr(table, np.tile(y[train], len(versions)), k, method.select.scheme)
    else:
        selected = np.arange(total)
    columns = tuple(int(i) for i in selected)

    def pack(
        field: NDArray[np.float32], cells: NDArray[np.float32], offsets: NDArray[np.int64], area: NDArray[np.float32]
    ) -> Tokens:
        return tokens(
            standardize(field, field_mean, field_std, columns),
            standardize(cells, cell_mean, cell_std, columns),
            offsets,
            area,
            method.classify.max_cells,
        )

    packed = [pack(f, c, own_offsets, features.area[members]) for f, c in versions]
    chosen = config.architecture()
    spec = ClassifierSpec(
        inputs=len(columns),
        width=chosen.classifier_width,
        layers=chosen.classifier_layers,
        attention=method.classify.attention,
    )
    steps, folds = config.classifier_steps, _folds(data)
    fit = partial(_fit, spec, packed, y[train], config.seed, log=log)
    best = fit(balanced_weights(data.labels, train), steps, work / "classifier.pt")
    unseen = np.zeros((len(train), len(CLASSES)))
    for fold in range(OUT_OF_FOLD):
        others = np.flatnonzero(folds != fold)
        weights = np.zeros(len(train))
        weights[others] = balanced_weights(data.labels, train[others])
        part = fit(weights, max(1, steps // 2), work / f"classifier_fold{fold}.pt")
        unseen[folds == fold] = forward(part, take(packed[0], np.flatnonzero(folds == fold)))[0]
    tokens_seen = np.concatenate([_ood_input(p) for p in packed])
    statistics = Statistics(field_mean, field_std, cell_mean, cell_std, *fit_ood(tokens_seen))
    fitted = Fitted(best, statistics, selected, Calibration())
    everything_packed = pack(features.field, features.cells, features.offsets, features.area)
    return replace(fitted, calibration=_calibrate(fitted, everything_packed, unseen, data, log))


def _folds(data: Prepared) -> NDArray[np.int64]:
    """Fold of each training field for out-of-fold logits: whole clusters, stratified by class."""
    train = data.split.train
    groups = np.array([data.labels.cluster[int(i)] for i in train])
    folds = np.zeros(len(train), np.int64)
    splitter = StratifiedGroupKFold(OUT_OF_FOLD, shuffle=True, random_state=0)
    for fold, (_, rows) in enumerate(splitter.split(groups, data.labels.y[train], groups)):
        folds[rows] = fold
    return folds


def _fit(
    spec: ClassifierSpec,
    packed: Sequence[Tokens],
    y: NDArray[np.int64],
    seed: int,
    weights: NDArray[np.float64],
    steps: int,
    checkpoint: Path,
    log: Callable[[str], None],
) -> AttentionClassifier:
    """One classifier on versions of the same fields, drawn with the given weights."""
    torch.manual_seed(seed + 11)
    model = AttentionClassifier(spec)

    def loss_of(step: int, progress: float) -> Tensor:
        rng = np.random.default_rng((seed, 3, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = rng.choice(len(y), BATCH, p=weights)
        version = packed[int(rng.integers(len(packed)))]
        field, cells = torch.from_numpy(version.field[rows]), torch.from_numpy(version.cells[rows])
        valid = torch.from_numpy(version.valid[rows])
        kept = valid & (torch.rand(valid.shape, generator=generator) >= CELL_DROPOUT)
        kept = torch.where(kept.any(1, keepdim=True), kept, valid)
        use_field = (torch.rand(BATCH, generator=generator) >= FIELD_DROPOUT) | ~kept.any(1)
        field = field + NOISE * torch.randn(field.shape, generator=generator)
        cells = cells + NOISE * torch.randn(cells.shape, generator=generator)
        result = model(field, cells, kept, use_field)
        return bag_loss(result.logits, result.cell_logits, kept, torch.from_numpy(y[rows]))

    budget = Budget(steps=steps, minutes=30)
    best = run_steps(model, loss_of, budget, checkpoint, rate=1e-3, weight_decay=0.1, log=log)
    assert isinstance(best, AttentionClassifier)
    return best


def _ood_input(packed: Tokens) -> NDArray[np.float32]:
    """[field, mean of cells], as `ood_scores` sees it."""
    return np.concatenate([packed.field, packed.cells.sum(1) / np.maximum(packed.valid.sum(1, keepdims=True), 1)], 1)


def take(packed: Tokens, rows: NDArray[np.int64]) -> Tokens:
    """Rows of packed tokens."""
    return Tokens(packed.field[rows], packed.cells[rows], packed.valid[rows], packed.source[rows])


def _calibrate(
    fitted: Fitted, packed: Tokens, unseen: NDArray[np.float64], data: Prepared, log: Callable[[str], None]
) -> Calibration:
    """Temperature from all clusters alike, training clusters out of fold; thresholds from calibration clusters.

    One temperature needs many clusters: a single odd one among the few calibration clusters would decide it alone.
    The thresholds need clusters that no network has seen.
    """
    rows, train, labels = data.split.calibration, data.split.train, data.labels
    y, clusters = labels.y[rows], np.array(labels.cluster)
    own = take(packed, rows)
    logits, _ = forward(fitted.classifier, own)
    pooled = np.concatenate([rows, train])
    temperature = fit_temperature(np.concatenate([logits, unseen]), labels.y[pooled], clusters[pooled])
    probabilities = softmax(logits, temperature)
    distance = ood_scores(own, fitted.statistics)
    accuracies = (logits.argmax(1) == y).mean(), (unseen.argmax(1) == labels.y[train]).mean()
    log(
        f"classifier: temperature {temperature:.2f}, accuracy {accuracies[0]:.3f} on calibration clusters, "
        f"{accuracies[1]:.3f} out of fold"
    )
    return Calibration(
        temperature=temperature,
        conformal=conformal_thresholds(probabilities, y, Calibration().alpha),
        min_cells=1,
        min_confidence=confidence_threshold(probabilities, y),
        max_ood=distance_threshold(distance, clusters[rows]),
    )


def distance_threshold(distance: NDArray[np.float64], clusters: NDArray[np.str_]) -> float:
    """Median over clusters of each one's quantile: a cluster that is foreign as a whole must not raise the bar."""
    return float(np.median([np.quantile(distance[clusters == c], OOD_QUANTILE) for c in np.unique(clusters)]))


def make_bundle(
    config: TrainConfig,
    data: Prepared,
    work: Path,
    out: Path,
    name: str,
    command: str,
    log: Callable[[str], None] = print,
) -> Bundle:
    """Fits the classifier on the stored features of a work directory and writes the bundle."""
    chosen = config.architecture()
    backbones = enabled_backbones(chosen.backbones, data.method.features)
    features = load_features(work, tuple(b.name for b in backbones))
    fitted = fit_classifier(config, data, features, work, log)
    modules: dict[str, nn.Module] = {b.name: build_backbone(b, work / f"{b.name}.safetensors") for b in backbones}
    unet = chosen.unet if data.method.segment.enabled else None
    if unet is not None:
        modules["segmenter"] = load_segmenter(unet, work, "cpu")
    modules["classifier"] = fitted.classifier

    def clusters(rows: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(sorted({data.labels.cluster[int(i)] for i in rows}))

    spec = BundleSpec(
        name=name,
        preset=config.preset,
        method=data.method,
        unet=unet,
        backbones=backbones,
        classifier=fitted.classifier.spec,
        selected=tuple(int(i) for i in fitted.selected),
        calibration=fitted.calibration,
        training=Training(
            data_digest=data.labels.digest,
            seed=config.seed,
            held_out_fold=config.hold_out,
            held_out_clusters=clusters(data.split.held_out),
            calibration_clusters=clusters(data.split.calibration),
            training_clusters=clusters(data.split.train),
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
