"""Hybrid backbones: columns, z-scores, ablation, weights from file, directory and hub, and the full-size networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from leukoflow.core.errors import BundleError, ConfigError
from leukoflow.core.method import FeatureSettings
from leukoflow.models.hybrid_cn_nas import BackboneSpec, HybridCNNas, build_backbone, feature_maps
from leukoflow.models.presets import enabled_backbones, preset
from leukoflow.tasks.imaging.extract import extract_batch, extract_padded, field_means

TINY = preset("tiny").backbones


def test_columns_are_the_backbones_maps_averaged_over_the_cell() -> None:
    torch.manual_seed(0)
    hybrid = HybridCNNas(TINY).eval()
    images, cell = torch.rand(3, 3, 32, 32), torch.zeros(3, 1, 32, 32)
    cell[:, :, 8:24, 8:16] = 1
    with torch.inference_mode():
        found = hybrid(images, cell)
        parts = []
        for s in TINY:
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (s.mean, s.std))
            for part in feature_maps(hybrid.backbones[s.name], s.stages, (images - mean) / std):
                scale = 32 // part.shape[-1]
                share = cell.unfold(2, scale, scale).unfold(3, scale, scale).mean((-1, -2)) + 1e-3
                parts.append((part * share).sum((2, 3)) / share.sum((2, 3)))
    assert found.shape == (3, hybrid.num_features) == (3, 96)
    assert [(name, width) for name, _, width in hybrid.columns] == [("convnext", 24), ("nasnet", 72)]
    torch.testing.assert_close(found, torch.cat(parts, 1), atol=1e-4, rtol=1e-4)


def test_the_cell_decides_and_without_one_the_whole_crop_does() -> None:
    torch.manual_seed(0)
    hybrid = HybridCNNas(TINY).eval()
    crops = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    nothing, everything = np.zeros((1, 32, 32), np.uint8), np.full((1, 32, 32), 255, np.uint8)
    left = nothing.copy()
    left[:, :, :8] = 255
    whole = extract_batch(hybrid, crops, everything)
    np.testing.assert_allclose(extract_batch(hybrid, crops, nothing), whole, atol=1e-4)
    assert np.abs(extract_batch(hybrid, crops, left) - whole).max() > 1e-3


def test_field_means_weigh_by_area() -> None:
    cells = np.array([[1, 0], [4, 2], [7, 7]], np.float32)
    found = field_means(cells, np.array([0, 2, 2, 3]), np.array([100, 200, 50], np.float32))
    assert found.tolist() == [[3.0, pytest.approx(4 / 3)], [0, 0], [7, 7]]


def test_ablation_leaves_one_backbone_or_refuses() -> None:
    both = enabled_backbones(TINY, FeatureSettings())
    one = enabled_backbones(TINY, FeatureSettings(nasnet=False))
    assert [s.name for s in both] == ["convnext", "nasnet"]
    assert [s.name for s in one] == ["convnext"]
    assert HybridCNNas(one).num_features == 24
    with pytest.raises(ConfigError, match="no backbone"):
        HybridCNNas(enabled_backbones(TINY, FeatureSettings(nasnet=False, convnext=False)))


def test_wrong_number_of_features_is_refused() -> None:
    with pytest.raises(ConfigError, match="gives 24 features, not 17"):
        build_backbone(TINY[0].model_copy(update={"num_features": 17}))


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    hybrid = HybridCNNas(TINY).eval()
    rng = np.random.default_rng(0)
    crops, masks = rng.integers(0, 256, (5, 32, 32, 3), np.uint8), rng.integers(0, 256, (5, 32, 32), np.uint8)
    alone = extract_padded(hybrid, crops[:3], masks[:3], 4)
    together = extract_padded(hybrid, crops, masks, 4)
    assert alone.dtype == np.float32
    np.testing.assert_array_equal(alone, together[:3])
    assert extract_padded(hybrid, crops[:0], masks[:0], 4).shape == (0, 96)
    np.testing.assert_array_equal(together[:4], extract_batch(hybrid, crops[:4], masks[:4]))


def test_weights_from_file_and_directory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = TINY[0]
    source = build_backbone(spec)
    state = {k: v.contiguous() for k, v in source.state_dict().items()}
    save_file(state | {"head.fc.weight": torch.zeros(3, 16)}, tmp_path / "convnext.safetensors")
    for place in (tmp_path, tmp_path / "convnext.safetensors"):
        loaded = build_backbone(spec, place)
        for key, value in loaded.state_dict().items():
            torch.testing.assert_close(value, state[key])
    with pytest.raises(BundleError, match="no weights of nasnet"):
        build_backbone(TINY[1], tmp_path)
    with pytest.raises(BundleError, match="no file"):
        build_backbone(spec, tmp_path / "absent.safetensors")
    with pytest.raises(BundleError, match="does not fit"):
        build_backbone(
            spec.model_copy(update={"kwargs": {"depths": (1, 1, 1, 1), "dims": (8, 8, 24, 24)}, "num_features": 32}),
            tmp_path,
        )


def test_hub_is_asked_by_name_and_its_absence_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def offline(name: str, pretrained: bool, **_: Any) -> None:
        asked.append(name)
        assert pretrained
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BundleError, match="pass the file or its directory"):
        build_backbone(preset("full").backbones[0], "hub")
    assert asked == ["convnext_base.fb_in22k_ft_in1k"]
    with pytest.raises(BundleError, match="no weights on timm's hub"):
        build_backbone(TINY[0], "hub")


@pytest.mark.slow
def test_full_size_networks_on_a_few_images() -> None:
    full = preset("full")
    assert full.method.select.k == 2000
    torch.manual_seed(0)
    hybrid = HybridCNNas(full.backbones).eval()
    side = full.method.features.cell_px
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    found = extract_batch(hybrid, images, np.full(images.shape[:3], 255, np.uint8))
    assert found.shape == (2, 768 + 3024)
    assert np.isfinite(found).all()
    assert np.abs(found[0] - found[1]).max() > 0


def test_specification_refuses_unknown_fields() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        BackboneSpec.model_validate(
            {"name": "convnext", "architecture": "a", "stages": (1,), "num_features": 1, "colour": "red"}
        )
