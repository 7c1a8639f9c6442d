"""What all trained networks share: schedule, moving average, checkpoints, sampling and augmentation."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from leukoflow.tasks.training.data import Budget

WARM_UP = 0.05  # share of the budget


def learning_rate(progress: float) -> float:
    """Factor 0..1: linear warm-up, then half a cosine."""
    if progress < WARM_UP:
        return (progress + 1e-3) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP)))) + 1e-3


class MovingAverage:
    """Exponential moving average of weights and normalisation statistics; the average is what is kept."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start as a copy of the model."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model; early on the window is shorter, so that the random start is forgotten."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - decay)
            else:
                mine.copy_(theirs)


@dataclass(slots=True)
class Progress:
    """State of a loop that a checkpoint must carry besides the tensors."""

    step: int = 0
    seconds: float = 0.0

    def share(self, budget: Budget) -> float:
        """Return how much of the budget is spent, by steps or by time, whichever is further."""
        return max(self.step / budget.steps, self.seconds / (60 * budget.minutes))


def run_steps(
    model: nn.Module,
    loss_of: Callable[[int, float], Tensor],
    budget: Budget,
    checkpoint: Path | None,
    *,
    rate: float,
    decay: float = 0.998,
    weight_decay: float = 0.05,
    save_every_s: float = 60.0,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Run AdamW on `loss_of(step, progress)` until the budget is spent; return the moving average.

    State is saved to `checkpoint`, if given, every `save_every_s` seconds, and a rerun continues there. A loss must
    draw its randomness from the step's number alone, so that an interrupted training sees the batches that an
    undisturbed one would.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate)
    average, progress = MovingAverage(model, decay), Progress()
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.model.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        average.updates, progress = state["step"], Progress(state["step"], state["seconds"])
        log(f"{checkpoint.stem}: continues at step {progress.step}")
    saved, running = time.monotonic(), math.nan
    while (share := progress.share(budget)) < 1:
        start = time.monotonic()
        for group in optimiser.param_groups:
            group["lr"] = rate * learning_rate(share)
        model.train()
        loss = loss_of(progress.step, share)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimiser.step()
        average.update(model)
        value = float(loss.detach())
        running = value if math.isnan(running) else 0.98 * running + 0.02 * value
        progress.step += 1
        progress.seconds += time.monotonic() - start
        if checkpoint is None:
            continue
        if progress.step % 50 == 0:
            log(f"{checkpoint.stem}: step {progress.step}, {progress.seconds:.0f} s, loss {running:.4f}")
        if time.monotonic() - saved > save_every_s:
            _save(checkpoint, model, average, optimiser, progress)
            saved = time.monotonic()
    if checkpoint is not None:
        _save(checkpoint, model, average, optimiser, progress)
    return average.model


def _save(
    path: Path, model: nn.Module, average: MovingAverage, optimiser: torch.optim.Optimizer, progress: Progress
) -> None:
    temporary = path.with_suffix(".part")
    state: Mapping[str, object] = {
        "model": model.state_dict(),
        "average": average.model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": progress.step,
        "seconds": progress.seconds,
    }
    torch.save(state, temporary)
    os.replace(temporary, path)


def to_tensor(images: NDArray[np.uint8], device: str | torch.device) -> Tensor:
    """Convert uint8 [N, h, w, 3] to float32 [N, 3, h, w] in 0..1, channels last in memory."""
    batch = torch.from_numpy(np.array(images, order="C")).to(device).permute(0, 3, 1, 2)
    return batch.float().div(255)


def stain_jitter(rgb: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Vary stain in optical density (after Tellez et al. 2018), brightness, contrast and sharpness at random.

    `rgb` float32 [N, 3, h, w] in 0..1; every image gets its own draw.
    """
    n = rgb.shape[0]

    def draw(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1).to(rgb.device) * strength

    density = -torch.log(rgb.clamp(1 / 255, 1))
    mix = torch.eye(3, device=rgb.device) + 0.12 * draw(n, 3, 3)
    gain = torch.exp(0.30 * draw(n, 3, 1) + 0.25 * draw(n, 1, 1))
    mixed = torch.einsum("nij,njp->nip", mix * gain, density.flatten(2)) + 0.08 * draw(n, 3, 1)
    out = torch.exp(-mixed.view_as(density))
    contrast, brightness = torch.exp(0.2 * draw(n, 1, 1, 1)), 0.08 * draw(n, 1, 1, 1)
    centre = out.mean((1, 2, 3), keepdim=True)
    out = (out - centre) * contrast + centre + brightness
    blurred = F.avg_pool2d(out, 3, 1, 1, count_include_pad=False)
    amount = (draw(n, 1, 1, 1) * 1.4).clamp(-0.5, 1)  # negative sharpens
    out = out + amount * (blurred - out)
    return out.clamp(0, 1)


def random_windows(windows: Tensor, side: int, window_px: float, generator: torch.Generator) -> Tensor:
    """Cut turned, mirrored, scaled and shifted crops float32 [N, 3, side, side] from cached windows [N, 3, W, W]."""
    n, width = windows.shape[0], windows.shape[-1]
    u = torch.rand(n, 5, generator=generator)
    angle = u[:, 0] * 2 * math.pi
    mirror = torch.where(u[:, 1] < 0.5, -1.0, 1.0)
    scale = window_px / width * torch.exp((u[:, 2] * 2 - 1) * 0.18)
    shift = (u[:, 3:5] * 2 - 1) * 6 / width
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale * torch.cos(angle) * mirror, -scale * torch.sin(angle)
    theta[:, 1, 0], theta[:, 1, 1] = scale * torch.sin(angle) * mirror, scale * torch.cos(angle)
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta.to(windows.device), [n, 3, side, side], align_corners=False)
    return F.grid_sample(windows, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
