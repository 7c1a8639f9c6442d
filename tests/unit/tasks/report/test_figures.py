"""Fields with their cells: activation maps where they are stored, masks where the source is lost."""

from __future__ import annotations

import base64
import re
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from made_up_report import (
    SHARD_SIZE,
    change,
    checked,
    figures_of,
    plain,
    store_maps,
)

from leukoflow.runs.records import RunManifest
from leukoflow.tasks.report.run_report import build_report


def test_a_ratio_that_was_not_measured_is_a_dash(run: tuple[Path, RunManifest]) -> None:
    change(run[0], "cells", "field-00014.jpg", nc_ratio=1.0)
    figures = figures_of(build_report(str(run[0]), run[1]), "suspicious")
    assert "nucleus / cell area – (cytoplasm not seen)" in figures["field-00014.jpg"]
    assert "nucleus / cell area 1.00" not in figures["field-00014.jpg"]
    assert "nucleus / cell area 0.80" in figures["field-00019.jpg"]


def test_activation_maps_lie_on_the_cells_that_weigh_most(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    for shard in ("00000", "00001"):
        store_maps(root, shard)
    page = build_report(str(root), manifest)
    checked(page)
    assert page.count('type="checkbox"') == 2  # one switch for each gallery
    assert "no activation maps" not in page
    figures = figures_of(page, "suspicious")
    for i, label in ((19, "Early"), (8, "Benign")):  # it is the map of the field's own label
        key = f"field-{i:05d}.jpg"
        drawing = figures[key]
        heats = re.findall(
            r'<image class="heat" x="([^"]+)" y="([^"]+)" width="44" height="44" href="([^"]+)"', drawing
        )
        masks = zarr.open_group(root / "masks.zarr" / f"{i // SHARD_SIZE:05d}", mode="r")
        cells = pq.read_table(root / "cells" / f"part-{i // SHARD_SIZE:05d}.parquet").to_pylist()
        mine = [c for c in cells if c["image_key"] == key]
        first = int(masks["cell_offsets"][mine[0]["zarr_index"]])  # type: ignore[index]
        assert len(heats) == min(3, len(mine))
        for n, (x, y, href) in enumerate(heats):  # cells weigh 1, 1/2, 1/3 ...
            _, cx, cy = masks["cell_table"][first + n]  # type: ignore[index,misc]
            assert (float(x), float(y)) == (pytest.approx(cx - 21.5, abs=0.01), pytest.approx(cy - 21.5, abs=0.01))
            raw = np.frombuffer(base64.b64decode(href.partition(",")[2]), np.uint8)
            pixels = cv2.imdecode(raw, cv2.IMREAD_UNCHANGED)
            full = round(217 / (n + 1))
            expected = [[full, 0], [0, full]] if label == "Early" else [[full, full], [round(full / 2), 0]]
            assert pixels[..., 3].tolist() == expected
            assert pixels[0, 0, 2] != pixels[1, 1, 2]  # against it, and for it


def test_fields_without_activation_maps_are_counted(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    page = build_report(str(root), replace(manifest, notes=("activation maps are absent for 2 of 2 shards",)))
    assert "These fields have no activation maps." in plain(page)
    assert "note activation maps are absent for 2 of 2 shards" in plain(page)
    assert 'type="checkbox"' not in page
    assert 'class="heat"' not in page
    store_maps(root, "00001")
    page = build_report(str(root), manifest)
    assert "9 of these 12 fields have no activation maps." in plain(page)  # shard 00001 has three diagnosed fields
    shutil.rmtree(root / "activations.zarr")
    assert 'class="heat"' not in build_report(str(root), manifest)


def test_activation_maps_that_are_not_committed_are_not_shown(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    store_maps(root, "00000")
    (root / "markers/activations/00000.json").unlink()
    assert 'class="heat"' not in build_report(str(root), manifest)


def test_a_lost_source_leaves_the_masks(run: tuple[Path, RunManifest], tmp_path: Path) -> None:
    root, manifest = run
    gone = replace(manifest, source=replace(manifest.source, uri=str(tmp_path / "gone.zip")))
    file = pq.ParquetFile(root / "plan.parquet")
    table, metadata = file.read(), file.schema_arrow.metadata
    file.close()
    moved = {k: v.replace(b"smears.zip", b"moved-away.zip") for k, v in metadata.items()}
    pq.write_table(table.replace_schema_metadata(moved), root / "plan.parquet", row_group_size=SHARD_SIZE)
    page = build_report(str(root), gone)
    assert "only masks are shown" in plain(page)
    assert "data:image" not in page
    assert page.count("nophoto") > 20
