"""Activation maps: they add up to the classifier's evidence, and the features beside them are the ones without maps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from leukoflow.models.attention_classifier import AttentionClassifier, ClassifierSpec
from leukoflow.models.bundle import Bundle, Statistics, random_bundle
from leukoflow.models.hybrid_cn_nas import BLANK_SHARE, HybridCNNas, Readout, feature_maps, spread
from leukoflow.tasks.imaging.classify import CLIP, readout, standardize
from leukoflow.tasks.imaging.extract import blank_maps, explain_batch, explain_padded, extract_batch, extract_padded

BATCH = 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "b", 0, tiny=True)


def cells(count: int, side: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Crops of noise; masks are discs, one of them empty, one whole."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:side, :side]
    masks = np.stack([np.hypot(ys - side / 2, xs - side / 2) < r for r in rng.uniform(3, side / 2, count)])
    masks[0], masks[-1] = False, True
    return rng.integers(0, 256, (count, side, side, 3), np.uint8), masks.astype(np.uint8) * 255


def variant(bundle: Bundle, seed: int, backbones: tuple[str, ...], select: bool) -> tuple[Bundle, AttentionClassifier]:
    """The bundle with some of its backbones, fitted statistics and a random classifier, in memory."""
    specs = tuple(spec for spec in bundle.spec.backbones if spec.name in backbones)
    width = sum(spec.num_features for spec in specs)
    rng = np.random.default_rng(seed)
    selected = tuple(rng.permutation(width)[:16].tolist()) if select else tuple(range(width))
    hybrid = HybridCNNas(specs, [bundle.hybrid().backbones[spec.name] for spec in specs])
    fitted = extract_padded(hybrid.eval(), *cells(24, 32, seed + 100), BATCH)
    mean, std = fitted.mean(0), np.maximum(fitted.std(0), 0.02)  # what noise leaves constant would be magnified
    nothing = np.zeros(0, np.float32)
    torch.manual_seed(seed)
    classifier = AttentionClassifier(ClassifierSpec(inputs=len(selected), width=16)).eval()
    spec = bundle.spec.model_copy(update={"backbones": specs, "selected": selected, "classifier": classifier.spec})
    return replace(bundle, spec=spec, statistics=Statistics(mean, std, nothing, nothing)), classifier


@pytest.mark.parametrize("backbones", [("convnext", "nasnet"), ("convnext",), ("nasnet",)], ids="+".join)
@pytest.mark.parametrize("select", [True, False], ids=["selected", "all columns"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_maps_add_up_to_the_evidence(bundle: Bundle, seed: int, backbones: tuple[str, ...], select: bool) -> None:
    chosen, classifier = variant(bundle, seed, backbones, select)
    hybrid, statistics = chosen.hybrid(), chosen.statistics
    crops, masks = cells(10, 32, seed)
    features, maps = explain_padded(hybrid, readout(chosen, classifier), crops, masks, BATCH)
    assert (maps.dtype, maps.shape) == (np.float16, (10, 4, 4, 4))
    scores = standardize(features, statistics.mean, statistics.std, chosen.spec.selected)
    assert np.abs(scores).max() < CLIP
    with torch.inference_mode():
        evidence = classifier.evidence(torch.from_numpy(scores)).numpy()
        bias = classifier.evidence.bias.numpy()
    found = maps.astype(np.float64).sum((2, 3)) + bias
    rounding = np.abs(maps.astype(np.float64)).sum((2, 3)) * 2.0**-11 + 1e-5
    assert (np.abs(found - evidence) <= rounding + 1e-5).all()
    assert np.abs(maps).max() > 1e-3


def test_without_rounding_they_add_up_more_closely(bundle: Bundle) -> None:
    chosen, classifier = variant(bundle, 3, ("convnext", "nasnet"), True)
    crops, masks = cells(4, 32)
    rgb = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    shown = readout(chosen, classifier)
    with torch.inference_mode():
        features, maps = chosen.hybrid().explained(rgb, torch.from_numpy(masks)[:, None].float() / 255, shown)
    torch.testing.assert_close(maps.sum((2, 3)), (features - shown.offset) @ shown.weight.T, atol=1e-5, rtol=1e-5)


def test_a_position_adds_what_its_own_features_say(bundle: Bundle) -> None:
    """Against sums that are written out, backbone by backbone and position by position."""
    hybrid = bundle.hybrid()
    rng = np.random.default_rng(0)
    weight, offset = rng.normal(size=(4, 96)).astype(np.float32), rng.normal(size=96).astype(np.float32)
    crops, masks = cells(2, 32)
    masks[0, 8:20, 4:12] = 255
    _, maps = explain_batch(hybrid, Readout(torch.from_numpy(weight), torch.from_numpy(offset)), crops, masks)
    expected = np.zeros((2, 4, 4, 4))
    first = 0
    for spec in hybrid.specs:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
        rgb = (torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255 - mean) / std
        with torch.inference_mode():
            parts = feature_maps(hybrid.backbones[spec.name], spec.stages, rgb)
        for part in (p.numpy().astype(np.float64) for p in parts):
            own, side = slice(first, first + part.shape[1]), part.shape[-1]
            first = own.stop
            finer, pixels = 4 // side, 32 // side
            for n in range(2):
                share = masks[n].reshape(side, pixels, side, pixels).mean((1, 3)) / 255 + BLANK_SHARE
                for y in range(side):
                    for x in range(side):
                        added = weight[:, own] @ (part[n, :, y, x] - offset[own]) * share[y, x] / share.sum()
                        block = (slice(y * finer, (y + 1) * finer), slice(x * finer, (x + 1) * finer))
                        expected[n, :, *block] += added[:, None, None] / finer**2
    np.testing.assert_allclose(maps, expected, atol=2e-3, rtol=2e-3)


def test_features_are_the_same_to_the_last_bit(bundle: Bundle) -> None:
    hybrid, shown = bundle.hybrid(), readout(bundle, bundle.classifier())
    crops, masks = cells(7, 32)
    features, maps = explain_padded(hybrid, shown, crops, masks, BATCH)
    assert features.tobytes() == extract_padded(hybrid, crops, masks, BATCH).tobytes()
    alone, mine = explain_batch(hybrid, shown, crops[:BATCH], masks[:BATCH])
    assert alone.tobytes() == extract_batch(hybrid, crops[:BATCH], masks[:BATCH]).tobytes()
    assert maps[:BATCH].tobytes() == mine.tobytes()


def test_maps_do_not_depend_on_how_many_cells_there_are(bundle: Bundle) -> None:
    hybrid, shown = bundle.hybrid(), readout(bundle, bundle.classifier())
    crops, masks = cells(7, 32)
    _, few = explain_padded(hybrid, shown, crops[:2], masks[:2], BATCH)
    _, many = explain_padded(hybrid, shown, crops, masks, BATCH)
    assert few.tobytes() == many[:2].tobytes()
    nothing, none = explain_padded(hybrid, shown, crops[:0], masks[:0], BATCH)
    assert (nothing.shape, none.shape, none.dtype) == ((0, 96), (0, 4, 4, 4), np.float16)
    assert blank_maps(3, 64, 4).shape == (3, 4, 8, 8)


@pytest.mark.parametrize("side", [32, 40, 44])
def test_crops_of_any_side_add_up(bundle: Bundle, side: int) -> None:
    """Where the grids of the backbones do not nest, a position is still shared out whole."""
    shown = readout(bundle, bundle.classifier())
    features, maps = explain_padded(bundle.hybrid(), shown, *cells(3, side), BATCH)
    expected = (features - shown.offset.numpy()) @ shown.weight.numpy().T
    np.testing.assert_allclose(maps.astype(np.float64).sum((2, 3)), expected, atol=2e-3)


def test_spreading_shares_out_by_area_and_keeps_sums() -> None:
    corners = torch.tensor([[[[4.0, 8.0], [0.0, -4.0]]]])
    assert spread(corners, 4).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, -1, -1], [0, 0, -1, -1]]]]
    assert torch.equal(spread(corners, 2), corners)
    torch.testing.assert_close(spread(corners, 3)[0, 0, 0], torch.tensor([16 / 9, 8 / 3, 32 / 9]))
    for lengths, side in (((3, 3), 5), ((2, 5), 3), ((7, 7), 4)):
        maps = torch.randn(2, 3, *lengths)
        torch.testing.assert_close(spread(maps, side).sum((2, 3)), maps.sum((2, 3)), atol=1e-5, rtol=1e-5)


def test_the_classifier_reads_selected_columns_only(bundle: Bundle) -> None:
    weight, offset = readout(bundle, bundle.classifier())
    others = sorted(set(range(96)) - set(bundle.spec.selected))
    assert not weight[:, others].any()
    assert weight[:, list(bundle.spec.selected)].abs().min() > 0
    assert offset.tolist() == bundle.statistics.mean.tolist()
