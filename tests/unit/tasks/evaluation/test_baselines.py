"""Baselines that know no cells."""

from __future__ import annotations

import numpy as np

from leukoflow.tasks.evaluation.baselines import histogram_features, linear_baseline


def test_baseline_tells_colours_apart() -> None:
    rng = np.random.default_rng(0)

    def field(red: int) -> np.ndarray:
        image = rng.integers(0, 60, (16, 16, 3), np.uint8)
        image[..., 0] += np.uint8(red)
        return histogram_features(image)

    x = np.stack([field(red) for red in [20] * 10 + [180] * 10])
    y = np.repeat([0, 2], 10)
    p = linear_baseline(x[::2], y[::2], x[1::2], 4)
    assert x.shape == (20, 222)
    assert (p.argmax(1) == y[1::2]).all()
    assert (p[:, [1, 3]] == 0).all()
