"""Features of all labelled fields by a bundle's label-free parts, as shipped and with one of them changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from leukoflow.core.errors import ConfigError
from leukoflow.models.attention_unet import segment_batch
from leukoflow.models.bundle import Bundle
from leukoflow.models.hybrid_cn_nas import HybridCNNas
from leukoflow.tasks.imaging.cells import crop_cells
from leukoflow.tasks.imaging.extract import Features, extract_padded
from leukoflow.tasks.imaging.normalize import normalize
from leukoflow.tasks.imaging.segment import single_cells
from leukoflow.tasks.imaging.semantic import pseudo_semantic
from leukoflow.tasks.training.data import padded, scaled_to_field
from leukoflow.tasks.training.features import CellCrops, collect_cells

GRID = 5  # windows per side where nothing is segmented


def classes_of(bundle: Bundle, images: Sequence[NDArray[np.uint8]], device: str = "cpu") -> NDArray[np.uint8]:
    """Classify pixels, uint8 [n, S, S], by the bundle's segmenter: what all tables start from."""
    normal = _normalised(bundle, images)
    model, batch = bundle.segmenter(device), bundle.spec.method.features.field_batch
    if model is None:
        return np.stack([pseudo_semantic(image) for image in normal])
    parts = [segment_batch(model, np.stack(normal[i : i + batch]), device) for i in range(0, len(normal), batch)]
    return np.concatenate(parts)


def plain_table(
    bundle: Bundle, images: Sequence[NDArray[np.uint8]], classes: NDArray[np.uint8], device: str = "cpu"
) -> Features:
    """Compute features as a run does; `classes` as of `classes_of`."""
    hybrid, settings = bundle.hybrid(device), bundle.spec.method.features
    normal = _normalised(bundle, images)
    cells = _cells(bundle, normal, classes, normal)
    return _table(cells, extract_padded(hybrid, cells.crops, cells.masks, settings.cell_batch, device))


def alternative_table(
    bundle: Bundle,
    images: Sequence[NDArray[np.uint8]],
    classes: NDArray[np.uint8],
    name: str,
    device: str = "cpu",
) -> Features:
    """Compute features with one part changed; cells are those of the bundle's segmenter but for `grid`.

    `raw` cuts from fields as photographed, `clahe` adds CLAHE, `unmasked` averages over whole windows, `grid` cuts
    windows from a grid, `untrained` uses random backbones. Raises ConfigError for another name.
    """
    settings, normal = bundle.spec.method.features, _normalised(bundle, images)
    hybrid = bundle.hybrid(device)
    if name == "grid":
        step = normal[0].shape[0] / GRID
        centres = np.array([((x + 0.5) * step, (y + 0.5) * step) for y in range(GRID) for x in range(GRID)], np.float32)
        crops = np.concatenate(
            [crop_cells(image, centres, settings.cell_window_px, settings.cell_px) for image in normal]
        )
        offsets = np.arange(len(normal) + 1, dtype=np.int64) * GRID**2
        area = np.ones(len(crops), np.float32)
        cells = CellCrops(crops, np.full(crops.shape[:3], 255, np.uint8), offsets, area)
    elif name in ("raw", "clahe"):
        change = {"reinhard": False, "clahe": False, "multiscale": False} if name == "raw" else {"clahe": True}
        other = bundle.spec.method.normalize.model_copy(update=change)
        side = bundle.spec.method.segment.field_px
        pictures = [padded(normalize(scaled_to_field(i, bundle.spec.method), other), side) for i in images]
        cells = _cells(bundle, normal, classes, pictures)
    elif name in ("unmasked", "untrained"):
        cells = _cells(bundle, normal, classes, normal)
    else:
        raise ConfigError(f"no table of features named {name!r}")
    if name == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(bundle.spec.training.seed)
            hybrid = HybridCNNas(bundle.spec.backbones).eval().requires_grad_(False).to(device)
    masks = np.full_like(cells.masks, 255) if name == "unmasked" else cells.masks
    found = extract_padded(hybrid, cells.crops, masks, settings.cell_batch, device)
    return _table(cells, found)


def _normalised(bundle: Bundle, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    method = bundle.spec.method
    side = method.segment.field_px
    return [padded(normalize(scaled_to_field(image, method), method.normalize), side) for image in images]


def _cells(
    bundle: Bundle,
    normal: Sequence[NDArray[np.uint8]],
    classes: NDArray[np.uint8],
    pictures: Sequence[NDArray[np.uint8]],
) -> CellCrops:
    """Find cells in normalised fields, and cut them from `pictures`."""
    method = bundle.spec.method
    found = (single_cells(image, c, method.segment) for image, c in zip(normal, classes, strict=True))
    return collect_cells(((p, *f) for p, f in zip(pictures, found, strict=True)), method)


def _table(cells: CellCrops, found: NDArray[np.float32]) -> Features:
    return Features.of_cells(found, cells.offsets, cells.area)
