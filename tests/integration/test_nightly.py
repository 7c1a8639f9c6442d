"""Whole runs with a real Prefect server and real workers: what they leave, whatever the source is packed in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import zarr
from harness import arrays, assert_same, digests, smears, table, tables, write_zip

from leukoflow.runs.progress import read_manifest, read_progress
from leukoflow.runs.schema import CELLS, PREDICTIONS, SLIDES
from leukoflow.storage.opening import open_storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
KINDS = ("zip", "directory", "tar", "tgz")


@pytest.fixture(scope="module")
def runs(screen: Any, archives: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run for each way to pack the same members."""
    out = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        state = screen(archives[kind], out, kind)
        assert state.is_completed(), state.message
    return {kind: out / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_member_has_exactly_one_row(runs: dict[str, Path], kind: str, members: dict[str, bytes]) -> None:
    root = runs[kind]
    rows = table(root, "predictions")
    assert rows["image_key"].to_pylist() == list(members)
    status = Counter(rows["status"].to_pylist())
    manifest = read_manifest(open_storage(str(root)))
    assert manifest is not None
    assert manifest.members == len(members) == sum(status.values())
    assert (manifest.predicted, manifest.abstained, manifest.rejected, manifest.quarantined) == tuple(
        status[s] for s in ("predicted", "abstained", "rejected", "quarantined")
    )
    assert manifest.ignored == 1
    assert manifest.exit_code == 3
    assert manifest.cells == len(table(root, "cells")) == sum(n or 0 for n in rows["n_cells"].to_pylist())
    assert sum(manifest.labels) == status["predicted"]
    reasons = dict(zip(rows["image_key"].to_pylist(), rows["reason"].to_pylist(), strict=True))
    assert reasons["slide-b/empty.jpg"] == "empty: 0 bytes"
    assert "truncated" in reasons["slide-b/cut.jpg"]
    assert "text" in reasons["slide-b/notes.txt"]
    by_key = dict(zip(rows["image_key"].to_pylist(), rows["status"].to_pylist(), strict=True))
    assert by_key["slide-b/blank.png"] == "rejected"
    assert status["quarantined"] == 3
    assert status["predicted"] > 20


@pytest.mark.parametrize("kind", ["directory", "tar", "tgz"])
def test_packing_changes_nothing(runs: dict[str, Path], kind: str) -> None:
    assert_same(runs["zip"], runs[kind])
    assert digests(runs["zip"] / "activations.zarr") == digests(runs[kind] / "activations.zarr")


def test_a_run_leaves_what_the_data_format_says(runs: dict[str, Path]) -> None:
    root = runs["zip"]
    assert {p.name for p in root.iterdir()} == {
        "activations.zarr", "cells", "drift.json", "features.zarr", "fields", "heartbeat.json", "hosts", "logs",
        "manifest.json", "markers", "masks.zarr", "plan.parquet", "predictions", "report.html", "run.json",
        "scales.parquet",
        "slides.parquet",
    }  # fmt: skip
    for name, schema in (("predictions", PREDICTIONS), ("cells", CELLS)):
        for part in (root / name).iterdir():
            file = pq.ParquetFile(part)
            assert file.schema_arrow.equals(schema)
            group = file.metadata.row_group(0)
            encodings = {e for i in range(group.num_columns) for e in group.column(i).encodings}
            assert not {"PLAIN_DICTIONARY", "RLE_DICTIONARY"} & encodings
    assert pq.read_schema(root / "slides.parquet").equals(SLIDES)
    log = next((root / "logs").glob("*.log")).read_text()
    assert "48 images in 3 shards" in log
    assert "shard 00002" in log
    assert "48 of 48 images accounted for" in log
    progress = read_progress(str(root))
    assert (progress.state, progress.done, progress.shards_done) == ("finished", 48, 3)


def test_other_tools_read_the_tables(runs: dict[str, Path], members: dict[str, bytes]) -> None:
    root = runs["zip"]
    frame = pd.read_parquet(root / "predictions")
    assert sorted(frame["image_key"]) == sorted(members)
    known = frame["label"].notna()
    assert set(frame.loc[~known, "status"]) <= {"rejected", "quarantined"}
    columns = ["prob_benign", "prob_early", "prob_pre", "prob_pro"]
    assert np.allclose(frame.loc[known, columns].sum(axis=1), 1, atol=1e-6)
    assert (frame.loc[known, columns].max(axis=1) == frame.loc[known, "confidence"]).all()
    with duckdb.connect() as database:
        counted = database.sql(
            f"""select p.image_key, any_value(p.n_cells), count(c.cell_id) from '{root}/predictions/*.parquet' p
            left join '{root}/cells/*.parquet' c using (image_key) group by all"""
        ).fetchall()
    assert len(counted) == len(members)
    assert all((n or 0) == cells for _, n, cells in counted)
    slides = pd.read_parquet(root / "slides.parquet")
    assert dict(zip(slides["slide_id"], slides["n_images"], strict=True)) == {"slide-a": 44, "slide-b": 4}


def test_zarr_alone_reads_masks_and_features(runs: dict[str, Path]) -> None:
    root = runs["zip"]
    rows, cells = table(root, "predictions").to_pylist(), table(root, "cells").to_pylist()
    masks = zarr.open_group(str(root / "masks.zarr"), mode="r")
    features = zarr.open_group(str(root / "features.zarr"), mode="r")
    assert sorted(masks.group_keys()) == sorted(features.group_keys()) == ["00000", "00001", "00002"]
    for shard in masks.group_keys():
        mine = {r["zarr_index"]: r for r in rows if r["shard"] == shard and r["zarr_index"] is not None}
        group: Any = masks[shard]
        semantic, ids, affine = group["semantic"][:], group["cells"][:], group["to_source"][:]
        assert (semantic.dtype, ids.dtype, affine.dtype) == (np.uint8, np.uint16, np.float32)
        assert semantic.shape == ids.shape == (len(mine), 224, 224)
        assert affine.shape == (len(mine), 2, 3)
        hybrid, single, offsets = (features[f"{shard}/{name}"] for name in ("hybrid", "cells", "cell_offsets"))
        assert hybrid.shape == (len(mine), 96)
        assert sum(block["dimension"] for block in hybrid.attrs["columns"]) == 96
        assert offsets.shape == (len(mine) + 1,)
        assert single.shape == (offsets[-1], 96)
        for index, row in mine.items():
            table_ids = sorted(c["cell_id"] for c in cells if c["image_key"] == row["image_key"])
            found = set(np.unique(ids[index]).tolist()) - {0}
            assert table_ids == sorted(found) == list(range(1, row["n_cells"] + 1))
            assert offsets[index + 1] - offsets[index] == row["n_cells"]
            assert not semantic[index][ids[index] == 0].all()
            for cell in (c for c in cells if c["image_key"] == row["image_key"]):
                ys, xs = np.nonzero(ids[index] == cell["cell_id"])
                assert cell["zarr_index"] == index
                assert cell["cell_area_px"] == len(xs)
                x, y = affine[index] @ np.array([xs.mean(), ys.mean(), 1.0])
                assert abs(x - cell["centroid_x_px"]) < 1
                assert abs(y - cell["centroid_y_px"]) < 1


def test_shard_size_and_neighbours_move_no_bit(
    screen: Any, runs: dict[str, Path], members: dict[str, bytes], tmp_path: Path
) -> None:
    """Another cut, and an archive in which one image is no longer readable: everybody else's row stays as it was."""
    names = list(members)
    damaged = dict(members) | {names[5]: b"no longer an image"}
    assert screen(write_zip(tmp_path / "cut.zip", members), tmp_path, "wide", shard_size=32).is_completed()
    assert screen(write_zip(tmp_path / "gap.zip", damaged), tmp_path, "gap", shard_size=32).is_completed()
    places = ("run_id", "source_uri", "shard", "zarr_index")
    mine, wide, gap = (tables(root, places) for root in (runs["zip"], tmp_path / "wide", tmp_path / "gap"))
    assert mine == wide
    for name in ("predictions", "cells"):
        others = [[r for r in t[name] if r["image_key"] != names[5]] for t in (mine, gap)]
        assert others[0] == others[1]
    for store, array in (("features.zarr", "hybrid"), ("features.zarr", "cells"), ("activations.zarr", "maps")):
        assert np.array_equal(
            np.concatenate(arrays(runs["zip"], store, array)),
            np.concatenate(arrays(tmp_path / "wide", store, array)),
        )


def test_large_fields_in_several_blocks(screen: Any, tmp_path: Path) -> None:
    """Mosaics among single fields, with a scale and without; blocks are cut by bytes, and the cut shows nowhere."""
    small = smears(tmp_path / "small", 14, seed=5)
    large = list(smears(tmp_path / "large", 2, seed=6, side=3000).values())
    names = list(small)
    images = dict(small) | {names[3] + "-large.jpg": large[0], names[9] + "-scaled.jpg": large[1]}
    source = write_zip(tmp_path / "mixed.zip", dict(sorted(images.items())))
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f"image_key,um_per_px\n{names[9]}-scaled.jpg,0.2\n")
    for run_id, block_mb in (("whole", 512), ("blocks", 8)):
        limits = {"block_mb": block_mb, "retry_delay_seconds": 0.1}
        state = screen(source, tmp_path, run_id, limits=limits, manifest=str(sheet))
        assert state.is_completed(), state.message
    assert_same(tmp_path / "whole", tmp_path / "blocks")
    rows = {r["image_key"]: r for r in table(tmp_path / "blocks", "predictions").to_pylist()}
    cells = table(tmp_path / "blocks", "cells").to_pylist()
    ids = arrays(tmp_path / "blocks", "masks.zarr", "cells")[0]
    for name in (names[3] + "-large.jpg", names[9] + "-scaled.jpg"):
        row = rows[name]
        assert row["n_tiles"] >= 9
        assert (row["width_px"], row["height_px"]) == (3000, 3000)
        mine = [c for c in cells if c["image_key"] == name]
        assert sorted(c["cell_id"] for c in mine) == list(range(1, row["n_cells"] + 1))
        tiles = ids[row["zarr_index"] : row["zarr_index"] + row["n_tiles"]]
        per_tile = [set(np.unique(tile).tolist()) - {0} for tile in tiles]
        assert sum(len(s) for s in per_tile) == len(set().union(*per_tile)) == row["n_cells"]
        assert all(-1 <= c["centroid_x_px"] <= 3001 and -1 <= c["centroid_y_px"] <= 3001 for c in mine)
    assert rows[names[3] + "-large.jpg"]["n_tiles"] != rows[names[9] + "-scaled.jpg"]["n_tiles"]


