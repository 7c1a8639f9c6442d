"""Attention classifier and diagnosis: independence of rows, attention, calibration, sets, abstention, tiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from leukoflow.core.errors import BundleError
from leukoflow.models.attention_classifier import AttentionClassifier, ClassifierSpec
from leukoflow.models.bundle import Bundle, Calibration, random_bundle
from leukoflow.tasks.imaging.classify import (
    ROWS,
    decide,
    diagnose,
    ood_scores,
    pool_tiles,
    softmax,
    standardize,
    tokens,
)
from leukoflow.tasks.imaging.extract import Features

D = 96


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(Path(tmp_path_factory.mktemp("bundle")) / "b", 0, tiny=True)


def _features(counts: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    m = int(offsets[-1])
    return (
        rng.normal(size=(len(counts), D)).astype(np.float32),
        rng.normal(size=(m, D)).astype(np.float32),
        offsets,
        rng.uniform(50, 900, m).astype(np.float32),
    )


def test_padding_is_not_seen() -> None:
    torch.manual_seed(0)
    model = AttentionClassifier(ClassifierSpec(inputs=8, width=16)).eval()
    cells, area = torch.randn(2, 5, 8), torch.full((2, 5), 300.0)
    valid = torch.tensor([[True, True, False, False, False], [True] * 5])
    noisy = cells.clone()
    noisy[0, 2:] = 1e3
    with torch.inference_mode():
        a, b = model(cells, area, valid), model(noisy, area, valid)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=0)
    assert torch.equal(a.attention[0, 2:], torch.zeros(3))
    torch.testing.assert_close(a.attention.sum(1), torch.ones(2))
    assert (a.attention[1] > 0).all()


def test_order_of_cells_does_not_matter() -> None:
    torch.manual_seed(0)
    model = AttentionClassifier(ClassifierSpec(inputs=8, width=16)).eval()
    cells, area, valid = torch.randn(1, 6, 8), torch.rand(1, 6) * 900, torch.ones(1, 6, dtype=torch.bool)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.inference_mode():
        a, b = model(cells, area, valid), model(cells[:, order], area[:, order], valid)
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.attention[:, order], b.attention)


def test_without_attention_cells_count_by_their_area() -> None:
    torch.manual_seed(0)
    model = AttentionClassifier(ClassifierSpec(inputs=8, width=16, attention=False)).eval()
    valid, area = torch.tensor([[True, True, False]]), torch.tensor([[300.0, 100.0, 0.0]])
    with torch.inference_mode():
        result = model(torch.randn(1, 3, 8), area, valid)
    torch.testing.assert_close(result.attention, torch.tensor([[0.75, 0.25, 0.0]]))


def test_attention_starts_from_the_area_and_logits_are_weighted_evidence() -> None:
    torch.manual_seed(0)
    model = AttentionClassifier(ClassifierSpec(inputs=8, width=16)).eval()
    valid, area = torch.tensor([[True, True, True]]), torch.tensor([[100.0, 200.0, 100.0]])
    cells = torch.randn(1, 3, 8)
    with torch.inference_mode():
        fresh = model(cells, area, valid)
        torch.nn.init.normal_(model.pool.query.weight)
        moved = model(cells, area, valid)
        nothing = model(cells, area, torch.zeros(1, 3, dtype=torch.bool))
        evidence = model.evidence(cells)
    torch.testing.assert_close(fresh.attention, torch.tensor([[0.25, 0.5, 0.25]]))
    assert (moved.attention - fresh.attention).abs().max() > 0.01
    torch.testing.assert_close(moved.logits, (moved.attention[..., None] * evidence).sum(1))
    assert torch.equal(nothing.logits, torch.zeros(1, 4))
    assert torch.equal(nothing.attention, torch.zeros(1, 3))


def test_a_row_does_not_depend_on_the_others(bundle: Bundle) -> None:
    counts = [3, 0, 20, 1, 7]
    field, cells, offsets, area = _features(counts)
    model = bundle.classifier()
    whole = diagnose(bundle, model, Features(field, cells, offsets, area))
    changed_field, changed_cells = field.copy(), cells.copy()
    changed_field[3:] += 1
    changed_cells[offsets[3] :] -= 1
    other = diagnose(bundle, model, Features(changed_field, changed_cells, offsets, area))
    np.testing.assert_array_equal(whole.probabilities[:3], other.probabilities[:3])
    np.testing.assert_array_equal(whole.attention[: offsets[3]], other.attention[: offsets[3]])
    assert np.abs(whole.probabilities[3:] - other.probabilities[3:]).max() > 0
    for i in range(len(counts)):
        own = slice(int(offsets[i]), int(offsets[i + 1]))
        alone = diagnose(
            bundle, model, Features(field[i : i + 1], cells[own], np.array([0, counts[i]], np.int64), area[own])
        )
        np.testing.assert_allclose(alone.probabilities[0], whole.probabilities[i], atol=1e-6)
        np.testing.assert_allclose(alone.attention, whole.attention[own], atol=1e-6)


def test_more_rows_than_a_batch(bundle: Bundle) -> None:
    counts = [1] * (ROWS + 5)
    field, cells, offsets, area = _features(counts)
    found = diagnose(bundle, bundle.classifier(), Features(field, cells, offsets, area))
    np.testing.assert_allclose(found.probabilities.sum(1), 1)
    tail = diagnose(bundle, bundle.classifier(), Features(field[ROWS:], cells[ROWS:], offsets[:6], area[ROWS:]))
    np.testing.assert_allclose(tail.probabilities, found.probabilities[ROWS:], atol=1e-6)


def test_the_largest_cells_are_kept_in_their_order() -> None:
    cells = np.arange(5, dtype=np.float32)[:, None]
    area = np.array([10, 50, 30, 50, 40], np.float32)
    packed = tokens(np.zeros((1, 1), np.float32), cells, np.array([0, 5], np.int64), area, 3)
    assert packed.source.tolist() == [[1, 3, 4]]
    assert packed.cells[0, :, 0].tolist() == [1, 3, 4]
    assert packed.valid.all()


def test_cells_beyond_the_limit_get_no_attention(bundle: Bundle) -> None:
    most = bundle.spec.method.classify.max_cells
    field, cells, offsets, area = _features([most + 4])
    found = diagnose(bundle, bundle.classifier(), Features(field, cells, offsets, area))
    assert (found.attention > 0).sum() == most
    assert set(np.flatnonzero(found.attention == 0)) == set(np.argsort(area)[:4])


def test_no_fields_at_all(bundle: Bundle) -> None:
    field, cells, offsets, area = _features([])
    found = diagnose(bundle, bundle.classifier(), Features(field, cells, offsets, area))
    assert found.probabilities.shape == (0, 4)
    assert found.abstained == ()


def test_features_of_another_bundle_are_refused(bundle: Bundle) -> None:
    field, cells, offsets, area = _features([2])
    with pytest.raises(BundleError, match="95 and 95 columns"):
        diagnose(bundle, bundle.classifier(), Features(field[:, :95], cells[:, :95], offsets, area))


def test_standardize_literal() -> None:
    x = np.array([[1.0, 10.0, 100.0]], np.float32)
    mean, std = np.array([0, 4, 0], np.float32), np.array([1, 2, 1], np.float32)
    assert standardize(x, mean, std, (1, 0)).tolist() == [[3.0, 1.0]]
    assert standardize(x, mean, std, (2,)).tolist() == [[12.0]]


def test_temperature_flattens() -> None:
    logits = np.array([[np.log(8.0), 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(softmax(logits, 1.0)[0], np.array([8, 1, 1, 1]) / 11)
    np.testing.assert_allclose(softmax(logits, 3.0)[0], np.array([2, 1, 1, 1]) / 5)


def test_sets_and_reasons_in_order_of_gravity() -> None:
    calibration = Calibration(conformal=(0.5, 0.8, 0.9, 0.05), min_cells=2, min_confidence=0.4, max_ood=1.5)
    p = np.array(
        [[0.6, 0.25, 0.1, 0.05], [0.3, 0.3, 0.3, 0.1], [0.0, 0.1, 0.0, 0.9], [0.7, 0.1, 0.1, 0.1], [1, 0, 0, 0]]
    )
    sets, reasons = decide(calibration, p, np.array([1.0, 1.0, 1.0, 2.0, 9.0]), np.array([3, 3, 3, 3, 1], np.int64))
    assert sets.tolist() == [
        [True, True, True, False],
        [True, True, True, False],
        [False, False, False, True],
        [True, False, True, False],
        [True, False, False, False],
    ]
    assert reasons == (
        None,
        "ambiguous: confidence 0.30 < 0.40",
        None,
        "out of distribution: distance from the training images 2.00 > 1.50",
        "too few cells: 1 < 2",
    )


def test_distance_is_a_whitened_root_mean_square(bundle: Bundle) -> None:
    statistics = replace(
        bundle.statistics,
        ood_mean=np.array([1, 0], np.float32),
        ood_whitening=np.array([[0.5, 0], [0, 2]], np.float32),
    )
    packed = tokens(
        np.array([[5.0, 1.0], [9, 9]], np.float32),
        np.array([[3.0, 1.0], [3.0, -1.0]], np.float32),
        np.array([0, 2, 2], np.int64),
        np.ones(2, np.float32),
        3,
    )
    np.testing.assert_allclose(ood_scores(packed, statistics), [np.sqrt((2**2 + 2**2) / 2), 0.0])


def test_tiles_are_weighed_by_their_cells(bundle: Bundle) -> None:
    field, cells, offsets, area = _features([3, 0, 1, 2])
    found = diagnose(bundle, bundle.classifier(), Features(field, cells, offsets, area))
    single, pooled = pool_tiles(bundle, found, offsets, np.array([1, 3], np.int64))
    np.testing.assert_array_equal(single.probabilities, found.probabilities[0])
    np.testing.assert_array_equal(single.attention, found.attention[:3])
    np.testing.assert_allclose(pooled.probabilities, (found.probabilities[2] + 2 * found.probabilities[3]) / 3)
    assert pooled.n_cells == 3
    assert len(pooled.attention) == 3
    assert pooled.attention.sum() <= 1
    empty = _features([0, 0])
    nothing = diagnose(bundle, bundle.classifier(), Features(*empty))
    verdict = pool_tiles(bundle, nothing, empty[2], np.array([2], np.int64))[0]
    assert verdict.abstained == "too few cells: 0 < 1"
