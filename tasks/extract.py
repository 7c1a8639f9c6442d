"""Hybrid features of whole fields and of single cells."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def field_inputs(fields: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Whole fields uint8 [B, H, W, 3] at the size in which the backbones see them: uint8 [B, side, side, 3]."""
    if fields.shape[1:3] == (side, side):
        return fields
    way = cv2.INTER_AREA if side < fields.shape[1] else cv2.INTER_LINEAR
    out = np.empty((len(fields), side, side, 3), np.uint8)
    for source, target in zip(fields, out, strict=True):
        cv2.resize(source, (side, side), dst=target, interpolation=way)
    return out


def extract_batch(
    hybrid: nn.Module, images: NDArray[np.uint8], device: str | torch.device = "cpu"
) -> NDArray[np.float32]:
    """Hybrid features float32 [B, D] of normalised RGB images uint8 [B, h, w, 3]: crops of cells, or whole fields.

    Callers pad their last batch, so that the shape, and with it every float, never depends on how many there are.
    Mixed precision on a GPU.
    """
    where = torch.device(device)
    with torch.inference_mode(), torch.autocast(where.type, enabled=where.type == "cuda"):
        batch = torch.from_numpy(np.array(images, order="C")).to(where).permute(0, 3, 1, 2)
        features = hybrid((batch.float() / 255).contiguous(memory_format=torch.channels_last))
    out: NDArray[np.float32] = features.float().cpu().numpy()
    return out


def extract_padded(
    hybrid: nn.Module, images: NDArray[np.uint8], batch: int, device: str | torch.device = "cpu"
) -> NDArray[np.float32]:
    """`extract_batch` over any number of images in batches of a fixed shape: float32 [n, D]."""
    parts = []
    for i in range(0, len(images), batch):
        piece = images[i : i + batch]
        padded = np.zeros((batch, *images.shape[1:]), np.uint8)
        padded[: len(piece)] = piece
        parts.append(extract_batch(hybrid, padded, device)[: len(piece)])
    if parts:
        return np.concatenate(parts)
    return np.zeros((0, int(hybrid.num_features)), np.float32)  # type: ignore[arg-type]
