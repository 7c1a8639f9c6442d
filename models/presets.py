"""Choose architectures and settings before training: `pocket`, `full`, `tiny`."""

from __future__ import annotations

from typing import Literal

from leukoflow.core.errors import BundleError
from leukoflow.core.method import (
    ClassifySettings,
    FeatureSettings,
    MethodSettings,
    NormalizeSettings,
    SegmentSettings,
    SelectSettings,
    Settings,
)
from leukoflow.models.attention_unet import UNetSpec
from leukoflow.models.hybrid_cn_nas import BackboneSpec

PresetName = Literal["pocket", "full", "tiny"]


class Preset(Settings):
    """Architecture and settings before training."""

    method: MethodSettings
    unet: UNetSpec
    backbones: tuple[BackboneSpec, ...]
    classifier_width: int = 64
    classifier_layers: int = 1


def preset(name: PresetName | str) -> Preset:
    """Return a preset: `pocket` for a laptop's processor, `full` for a GPU with pretrained weights, `tiny` to test."""
    if name == "pocket":
        return Preset(
            # Contrast enhancement made features of unseen photographs less comparable: see benchmarks/LOG.md.
            method=MethodSettings(
                normalize=NormalizeSettings(clahe=False, multiscale=False),
                select=SelectSettings(k=512, scheme="fcd"),
            ),
            unet=UNetSpec(),
            backbones=(
                BackboneSpec(
                    name="convnext",
                    architecture="convnext_atto",
                    kwargs={"ls_init_value": 0.1},  # 1e-6 is for long schedules
                    stages=(1, 2),
                    num_features=240,
                ),
                BackboneSpec(
                    name="nasnet",
                    architecture="nasnetalarge",
                    kwargs={"num_features": 384, "channel_multiplier": 2, "stem_size": 32},
                    stages=(2, 3),
                    num_features=288,
                ),
            ),
        )
    if name == "full":
        return Preset(
            method=MethodSettings(
                features=FeatureSettings(cell_px=128),
                select=SelectSettings(k=2000),
            ),
            unet=UNetSpec(widths=(32, 64, 128, 256)),
            backbones=(
                BackboneSpec(
                    name="convnext",
                    architecture="convnext_base",
                    stages=(1, 2),
                    num_features=768,
                    hub="convnext_base.fb_in22k_ft_in1k",
                    mean=(0.485, 0.456, 0.406),
                    std=(0.229, 0.224, 0.225),
                ),
                BackboneSpec(
                    name="nasnet",
                    architecture="nasnetalarge",
                    stages=(2, 3),
                    num_features=3024,
                    hub="nasnetalarge.tf_in1k",
                    mean=(0.5, 0.5, 0.5),
                    std=(0.5, 0.5, 0.5),
                ),
            ),
            classifier_width=256,
            classifier_layers=2,
        )
    if name == "tiny":
        return _tiny()
    raise BundleError(f"no preset named {name!r}; there are: pocket, full, tiny")


def _tiny() -> Preset:
    """Return very small networks of the same families."""
    return Preset(
        method=MethodSettings(
            segment=SegmentSettings(),
            features=FeatureSettings(cell_px=32, field_batch=4, cell_batch=16),
            select=SelectSettings(k=16),
            classify=ClassifySettings(max_cells=16),
        ),
        unet=UNetSpec(widths=(4, 8)),
        backbones=(
            BackboneSpec(
                name="convnext",
                architecture="convnext_atto",
                kwargs={"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
                stages=(1, 2),
                num_features=24,
            ),
            BackboneSpec(
                name="nasnet",
                architecture="nasnetalarge",
                kwargs={"num_features": 96, "channel_multiplier": 2, "stem_size": 8},
                stages=(2, 3),
                num_features=72,
            ),
        ),
        classifier_width=16,
    )


def enabled_backbones(backbones: tuple[BackboneSpec, ...], settings: FeatureSettings) -> tuple[BackboneSpec, ...]:
    """Keep the backbones that the ablation switches leave on."""
    return tuple(spec for spec in backbones if getattr(settings, spec.name))
