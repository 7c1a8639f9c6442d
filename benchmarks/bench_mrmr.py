"""mRMR at the size of the full preset against a plain loop that correlates column by column.

`python -m pytest benchmarks/bench_mrmr.py -q -s` prints the figures. The plain loop does what the usual Python package
does (per pick, Pearson of the last pick with every remaining column), in NumPy; it is timed on few picks, since at full
size it would run for many minutes, and the prefixes of both must agree.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from leukoflow.tasks.training.select import f_statistic, mrmr


def features(n: int, d: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Correlated columns from 60 factors, some of which follow the class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    latent = rng.standard_normal((n, 60))
    latent[:, :8] += 0.5 * y[:, None]
    x = latent @ rng.standard_normal((60, d)) + 2 * rng.standard_normal((n, d))
    return x.astype(np.float32), y


def column_by_column(x: NDArray[np.float32], y: NDArray[np.int64], k: int) -> list[int]:
    relevance = f_statistic(x, y)
    rest = list(range(x.shape[1]))
    sums = np.zeros(x.shape[1])
    chosen: list[int] = []
    for i in range(k):
        score = relevance[rest] / (sums[rest] / i if i else 1.0)
        pick = rest.pop(int(np.argmax(score)))
        chosen.append(pick)
        for j in rest:
            sums[j] += max(abs(np.corrcoef(x[:, pick], x[:, j])[0, 1]), 0.001)
    return chosen


def test_full_size_and_against_a_plain_loop() -> None:
    x, y = features(3000, 5500)
    start = time.perf_counter()
    picks = mrmr(x, y, 2000)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    prefix = column_by_column(x, y, 6)
    per_pick = (time.perf_counter() - start) / 6
    assert picks[:6].tolist() == prefix
    print(f"\nmRMR 3,000 x 5,500 choosing 2,000: {ours:.1f} s")
    print(f"plain loop: {per_pick:.2f} s a pick against {ours / 2000:.5f} s, {per_pick * 2000 / ours:.0f}x")
    assert ours < 10
