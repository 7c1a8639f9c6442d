"""Diagnose fields from their features: probabilities, prediction set, attention of cells, and when to abstain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from leukoflow.core.errors import BundleError
from leukoflow.models.attention_classifier import AttentionClassifier
from leukoflow.models.bundle import Bundle, Calibration, Statistics
from leukoflow.models.hybrid_cn_nas import Readout
from leukoflow.runs.records import OUT_OF_DISTRIBUTION
from leukoflow.tasks.imaging.extract import Features

CLIP = 12.0
ROWS = 64  # fields of a forward pass; a fixed shape, so that a row's floats do not depend on how many there are


@dataclass(frozen=True, slots=True)
class TileDiagnoses:
    """The diagnoses of n tiles (or fields of one tile) with m cells in all, of C classes in the bundle's order."""

    probabilities: NDArray[np.float64]  # [n, C], calibrated
    prediction_set: NDArray[np.bool_]  # [n, C]
    attention: NDArray[np.float32]  # [m]; sums to 1 within a field, 0 for cells beyond max_cells
    ood: NDArray[np.float64]  # [n], 1 is typical of training data
    abstained: tuple[str | None, ...]  # reason per row


@dataclass(frozen=True, slots=True)
class ImageDiagnosis:
    """The diagnosis of one image, over all its tiles."""

    probabilities: NDArray[np.float64]  # [C]
    prediction_set: NDArray[np.bool_]  # [C]
    attention: NDArray[np.float32]  # of all its cells, tile by tile
    ood: float
    n_cells: int
    abstained: str | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the classifier reads: z-scored, selected columns, cells padded to max_cells."""

    field: NDArray[np.float32]  # [n, K], for the out-of-distribution score
    cells: NDArray[np.float32]  # [n, M, K]
    area: NDArray[np.float32]  # [n, M], in model pixels, 0 where padded
    valid: NDArray[np.bool_]  # [n, M]
    source: NDArray[np.int64]  # [n, M], row of the cell among all cells, -1 where padded


def standardize(
    features: NDArray[np.float32], mean: NDArray[np.float32], std: NDArray[np.float32], selected: Sequence[int]
) -> NDArray[np.float32]:
    """Return z-scores of the selected columns: float32 [n, D] -> [n, K], clipped at 12 deviations of a field's mean."""
    columns = np.asarray(selected, np.int64)
    scores = (features[:, columns] - mean[columns]) / std[columns]
    out: NDArray[np.float32] = np.clip(scores, -CLIP, CLIP).astype(np.float32)
    return out


def readout(bundle: Bundle, classifier: AttentionClassifier, device: str | torch.device = "cpu") -> Readout:
    """Express the classifier's evidence, without its bias, as a linear function of a cell's features before selection.

    Exact but for the clipping of z-scores at 12 deviations, which is rare and has no counterpart here.
    """
    columns, statistics = list(bundle.spec.selected), bundle.statistics
    found = classifier.evidence.weight.detach().cpu().numpy().astype(np.float64)
    weight = np.zeros((len(found), len(statistics.mean)))
    weight[:, columns] = found / statistics.std[columns].astype(np.float64)
    return Readout(torch.from_numpy(weight).float().to(device), torch.from_numpy(statistics.mean).float().to(device))


def tokens(
    field: NDArray[np.float32],
    cells: NDArray[np.float32],
    cell_offsets: NDArray[np.int64],
    cell_area: NDArray[np.float32],
    max_cells: int,
) -> Tokens:
    """Pack the cells of each field, the `max_cells` largest where there are more; ties go to the first.

    Args:
        field: float32 [n, K]; cells: float32 [m, K]; both standardised.
        cell_offsets: int64 [n + 1].
        cell_area: float32 [m].
        max_cells: M.
    """
    n, k = field.shape
    packed, area = np.zeros((n, max_cells, k), np.float32), np.zeros((n, max_cells), np.float32)
    valid = np.zeros((n, max_cells), np.bool_)
    source = np.full((n, max_cells), -1, np.int64)
    for i in range(n):
        rows = np.arange(cell_offsets[i], cell_offsets[i + 1])
        if len(rows) > max_cells:
            rows = np.sort(rows[np.argsort(-cell_area[rows], kind="stable")[:max_cells]])
        packed[i, : len(rows)], valid[i, : len(rows)], source[i, : len(rows)] = cells[rows], True, rows
        area[i, : len(rows)] = cell_area[rows]
    return Tokens(field, packed, area, valid, source)


def ood_scores(packed: Tokens, statistics: Statistics) -> NDArray[np.float64]:
    """Measure each field's distance from the training fields, float64 [n]; about 1 for those, 0 without cells.

    The Mahalanobis distance of the field's features (Lee et al. 2018), per root of their number, with a shrunken
    covariance (Ledoit and Wolf 2004).
    """
    whitened = (packed.field.astype(np.float64) - statistics.ood_mean) @ statistics.ood_whitening.astype(np.float64)
    out: NDArray[np.float64] = np.sqrt((whitened**2).mean(1)) if whitened.shape[1] else np.zeros(len(packed.field))
    return np.where(packed.valid.any(1), out, 0.0)


