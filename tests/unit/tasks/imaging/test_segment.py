"""Cells: apart, and counted once."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from leukoflow.core.geometry import field_geometry
from leukoflow.core.method import SegmentSettings
from leukoflow.models.bundle import random_bundle
from leukoflow.tasks.evaluation.images import image_block
from leukoflow.tasks.imaging.cells import cell_table, concatenate
from leukoflow.tasks.imaging.overlays import mask_overlays
from leukoflow.tasks.imaging.segment import own_cells, single_cells, watershed_cells
from leukoflow.tasks.imaging.semantic import clean_semantic, pseudo_semantic, red_cell_px
from leukoflow.tasks.inference.chain import segment_block

SETTINGS = SegmentSettings()
IDENTITY = np.eye(2, 3, dtype=np.float32)

BACKGROUND_RGB = (246, 248, 244)
STAINS = {
    # red cell, cytoplasm, nucleus as they look in stains of several laboratories
    "bluish": ((170, 190, 222), (170, 160, 235), (140, 90, 210)),
    "pinkish": ((225, 170, 175), (190, 170, 225), (90, 50, 140)),
    "pale": ((190, 198, 215), (226, 180, 235), (215, 140, 225)),
}


def semantic_of(*cells: tuple[int, int, int, int], side: int = 120) -> NDArray[np.uint8]:
    """Discs (x, y, radius of the cell, radius of the nucleus) as classes."""
    out = np.zeros((side, side), np.uint8)
    for x, y, r, _ in cells:
        cv2.circle(out, (x, y), r, 1, -1)
    for x, y, _, r in cells:
        if r:
            cv2.circle(out, (x, y), r, 2, -1)
    return out


def smear(stain: str, white: list[tuple[int, int]], seed: int = 0, side: int = 224) -> NDArray[np.uint8]:
    """A field with red cells everywhere, white cells at the places given, and platelets."""
    red, cytoplasm, nucleus = STAINS[stain]
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), BACKGROUND_RGB, np.uint8)
    for x, y in rng.integers(0, side, (70, 2)).tolist():
        cv2.circle(image, (x, y), 8, red, -1, cv2.LINE_AA)
    for x, y in rng.integers(0, side, (15, 2)).tolist():
        cv2.circle(image, (x, y), 2, nucleus, -1, cv2.LINE_AA)
    for x, y in white:
        cv2.circle(image, (x, y), 14, BACKGROUND_RGB, -1)
        cv2.circle(image, (x, y), 13, cytoplasm, -1, cv2.LINE_AA)
        cv2.circle(image, (x, y), 10, nucleus, -1, cv2.LINE_AA)
    blurred = cv2.GaussianBlur(image, (0, 0), 0.8)
    return np.clip(blurred + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


# --- classical segmentation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stain", STAINS)
def test_white_cells_are_found_in_every_stain_and_nothing_else(stain: str) -> None:
    places = [(40, 50), (120, 40), (180, 110), (60, 160), (150, 180)]
    semantic = pseudo_semantic(smear(stain, places))
    assert semantic.dtype == np.uint8
    truth = semantic_of(*[(x, y, 13, 10) for x, y in places], side=224)
    overlap = 2 * ((semantic > 0) & (truth > 0)).sum() / ((semantic > 0).sum() + (truth > 0).sum())
    assert overlap > 0.85
    table = cell_table(semantic, watershed_cells(semantic, SETTINGS), IDENTITY)
    found = sorted(zip(table.field_x.round().tolist(), table.field_y.round().tolist(), strict=True))
    assert len(found) == 5
    np.testing.assert_allclose(found, sorted(places), atol=2)


def test_nucleus_and_cytoplasm_are_distinguished_where_they_differ() -> None:
    semantic = pseudo_semantic(smear("pinkish", [(100, 100)]))
    truth = semantic_of((100, 100, 13, 10), side=224)
    nucleus = semantic == 2
    assert 2 * (nucleus & (truth == 2)).sum() / (nucleus.sum() + (truth == 2).sum()) > 0.9


def test_a_blast_without_visible_cytoplasm_is_nucleus_throughout() -> None:
    image = np.full((100, 100, 3), BACKGROUND_RGB, np.uint8)
    cv2.circle(image, (50, 50), 14, (140, 90, 210), -1, cv2.LINE_AA)
    semantic = pseudo_semantic(image)
    assert (semantic == 2).sum() > 0.95 * (semantic > 0).sum() > 500


@pytest.mark.parametrize("level", [0, 120, 255])
def test_blank_fields_have_no_cells(level: int) -> None:
    semantic = pseudo_semantic(np.full((64, 80, 3), level, np.uint8))
    assert semantic.shape == (64, 80)
    assert not semantic.any()
    assert not watershed_cells(semantic, SETTINGS).any()


def test_red_cells_alone_are_no_white_cells() -> None:
    for stain in STAINS:
        assert not pseudo_semantic(smear(stain, [])).any()


# --- watershed ---------------------------------------------------------------------------------------------------


def test_touching_cells_come_apart_at_their_waist() -> None:
    cells = watershed_cells(semantic_of((40, 60, 14, 11), (64, 60, 14, 11)), SETTINGS)
    assert cells.dtype == np.uint16
    assert cells.max() == 2
    assert cells[60, 40] == 1
    assert cells[60, 64] == 2
    columns = np.flatnonzero((cells[60, :-1] == 1) & (cells[60, 1:] == 2))
    assert abs(columns[0] - 52) <= 2


def test_cytoplasm_belongs_to_its_cell_and_lobes_are_one_nucleus() -> None:
    lobed = semantic_of((60, 60, 20, 0))
    for x, y in ((52, 55), (68, 55), (60, 70)):
        cv2.circle(lobed, (x, y), 6, 2, -1)
    cells = watershed_cells(lobed, SETTINGS)
    assert cells.max() == 1
    assert np.array_equal(cells > 0, lobed > 0)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_one_round_cell_is_one_cell_at_any_scale(scale: int) -> None:
    assert watershed_cells(semantic_of((60, 60, 12 * scale, 9 * scale)), SETTINGS).max() == 1


def test_debris_and_cells_without_nucleus_are_dropped() -> None:
    semantic = semantic_of((20, 20, 4, 3), (60, 60, 14, 10), (100, 100, 12, 2), (100, 20, 12, 0))
    cells = watershed_cells(semantic, SETTINGS)
    assert cells.max() == 1
    assert cells[60, 60] == 1


def test_border_cells_are_kept_or_not_as_set() -> None:
    semantic = semantic_of((0, 60, 14, 10), (60, 60, 14, 10))
    assert watershed_cells(semantic, SETTINGS).max() == 2
    inner = watershed_cells(semantic, SETTINGS.model_copy(update={"touching_border": False}))
    assert inner.max() == 1
    assert inner[60, 60] == 1


def test_ids_are_in_raster_order_without_gaps() -> None:
    cells = watershed_cells(semantic_of((90, 90, 12, 9), (30, 88, 14, 9), (60, 30, 12, 9)), SETTINGS)
    assert (cells[30, 60], cells[88, 30], cells[90, 90]) == (1, 2, 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100_000))
def test_watershed_holds_on_any_input(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.random((60, 70)), (0, 0), float(rng.uniform(0.5, 5)))
    semantic = np.digitize(noise, np.quantile(noise, [0.5, 0.7])).astype(np.uint8)
    cells = watershed_cells(semantic, SETTINGS)
    assert not (cells[semantic == 0]).any()
    assert np.array_equal(cells, watershed_cells(semantic, SETTINGS))
    for k in range(1, int(cells.max()) + 1):
        one = cells == k
        assert one.sum() >= SETTINGS.min_cell_area_px
        assert (semantic[one] == 2).sum() >= SETTINGS.min_nucleus_area_px
    first = [int(np.flatnonzero(cells.ravel() == k)[0]) for k in range(1, int(cells.max()) + 1)]
    assert first == sorted(first)


# --- tiles -------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(230, 600), st.integers(100, 500), st.integers(0, 10_000))
def test_every_cell_belongs_to_exactly_one_tile(width: int, height: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    semantic = np.zeros((height, width), np.uint8)
    for y in range(15, height - 15, 30):
        for x in range(15, width - 15, 30):
            cx, cy = x + int(rng.integers(-1, 2)), y + int(rng.integers(-1, 2))
            cv2.circle(semantic, (cx, cy), 11, 1, -1)
            cv2.circle(semantic, (cx, cy), 8, 2, -1)
    whole = cell_table(semantic, watershed_cells(semantic, SETTINGS), IDENTITY)
    geometry = field_geometry(width, height, SETTINGS.um_per_px, SETTINGS)
    assert (geometry.width, geometry.height) == (width, height)
    side = SETTINGS.field_px
    tables = []
    for origin, core, to_source in zip(geometry.origins, geometry.cores, geometry.to_source(), strict=True):
        tile = np.zeros((side, side), np.uint8)
        part = semantic[origin[1] : origin[1] + side, origin[0] : origin[0] + side]
        tile[: part.shape[0], : part.shape[1]] = part
        own = own_cells(watershed_cells(tile, SETTINGS), origin, core)
        tables.append(cell_table(tile, own, to_source, first_id=1 + sum(len(t) for t in tables)))
    together = concatenate(tables)
    assert together.cell_id.tolist() == list(range(1, len(whole) + 1))
    order = np.lexsort((together.centroid_x_px, together.centroid_y_px))
    expected = np.lexsort((whole.centroid_x_px, whole.centroid_y_px))
    np.testing.assert_allclose(together.centroid_x_px[order], whole.centroid_x_px[expected], atol=1e-3)
    np.testing.assert_allclose(together.centroid_y_px[order], whole.centroid_y_px[expected], atol=1e-3)
    assert together.cell_area_px[order].tolist() == whole.cell_area_px[expected].tolist()


def test_core_is_half_open() -> None:
    cells = np.zeros((20, 20), np.uint16)
    cells[9:12, 9:12] = 1  # centroid at (10, 10)
    assert own_cells(cells, (100, 0), (0, 0, 110, 50)).max() == 0
    assert own_cells(cells, (100, 0), (110, 10, 120, 50)).max() == 1
    assert own_cells(cells, (100, 0), (0, 0, 111, 10)).max() == 0


# --- real smears -------------------------------------------------------------------------------------------------


def _rgb(data: bytes) -> NDArray[np.uint8]:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    return np.asarray(pixels, np.uint8)


def test_real_fields_have_cells(shared_data: Path) -> None:
    with (shared_data / "all_fields.csv").open() as table:
        keys = [row["image_key"] for row in csv.DictReader(table)][::60]
    counts = []
    with zipfile.ZipFile(shared_data / "all_fields.zip") as archive:
        for key in keys:
            semantic = pseudo_semantic(mask_overlays(_rgb(archive.read(key)))[0])
            counts.append(int(watershed_cells(semantic, SETTINGS).max()))
    assert min(counts) >= 1
    assert 6 < np.mean(counts) < 16


def test_white_cells_of_another_laboratory(shared_data: Path) -> None:
    boxes: dict[str, list[list[float]]] = {}
    with (shared_data / "bccd_fields_boxes.csv").open() as table:
        for row in csv.DictReader(table):
            if row["cell_type"] == "WBC":
                box = [float(row[name]) for name in ("xmin_px", "ymin_px", "xmax_px", "ymax_px")]
                boxes.setdefault(row["image_key"], []).append(box)
    found = total = 0
    with zipfile.ZipFile(shared_data / "bccd_fields.zip") as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        for key in sorted(boxes)[::8]:
            image = _rgb(archive.read(names[Path(key).name]))
            geometry = field_geometry(image.shape[1], image.shape[0], None, SETTINGS)
            small = cv2.resize(image, (geometry.width, geometry.height), interpolation=cv2.INTER_AREA)
            semantic = pseudo_semantic(np.asarray(small, np.uint8))
            t = cell_table(semantic, watershed_cells(semantic, SETTINGS), geometry.to_source()[0])
            for x0, y0, x1, y1 in boxes[key]:
                w = np.minimum(t.bbox_xmax_px, x1) - np.maximum(t.bbox_xmin_px, x0)
                h = np.minimum(t.bbox_ymax_px, y1) - np.maximum(t.bbox_ymin_px, y0)
                both = w.clip(0) * h.clip(0)
                areas = (t.bbox_xmax_px - t.bbox_xmin_px) * (t.bbox_ymax_px - t.bbox_ymin_px)
                found += bool((both / (areas + (x1 - x0) * (y1 - y0) - both) >= 0.5).any())
                total += 1
    assert found / total > 0.9


def _smear(red_radius: int, white_radius: int) -> tuple[np.ndarray, np.ndarray]:
    """A normalised field of red cells, two of them touching, and one white cell; and the white cell's classes."""
    rgb = np.full((224, 224, 3), 250, np.uint8)
    for x in range(red_radius + 4, 220 - red_radius, 3 * red_radius):
        cv2.circle(rgb, (x, 40), red_radius, (190, 196, 205), -1)
    cv2.circle(rgb, (60, 170), red_radius, (190, 196, 205), -1)
    cv2.circle(rgb, (60 + 2 * red_radius, 170), red_radius, (190, 196, 205), -1)
    semantic = np.zeros((224, 224), np.uint8)
    cv2.circle(rgb, (150, 130), white_radius, (120, 60, 160), -1)
    cv2.circle(semantic, (150, 130), white_radius, 1, -1)
    cv2.circle(semantic, (150, 130), white_radius - 3, 2, -1)
    return rgb, semantic


