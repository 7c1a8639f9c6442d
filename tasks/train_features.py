"""From trained networks to the table of features that the selector and the classifier are fitted on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from models.attention_unet import segment_batch
from models.hybrid_cn_nas import HybridCNNas, build_backbone
from tasks.extract import extract_padded, field_inputs
from tasks.segment import cell_table, crop_cells, watershed_cells
from tasks.train_data import CACHE_PX, Prepared, TrainConfig
from tasks.train_loop import random_windows, stain_jitter, to_tensor
from tasks.train_segmenter import load_segmenter

CHUNK = 64  # fields per step
JITTER = 0.7  # strength of the stain augmentation of feature copies


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells of all fields as the trained segmenter finds them; memory-mapped."""

    crops: NDArray[np.uint8]  # [m, cell_px, cell_px, 3]
    windows: NDArray[np.uint8]  # [m, CACHE_PX, CACHE_PX, 3]
    offsets: NDArray[np.int64]  # [n + 1]
    area: NDArray[np.float32]  # [m]


@dataclass(frozen=True, slots=True)
class Features:
    """Hybrid features of all fields and cells. Copies are of training fields with other stain and geometry."""

    field: NDArray[np.float32]  # [n, D]
    cells: NDArray[np.float32]  # [m, D]
    field_copies: NDArray[np.float32]  # [copies, training fields, D]
    cell_copies: NDArray[np.float32]  # [copies, cells of training fields, D]
    offsets: NDArray[np.int64]
    area: NDArray[np.float32]


def find_cells(
    config: TrainConfig, data: Prepared, work: Path, device: str, log: Callable[[str], None] = print
) -> None:
    """Segments all fields with the trained segmenter (classically where it is switched off) and caches crops."""
    done = work / "cells_offsets.npy"
    if done.is_file():
        return
    settings, features = data.method.segment, data.method.features
    model = load_segmenter(config.architecture().unet, work, device) if settings.enabled else None
    crops, windows, areas = [], [], []
    offsets = np.zeros(len(data.fields) + 1, np.int64)
    for i in range(0, len(data.fields), features.field_batch):
        fields = np.array(data.fields[i : i + features.field_batch])
        semantic = data.pseudo[i : i + len(fields)] if model is None else segment_batch(model, fields, device)
        for j, (image, classes) in enumerate(zip(fields, semantic, strict=True)):
            table = cell_table(classes, watershed_cells(classes, settings), np.eye(2, 3, dtype=np.float32))
            centres = np.stack([table.field_x, table.field_y], 1).astype(np.float32)
            crops.append(crop_cells(image, centres, features.cell_window_px, features.cell_px))
            windows.append(crop_cells(image, np.rint(centres).astype(np.float32), CACHE_PX, CACHE_PX))
            areas.append(table.cell_area_px.astype(np.float32))
            offsets[i + j + 1] = offsets[i + j] + len(table)
    log(f"cells: {offsets[-1]} in {len(data.fields)} fields")
    np.save(work / "cells_crops.npy", np.concatenate(crops))
    np.save(work / "cells_windows.npy", np.concatenate(windows))
    np.save(work / "cells_area.npy", np.concatenate(areas))
    np.save(done, offsets)


def load_cells(work: Path) -> Cells:
    """Opens what `find_cells` left."""
    crops, windows, offsets, area = (
        np.load(work / f"cells_{name}.npy", mmap_mode="r") for name in ("crops", "windows", "offsets", "area")
    )
    return Cells(crops, windows, offsets, area)


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
    """Features of one trained backbone for all cells and fields, and for augmented copies of the training part."""
    done = work / f"features_{name}.npz"
    if done.is_file():
        return
    spec, settings = config.backbone(name), data.method.features
    model = HybridCNNas((spec,), [build_backbone(spec, work / f"{name}.safetensors")])
    model = model.to(device).to(memory_format=torch.channels_last)
    model.eval().requires_grad_(False)
    cells = load_cells(work)
    whole = field_inputs(data.fields, settings.field_input_px)
    arrays = {
        "field": extract_padded(model, whole, settings.field_batch, device),
        "cells": extract_padded(model, cells.crops, settings.cell_batch, device),
    }
    log(f"features of {name}: {len(arrays['cells'])} cells, {len(arrays['field'])} fields")
    members = rows_of(cells.offsets, data.split.train)
    field_copies, cell_copies = [], []
    for copy in range(config.feature_copies):
        # The same draws for both backbones: their columns of one row must come from one picture.
        generator = torch.Generator().manual_seed(config.seed * 1000 + copy)
        turned = []
        for i in range(0, len(members), 16 * CHUNK):
            cached = to_tensor(cells.windows[members[i : i + 16 * CHUNK]], "cpu")
            drawn = random_windows(cached, settings.cell_px, settings.cell_window_px, generator)
            turned.append(_bytes(stain_jitter(drawn, generator, JITTER)))
        cell_copies.append(extract_padded(model, np.concatenate(turned), settings.cell_batch, device))
        stained = [
            _bytes(stain_jitter(to_tensor(whole[data.split.train[i : i + CHUNK]], "cpu"), generator, JITTER))
            for i in range(0, len(data.split.train), CHUNK)
        ]
        field_copies.append(extract_padded(model, np.concatenate(stained), settings.field_batch, device))
        log(f"features of {name}: copy {copy + 1} of {config.feature_copies}")
    width = spec.num_features
    arrays["field_copies"] = np.array(field_copies, np.float32).reshape(-1, len(data.split.train), width)
    arrays["cell_copies"] = np.array(cell_copies, np.float32).reshape(-1, len(members), width)
    temporary = work / f"features_{name}.part.npz"
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    temporary.rename(done)


def load_features(work: Path, backbones: tuple[str, ...]) -> Features:
    """Columns of the given backbones side by side, in their order."""
    stored = [np.load(work / f"features_{name}.npz") for name in backbones]
    joined = {
        key: np.concatenate([s[key] for s in stored], axis=-1)
        for key in ("field", "cells", "field_copies", "cell_copies")
    }
    cells = load_cells(work)
    return Features(**joined, offsets=np.array(cells.offsets), area=np.array(cells.area))


def _bytes(batch: torch.Tensor) -> NDArray[np.uint8]:
    """float32 [N, 3, h, w] in 0..1 to uint8 [N, h, w, 3]."""
    out: NDArray[np.uint8] = (batch.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return out
