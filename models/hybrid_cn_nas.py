"""Hybrid features of single cells: feature maps of a ConvNeXt (Liu et al. 2022) and a NASNet-A (Zoph et al. 2018).

Both networks come from timm. A network sees the cell in its surroundings; its maps are then averaged over the cell
alone, so that what lies around it enters only through the receptive field. Maps of 1/8 and 1/16 of the crop are used:
they hold texture, where the last ones hold what the network was once trained to name. The output is the concatenation
of the enabled backbones' averages, in the order of the specs.

An average is a sum over positions, so whatever is linear in the features falls apart into what each position adds to it
(class activation maps, Zhou et al. 2016): exactly, and in the pass that gives the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from leukoflow.core.errors import BundleError, ConfigError
from leukoflow.core.method import Settings

BLANK_SHARE = 1e-3  # weight of a pixel outside the cell: an empty mask averages over the whole crop
GRID = 8  # an activation map has one position per so many pixels of the crop


class BackboneSpec(Settings):
    """One backbone: timm's name and arguments, and how its input is z-scored (RGB in 0..1)."""

    name: Literal["convnext", "nasnet"]
    architecture: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    stages: tuple[int, ...]  # timm's numbers of the feature maps in use
    num_features: int  # their channels together
    layer: str = "maps at 1/8 and 1/16, averaged over the cell"
    mean: tuple[float, float, float] = (0.73, 0.76, 0.85)
    std: tuple[float, float, float] = (0.24, 0.24, 0.14)
    hub: str | None = None  # timm's name of pretrained weights, where there are any


def build_backbone(spec: BackboneSpec, weights: str | Path | None = None) -> nn.Module:
    """Build a timm network without what lies above its last stage in use; `feature_maps` runs it.

    `weights` is None (random), "hub" (timm downloads and caches), a *.safetensors file, or a directory holding
    `<name>.safetensors` or timm's `model.safetensors`. Raises BundleError when they are absent or of another shape.
    """
    import timm  # seconds, and only who builds a network needs it

    if weights == "hub":
        if spec.hub is None:
            raise BundleError(f"backbone {spec.name} ({spec.architecture}) has no weights on timm's hub; give a path")
        try:
            return _pruned(timm.create_model(spec.hub, pretrained=True, num_classes=0, **spec.kwargs), spec)
        except Exception as error:
            raise BundleError(
                f"weights of {spec.hub} could not be had from timm's hub ({error}); download them elsewhere and pass "
                "the file or its directory instead"
            ) from error
    model = _pruned(timm.create_model(spec.architecture, pretrained=False, num_classes=0, **spec.kwargs), spec)
    if weights is not None:
        _load_weights(model, spec, Path(weights))
    return model


def feature_maps(network: nn.Module, stages: tuple[int, ...], rgb: Tensor) -> list[Tensor]:
    """Compute maps [N, C, h, w] of the given stages for standardised RGB [N, 3, H, W]."""
    found: list[Tensor] = network.forward_intermediates(  # type: ignore[operator]
        rgb, indices=list(stages), intermediates_only=True, stop_early=True
    )
    return found


def _pruned(model: nn.Module, spec: BackboneSpec) -> nn.Module:
    """Drop the layers above the last stage in use, and check the number of channels."""
    model.prune_intermediate_layers(list(spec.stages), prune_norm=True, prune_head=True)  # type: ignore[operator]
    was_training = model.training
    with torch.no_grad():
        maps = feature_maps(model.eval(), spec.stages, torch.zeros(1, 3, 64, 64))
    found = sum(m.shape[1] for m in maps)
    if found != spec.num_features:
        raise ConfigError(f"backbone {spec.name}: {spec.architecture} gives {found} features, not {spec.num_features}")
    return model.train(was_training)


def _load_weights(model: nn.Module, spec: BackboneSpec, path: Path) -> None:
    """Load a safetensors file (a published checkpoint's classifier head is dropped)."""
    if path.is_dir():
        candidates = [path / f"{spec.name}.safetensors", path / spec.architecture / "model.safetensors"]
        candidates.append(path / "model.safetensors")
        file = next((p for p in candidates if p.is_file()), None)
        if file is None:
            raise BundleError(f"no weights of {spec.name} in {path}: expected one of {[p.name for p in candidates]}")
    else:
        file = path
    if not file.is_file():
        raise BundleError(f"weights of backbone {spec.name}: no file {file}")
    state = {key: value.float() for key, value in load_file(file).items()}
    wanted = model.state_dict()
    missing = sorted(k for k in wanted if k not in state and not k.endswith("num_batches_tracked"))
    shapes = sorted(k for k in wanted if k in state and state[k].shape != wanted[k].shape)
    if missing or shapes:
        raise BundleError(
            f"{file} does not fit backbone {spec.name} ({spec.architecture}): {len(missing)} weights absent, "
            f"{len(shapes)} of another shape, for example {(missing + shapes)[0]}"
        )
    model.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)


