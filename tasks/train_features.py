"""From trained networks to the table of features that the selector and the classifier are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from leukoflow.method import FeatureSettings, MethodSettings
from models.attention_unet import segment_batch
from models.hybrid_cn_nas import HybridCNNas, build_backbone
from tasks.extract import extract_padded, field_means
from tasks.segment import cell_table, crop_cells, crop_masks, pseudo_semantic, single_cells
from tasks.train_data import CACHE_PX, Prepared, TrainConfig
from tasks.train_loop import random_windows, stain_jitter, to_tensor
from tasks.train_segmenter import load_segmenter

CHUNK = 1024  # cells turned at a time
JITTER = 0.5  # strength of the stain augmentation of feature copies


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells of all fields as the trained segmenter finds them; memory-mapped."""

    crops: NDArray[np.uint8]  # [m, cell_px, cell_px, 3]
    masks: NDArray[np.uint8]  # [m, cell_px, cell_px], 255 inside the cell
    windows: NDArray[np.uint8]  # [m, CACHE_PX, CACHE_PX, 4], the last channel is the mask
    offsets: NDArray[np.int64]  # [n + 1]
    area: NDArray[np.float32]  # [m]


@dataclass(frozen=True, slots=True)
class Features:
    """Hybrid features of all fields and cells, and of copies of them with other stain and geometry."""

    field: NDArray[np.float32]  # [n, D]
    cells: NDArray[np.float32]  # [m, D]
    field_copies: NDArray[np.float32]  # [copies, n, D]
    cell_copies: NDArray[np.float32]  # [copies, m, D]
    offsets: NDArray[np.int64]
    area: NDArray[np.float32]

    def columns(self, which: NDArray[np.int64]) -> Features:
        """The same with some columns only."""
        return Features(
            self.field[:, which],
            self.cells[:, which],
            self.field_copies[:, :, which],
            self.cell_copies[:, :, which],
            self.offsets,
            self.area,
        )


def collect_cells(
    fields: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]], method: MethodSettings
) -> Cells:
    """Cells of fields given as picture to cut from, classes and cells: uint8 [S, S, 3], uint8 and uint16 [S, S]."""
    window, side = method.features.cell_window_px, method.features.cell_px
    crops, masks, windows, areas, offsets = [], [], [], [], [0]
    for image, classes, cells in fields:
        table = cell_table(classes, cells, np.eye(2, 3, dtype=np.float32))
        centres = np.stack([table.field_x, table.field_y], 1).astype(np.float32)
        crops.append(crop_cells(image, centres, window, side))
        masks.append(crop_masks(cells, table.cell_id, centres, window, side))
        # Whole pixels, so that the wider window is not smoothed twice.
        centres = np.rint(centres).astype(np.float32)
        wide = crop_masks(cells, table.cell_id, centres, CACHE_PX, CACHE_PX)
        windows.append(np.concatenate([crop_cells(image, centres, CACHE_PX, CACHE_PX), wide[..., None]], -1))
        areas.append(table.cell_area_px.astype(np.float32))
        offsets.append(offsets[-1] + len(table))
    return Cells(
        np.concatenate(crops),
        np.concatenate(masks),
        np.concatenate(windows),
        np.array(offsets, np.int64),
        np.concatenate(areas),
    )


def find_cells(
    config: TrainConfig, data: Prepared, work: Path, device: str, log: Callable[[str], None] = print
) -> None:
    """Segments all fields with the trained segmenter (classically where it is switched off) and caches crops."""
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
    for name in ("crops", "masks", "windows", "area"):
        np.save(work / f"cells_{name}.npy", getattr(cells, name))
    np.save(done, cells.offsets)


def load_cells(work: Path) -> Cells:
    """Opens what `find_cells` left."""
    crops, masks, windows, offsets, area = (
        np.load(work / f"cells_{name}.npy", mmap_mode="r") for name in ("crops", "masks", "windows", "offsets", "area")
    )
    return Cells(crops, masks, windows, offsets, area)


def rows_of(offsets: NDArray[np.int64], fields: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the cells of the given fields, in their order."""
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
    """Features of one trained backbone for all cells, and for augmented copies of them."""
    done = work / f"features_{name}.npz"
    if done.is_file():
        return
    spec, settings = config.backbone(name), data.method.features
    model = HybridCNNas((spec,), [build_backbone(spec, work / f"{name}.safetensors")])
    model = model.to(device).to(memory_format=torch.channels_last)
    model.eval().requires_grad_(False)
    cells = load_cells(work)
    found = extract_padded(model, cells.crops, cells.masks, settings.cell_batch, device)
    log(f"features of {name}: {len(found)} cells")
    copies = augmented_features(model, cells, settings, config.feature_copies, config.seed, device)
    log(f"features of {name}: {config.feature_copies} augmented copies")
    temporary = work / f"features_{name}.part.npz"
    np.savez(temporary, cells=found, cell_copies=copies)
    temporary.rename(done)


def augmented_features(
    model: HybridCNNas, cells: Cells, settings: FeatureSettings, copies: int, seed: int, device: str
) -> NDArray[np.float32]:
    """Features of cells with other geometry and stain: float32 [copies, m, D].

    The draws depend on the seed alone: the columns of two backbones in one row come from one picture.
    """
    out = np.empty((copies, len(cells.crops), model.num_features), np.float32)
    for copy, target in enumerate(out):
        generator = torch.Generator().manual_seed(seed * 1000 + copy)
        for i in range(0, len(cells.crops), CHUNK):
            cached = to_tensor(cells.windows[i : i + CHUNK], "cpu")
            drawn = random_windows(cached, settings.cell_px, settings.cell_window_px, generator)
            crops, masks = _bytes(stain_jitter(drawn[:, :3], generator, JITTER)), _bytes(drawn[:, 3:])[..., 0]
            target[i : i + CHUNK] = extract_padded(model, crops, masks, settings.cell_batch, device)
    return out


def load_features(work: Path, backbones: tuple[str, ...]) -> Features:
    """Columns of the given backbones side by side, in their order."""
    stored = [np.load(work / f"features_{name}.npz") for name in backbones]
    single, copies = (np.concatenate([s[key] for s in stored], axis=-1) for key in ("cells", "cell_copies"))
    cells = load_cells(work)
    offsets, area = np.array(cells.offsets), np.array(cells.area)
    field = field_means(single, offsets, area)
    fields = [field_means(copy, offsets, area) for copy in copies]
    return Features(
        field, single, np.array(fields, np.float32).reshape(len(copies), *field.shape), copies, offsets, area
    )


def _bytes(batch: torch.Tensor) -> NDArray[np.uint8]:
    """float32 [N, C, h, w] in 0..1 to uint8 [N, h, w, C]."""
    out: NDArray[np.uint8] = (batch.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return out