@pytest.mark.parametrize("radius", [7, 12, 20])
def test_red_cells_are_a_ruler(radius: int) -> None:
    assert red_cell_px(*_smear(radius, 24)) == pytest.approx(2 * radius, rel=0.2)
    assert red_cell_px(np.full((64, 64, 3), 250, np.uint8), np.zeros((64, 64), np.uint8)) is None


def test_what_is_smaller_than_a_red_cell_is_no_white_cell() -> None:
    rgb, semantic = _smear(12, 20)
    cv2.circle(semantic, (40, 110), 7, 2, -1)
    cleaned, cells = single_cells(rgb, semantic, SegmentSettings())
    assert cells.max() == 1
    assert cells[130, 150] == 1
    assert cleaned[110, 40] == 0
    alone = np.where(np.arange(224) < 100, semantic, 0).astype(np.uint8)  # without the large one it is the largest
    assert single_cells(rgb, alone, SegmentSettings())[1][110, 40] == 1
    assert not single_cells(rgb, np.zeros_like(semantic), SegmentSettings())[1].any()


def test_holes_are_filled_and_specks_of_nucleus_dropped() -> None:
    rgb, semantic = _smear(12, 24)
    semantic[128:132, 148:152] = 0
    semantic[106, 150] = 1
    semantic[107, 150:152] = 2  # a speck in the rim, apart from the nucleus
    semantic[108:110, 146:156] = 1
    cleaned, smallest = clean_semantic(rgb, semantic)
    assert cleaned[130, 150] == 2
    assert cleaned[107, 150] == 1
    assert smallest == pytest.approx(0.6 * np.pi * 144, rel=0.3)


def test_a_cell_at_the_edge_of_a_small_image_ends_there(tmp_path: Path) -> None:
    image = np.full((168, 224, 3), 245, np.uint8)
    for x, y in ((40, 60), (90, 60), (140, 60), (60, 110)):
        cv2.circle(image, (x, y), 9, (230, 190, 190), -1)
    cv2.circle(image, (160, 158), 18, (90, 40, 160), -1)  # cut by the lower edge; the tile goes on, mirrored
    block = image_block([image], random_bundle(tmp_path / "b", tiny=True))
    assert block.extents.tolist() == [[224, 168]]
    semantic, cells = segment_block(block, None, SegmentSettings(), "cpu")
    assert len(cells) == 1
    assert cells.table.bbox_ymax_px[0] == pytest.approx(168)
    assert cells.table.touches_border[0]
    assert not semantic[0, 168:].any()
    assert not cells.labels[0, 168:].any()
