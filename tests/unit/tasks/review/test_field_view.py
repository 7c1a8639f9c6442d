"""Fields of a run as pictures: the same pixels, masks and maps as the run saw, and words for what is gone."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from harness import arrays

from leukoflow.core.errors import NotFoundError
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.review import bundle_settings, field_view
from leukoflow.tasks.review.field_view import ERASED, view
from leukoflow.tasks.review.keys import run_key_of
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.upkeep.erase import erase_patient

NIGHT = run_key_of("night")
CUT, BLANK, TEXT = 34, 35, 36


def source_of(night: Run, key: str) -> np.ndarray[Any, Any]:
    with zipfile.ZipFile(night.source.uri) as archive:
        data = archive.read(key)
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))


def test_pixels_masks_and_maps_are_the_runs_own(night: Run, opened: RunTable) -> None:
    root = Path(night.root)
    for ordinal in (0, 17, 33):
        found = view(opened, ordinal)
        assert (found.remarks, found.pixels, found.mapped) == ((), True, True)
        row = opened.stored_row(ordinal)
        shard, first = int(row["shard"]), row["zarr_index"]
        assert len(found.tiles) == row["n_tiles"]
        offsets = arrays(root, "masks.zarr", "cell_offsets")[shard]
        for i, tile in enumerate(found.tiles):
            h, w = tile.semantic.shape
            assert np.array_equal(tile.semantic, arrays(root, "masks.zarr", "semantic")[shard][first + i][:h, :w])
            assert np.array_equal(tile.cells, arrays(root, "masks.zarr", "cells")[shard][first + i][:h, :w])
            begin, end = offsets[first + i : first + i + 2]
            assert np.array_equal(tile.maps, arrays(root, "activations.zarr", "maps")[shard][begin:end])
            assert tile.original.shape == tile.normalized.shape == (h, w, 3)
            assert (tile.original.dtype, tile.cells.dtype) == (np.uint8, np.uint16)
            assert not np.array_equal(tile.original, tile.normalized)
            for cell_id, x, y in zip(tile.cell_ids, tile.field_x, tile.field_y, strict=True):
                ys, xs = np.nonzero(tile.cells == cell_id)
                assert (xs.mean(), ys.mean()) == pytest.approx((x, y), abs=1.0)
        assert sorted(i for t in found.tiles for i in t.cell_ids.tolist()) == found.cells["cell_id"].to_pylist()


def test_a_tile_shows_its_place_of_the_image(night: Run, opened: RunTable) -> None:
    source = source_of(night, opened.field(0).image_key)
    tile = view(opened, 0).tiles[-1]
    h, w = tile.original.shape[:2]
    warped = cv2.warpAffine(
        source, tile.to_source.astype(np.float64), (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    inner = (slice(4, h - 4), slice(4, w - 4))
    assert np.abs(warped[inner].astype(int) - tile.original[inner]).mean() < 3


def test_what_was_not_segmented(opened: RunTable) -> None:
    blank = view(opened, BLANK)
    assert (blank.pixels, len(blank.tiles), len(blank.cells)) == (True, 1, 0)
    assert blank.tiles[0].original.min() == 255
    assert blank.remarks[0].startswith("nothing was segmented: ")
    for ordinal in (CUT, TEXT):
        found = view(opened, ordinal)
        assert (found.tiles, found.pixels) == ((), False)
        assert "there is no picture" not in found.remarks[0]
    assert view(opened, CUT).remarks == ("Truncated: the image's data ends early (700 bytes).",)
    with pytest.raises(NotFoundError):
        view(opened, 99)


def moved(copy: Path, to: str) -> RunTable:
    """The run with another source."""
    plan = copy / "plan.parquet"
    table = pq.ParquetFile(plan)
    metadata = table.metadata.metadata[b"leukoflow.plan"].decode()
    summary = json.loads(metadata)
    summary["source"]["uri"] = to
    with pq.ParquetWriter(copy / "new", table.schema_arrow.remove_metadata()) as writer:
        for i in range(table.num_row_groups):
            writer.write_table(table.read_row_group(i).replace_schema_metadata(None))
        writer.add_key_value_metadata({"leukoflow.plan": json.dumps(summary)})
    (copy / "new").rename(plan)
    return open_run_table(str(copy.parent), NIGHT)


def test_a_source_that_is_gone(copy: Path, tmp_path: Path) -> None:
    found = view(moved(copy, str(tmp_path / "gone.zip")), 0)
    assert (found.pixels, len(found.tiles) > 0, found.mapped) == (False, True, True)
    assert "can no longer be read" in found.remarks[0]
    assert found.tiles[0].original.min() == 255
    assert found.tiles[0].semantic.any()


def test_a_source_that_holds_other_images_now(night: Run, copy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(night.source.uri) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = list(members)
    members[names[0]], members[names[1]] = members[names[1]], members[names[0]]
    other = tmp_path / "night.zip"
    with zipfile.ZipFile(other, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    found = view(moved(copy, str(other)), 0)
    assert not found.pixels
    assert found.tiles[0].original.min() == 255
    assert any("can no longer be read" in r or "the source has changed" in r for r in found.remarks)


def test_maps_that_are_absent_and_masks_that_are_damaged(copy: Path) -> None:
    table = open_run_table(str(copy.parent), NIGHT)
    (copy / "markers" / "activations" / "00000.json").unlink()
    found = view(table, 0)
    assert (found.mapped, found.pixels) == (False, True)
    assert any("no activation maps" in r for r in found.remarks)
    assert not any(t.maps.any() for t in found.tiles)
    shutil.rmtree(copy / "masks.zarr" / "00000" / "cells")
    found = view(table, 0)
    assert found.tiles == ()
    assert "masks cannot be read" in found.remarks[-1]


def test_an_erased_patients_field(copy: Path) -> None:
    erase_patient(str(copy.parent), pseudonym("mary", b"a key that only these tests have"))
    found = view(open_run_table(str(copy.parent), NIGHT), 0)
    assert ERASED in found.remarks
    assert not any(t.semantic.any() or t.maps.any() for t in found.tiles)


def test_without_the_bundle_the_image_is_shown_as_it_is(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bundle_settings, field_view):
        monkeypatch.setattr(module, "method_of", lambda bundle: None)
    found = view(open_run_table(str(copy.parent), NIGHT), 0)
    assert any("without normalisation" in r or "does not fit" in r for r in found.remarks)


def test_large_images_show_the_tiles_of_most_attention(opened: RunTable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = view(opened, 0)
    cells = whole.cells
    weight = {}
    for index, attention in zip(cells["zarr_index"].to_pylist(), cells["attention"].to_pylist(), strict=True):
        weight[index] = weight.get(index, 0.0) + attention
    assert len(whole.tiles) > 1
    monkeypatch.setattr(field_view, "MAX_VIEWS", 1)
    found = view(opened, 0)
    assert len(found.tiles) == 1
    best = max(weight, key=lambda i: weight[i])
    row = opened.stored_row(0)
    group: Any = zarr.open_group(str(Path(opened.storage.root) / "masks.zarr" / row["shard"]), mode="r")
    assert np.array_equal(found.tiles[0].to_source, group["to_source"][best])
    assert f"1 of {len(whole.tiles)} tiles" in found.remarks[0]
