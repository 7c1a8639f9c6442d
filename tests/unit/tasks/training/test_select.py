"""mRMR against a plain implementation that looks at every pair again."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.feature_selection import f_classif

from leukoflow.core.errors import LeukoflowError
from leukoflow.tasks.training import select
from leukoflow.tasks.training.select import f_statistic, mrmr

SCHEMES: list[Literal["fcq", "fcd"]] = ["fcq", "fcd"]


def make(seed: int, n: int = 120, d: int = 40, factors: int = 8) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Correlated columns, some of them informative."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    latent = rng.standard_normal((n, factors))
    latent[:, :3] += y[:, None] * [1.0, 0.6, -0.3]
    return latent @ rng.standard_normal((factors, d)) + rng.standard_normal((n, d)), y


def plain(x: NDArray[np.float64], y: NDArray[np.int64], k: int, scheme: str) -> list[int]:
    """The definition, slowly: scikit-learn's F, numpy's corrcoef, every mean computed from scratch."""
    relevance = f_classif(x, y)[0]
    correlation = np.abs(np.corrcoef(x.T))
    chosen: list[int] = []
    while len(chosen) < k:
        scores = {}
        for j in range(x.shape[1]):
            if j in chosen:
                continue
            if not chosen:
                scores[j] = relevance[j]
            elif scheme == "fcq":
                scores[j] = relevance[j] / np.mean([max(correlation[i, j], 0.001) for i in chosen])
            else:
                scores[j] = relevance[j] - np.mean([correlation[i, j] for i in chosen])
        chosen.append(max(scores, key=lambda j: (scores[j], -j)))
    return chosen


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(5))
def test_same_picks_as_the_definition(seed: int, scheme: Literal["fcq", "fcd"]) -> None:
    x, y = make(seed)
    assert mrmr(x, y, 40, scheme).tolist() == plain(x, y, 40, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_picks_do_not_depend_on_blocks_or_cache(scheme: Literal["fcq", "fcd"], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = make(7, d=90)
    expected = mrmr(x, y, 90, scheme)
    for block, cache in ((1, 0), (5, 0), (16, 8 * 90 * 20)):
        monkeypatch.setattr(select, "BLOCK", block)
        monkeypatch.setattr(select, "CACHE_BYTES", cache)
        np.testing.assert_array_equal(mrmr(x, y, 90, scheme), expected)


def test_first_pick_is_the_most_relevant_and_copies_wait() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 50)
    signal = y + 0.3 * rng.standard_normal(100)
    other = y + 0.8 * rng.standard_normal(100)
    x = np.stack([rng.standard_normal(100), signal, signal * 2 + 1, other], axis=1)
    picks = mrmr(x, y, 4, "fcq").tolist()
    assert picks[0] == 1  # not its copy at 2: the lower index wins a tie
    relevance = f_statistic(x, y)
    assert relevance[1] == pytest.approx(relevance[2])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(SCHEMES))
def test_shuffled_columns_give_the_same_features(seed: int, scheme: Literal["fcq", "fcd"]) -> None:
    x, y = make(seed, n=60, d=15)
    order = np.random.default_rng(seed).permutation(15)
    np.testing.assert_array_equal(order[mrmr(x[:, order], y, 15, scheme)], mrmr(x, y, 15, scheme))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(SCHEMES), st.integers(1, 15))
def test_scale_shift_rows_and_names_of_classes_do_not_matter(seed: int, scheme: Literal["fcq", "fcd"], k: int) -> None:
    x, y = make(seed, n=60, d=15)
    rng = np.random.default_rng(seed)
    expected = mrmr(x, y, k, scheme)
    assert len(set(expected.tolist())) == k
    np.testing.assert_array_equal(expected, mrmr(x, y, 15, scheme)[:k])
    rows = rng.permutation(60)
    changed = x[rows] * rng.choice([-3.0, 0.5, 40.0], 15) + rng.normal(0, 10, 15)
    np.testing.assert_array_equal(mrmr(changed, 7 - 2 * y[rows], k, scheme), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_constant_columns_come_last(scheme: Literal["fcq", "fcd"], constant: float) -> None:
    x, y = make(3, d=6)
    x = np.insert(x, [0, 3], constant, axis=1)
    assert f_statistic(x, y)[[0, 4]].tolist() == [0.0, 0.0]
    assert mrmr(x, y, 8, scheme)[-2:].tolist() == [0, 4]


def test_f_statistic_is_that_of_scikit_learn() -> None:
    x, y = make(11)
    np.testing.assert_allclose(f_statistic(x, y), f_classif(x, y)[0], rtol=1e-9)
    np.testing.assert_allclose(f_statistic(x.astype(np.float32) + 1000, y), f_classif(x, y)[0], rtol=1e-2)
    perfect = np.stack([y.astype(float), x[:, 0]], axis=1)
    assert np.isfinite(f_statistic(perfect, y)).all()
    assert mrmr(perfect, y, 1).tolist() == [0]


def test_input_is_not_changed() -> None:
    x, y = make(12)
    x = np.asfortranarray(x)
    before = x.copy()
    mrmr(x, y, 5)
    np.testing.assert_array_equal(x, before)


def test_errors_name_the_remedy() -> None:
    x, y = make(1)
    with pytest.raises(LeukoflowError, match="cannot choose 41"):
        mrmr(x, y, 41)
    with pytest.raises(LeukoflowError, match="cannot choose 0"):
        mrmr(x, y, 0)
    with pytest.raises(LeukoflowError, match="do not fit"):
        mrmr(x, y[:-1], 3)
    with pytest.raises(LeukoflowError, match="two classes"):
        mrmr(x, np.zeros_like(y), 3)
    with pytest.raises(LeukoflowError, match="unknown mRMR scheme"):
        mrmr(x, y, 3, "mid")  # type: ignore[arg-type]
    x[3, 4] = np.nan
    with pytest.raises(LeukoflowError, match="NaN"):
        mrmr(x, y, 3)
