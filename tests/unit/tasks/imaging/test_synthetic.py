"""The sample archive: same bytes for the same seed, truth that agrees with the picture, files as promised."""

from __future__ import annotations

import csv
import hashlib
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from leukoflow.core.errors import ConfigError
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.imaging.synthetic import MAX_CELLS, render_field, slide_of, slide_style, write_sample


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    write_sample(tmp_path / "a", images=6, seed=3)
    write_sample(tmp_path / "b", images=6, seed=3)
    write_sample(tmp_path / "c", images=6, seed=4)
    a, c = _digests(tmp_path / "a"), _digests(tmp_path / "c")
    assert a == _digests(tmp_path / "b")
    assert a.keys() == c.keys()
    assert a["fields/field-00000.jpg"] != c["fields/field-00000.jpg"]


def test_more_images_only_append(tmp_path: Path) -> None:
    write_sample(tmp_path / "few", images=3, seed=1)
    write_sample(tmp_path / "many", images=40, seed=1)
    few, many = _digests(tmp_path / "few"), _digests(tmp_path / "many")
    pictures = [name for name in few if name.endswith((".jpg", ".png"))]
    assert len(pictures) == 9
    assert all(few[name] == many[name] for name in pictures)
    assert (tmp_path / "many" / "truth.csv").read_text().startswith((tmp_path / "few" / "truth.csv").read_text())


def test_a_shorter_rerun_leaves_nothing_of_the_longer_one(tmp_path: Path) -> None:
    write_sample(tmp_path, images=5, seed=1)
    write_sample(tmp_path, images=2, seed=1)
    assert [p.name for p in sorted((tmp_path / "fields").iterdir())] == ["field-00000.jpg", "field-00001.jpg"]
    assert len(list((tmp_path / "truth" / "cells").iterdir())) == 2


def test_archive_directory_truth_and_manifest_agree(tmp_path: Path) -> None:
    summary = write_sample(tmp_path, images=10, seed=7, side=160)
    assert (summary.images, summary.slides) == (10, 4)
    with zipfile.ZipFile(summary.archive) as archive:
        names = archive.namelist()
        assert names == [f"field-{i:05d}.jpg" for i in range(10)]
        for name in names:
            assert archive.read(name) == (tmp_path / "fields" / name).read_bytes()
    with (tmp_path / "truth.csv").open() as file:
        truth = list(csv.DictReader(file))
    with summary.manifest.open() as file:
        manifest = list(csv.DictReader(file))
    assert [r["image_key"] for r in truth] == [r["image_key"] for r in manifest] == names
    assert [r["slide_id"] for r in truth] == [r["slide_id"] for r in manifest]
    assert "patient_id" not in manifest[0]
    assert sum(int(r["n_cells"]) for r in truth) == summary.cells > 10
    for row in truth:
        stem = row["image_key"].removesuffix(".jpg")
        image = cv2.imread(str(tmp_path / "fields" / row["image_key"]))
        cells = cv2.imread(str(tmp_path / "truth" / "cells" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        semantic = cv2.imread(str(tmp_path / "truth" / "semantic" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert image is not None
        assert cells is not None
        assert semantic is not None
        assert image.shape == (160, 160, 3)
        assert (cells.dtype, semantic.dtype) == (np.uint16, np.uint8)
        assert set(np.unique(cells)) - {0} == set(range(1, int(row["n_cells"]) + 1))
        assert np.array_equal(cells > 0, semantic > 0)
        assert float(row["um_per_px"]) == pytest.approx(0.42 * 224 / 160)


@pytest.mark.parametrize("label", CLASSES)
def test_truth_matches_the_picture(label: str) -> None:
    rng = np.random.default_rng(11)
    fields = [render_field(rng, label) for _ in range(12)]
    assert all(f.n_cells <= MAX_CELLS for f in fields)
    assert sum(f.n_cells for f in fields) >= 20
    green = np.concatenate([f.rgb[..., 1].ravel() for f in fields]).astype(float)
    semantic = np.concatenate([f.semantic.ravel() for f in fields])
    background, cytoplasm, nucleus = (green[semantic == k].mean() for k in (0, 1, 2))
    assert nucleus < cytoplasm < background
    for f in fields:  # every cell has a nucleus of its own
        assert set(np.unique(f.cells[f.semantic == 2])) == set(range(1, f.n_cells + 1))


def test_classes_differ_in_their_cells_and_not_in_their_light() -> None:
    def share_of_nucleus(label: str) -> float:
        fields = [render_field(np.random.default_rng(i), label) for i in range(12)]
        return sum(int((f.semantic == 2).sum()) for f in fields) / sum(int((f.semantic > 0).sum()) for f in fields)

    assert share_of_nucleus("Benign") > share_of_nucleus("Pre") > share_of_nucleus("Pro")
    blocks = [slide_of(i) for i in range(64)]
    assert sorted(set(blocks)) == list(range(8))
    assert all(blocks.count(s) == 8 for s in range(8))


def test_a_large_image_is_a_mosaic_with_distinct_cells() -> None:
    field = render_field(np.random.default_rng(2), "Pre", side=1500)
    assert field.rgb.shape == (1500, 1500, 3)
    assert set(np.unique(field.cells)) == set(range(field.n_cells + 1))
    assert field.n_cells > 1
    assert np.array_equal(field.cells > 0, field.semantic > 0)


def test_scale_bars_come_in_several_styles() -> None:
    styles = {slide_style(np.random.default_rng(i)).scale_bar for i in range(40)}
    assert styles == {0, 1, 2, 3}


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown label 'Late'"):
        render_field(np.random.default_rng(0), "Late")
    with pytest.raises(ConfigError, match="at least 32"):
        render_field(np.random.default_rng(0), "Pre", side=20)
    with pytest.raises(ConfigError, match="at least 1"):
        write_sample(tmp_path / "none", images=0)
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="holds other files"):
        write_sample(tmp_path, images=1)
    assert (tmp_path / "notes.txt").read_text() == "keep me"