def softmax(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return calibrated probabilities float64 [n, C] (Guo et al. 2017)."""
    scaled = logits / temperature
    raised = np.exp(scaled - scaled.max(1, keepdims=True))
    out: NDArray[np.float64] = raised / raised.sum(1, keepdims=True)
    return out


def forward(
    classifier: AttentionClassifier, packed: Tokens, device: str | torch.device = "cpu", batch: int = ROWS
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Compute logits float64 [n, C] and attention to cells float32 [n, M], in batches of fixed shape."""
    n, most, k = packed.cells.shape
    logits, attention = np.zeros((n, classifier.spec.classes)), np.zeros((n, most), np.float32)
    where = torch.device(device)
    for i in range(0, n, batch):
        rows = slice(i, min(i + batch, n))
        count = rows.stop - i
        cells, area = np.zeros((batch, most, k), np.float32), np.zeros((batch, most), np.float32)
        valid = np.zeros((batch, most), np.bool_)
        cells[:count], area[:count], valid[:count] = packed.cells[rows], packed.area[rows], packed.valid[rows]
        inputs = (torch.from_numpy(a).to(where) for a in (cells, area, valid))
        with torch.inference_mode():
            result = classifier(*inputs)
        logits[rows] = result.logits[:count].double().cpu().numpy()
        attention[rows] = result.attention[:count].float().cpu().numpy()
    return logits, attention


def decide(
    calibration: Calibration,
    probabilities: NDArray[np.float64],
    ood: NDArray[np.float64],
    n_cells: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], tuple[str | None, ...]]:
    """Decide on prediction sets bool [n, C] (class-conditional conformal, Vovk 2012) and reasons to abstain, or None.

    The likeliest class is always in the set, so that a set is never empty.
    """
    sets = 1 - probabilities <= np.asarray(calibration.conformal) + 1e-12
    if len(sets):
        sets[np.arange(len(sets)), probabilities.argmax(1)] = True
    confidence = probabilities.max(1) if len(sets) else np.zeros(0)
    reasons: list[str | None] = []
    for sure, distance, count in zip(confidence, ood, n_cells, strict=True):
        if count < calibration.min_cells:
            reasons.append(f"too few cells: {count} < {calibration.min_cells}")
        elif distance > calibration.max_ood:
            reasons.append(
                f"{OUT_OF_DISTRIBUTION}: distance from the training images {distance:.2f} > {calibration.max_ood:.2f}"
            )
        elif sure < calibration.min_confidence:
            reasons.append(f"ambiguous: confidence {sure:.2f} < {calibration.min_confidence:.2f}")
        else:
            reasons.append(None)
    return np.asarray(sets, np.bool_), tuple(reasons)


def diagnose(
    bundle: Bundle,
    classifier: AttentionClassifier,
    features: Features,
    device: str | torch.device = "cpu",
    batch: int = ROWS,
) -> TileDiagnoses:
    """Diagnose n tiles from their features.

    Args:
        bundle: statistics, selection and calibration.
        classifier: the bundle's classifier, in evaluation mode.
        features: of the tiles and their cells; areas decide which cells count where there are more than `max_cells`.
        device: of the classifier.
        batch: tiles of a forward pass.

    Raises:
        BundleError: the features have another number of columns than the bundle's backbones give.
    """
    statistics, spec = bundle.statistics, bundle.spec
    width = len(statistics.mean)
    field, cells = features.field, features.cells
    if field.shape[1] != width or cells.shape[1] != width:
        raise BundleError(
            f"features have {field.shape[1]} and {cells.shape[1]} columns, bundle {spec.name} expects {width}: they "
            "were made with another bundle; extract them again"
        )
    packed = tokens(
        standardize(field, statistics.mean, statistics.std, spec.selected),
        standardize(cells, statistics.mean, statistics.std, spec.selected),
        features.offsets,
        features.area,
        spec.method.classify.max_cells,
    )
    logits, weights = forward(classifier, packed, device, batch)
    attention = np.zeros(len(cells), np.float32)
    attention[packed.source[packed.valid]] = weights[packed.valid]
    probabilities = softmax(logits, spec.calibration.temperature)
    ood = ood_scores(packed, statistics)
    sets, abstained = decide(spec.calibration, probabilities, ood, np.diff(features.offsets))
    return TileDiagnoses(probabilities, sets, attention, ood, abstained)


def pool_tiles(
    bundle: Bundle, tiles: TileDiagnoses, cell_offsets: NDArray[np.int64], n_tiles: NDArray[np.int64]
) -> list[ImageDiagnosis]:
    """Pool the consecutive tiles of each image into its diagnosis, each tile weighted by its number of cells.

    An image of a single tile keeps that tile's numbers exactly. Attention is scaled by the tile's weight, so that it
    sums to at most 1 over the image.
    """
    images: list[ImageDiagnosis] = []
    counts = np.diff(cell_offsets)
    start = 0
    for number in n_tiles:
        rows = np.arange(start, start + int(number))
        start += int(number)
        own = counts[rows]
        share = own / own.sum() if own.sum() else np.full(len(rows), 1 / len(rows))
        first, last = int(cell_offsets[rows[0]]), int(cell_offsets[rows[-1] + 1])
        if len(rows) == 1:
            row = int(rows[0])
            images.append(
                ImageDiagnosis(
                    tiles.probabilities[row],
                    tiles.prediction_set[row],
                    tiles.attention[first:last],
                    float(tiles.ood[row]),
                    int(own[0]),
                    tiles.abstained[row],
                )
            )
            continue
        probabilities = (share[:, None] * tiles.probabilities[rows]).sum(0)
        ood = float((share * tiles.ood[rows]).sum())
        sets, abstained = decide(
            bundle.spec.calibration, probabilities[None], np.array([ood]), np.array([int(own.sum())], np.int64)
        )
        scaled = tiles.attention[first:last] * np.repeat(share, own).astype(np.float32)
        images.append(ImageDiagnosis(probabilities, sets[0], scaled, ood, int(own.sum()), abstained[0]))
    return images
