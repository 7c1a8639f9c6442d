"""Hybrid backbones: columns, z-scores, ablation, weights from file, directory and hub, and the full-size networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from leukoflow.errors import BundleError, ConfigError
from leukoflow.method import FeatureSettings
from models.bundle import enabled_backbones, preset
from models.hybrid_cn_nas import BackboneSpec, HybridCNNas, build_backbone
from tasks.extract import extract_batch, extract_padded, field_inputs

TINY = preset("tiny").backbones


def test_columns_are_the_backbones_side_by_side() -> None:
    torch.manual_seed(0)
    hybrid = HybridCNNas(TINY).eval()
    images = torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        found = hybrid(images)
        parts = [
            hybrid.backbones[s.name](
                (images - torch.tensor(s.mean).view(1, 3, 1, 1)) / torch.tensor(s.std).view(1, 3, 1, 1)
            )
            for s in TINY
        ]
    assert found.shape == (3, hybrid.num_features) == (3, 112)
    assert [(name, width) for name, _, width in hybrid.columns] == [("convnext", 16), ("nasnet", 96)]
    torch.testing.assert_close(found, torch.cat(parts, 1))


def test_ablation_leaves_one_backbone_or_refuses() -> None:
    both = enabled_backbones(TINY, FeatureSettings())
    one = enabled_backbones(TINY, FeatureSettings(nasnet=False))
    assert [s.name for s in both] == ["convnext", "nasnet"]
    assert [s.name for s in one] == ["convnext"]
    assert HybridCNNas(one).num_features == 16
    with pytest.raises(ConfigError, match="no backbone"):
        HybridCNNas(enabled_backbones(TINY, FeatureSettings(nasnet=False, convnext=False)))


def test_wrong_number_of_features_is_refused() -> None:
    with pytest.raises(ConfigError, match="gives 16 features, not 17"):
        build_backbone(TINY[0].model_copy(update={"num_features": 17}))


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    hybrid = HybridCNNas(TINY).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    alone = extract_padded(hybrid, images[:3], 4)
    together = extract_padded(hybrid, images, 4)
    assert alone.dtype == np.float32
    np.testing.assert_array_equal(alone, together[:3])
    assert extract_padded(hybrid, images[:0], 4).shape == (0, 112)
    np.testing.assert_array_equal(together[:4], extract_batch(hybrid, images[:4]))


def test_field_inputs_average() -> None:
    field = np.zeros((1, 4, 4, 3), np.uint8)
    field[0, :2, :2] = 100
    assert field_inputs(field, 2)[0, :, :, 0].tolist() == [[100, 0], [0, 0]]
    assert field_inputs(field, 4) is field


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
            spec.model_copy(update={"kwargs": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}, "num_features": 24}),
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


def test_full_size_networks_on_a_few_images() -> None:
    full = preset("full")
    assert full.method.select.k == 2000
    assert full.method.features.field_input_px == 331
    torch.manual_seed(0)
    hybrid = HybridCNNas(full.backbones).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 331, 331, 3), np.uint8)
    found = extract_batch(hybrid, images)
    assert found.shape == (2, 1024 + 4032)
    assert np.isfinite(found).all()
    assert np.abs(found[0] - found[1]).max() > 0


def test_specification_refuses_unknown_fields() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        BackboneSpec.model_validate({"name": "convnext", "architecture": "a", "num_features": 1, "colour": "red"})
