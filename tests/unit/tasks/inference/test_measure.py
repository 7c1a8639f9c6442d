"""The scales of a run: settled once, the same whatever the shards, and read by all that comes after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from harness import measure_here, screen_here, write_folder, write_zip

from leukoflow.core.config import load_config
from leukoflow.models.bundle import Bundle, random_bundle
from leukoflow.runs.layout import RunKey
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.imaging.synthetic import render_field, slide_style
from leukoflow.tasks.inference.measure import unmeasured_shards
from leukoflow.tasks.inference.worker import scaled
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.intake.plan_file import shards
from leukoflow.tasks.upkeep.verify import verify_run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "b", tiny=True)


def field(seed: int, factor: float = 1.0) -> bytes:
    """A drawn field; enlarged by a factor, its middle is shown at the same size."""
    rgb = render_field(np.random.default_rng(seed), "Pre", 224, slide_style(np.random.default_rng(5))).rgb
    if factor != 1.0:
        side = round(224 / factor)
        at = (224 - side) // 2
        rgb = np.asarray(cv2.resize(rgb[at : at + side, at : at + side], (224, 224), interpolation=cv2.INTER_CUBIC))
    return bytes(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 fields, 12 of them enlarged by half in a folder of their own, a picture without red cells, and no picture."""
    members = {f"near/{i}.png": field(i) for i in range(8)} | {f"far/{i}.png": field(i, 1.5) for i in range(12)}
    blank = np.full((224, 224, 3), 240, np.uint8)
    members |= {"blank/0.png": bytes(cv2.imencode(".png", blank)[1]), "near/broken.png": b"no picture"}
    return write_zip(tmp_path_factory.mktemp("source") / "night.zip", members)


def rows(root: str) -> dict[str, dict[str, Any]]:
    parts = sorted((Path(root) / "predictions").iterdir())
    return {row["image_key"]: row for part in parts for row in pq.read_table(part).to_pylist()}


def test_each_folder_has_its_scale_and_every_row_says_where_it_came_from(
    source: Path, bundle: Bundle, tmp_path: Path
) -> None:
    run = screen_here(source, tmp_path, "r", bundle)
    found = rows(run.root)
    for i in range(8):
        assert found[f"near/{i}.png"]["um_per_px"] == 0.42
    for i in range(12):
        row = found[f"far/{i}.png"]
        assert row["um_per_px"] == pytest.approx(0.42 / 1.5, rel=0.08)
        assert row["um_per_px_source"] == "ruler"
        assert 0.07 < row["um_per_px_sd"] / row["um_per_px"] < 0.1
        assert row["um_per_px_stated"] is None
        assert row["n_tiles"] == 1
    assert found["near/broken.png"]["um_per_px"] is None
    assert found["near/broken.png"]["um_per_px_source"] is None
    assert found["blank/0.png"]["status"] == "rejected"
    assert found["blank/0.png"]["um_per_px"] == 0.42  # it follows the rest of the source, whose first scale that is
    assert verify_run(run.root).ok


def test_scales_do_not_depend_on_the_size_of_shards(source: Path, bundle: Bundle, tmp_path: Path) -> None:
    roots = [screen_here(source, tmp_path, f"r{size}", bundle, shard_size=size).root for size in (16, 32)]
    tables = [pq.read_table(Path(root) / "scales.parquet") for root in roots]
    assert tables[0].equals(tables[1])
    assert pq.ParquetFile(Path(roots[0]) / "scales.parquet").num_row_groups == 2


def test_what_is_measured_is_not_measured_again(
    source: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(load_config(source=str(source), out=str(tmp_path), run_id="r", bundle=str(bundle.path)))
    storage = open_storage(run.root)
    assert unmeasured_shards(storage, run.summary) == list(shards(run.summary))
    measure_here(run)
    assert not storage.exists(RunKey.RED_CELLS)
    before = storage.read(RunKey.SCALES)
    measure_here(run)
    assert storage.read(RunKey.SCALES) == before


def test_a_stated_scale_is_used_and_one_that_red_cells_contradict_is_not_answered(
    bundle: Bundle, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "ward", {f"{i}.png": field(i) for i in range(6)})
    lines = ["image_key,um_per_px", "0.png,0.42", "1.png,0.1", "2.png,0.33"]
    (tmp_path / "scales.csv").write_text("\n".join(lines) + "\n")
    run = screen_here(folder, tmp_path / "out", "r", bundle, manifest=str(tmp_path / "scales.csv"))
    found = rows(run.root)
    assert (found["0.png"]["um_per_px"], found["0.png"]["um_per_px_source"]) == (0.42, "manifest")
    assert found["0.png"]["um_per_px_stated"] == 0.42
    wrong = found["1.png"]
    assert (wrong["um_per_px"], wrong["um_per_px_stated"], wrong["status"]) == (0.1, 0.1, "abstained")
    assert wrong["reason"].startswith("scale contradicted: stated scale 0.1 µm per pixel, red cells say 0.4")
    assert wrong["label"] is not None
    assert any(flag.startswith("stated scale 0.1 µm per pixel") for flag in wrong["quality_flags"])
    odd = found["2.png"]
    assert any(flag.startswith("stated scale 0.33 µm per pixel, red cells say 0.4") for flag in odd["quality_flags"])
    assert not str(odd["reason"]).startswith("scale")
    assert (found["3.png"]["um_per_px"], found["3.png"]["um_per_px_source"]) == (0.42, "ruler")
    assert verify_run(run.root).ok


def test_without_a_scale_an_image_is_judged_at_the_assumed_one_and_not_answered(bundle: Bundle, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    picture = np.full((448, 448, 3), (246, 244, 243), np.uint8)
    for x, y in rng.integers(40, 400, (6, 2)).tolist():
        cv2.circle(picture, (x, y), 26, (120, 60, 170), -1, cv2.LINE_AA)  # white cells alone
    data = bytes(cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1])
    folder = write_folder(tmp_path / "ward", {"a.png": data})
    (row,) = rows(screen_here(folder, tmp_path / "out", "r", bundle).root).values()
    assert row["status"] == "abstained"
    assert row["reason"].startswith("no scale: 0 round red cells in the image and those of its slide or folder, 12 are")
    assert row["reason"].endswith("give um_per_px")
    assert (row["um_per_px"], row["um_per_px_source"], row["um_per_px_sd"]) == (0.21, "assumed", None)
    assert row["label"] is not None
    cells = pq.read_table(next((tmp_path / "out" / "r" / "cells").iterdir()))
    assert cells["cell_area_um2"].null_count == len(cells)


def test_a_run_of_an_older_version_has_the_scales_that_were_stated(
    source: Path, bundle: Bundle, tmp_path: Path
) -> None:
    run = open_run(load_config(source=str(source), out=str(tmp_path), run_id="r", bundle=str(bundle.path)))
    (shard,) = shards(run.summary)
    for member in scaled(run.root, shard, bundle.spec.method.segment):
        assert member.scale.um_per_px is None
        assert member.scale.doubt == ""
