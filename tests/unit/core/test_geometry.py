"""Geometry: the cores of the tiles partition the image, and every pixel finds its way back to the source."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leukoflow.core.geometry import MAX_ENLARGEMENT, field_geometry, scale_of
from leukoflow.core.method import SegmentSettings

SETTINGS = SegmentSettings()
SIDE = SETTINGS.field_px


@pytest.mark.parametrize(
    ("size", "um_per_px", "scale"),
    [
        ((224, 224), None, 1.0),
        ((640, 480), None, 224 / 640),
        ((480, 640), None, 224 / 640),
        ((1024, 768), None, 224 / 1024),
        ((8000, 6000), None, 224 / 1024),  # a mosaic, sampled like a field of 1024 px
        ((100, 50), None, 2.24),
        ((10, 10), None, MAX_ENLARGEMENT),
        ((640, 480), 0.42, 1.0),
        ((640, 480), 0.105, 0.25),
        ((640, 480), 100.0, MAX_ENLARGEMENT),
        ((640, 480), 0.0, 224 / 640),  # a scale of nought is no scale
    ],
)
def test_scale(size: tuple[int, int], um_per_px: float | None, scale: float) -> None:
    assert scale_of(*size, um_per_px, SETTINGS) == pytest.approx(scale)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([None, 0.1, 0.42, 1.0]))
def test_cores_partition_the_image(width: int, height: int, um_per_px: float | None) -> None:
    g = field_geometry(width, height, um_per_px, SETTINGS)
    xs = sorted({(x0, x1) for x0, _, x1, _ in g.cores})
    ys = sorted({(y0, y1) for _, y0, _, y1 in g.cores})
    assert len(g.cores) == len(g.origins) == len(xs) * len(ys)
    for spans, length in ((xs, g.width), (ys, g.height)):
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert all(a < b for a, b in spans)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([None, 0.1, 0.42, 1.0]))
def test_a_core_keeps_its_distance_from_inner_edges(width: int, height: int, um_per_px: float | None) -> None:
    g = field_geometry(width, height, um_per_px, SETTINGS)
    margin = SETTINGS.tile_overlap_px // 2
    for (ox, oy), (x0, y0, x1, y1) in zip(g.origins, g.cores, strict=True):
        for start, low, high, length in ((ox, x0, x1, g.width), (oy, y0, y1, g.height)):
            assert start >= 0
            assert start + SIDE <= max(length, SIDE)
            assert start <= low < high <= start + SIDE
            assert low == 0 or low - start >= margin
            assert high == length or start + SIDE - high >= margin


def test_tiles_come_row_by_row() -> None:
    g = field_geometry(500, 400, 0.42, SETTINGS)
    assert g.origins == ((0, 0), (138, 0), (276, 0), (0, 176), (138, 176), (276, 176))
    assert list(g.origins) == sorted(g.origins, key=lambda o: (o[1], o[0]))


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (100, 60), (2100, 1400)])
def test_way_back_agrees_with_the_resize(size: tuple[int, int]) -> None:
    g = field_geometry(*size, None, SETTINGS)
    # An image whose values are its own coordinates, scaled as the pipeline scales.
    x, y = np.meshgrid(np.arange(size[0], dtype=np.float32), np.arange(size[1], dtype=np.float32))
    small = cv2.resize(np.dstack([x, y]), (g.width, g.height), interpolation=cv2.INTER_LINEAR)
    maps = g.to_source()
    assert maps.shape == (len(g.origins), 2, 3)
    assert maps.dtype == np.float32
    for (ox, oy), m in zip(g.origins, maps, strict=True):
        for tx, ty in ((10, 10), (40, 30), (57, 41)):
            if ox + tx < g.width - 5 and oy + ty < g.height - 5:
                np.testing.assert_allclose(m @ (tx, ty, 1), small[oy + ty, ox + tx], atol=0.02)


def test_identity_for_a_field() -> None:
    g = field_geometry(224, 224, None, SETTINGS)
    np.testing.assert_array_equal(g.to_source(), [[[1, 0, 0], [0, 1, 0]]])
    assert g.cores == ((0, 0, 224, 224),)
