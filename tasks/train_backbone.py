"""Training of one backbone end to end on bags of cells and on whole fields, with a temporary attention head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention_classifier import AttentionClassifier, ClassifierSpec
from models.hybrid_cn_nas import HybridCNNas, build_backbone
from tasks.train_data import Prepared, TrainConfig, balanced_weights
from tasks.train_loop import random_windows, run_steps, stain_jitter, to_tensor

BAGS, CELLS, WHOLE = 20, 6, 4  # fields of a step, cells of each, and how many are also seen whole
SMALL_PX, SMALL_UNTIL = 48, 0.5  # smaller crops for the first half of the budget: more steps for the same time
RATE = {"convnext": 1e-3, "nasnet": 2e-3}


class _Trained(nn.Module):
    """Backbone with its temporary head."""

    def __init__(self, hybrid: HybridCNNas, head: AttentionClassifier) -> None:
        super().__init__()
        self.hybrid, self.head = hybrid, head


@contextmanager
def _stored_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation uses its running statistics: whole fields must not mix with those of single cells."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


def bag_loss(logits: Tensor, cell_logits: Tensor, valid: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the field plus half the mean cross-entropy of its cells, which share the field's label."""
    cells = F.cross_entropy(
        cell_logits.transpose(1, 2), y[:, None].expand(valid.shape), reduction="none", label_smoothing=0.05
    )
    return F.cross_entropy(logits, y, label_smoothing=0.05) + 0.5 * (cells * valid).sum() / valid.sum()


def train_backbone(
    config: TrainConfig,
    data: Prepared,
    work: Path,
    name: Literal["convnext", "nasnet"],
    device: str,
    log: Callable[[str], None] = print,
) -> None:
    """Leaves `<name>.safetensors` in the work directory."""
    done = work / f"{name}.safetensors"
    if done.is_file():
        return
    torch.manual_seed(config.seed + 7)
    spec = config.backbone(name)
    settings = config.method.features
    hybrid = HybridCNNas((spec,), [build_backbone(spec, config.weights)])
    head = AttentionClassifier(ClassifierSpec(inputs=spec.num_features, width=96, dropout=0.1))
    model = _Trained(hybrid, head).to(device).to(memory_format=torch.channels_last)
    counts = np.diff(data.offsets)
    rows = data.split.train[counts[data.split.train] > 0]
    weights = balanced_weights(data.labels, rows)

    def loss_of(step: int, progress: float) -> Tensor:
        rng = np.random.default_rng((config.seed, 2, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        picked = rng.choice(rows, BAGS, p=weights)
        windows = np.empty((BAGS, CELLS, *data.windows.shape[1:]), np.uint8)
        for i, row in enumerate(picked):
            first, count = int(data.offsets[row]), int(counts[row])
            which = rng.choice(count, CELLS, replace=count < CELLS)
            windows[i] = data.windows[first + np.sort(which)]
        side = SMALL_PX if progress < SMALL_UNTIL and settings.cell_px > SMALL_PX else settings.cell_px
        cached = to_tensor(windows.reshape(-1, *windows.shape[2:]), device)
        crops = stain_jitter(random_windows(cached, side, settings.cell_window_px, generator), generator)
        features = hybrid(crops.contiguous(memory_format=torch.channels_last)).view(BAGS, CELLS, -1)
        whole = to_tensor(data.fields[picked[:WHOLE]], device)
        turned = torch.rot90(whole, int(rng.integers(4)), (2, 3))
        turned = turned.flip(3) if rng.integers(2) else turned
        small = F.interpolate(turned, size=(settings.field_input_px,) * 2, mode="area")
        small = stain_jitter(small, generator)
        with _stored_statistics(hybrid):
            seen = hybrid(small.contiguous(memory_format=torch.channels_last))
        field = torch.cat([seen, seen.new_zeros(BAGS - WHOLE, seen.shape[1])])
        use_field = torch.arange(BAGS, device=device) < WHOLE
        y = torch.from_numpy(data.labels.y[picked]).to(device)
        valid = torch.ones(BAGS, CELLS, dtype=torch.bool, device=device)
        result = head(field, features, valid, use_field)
        alone = head(field[:WHOLE], features[:WHOLE], torch.zeros_like(valid[:WHOLE]))
        return bag_loss(result.logits, result.cell_logits, valid, y) + 0.25 * F.cross_entropy(
            alone.logits, y[:WHOLE], label_smoothing=0.05
        )

    budget = config.convnext if name == "convnext" else config.nasnet
    best = run_steps(model, loss_of, budget, work / f"{name}.pt", rate=RATE[name], log=log)
    assert isinstance(best, _Trained)
    temporary = work / f"{name}.part"
    backbone = best.hybrid.backbones[name]
    save_file({k: v.cpu().contiguous() for k, v in backbone.state_dict().items()}, temporary)
    temporary.rename(done)
