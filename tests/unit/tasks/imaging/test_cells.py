"""Cells: measured, against scikit-image among others, and cropped."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.measure import regionprops

from leukoflow.core.errors import LeukoflowError
from leukoflow.tasks.imaging.cells import Cells, CellTable, cell_table, concatenate, crop_cells, crop_masks

IDENTITY = np.eye(2, 3, dtype=np.float32)


def semantic_of(*cells: tuple[int, int, int, int], side: int = 120) -> NDArray[np.uint8]:
    """Discs (x, y, radius of the cell, radius of the nucleus) as classes."""
    out = np.zeros((side, side), np.uint8)
    for x, y, r, _ in cells:
        cv2.circle(out, (x, y), r, 1, -1)
    for x, y, _, r in cells:
        if r:
            cv2.circle(out, (x, y), r, 2, -1)
    return out


# --- table -------------------------------------------------------------------------------------------------------


def test_measurements_of_a_rectangle() -> None:
    semantic = np.zeros((30, 40), np.uint8)
    cells = np.zeros((30, 40), np.uint16)
    semantic[10:16, 20:32] = 1
    semantic[12:15, 22:26] = 2
    cells[10:16, 20:32] = 1
    # Twice the size in the source: pixel centre 0 lies at 0.5.
    to_source = np.array([[2, 0, 0.5], [0, 2, 0.5]], np.float32)
    table = cell_table(semantic, cells, to_source, first_id=7)
    assert len(table) == 1
    assert table.cell_id.tolist() == [7]
    box = [table.bbox_xmin_px, table.bbox_ymin_px, table.bbox_xmax_px, table.bbox_ymax_px]
    assert [float(v[0]) for v in box] == [40, 20, 64, 32]
    assert (table.field_x[0], table.field_y[0]) == (25.5, 12.5)
    assert (table.centroid_x_px[0], table.centroid_y_px[0]) == (51.5, 25.5)
    assert (table.nucleus_area_px[0], table.cell_area_px[0]) == (12, 72)
    assert table.nc_ratio[0] == pytest.approx(12 / 72)
    assert table.eccentricity[0] == pytest.approx(np.sqrt(1 - (6 / 12) ** 2))
    assert table.touches_border.tolist() == [False]


def test_table_of_many_cells_and_of_none() -> None:
    semantic = semantic_of((0, 30, 12, 9), (60, 60, 12, 9), (100, 100, 12, 0), side=113)
    semantic[100, 100] = 2
    cells = np.zeros_like(semantic, np.uint16)
    for k, (x, y) in enumerate([(0, 30), (60, 60), (100, 100)], start=1):
        disc = cv2.circle(np.zeros_like(semantic), (x, y), 12, 1, -1)
        cells[disc > 0] = k
    table = cell_table(semantic, cells, IDENTITY)
    assert table.touches_border.tolist() == [True, False, True]
    assert table.cell_area_px.tolist() == [(cells == k).sum() for k in (1, 2, 3)]
    assert table.nucleus_area_px[2] == 1
    assert table.eccentricity[1] == pytest.approx(0, abs=1e-3)
    none = cell_table(np.zeros_like(semantic), np.zeros_like(cells), IDENTITY)
    assert len(none) == 0
    assert len(concatenate([])) == 0
    both = concatenate([none, table])
    for name in CellTable.__dataclass_fields__:
        assert getattr(both, name).dtype == getattr(none, name).dtype
        np.testing.assert_array_equal(getattr(both, name), getattr(table, name))
    with pytest.raises(LeukoflowError, match="differ"):
        cell_table(semantic[1:], cells, IDENTITY)


@pytest.mark.parametrize("seed", range(5))
def test_the_table_agrees_with_scikit_image(seed: int) -> None:
    """Ellipses of any size and direction, some cut by the border, in a tile that is twice as large in the source."""
    rng = np.random.default_rng(seed)
    cells, semantic = np.zeros((200, 240), np.uint16), np.zeros((200, 240), np.uint8)
    for k, (x, y) in enumerate(np.mgrid[0:240:40, 0:200:40].reshape(2, -1).T.tolist(), start=1):
        axes = tuple(int(v) for v in rng.integers(3, 18, 2))
        shape = cv2.ellipse(np.zeros_like(semantic), (x, y), axes, float(rng.uniform(0, 180)), 0, 360, 1, -1) > 0
        cells[shape], semantic[shape] = k, np.where(rng.random(int(shape.sum())) < 0.6, 2, 1)
    names = np.unique(cells[cells > 0])
    cells = np.searchsorted(names, cells, side="right").astype(np.uint16) * (cells > 0)  # without gaps
    table = cell_table(semantic, cells, np.array([[2, 0, 0.5], [0, 2, 0.5]], np.float32))
    found = regionprops(cells, intensity_image=semantic == 2)
    assert len(table) == len(found) > 20
    assert table.cell_area_px.tolist() == [r.area for r in found]
    assert table.nucleus_area_px.tolist() == [int(r.image_intensity.sum()) for r in found]
    np.testing.assert_allclose(table.nc_ratio, [r.intensity_mean for r in found], rtol=1e-6)
    np.testing.assert_allclose(np.stack([table.field_y, table.field_x], 1), [r.centroid for r in found], rtol=1e-5)
    # To scikit-image a pixel is a point; here it is a square, whose own second moment is 1/12.
    moments = np.array([r.inertia_tensor_eigvals for r in found]) + 1 / 12
    np.testing.assert_allclose(table.eccentricity, np.sqrt(1 - moments[:, 1] / moments[:, 0]), atol=1e-4)
    boxes = np.stack([table.bbox_ymin_px, table.bbox_xmin_px, table.bbox_ymax_px, table.bbox_xmax_px], axis=1)
    np.testing.assert_allclose(boxes / 2, [r.bbox for r in found])
    touching = [y0 == 0 or x0 == 0 or y1 == 200 or x1 == 240 for y0, x0, y1, x1 in (r.bbox for r in found)]
    assert table.touches_border.tolist() == touching
    assert 0 < sum(touching) < len(found)


def test_cells_know_the_rows_of_their_tiles() -> None:
    plane = np.zeros((8, 8), np.uint16)
    plane[2:6, 2:6] = 1
    one = cell_table(np.where(plane, 2, 0).astype(np.uint8), plane, IDENTITY)
    cells = Cells(np.stack([plane, np.zeros_like(plane), plane]), concatenate([one, one]), np.array([0, 1, 1, 2]))
    assert len(cells) == 2
    assert [cells.rows(t) for t in range(3)] == [slice(0, 1), slice(1, 1), slice(1, 2)]
    assert (cells.area.dtype, cells.area.tolist()) == (np.float32, [16.0, 16.0])
    assert cells.centers.tolist() == [[3.5, 3.5], [3.5, 3.5]]


# --- crops -------------------------------------------------------------------------------------------------------


def test_crop_of_the_same_scale_is_the_window() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    crops = crop_cells(image, np.array([[30.5, 20.5], [40.5, 33.5]], np.float32), 10, 10)
    assert crops.shape == (2, 10, 10, 3)
    np.testing.assert_array_equal(crops[0], image[16:26, 26:36])
    np.testing.assert_array_equal(crops[1], image[29:39, 36:46])


def test_crop_is_resized_like_opencv_does_and_mirrored_at_the_border() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    padded = cv2.copyMakeBorder(image, 30, 30, 30, 30, cv2.BORDER_REFLECT_101)
    centers = np.array([[35.5, 30.5], [1.5, 58.5]], np.float32)
    crops = crop_cells(image, centers, 40, 64)
    for crop, (x, y) in zip(crops, centers, strict=True):
        left, top = int(x - 19.5) + 30, int(y - 19.5) + 30
        window = padded[top : top + 40, left : left + 40]
        expected = cv2.resize(window, (64, 64), interpolation=cv2.INTER_LINEAR)
        difference = np.abs(crop.astype(int) - expected)[2:-2, 2:-2]
        assert difference.max() <= 4  # warpAffine has coarser weights than resize
        assert difference.mean() < 1
    assert crop_cells(image, np.zeros((0, 2), np.float32), 40, 64).shape == (0, 64, 64, 3)


def test_masks_of_cells_lie_on_their_crops() -> None:
    cells = np.zeros((100, 100), np.uint16)
    cells[40:60, 30:50] = 7
    rgb = np.repeat(np.where(cells > 0, 200, 10).astype(np.uint8)[..., None], 3, 2)
    centres = np.array([[39.5, 49.5]], np.float32)
    crop, mask = crop_cells(rgb, centres, 44, 64), crop_masks(cells, np.array([7], np.int32), centres, 44, 64)
    assert mask.shape == (1, 64, 64)
    np.testing.assert_array_equal(crop[0, ..., 0] > 100, mask[0] > 120)
    assert not crop_masks(cells, np.array([3], np.int32), centres, 44, 64).any()
