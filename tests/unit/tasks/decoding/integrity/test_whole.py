"""Whole pictures pass, real ones too; a run and a training account for what does not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from damaged_pictures import WAYS, decode, stored
from harness import screen_here, table, write_zip

from leukoflow.core.errors import SourceError
from leukoflow.models.bundle import Bundle
from leukoflow.tasks.training.data import read_members


@pytest.mark.parametrize("way", WAYS)
def test_whole_pictures_pass_without_a_remark(way: str) -> None:
    for seed in range(6):
        assert decode(stored(way, seed)).remarks == ()


@pytest.mark.slow
def test_a_run_accounts_for_damaged_and_odd_pictures(small: Bundle, tmp_path: Path) -> None:
    jpeg, png = stored("jpeg"), stored("png")
    members: dict[str, bytes] = {
        "whole.jpg": jpeg,
        "cut.jpg": jpeg[: len(jpeg) * 4 // 5] + b"\xff\xd9",
        "flipped.png": png[:9000] + bytes([png[9000] ^ 1]) + png[9001:],
        "trailing.jpg": jpeg + b"trail",
    }
    run = screen_here(write_zip(tmp_path / "night.zip", members), tmp_path / "out", "night", small)
    rows = {r["image_key"]: r for r in table(Path(run.root), "predictions").to_pylist()}
    assert rows["cut.jpg"]["status"] == rows["flipped.png"]["status"] == "quarantined"
    assert rows["cut.jpg"]["reason"] == "picture data missing: the JPEG's data end before its picture does"
    assert rows["flipped.png"]["reason"] == "damaged: the checksum of chunk IDAT of the PNG is wrong"
    assert "odd but complete: 5 bytes follow the picture's end" in rows["trailing.jpg"]["quality_flags"]
    assert rows["trailing.jpg"]["label"] == rows["whole.jpg"]["label"]
    assert not any("odd" in f for f in rows["whole.jpg"]["quality_flags"])


def test_damaged_pictures_are_not_trained_on(tmp_path: Path) -> None:
    jpeg = stored("jpeg")
    archive = write_zip(tmp_path / "all_fields.zip", {"a.jpg": jpeg, "b.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd9"})
    with pytest.raises(SourceError, match=r"'b.jpg'.*picture data missing"):
        list(read_members(archive, None))


def test_no_false_alarm_on_real_pictures(shared_data: Path) -> None:
    for name in ("all_fields", "bccd_fields", "healthy_other_source", "healthy_pbc_raabin", "other_centre_allidb2"):
        with zipfile.ZipFile(shared_data / f"{name}.zip") as stored_fields:
            keys = [k for k in stored_fields.namelist() if k.lower().endswith((".jpg", ".png", ".tif", ".bmp"))]
            for key in keys[:: max(1, len(keys) // 50)]:
                assert decode(stored_fields.read(key)).remarks == (), (name, key)
