"""Stain normalisation on one core: our Reinhard and CLAHE together against torchstain's NumPy Reinhard alone.

`python -m pytest benchmarks/bench_normalize.py -q -s` prints the figures. Both run interleaved on the same drawn
fields, and each field counts with its best time, so that other load on the machine hits both or neither.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from leukoflow.core.method import NormalizeSettings
from leukoflow.tasks.imaging.normalize import normalize
from leukoflow.tasks.imaging.overlays import mask_overlays

REINHARD_CLAHE = NormalizeSettings(mask_overlays=False, multiscale=False)


def field(seed: int, side: int = 224) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), (240, 246, 248), np.uint8)
    for count, radius, colour in ((side * side // 700, 8, (178, 190, 214)), (side * side // 6000, 13, (140, 90, 190))):
        for x, y in rng.integers(0, side, (count, 2)).tolist():
            cv2.circle(image, (x, y), radius, colour, -1, cv2.LINE_AA)
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def best_ms(
    functions: dict[str, Callable[[NDArray[np.uint8]], object]], fields: list[NDArray[np.uint8]], repeats: int = 15
) -> dict[str, float]:
    """Mean over fields of the best of interleaved repeats, in milliseconds."""
    best = {name: np.full(len(fields), np.inf) for name in functions}
    for _ in range(repeats):
        for i, image in enumerate(fields):
            for name, function in functions.items():
                start = time.perf_counter()
                function(image)
                best[name][i] = min(best[name][i], time.perf_counter() - start)
    return {name: float(times.mean()) * 1e3 for name, times in best.items()}


@pytest.fixture
def one_thread():
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


@pytest.mark.usefixtures("one_thread")
def test_ten_times_torchstain() -> None:
    reinhard = pytest.importorskip("torchstain.numpy.normalizers.reinhard")
    peer = reinhard.NumpyReinhardNormalizer()
    peer.fit(field(99))
    times = best_ms(
        {
            "torchstain Reinhard": peer.normalize,
            "Reinhard + CLAHE": lambda image: normalize(image, REINHARD_CLAHE),
            "overlays": mask_overlays,
            "all steps": lambda image: normalize(image, NormalizeSettings()),
        },
        [field(seed) for seed in range(8)],
    )
    ratio = times["torchstain Reinhard"] / times["Reinhard + CLAHE"]
    print("\n224x224, one core, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in times.items()))
    print(f"torchstain Reinhard / our Reinhard + CLAHE: {ratio:.1f}x")
    assert ratio >= 10


@pytest.mark.usefixtures("one_thread")
def test_a_large_image_is_never_floats() -> None:
    image = np.tile(field(0, 1000), (8, 8, 1))
    tracemalloc.start()
    start = time.perf_counter()
    normalize(image, NormalizeSettings())
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"\n8000x8000, all steps: {seconds:.1f} s, {peak / 2**20:.0f} MiB beside the input")
    assert peak < 2**30
