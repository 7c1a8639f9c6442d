"""Areas of cells in square micrometres, whatever scale the picture had and however it was cut into tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from leukoflow.core.geometry import field_geometry
from leukoflow.core.method import SegmentSettings
from leukoflow.runs.schema import CELLS
from leukoflow.tasks.imaging.cells import cell_table, concatenate, square_micrometres
from leukoflow.tasks.imaging.classify import ImageDiagnosis
from leukoflow.tasks.inference.rows import cell_rows
from leukoflow.tasks.intake.binding import Run


def square(scale: float) -> np.ndarray:
    return np.array([[[scale, 0, 0], [0, scale, 0]]], np.float32)


@pytest.mark.parametrize(
    ("um_per_px", "to_source", "expected"),
    [
        (0.5, square(1.0), 25.0),  # 100 mask pixels of 0.5 µm
        (0.25, square(2.0), 25.0),  # twice as fine a picture, halved before it was segmented
        (1.0, square(0.5), 25.0),  # half as fine a one, doubled
        (0.25, np.array([[[2.0, 0, 7.0], [0, 3.0, -1.0]]], np.float32), 37.5),
    ],
)
def test_areas_by_hand(um_per_px: float, to_source: np.ndarray, expected: float) -> None:
    found = square_micrometres(np.array([100]), to_source, np.array([um_per_px]))
    assert found.tolist() == [expected]
    assert found.dtype == np.float32


def test_without_a_scale_there_is_no_area() -> None:
    assert np.isnan(square_micrometres(np.array([100]), square(1.0), np.array([np.nan]))).all()


def diagnosis(cells: int) -> ImageDiagnosis:
    return ImageDiagnosis(np.full(4, 0.25), np.ones(4, np.bool_), np.zeros(cells, np.float32), 1.0, cells, None)


def test_every_tile_has_the_scale_of_its_image() -> None:
    """Two tiles of one image and one of each of two others, the last of unknown scale; one cell of 4 x 4 in each."""
    plane = np.zeros((8, 8), np.uint16)
    plane[2:6, 2:6] = 1
    semantic = np.where(plane, 2, 0).astype(np.uint8)
    semantic[2, 2:6] = 1  # cytoplasm: 4 of the 16 pixels
    maps = np.concatenate([square(2.0), square(2.0), square(0.5), square(1.0)])
    table = concatenate([cell_table(semantic, plane, m, first_id=i + 1) for i, m in enumerate(maps)])
    rows = cell_rows(
        table, np.arange(5), ["a", "a", "b", "c"], [diagnosis(2), diagnosis(1), diagnosis(1)], maps,
        [0.25, 0.25, 0.4, None], "night",
    )  # fmt: skip
    assert rows.schema.equals(CELLS)
    assert rows["run_id"].to_pylist() == ["night"] * 4
    assert rows["cell_area_px"].to_pylist() == [16.0] * 4
    assert rows["cell_area_um2"].to_pylist() == [4.0, 4.0, pytest.approx(0.64), None]
    assert rows["nucleus_area_um2"].to_pylist() == [3.0, 3.0, pytest.approx(0.48), None]


@pytest.mark.parametrize(("side", "um_per_px"), [(448, 0.21), (224, 0.42), (4000, 0.105)])
def test_a_mask_pixel_is_as_large_as_the_model_wants_it(side: int, um_per_px: float) -> None:
    """Whole pictures and tiles: at a known scale every mask pixel measures what the models were trained with."""
    settings = SegmentSettings()
    maps = np.stack(field_geometry(side, side, um_per_px, settings).to_source()).astype(np.float32)
    areas = square_micrometres(np.ones(len(maps)), maps, np.full(len(maps), um_per_px))
    assert len(maps) >= (1 if side < 1000 else 2)
    assert areas == pytest.approx(settings.um_per_px**2, rel=0.02)


def test_a_runs_cells_name_it_and_their_areas(night: Run) -> None:
    masks = zarr.open_group(f"{night.root}/masks.zarr", mode="r")
    for path in sorted((Path(night.root) / "cells").iterdir()):
        rows = pq.read_table(path)
        assert rows.schema.equals(CELLS)
        assert set(rows["run_id"].to_pylist()) == {"night"}
        maps = np.asarray(masks[f"{path.stem.removeprefix('part-')}/to_source"][:], np.float64)
        side = maps[rows["zarr_index"].to_numpy(), 0, 0] * 0.5  # the manifest's micrometres per pixel
        for name in ("nucleus_area", "cell_area"):
            expected = rows[f"{name}_px"].to_numpy() * side**2
            np.testing.assert_allclose(rows[f"{name}_um2"].to_numpy(), expected, rtol=1e-5)
    slides = pq.read_table(Path(night.root) / "slides.parquet")
    assert set(slides["run_id"].to_pylist()) == {"night"}
