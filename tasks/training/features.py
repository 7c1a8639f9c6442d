"""From trained networks to the table of features that the selector and the classifier are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from leukoflow.core.method import MethodSettings
from leukoflow.models.attention_unet import segment_batch
from leukoflow.models.hybrid_cn_nas import HybridCNNas, build_backbone
from leukoflow.tasks.imaging.cells import cell_table, crop_cells, crop_masks
from leukoflow.tasks.imaging.extract import Features, extract_padded
from leukoflow.tasks.imaging.segment import single_cells
from leukoflow.tasks.imaging.semantic import pseudo_semantic
from leukoflow.tasks.training.data import Prepared, TrainConfig
from leukoflow.tasks.training.segmenter import load_segmenter


@dataclass(frozen=True, slots=True)
class CellCrops:
    """Cells of all fields as the trained segmenter finds them; memory-mapped."""

    crops: NDArray[np.uint8]  # [m, cell_px, cell_px, 3]
    masks: NDArray[np.uint8]  # [m, cell_px, cell_px], 255 inside the cell
    offsets: NDArray[np.int64]  # [n + 1]
    area: NDArray[np.float32]  # [m]


def collect_cells(
    fields: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]], method: MethodSettings
) -> CellCrops:
    """Collect cells of fields given as (image, classes, cells): uint8 [S, S, 3], uint8 and uint16 [S, S]."""
    window, side = method.features.cell_window_px, method.features.cell_px
    crops, masks, areas, offsets = [], [], [], [0]
    for image, classes, cells in fields:
        table = cell_table(classes, cells, np.eye(2, 3, dtype=np.float32))
        centres = np.stack([table.field_x, table.field_y], 1).astype(np.float32)
        crops.append(crop_cells(image, centres, window, side))
        masks.append(crop_masks(cells, table.cell_id, centres, window, side))
        areas.append(table.cell_area_px.astype(np.float32))
        offsets.append(offsets[-1] + len(table))
    return CellCrops(
        np.concatenate(crops),
        np.concatenate(masks),
        np.array(offsets, np.int64),
        np.concatenate(areas),
    )


def find_cells(
    config: TrainConfig, data: Prepared, work: Path, device: str, log: Callable[[str], None] = print
) -> None:
    """Segment all fields with the trained segmenter (classically where it is switched off) and cache crops."""
    done = work / "cells_offsets.npy"
    if done.is_file():
        return
    model = load_segmenter(config.architecture().unet, work, device) if data.method.segment.enabled else None
    batch = data.method.features.field_batch

    def segmented() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]]:
        for i in range(0, len(data.fields), batch):
            fields = np.array(data.fields[i : i + batch])
            # Without a network, of the normalised field: that is what a run has.
            found = [pseudo_semantic(f) for f in fields] if model is None else segment_batch(model, fields, device)
            for image, classes in zip(fields, found, strict=True):
                yield image, *single_cells(image, classes, data.method.segment)

    cells = collect_cells(segmented(), data.method)
    log(f"cells: {cells.offsets[-1]} in {len(data.fields)} fields")
    for name in ("crops", "masks", "area"):
        np.save(work / f"cells_{name}.npy", getattr(cells, name))
    np.save(done, cells.offsets)


def load_cells(work: Path) -> CellCrops:
    """Open what `find_cells` left."""
    crops, masks, offsets, area = (
        np.load(work / f"cells_{name}.npy", mmap_mode="r") for name in ("crops", "masks", "offsets", "area")
    )
    return CellCrops(crops, masks, offsets, area)


def rows_of(offsets: NDArray[np.int64], fields: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of the cells of the given fields, in their order."""
    parts = [np.arange(offsets[i], offsets[i + 1]) for i in fields]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def backbone_features(
    config: TrainConfig,
    data: Prepared,
    work: Path,
    name: Literal["convnext", "nasnet"],
    device: str,
    log: Callable[[str], None] = print,
) -> None:
    """Compute the features of one trained backbone for all cells."""
    done = work / f"features_{name}.npy"
    if done.is_file():
        return
    spec, settings = config.backbone(name), data.method.features
    model = HybridCNNas((spec,), [build_backbone(spec, work / f"{name}.safetensors")])
    model = model.to(device).to(memory_format=torch.channels_last)
    model.eval().requires_grad_(False)
    cells = load_cells(work)
    found = extract_padded(model, cells.crops, cells.masks, settings.cell_batch, device)
    log(f"features of {name}: {len(found)} cells")
    temporary = work / f"features_{name}.part.npy"
    np.save(temporary, found)
    temporary.rename(done)


def load_features(work: Path, backbones: tuple[str, ...]) -> Features:
    """Load the columns of the given backbones side by side, in their order."""
    single = np.concatenate([np.load(work / f"features_{name}.npy") for name in backbones], axis=-1)
    cells = load_cells(work)
    offsets, area = np.array(cells.offsets), np.array(cells.area)
    return Features.of_cells(single, offsets, area)
