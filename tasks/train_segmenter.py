"""Training of the Attention U-Net on classical labels of the fields and hand-drawn masks of another source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from models.attention_unet import AttentionUNet, UNetSpec
from tasks.train_data import Prepared, TrainConfig
from tasks.train_loop import run_steps, stain_jitter, to_tensor

CROP_PX = 128
BATCH, DRAWN = 12, 4  # crops of a step, and how many of them come from hand-drawn masks


def dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Dice coefficient of two masks; 1 when both are empty."""
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice over the foreground classes; logits [N, 3, h, w], target int64 [N, h, w]."""
    probability = logits.softmax(1)
    truth = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).to(probability.dtype)
    overlap, total = (probability * truth).sum((0, 2, 3)), (probability + truth).sum((0, 2, 3))
    soft = 1 - (2 * overlap + 1) / (total + 1)
    return F.cross_entropy(logits, target) + soft[1:].mean()


def train_segmenter(
    config: TrainConfig, data: Prepared, work: Path, device: str, log: Callable[[str], None] = print
) -> None:
    """Leaves `segmenter.safetensors` in the work directory."""
    done = work / "segmenter.safetensors"
    if done.is_file():
        return
    torch.manual_seed(config.seed)
    model = AttentionUNet(config.architecture().unet).to(device).to(memory_format=torch.channels_last)
    side = data.fields.shape[1]

    def loss_of(step: int, progress: float) -> Tensor:
        rng = np.random.default_rng((config.seed, 1, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        images = np.empty((BATCH, CROP_PX, CROP_PX, 3), np.uint8)
        target = np.empty((BATCH, CROP_PX, CROP_PX), np.uint8)
        for i in range(BATCH):
            y, x = (int(v) for v in rng.integers(0, side - CROP_PX + 1, 2))
            window = (slice(y, y + CROP_PX), slice(x, x + CROP_PX))
            if i < DRAWN:
                source = data.mosaics[int(rng.integers(len(data.mosaics)))][window]
                rgb, classes = source[..., :3], source[..., 3]
            else:
                row = int(rng.choice(data.split.train))
                rgb, classes = data.fields[row][window], data.pseudo[row][window]
            turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
            rgb, classes = np.rot90(rgb, turns), np.rot90(classes, turns)
            images[i], target[i] = (rgb[:, ::-1], classes[:, ::-1]) if mirror else (rgb, classes)
        batch = stain_jitter(to_tensor(images, device), generator, 0.7)
        batch = batch.contiguous(memory_format=torch.channels_last)
        return segmentation_loss(model(batch), torch.from_numpy(target).to(device).long())

    best = run_steps(model, loss_of, config.segmenter, work / "segmenter.pt", rate=2e-3, decay=0.99, log=log)
    temporary = work / "segmenter.part"
    save_file({k: v.cpu().contiguous() for k, v in best.state_dict().items()}, temporary)
    temporary.rename(done)


def load_segmenter(spec: UNetSpec, work: Path, device: str) -> AttentionUNet:
    """The trained segmenter of a work directory, in evaluation mode."""
    model = AttentionUNet(spec)
    model.load_state_dict(load_file(work / "segmenter.safetensors"))
    model.eval().requires_grad_(False)
    return model.to(device).to(memory_format=torch.channels_last)
