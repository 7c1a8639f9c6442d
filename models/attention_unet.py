"""Attention U-Net: background, cytoplasm and nucleus of white cells in one field.

Oktay et al. 2018, "Attention U-Net: Learning Where to Look for the Pancreas": a U-Net whose skip connections pass an
additive attention gate driven by the coarser level. The first convolution has stride two and the logits are enlarged
bilinearly: at the training fields' scale a white cell is 30 to 40 px wide, and a quarter of the pixels suffices.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from leukoflow.core.method import Settings


class UNetSpec(Settings):
    """Architecture of the segmenter; `mean` and `std` z-score RGB in 0..1."""

    widths: tuple[int, ...] = Field(default=(24, 48, 96, 160), min_length=2)
    classes: int = 3
    mean: tuple[float, float, float] = (0.73, 0.76, 0.85)
    std: tuple[float, float, float] = (0.24, 0.24, 0.14)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Build two 3x3 convolutions with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class AttentionGate(nn.Module):
    """Additive attention gate: weighs a skip connection by the signal of the coarser level (Oktay 2018, eq. 1-2)."""

    def __init__(self, skip: int, signal: int) -> None:
        """Channels of the skip connection and of the coarser level."""
        super().__init__()
        hidden = max(skip // 2, 4)
        self.skip = nn.Conv2d(skip, hidden, 1, bias=False)
        self.signal = nn.Conv2d(signal, hidden, 1)
        self.weight = nn.Conv2d(hidden, 1, 1)

    def forward(self, skip: Tensor, signal: Tensor) -> Tensor:
        """Weigh `skip` [N, C, 2h, 2w] pixel by pixel; `signal` is [N, S, h, w]."""
        gate = F.interpolate(self.signal(signal), size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return skip * torch.sigmoid(self.weight(F.relu(self.skip(skip) + gate)))


class AttentionUNet(nn.Module):
    """U-Net with attention gates. Input float32 [N, 3, H, W], RGB in 0..1; H and W of any size."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: UNetSpec) -> None:
        """Random weights."""
        super().__init__()
        self.spec = spec
        widths = spec.widths
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.down = nn.ModuleList(_block(a, b) for a, b in zip((widths[0], *widths[:-1]), widths, strict=True))
        pairs = list(pairwise(widths))
        self.gates = nn.ModuleList(AttentionGate(fine, coarse) for fine, coarse in pairs)
        self.up = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairs)
        self.merge = nn.ModuleList(_block(2 * fine, fine) for fine, _ in pairs)
        self.head = nn.Conv2d(widths[0], spec.classes, 1)

    def forward(self, rgb: Tensor) -> Tensor:
        """Compute logits float32 [N, classes, H, W]."""
        height, width = rgb.shape[-2:]
        multiple = 2 ** len(self.spec.widths)
        pad_y, pad_x = -height % multiple, -width % multiple
        x = (rgb - self.mean) / self.std
        if pad_y or pad_x:
            x = F.pad(x, (0, pad_x, 0, pad_y), mode="replicate")
        x = self.stem(x)
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for i in reversed(range(len(self.merge))):
            skip = self.gates[i](skips[i], x)
            x = F.interpolate(self.up[i](x), size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = self.merge[i](torch.cat([skip, x], 1))
        logits = F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return logits[..., :height, :width].float()


def segment_batch(model: nn.Module, fields: NDArray[np.uint8], device: str | torch.device) -> NDArray[np.uint8]:
    """Segment normalised RGB `fields` uint8 [B, H, W, 3]: uint8 [B, H, W], 0 background, 1 cytoplasm, 2 nucleus."""
    where = torch.device(device)
    with torch.inference_mode(), torch.autocast(where.type, enabled=where.type == "cuda"):
        batch = torch.from_numpy(np.ascontiguousarray(fields)).to(where).permute(0, 3, 1, 2)
        logits = model((batch.float() / 255).contiguous(memory_format=torch.channels_last))
        out: NDArray[np.uint8] = logits.argmax(1).to(torch.uint8).cpu().numpy()
    return out
