"""Training of the Attention U-Net on classical labels of the fields, hand-drawn masks and boxes of other sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from leukoflow.models.attention_unet import AttentionUNet, UNetSpec
from leukoflow.tasks.training.data import UNKNOWN, Prepared, TrainConfig
from leukoflow.tasks.training.loop import run_steps, stain_jitter, to_tensor

CROP_PX = 160
PARTS = {"fields": 2, "mosaics": 1, "drawn_small": 3, "drawn_large": 3, "boxed": 2}  # crops of a step by source
ZOOM = {
    "fields": (0.8, 1.25),
    "mosaics": (0.8, 1.6),
    "drawn_small": (0.6, 1.2),
    "drawn_large": (0.6, 1.3),
    "boxed": (0.7, 1.4),
}


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute cross-entropy plus soft Dice over the foreground classes; logits [N, 3, h, w], target int64 [N, h, w].

    Pixels of class UNKNOWN count nowhere.
    """
    known = (target != UNKNOWN)[:, None]
    probability = logits.softmax(1) * known
    truth = F.one_hot(target.clamp(max=logits.shape[1] - 1), logits.shape[1]).permute(0, 3, 1, 2) * known
    overlap, total = (probability * truth).sum((0, 2, 3)), (probability + truth).sum((0, 2, 3))
    soft = 1 - (2 * overlap + 1) / (total + 1)
    return F.cross_entropy(logits, target, ignore_index=UNKNOWN) + soft[1:].mean()


def turned_window(
    rgb: NDArray[np.uint8], classes: NDArray[np.uint8], zoom: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Cut a square of CROP_PX from a field at another scale, turned and flipped at random; mirrored beyond the edge."""
    height, width = classes.shape
    angle, mirror = rng.uniform(0, 2 * np.pi), 1 if rng.integers(2) else -1
    half = CROP_PX / 2
    # Output pixel to source pixel around a centre that keeps the square inside where it fits.
    reach = half / zoom
    x, y = (
        rng.uniform(min(reach, side / 2), max(side - reach, side / 2)) if side > 2 * reach else side / 2
        for side in (width, height)
    )
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    linear = np.array([[cos * mirror, -sin], [sin * mirror, cos]])
    shift = np.array([x, y]) - 0.5 - linear @ np.array([half - 0.5, half - 0.5])
    matrix = np.column_stack([linear, shift])
    size, inverse = (CROP_PX, CROP_PX), cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(rgb, matrix, size, flags=cv2.INTER_LINEAR | inverse, borderMode=cv2.BORDER_REFLECT_101)
    labels = cv2.warpAffine(classes, matrix, size, flags=cv2.INTER_NEAREST | inverse, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(image, np.uint8), np.asarray(labels, np.uint8)


def train_segmenter(
    config: TrainConfig, data: Prepared, work: Path, device: str, log: Callable[[str], None] = print
) -> None:
    """Leave `segmenter.safetensors` in the work directory."""
    done = work / "segmenter.safetensors"
    if done.is_file():
        return
    torch.manual_seed(config.seed)
    model = AttentionUNet(config.architecture().unet).to(device).to(memory_format=torch.channels_last)
    batch_size = sum(PARTS.values())

    def loss_of(step: int, progress: float) -> Tensor:
        rng = np.random.default_rng((config.seed, 1, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        images = np.empty((batch_size, CROP_PX, CROP_PX, 3), np.uint8)
        target = np.empty((batch_size, CROP_PX, CROP_PX), np.uint8)
        kinds = [kind for kind, count in PARTS.items() for _ in range(count)]
        for i, kind in enumerate(kinds):
            zoom = float(np.exp(rng.uniform(*np.log(ZOOM[kind]))))
            if kind == "fields":
                row = int(rng.integers(len(data.fields)))
                rgb, classes = data.fields[row], data.pseudo[row]
            else:
                source = getattr(data, kind)
                both = source[int(rng.integers(len(source)))]
                rgb, classes = np.ascontiguousarray(both[..., :3]), np.ascontiguousarray(both[..., 3])
            images[i], target[i] = turned_window(rgb, classes, zoom, rng)
        batch = stain_jitter(to_tensor(images, device), generator, 0.7)
        batch = batch.contiguous(memory_format=torch.channels_last)
        return segmentation_loss(model(batch), torch.from_numpy(target).to(device).long())

    best = run_steps(model, loss_of, config.segmenter, work / "segmenter.pt", rate=2e-3, decay=0.99, log=log)
    temporary = work / "segmenter.part"
    save_file({k: v.cpu().contiguous() for k, v in best.state_dict().items()}, temporary)
    temporary.rename(done)


def load_segmenter(spec: UNetSpec, work: Path, device: str) -> AttentionUNet:
    """Load the trained segmenter of a work directory, in evaluation mode."""
    model = AttentionUNet(spec)
    model.load_state_dict(load_file(work / "segmenter.safetensors"))
    model.eval().requires_grad_(False)
    return model.to(device).to(memory_format=torch.channels_last)