def test_patients_are_only_ever_pseudonyms(
    screen: Any, members: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    plain = ("Kowalska-1961", "Hernandez-1974")
    images = dict(list(members.items())[:10])
    names = list(images)
    images["slide-c/copy.jpg"] = images[names[0]]
    source = write_zip(tmp_path / "ward.zip", images)
    sheet = tmp_path / "ward.csv"
    lines = [f"{name},{plain[0]}" for name in names] + [f"slide-c/copy.jpg, {plain[1]}"]
    sheet.write_text("image_key,patient_id\n" + "\n".join(lines) + "\n")
    monkeypatch.delenv("LEUKOFLOW_PATIENT_KEY", raising=False)
    refused = screen(source, tmp_path / "out", "ward", manifest=str(sheet))
    assert refused.is_failed()
    assert "LEUKOFLOW_PATIENT_KEY" in str(refused.message)
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "a key that only the hospital has")
    done = screen(source, tmp_path / "out", "ward", manifest=str(sheet))
    assert done.is_completed(), done.message
    root = tmp_path / "out" / "ward"
    rows = table(root, "predictions").to_pylist()
    assert len({r["patient_id"] for r in rows}) == 2
    assert all(r["patient_id"].startswith("p_") for r in rows)
    manifest = read_manifest(open_storage(str(root)))
    assert manifest is not None
    assert manifest.conflicts == 2
    remark = "patient_id has blanks, quotation marks or invisible characters around it in line 12: they are left out"
    assert manifest.notes == (remark,)
    assert f"WARNING {remark}" in "".join(p.read_text() for p in (root / "logs").glob("*.log"))
    doubles = pq.read_table(root / "duplicates.parquet").to_pylist()
    assert [d["image_key"] for d in doubles] == [names[0], "slide-c/copy.jpg"]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert not any(p.encode() in path.read_bytes() for p in plain), path
    database = Path(_home(server)) / "prefect.db"
    for path in (database, database.with_name("prefect.db-wal")):
        if path.exists():
            assert not any(p.encode() in path.read_bytes() for p in plain), path


def _home(server: str) -> str:
    import os

    return os.environ["PREFECT_HOME"]


def test_prefect_shows_the_shards_and_the_summary(runs: dict[str, Path], server: str) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        tasks = [t.name for t in client.read_task_runs(limit=200)]
        artifacts = client.read_artifacts(limit=200)
    assert "shard 00000, images 1 to 16" in tasks
    assert "shard 00002, images 33 to 48" in tasks
    assert any("48 of 48 images accounted for" in str(a.data) for a in artifacts if a.key == "nightly-summary")


def test_an_unusable_source_is_refused(screen: Any, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    for source in (tmp_path / "absent.zip", tmp_path / "hollow"):
        state = screen(source, tmp_path / "out", "none")
        assert state.is_failed()
        error = state.result(raise_on_failure=False)
        assert error.exit_code == 2
        assert str(source) in str(error)
    assert not (tmp_path / "out").exists()