class Readout(NamedTuple):
    """What is linear in the features: `weight` @ (features - `offset`), float32 [C, D] and [D]."""

    weight: Tensor
    offset: Tensor


def spread(maps: Tensor, side: int) -> Tensor:
    """Spread maps [N, C, h, w] on a grid [N, C, side, side] over the same square; sums over positions are conserved.

    A position gives to each of the grid what share of its area lies there: a quarter each where the grid is twice as
    fine.
    """
    rows, columns = (_overlap(length, side).to(maps) for length in maps.shape[-2:])
    return rows.T @ maps @ columns


def _overlap(length: int, side: int) -> Tensor:
    """Return the share of each of `length` equal parts of a line in each of `side` parts: float64 [length, side]."""
    coarse = torch.arange(length + 1, dtype=torch.float64) / length
    fine = torch.arange(side + 1, dtype=torch.float64) / side
    end = torch.minimum(coarse[1:, None], fine[None, 1:])
    return (end - torch.maximum(coarse[:-1, None], fine[None, :-1])).clamp(min=0) * length


class HybridCNNas(nn.Module):
    """Features of the backbones side by side.

    Input: float32 [N, 3, h, w], RGB in 0..1, and float32 [N, 1, h, w], how much of each pixel belongs to the cell.
    Output: float32 [N, D].
    """

    def __init__(self, specs: tuple[BackboneSpec, ...], backbones: list[nn.Module] | None = None) -> None:
        """Given networks, one for each specification, or random ones."""
        super().__init__()
        if not specs:
            raise ConfigError("no backbone is enabled: switch on features.convnext or features.nasnet")
        self.specs = specs
        built = backbones if backbones is not None else [build_backbone(spec) for spec in specs]
        self.backbones = nn.ModuleDict({spec.name: net for spec, net in zip(specs, built, strict=True)})
        for spec in specs:
            self.register_buffer(f"{spec.name}_mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer(f"{spec.name}_std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    @property
    def num_features(self) -> int:
        """D, the sum over backbones."""
        return sum(spec.num_features for spec in self.specs)

    @property
    def columns(self) -> tuple[tuple[str, str, int], ...]:
        """(backbone, layer, dimension) of each block of columns, in order."""
        return tuple((spec.name, spec.layer, spec.num_features) for spec in self.specs)

    def forward(self, rgb: Tensor, cell: Tensor) -> Tensor:
        """Compute features float32 [N, D]."""
        return torch.cat([_average(found, share) for found, share in self._maps(rgb, cell)], 1)

    def explained(self, rgb: Tensor, cell: Tensor, readout: Readout) -> tuple[Tensor, Tensor]:
        """Compute features float32 [N, D], the very ones of `forward`, and maps float32 [N, C, g, g], g = h / 8.

        A map says what each position adds to the readout: it sums to `weight` @ (features - `offset`).
        """
        side = max(1, rgb.shape[-1] // GRID)
        parts, first = [], 0
        maps = rgb.new_zeros((len(rgb), len(readout.weight), side, side), dtype=torch.float32)
        for found, share in self._maps(rgb, cell):
            parts.append(_average(found, share))
            own = slice(first, first + found.shape[1])
            first = own.stop
            with torch.autocast(rgb.device.type, enabled=False):  # half precision would not add up
                centred = found.float() - readout.offset[own].view(1, -1, 1, 1)
                added = torch.einsum("cd,ndhw->nchw", readout.weight[:, own], centred)
                maps += spread(added * share / share.sum((2, 3), keepdim=True), side)
        return torch.cat(parts, 1), maps

    def _maps(self, rgb: Tensor, cell: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each map [N, C, h, w] of each backbone, and the weight of its positions, float32 [N, 1, h, w]."""
        for spec in self.specs:
            mean, std = getattr(self, f"{spec.name}_mean"), getattr(self, f"{spec.name}_std")
            for found in feature_maps(self.backbones[spec.name], spec.stages, (rgb - mean) / std):
                yield found, F.adaptive_avg_pool2d(cell, (found.shape[-2], found.shape[-1])) + BLANK_SHARE


def _average(found: Tensor, share: Tensor) -> Tensor:
    """Average over positions with weights: [N, C, h, w] and [N, 1, h, w] -> float32 [N, C]."""
    return (found.float() * share).sum((2, 3)) / share.sum((2, 3))
