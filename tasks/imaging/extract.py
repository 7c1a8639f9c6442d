"""Extract hybrid features of single cells, with their activation maps; a field's are the average of its cells'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leukoflow.models.hybrid_cn_nas import GRID, HybridCNNas, Readout


@dataclass(frozen=True, slots=True)
class Features:
    """Hybrid features, D columns, of n fields (or tiles) and of their m cells.

    Field i has the cells offsets[i] to offsets[i + 1]; `area` is each cell's in model pixels.
    """

    field: NDArray[np.float32]  # [n, D]
    cells: NDArray[np.float32]  # [m, D]
    offsets: NDArray[np.int64]  # [n + 1]
    area: NDArray[np.float32]  # [m]

    @classmethod
    def of_cells(cls, cells: NDArray[np.float32], offsets: NDArray[np.int64], area: NDArray[np.float32]) -> Features:
        """Average each field's cells by area."""
        return cls(field_means(cells, offsets, area), cells, offsets, area)

    def columns(self, which: NDArray[np.int64]) -> Features:
        """Keep some columns only."""
        return Features(self.field[:, which], self.cells[:, which], self.offsets, self.area)


def extract_batch(
    hybrid: nn.Module,
    crops: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    device: str | torch.device = "cpu",
) -> NDArray[np.float32]:
    """Extract hybrid features float32 [B, D] of one batch of cells. Mixed precision on a GPU.

    Callers pad their last batch, so that the shape, and with it every float, never depends on how many there are.

    Args:
        hybrid: the backbones, in evaluation mode.
        crops: uint8 [B, h, w, 3], windows of a normalised field.
        masks: uint8 [B, h, w], 255 where the cell lies.
        device: of the backbones.
    """
    where = torch.device(device)
    with torch.inference_mode(), torch.autocast(where.type, enabled=where.type == "cuda"):
        features = hybrid(*_inputs(crops, masks, where))
    out: NDArray[np.float32] = features.float().cpu().numpy()
    return out


def explain_batch(
    hybrid: HybridCNNas,
    readout: Readout,
    crops: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    device: str | torch.device = "cpu",
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Do what `extract_batch` does and, in the same pass, make activation maps float16 [B, C, g, g] of the readout."""
    where = torch.device(device)
    with torch.inference_mode(), torch.autocast(where.type, enabled=where.type == "cuda"):
        features, maps = hybrid.explained(*_inputs(crops, masks, where), readout)
    bound = torch.finfo(torch.float16).max  # a column without spread may give more, and nothing infinite is stored
    return features.float().cpu().numpy(), maps.clamp(-bound, bound).half().cpu().numpy()


def _inputs(crops: NDArray[np.uint8], masks: NDArray[np.uint8], where: torch.device) -> tuple[Tensor, Tensor]:
    """Make what the backbones read: RGB in 0..1, float32 [B, 3, h, w], and the cell's share, float32 [B, 1, h, w]."""
    batch = torch.from_numpy(np.array(crops, order="C")).to(where).permute(0, 3, 1, 2)
    cell = torch.from_numpy(np.array(masks, order="C")).to(where)[:, None].float() / 255
    return (batch.float() / 255).contiguous(memory_format=torch.channels_last), cell


def extract_padded(
    hybrid: nn.Module,
    crops: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    batch: int,
    device: str | torch.device = "cpu",
) -> NDArray[np.float32]:
    """Do `extract_batch` over any number of cells in batches of a fixed shape: float32 [m, D]."""
    parts = [extract_batch(hybrid, rgb, cell, device)[:count] for count, rgb, cell in _padded(crops, masks, batch)]
    if parts:
        return np.concatenate(parts)
    return np.zeros((0, int(hybrid.num_features)), np.float32)  # type: ignore[arg-type]


def explain_padded(
    hybrid: HybridCNNas,
    readout: Readout,
    crops: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    batch: int,
    device: str | torch.device = "cpu",
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Do `explain_batch` over any number of cells in batches of a fixed shape: float32 [m, D], float16 [m, C, g, g]."""
    features = np.zeros((len(crops), hybrid.num_features), np.float32)
    maps = blank_maps(len(crops), crops.shape[1], len(readout.weight))
    first = 0
    for count, padded, cell in _padded(crops, masks, batch):
        own = slice(first, first + count)
        found, activations = explain_batch(hybrid, readout, padded, cell, device)
        features[own], maps[own] = found[:count], activations[:count]
        first += count
    return features, maps


def blank_maps(count: int, side: int, classes: int) -> NDArray[np.float16]:
    """Make activation maps for crops of `side` pixels, all zero: float16 [count, classes, g, g]."""
    grid = max(1, side // GRID)
    return np.zeros((count, classes, grid, grid), np.float16)


def _padded(
    crops: NDArray[np.uint8], masks: NDArray[np.uint8], batch: int
) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield batches of a fixed shape, the last one padded with blanks, and how many of their cells count."""
    for i in range(0, len(crops), batch):
        count = min(batch, len(crops) - i)
        padded, cell = np.zeros((batch, *crops.shape[1:]), np.uint8), np.zeros((batch, *masks.shape[1:]), np.uint8)
        padded[:count], cell[:count] = crops[i : i + count], masks[i : i + count]
        yield count, padded, cell


def field_means(
    cells: NDArray[np.float32], offsets: NDArray[np.int64], area: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Average the features of each field's cells by area, float32 [n, D]; zeros for a field without cells.

    Nothing but cells enters, so a diagnosis cannot rest on how the rest of the field was photographed.

    Args:
        cells: float32 [m, D].
        offsets: int64 [n + 1]; field i has the cells offsets[i] to offsets[i + 1].
        area: float32 [m].
    """
    out = np.zeros((len(offsets) - 1, cells.shape[1]), np.float32)
    for i, (first, last) in enumerate(pairwise(offsets)):
        if last > first:
            weight = np.maximum(area[first:last], 1.0).astype(np.float64)
            out[i] = (weight / weight.sum()) @ cells[first:last].astype(np.float64)
    return out
