"""Comparing runs: what is said to differ is what differs, whichever way the images are brought together."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import screen_here, table, with_other_classifier, write_zip
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.core.errors import StorageError
from leukoflow.models.bundle import Bundle
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.store.tables import finished
from leukoflow.tasks.upkeep.diff import (
    ImageChange,
    Outcome,
    change_of,
    diff_runs,
    differences,
    joined,
    setup_differences,
)

ONE = Outcome("s/1.jpg", "ab", "S1", "predicted", None, "Early", 0.75, ("Early", "Pre"))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["diff", *arguments], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


# --- one image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({}, ()),
        ({"confidence": 0.75 + 1e-12}, ("confidence",)),
        ({"confidence": None}, ("confidence",)),
        ({"label": "Pro"}, ("label",)),
        ({"prediction_set": ("Early",)}, ("prediction_set",)),
        ({"status": "abstained", "reason": "unlike the training fields"}, ("status", "reason")),
        ({"slide": "S2"}, ("slide",)),
        ({"member_sha256": "cd"}, ("member_sha256",)),
        ({"image_key": "s/2.jpg"}, ("image_key",)),
    ],
)
def test_the_fields_that_differ_are_named(change: dict[str, Any], fields: tuple[str, ...]) -> None:
    assert differences(ONE, replace(ONE, **change)) == fields
    found = change_of(ONE, replace(ONE, **change))
    assert (found.fields if found else ()) == fields


def test_confidences_may_differ_by_the_tolerance() -> None:
    assert differences(ONE, replace(ONE, confidence=0.7), 0.06) == ()
    assert differences(ONE, replace(ONE, confidence=0.7), 0.04) == ("confidence",)


def test_an_image_moves_with_its_label_or_status_only() -> None:
    for other, moved in (
        (replace(ONE, confidence=0.5), False),
        (replace(ONE, label="Pre"), True),
        (replace(ONE, status="abstained"), True),
        (None, True),
    ):
        found = change_of(ONE, other)
        assert found is not None
        assert found.moved is moved


# --- bringing images together ----------------------------------------------------------------------------------------


def as_dict(pairs: Any) -> set[tuple[str | None, str | None]]:
    return {(a and a.image_key, b and b.image_key) for a, b in pairs}


def image(key: str, sha: str | None = None) -> Outcome:
    return replace(ONE, image_key=key, member_sha256=sha or f"sha of {key}")


def test_images_are_joined_by_key_then_by_content() -> None:
    a = [image("same"), image("renamed", "r"), image("gone"), image("twin", "t"), image("other content", "x")]
    b = [image("new name", "r"), image("other content", "y"), image("same"), image("came"), image("second twin", "t")]
    with joined(iter(a), iter(b)) as pairs:
        found = as_dict(pairs)
    assert found == {
        ("same", "same"), ("renamed", "new name"), ("gone", None), (None, "came"), ("twin", "second twin"),
        ("other content", "other content"),
    }  # fmt: skip


def test_images_without_content_are_never_taken_for_each_other() -> None:
    a, b = replace(ONE, member_sha256=None), replace(ONE, image_key="x", member_sha256=None)
    with joined(iter([a]), iter([b])) as pairs:
        assert as_dict(pairs) == {(ONE.image_key, None), (None, "x")}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 30), unique=True))
def test_joining_finds_what_sets_find(left: list[int], right: list[int]) -> None:
    a, b = [image(str(i)) for i in left], [image(str(i)) for i in right]
    with joined(iter(a), iter(b)) as pairs:
        found = list(pairs)
    assert len(found) == len(set(left) | set(right))
    assert sum(x is not None and y is not None for x, y in found) == len(set(left) & set(right))
    assert all(x == y for x, y in found if x is not None and y is not None)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(night: Run, small: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same night with another classifier, in shards of another size."""
    folder = tmp_path_factory.mktemp("other")
    bundle = with_other_classifier(small, folder / "other", seed=9)
    return screen_here(
        night.config.source, folder / "out", "again", bundle, shard_size=32,
        manifest=night.config.manifest, meta_columns=["ward"],
    )  # fmt: skip


def test_a_run_is_the_same_as_its_copy(night: Run, copy: Path) -> None:
    found = diff_runs(night.root, str(copy), lambda change: pytest.fail(str(change)))
    assert found.same
    assert (found.images, found.same_order, found.slides, found.setup) == (38, True, (), ())
    result = invoke(night.root, str(copy) + "/")
    assert (result.exit_code, "all 38 images have the same outcome" in result.output) == (0, True)


@pytest.mark.slow
def test_another_classifier_changes_what_the_tables_say(night: Run, other: Run) -> None:
    """Against an independent comparison of whole tables."""
    seen: list[ImageChange] = []
    found = diff_runs(night.root, other.root, seen.append)
    a, b = (table(Path(r.root), "predictions").to_pylist() for r in (night, other))
    columns = ("status", "label", "confidence", "prediction_set", "reason")
    expected = [x["image_key"] for x, y in zip(a, b, strict=True) if any(x[c] != y[c] for c in columns)]
    assert [c.image_key for c in seen] == expected
    assert found.same_order
    assert found.changed == len(expected) > 20
    assert sum(n for _, _, n in found.transitions) == 38
    assert sum(s.changed for s in found.slides) == len(expected)
    assert [s.moved for s in found.slides] == sorted((s.moved for s in found.slides), reverse=True)
    assert {s.slide for s in found.slides} <= {"S0", "S1", "S2", "ward-2"}
    assert {name for name, _, _ in found.setup} == {"bundle", "bundle_digest", "shard_size", "fingerprint"}
    assert diff_runs(night.root, other.root, tolerance=1.0).changed <= found.changed


def test_another_hand_over_is_joined(night: Run, small: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    """Some images gone, one renamed, one replaced, in another order, and without the manifest."""
    import zipfile

    with zipfile.ZipFile(night.config.source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    renamed = members.pop("ward-1/01.jpg")
    gone = members.pop("ward-1/04.jpg")
    members["ward-0/00.jpg"] = gone
    later = dict(reversed(members.items())) | {"ward-1/new.jpg": renamed, "ward-9/more.txt": b"text"}
    run = screen_here(write_zip(tmp_path / "later.zip", later), tmp_path / "out", "later", small)
    seen: list[ImageChange] = []
    found = diff_runs(night.root, run.root, seen.append)
    assert not found.same_order
    assert [c.image_key for c in seen if c.change == "only in A"] == ["ward-1/04.jpg"]
    assert [c.image_key for c in seen if c.change == "only in B"] == ["ward-9/more.txt"]
    by_key = {c.image_key: c for c in seen}
    assert "image_key" in by_key["ward-1/new.jpg"].fields
    assert "member_sha256" in by_key["ward-0/00.jpg"].fields
    assert "slide" in by_key["ward-0/03.jpg"].fields
    assert (found.only_a, found.only_b, found.images) == (1, 1, 39)
    assert ("ward-0/03.jpg", False) in {(c.image_key, c.moved) for c in seen}
    assert {name for name, _, _ in found.setup} >= {"source", "source identity", "--manifest", "missing"}


def test_files_have_every_change(night: Run, other: Run, tmp_path: Path) -> None:
    result = invoke(night.root, other.root, "--csv", str(tmp_path / "c.csv"), "--json", str(tmp_path / "c.json"))
    assert result.exit_code == 3, result.output
    for part in ("made differently", "bundle_digest", "label or status", "different", "of 38 images"):
        assert part in result.output
    with (tmp_path / "c.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    whole = json.loads((tmp_path / "c.json").read_text())
    assert [x["image_key"] for x in lines] == [x["image_key"] for x in whole["images"]]
    assert whole["summary"]["changed"] == len(lines)
    assert whole["summary"]["same"] is False
    row = pq.read_table(Path(night.root) / "predictions").to_pylist()[0]
    assert lines[0]["image_key"] == row["image_key"]
    assert lines[0]["confidence_a"] == str(row["confidence"])
    assert lines[0]["prediction_set_a"] == "|".join(row["prediction_set"])
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["c.csv", "c.json"]


def test_the_same_runs_give_an_empty_list(night: Run, copy: Path, tmp_path: Path) -> None:
    assert invoke(night.root, str(copy), "--json", str(tmp_path / "c.json")).exit_code == 0
    whole = json.loads((tmp_path / "c.json").read_text())
    assert (whole["images"], whole["summary"]["same"]) == ([], True)


def test_what_cannot_be_compared_is_one_line(night: Run, copy: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ([night.root, str(tmp_path / "nothing")], "holds no run"),
        ([night.root, str(copy), "--csv", str(tmp_path / "no" / "c.csv")], "cannot be written"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    (copy / "predictions" / "part-00001.parquet").write_bytes(b"PAR1 nothing PAR1")
    result = invoke(night.root, str(copy), "--csv", str(tmp_path / "c.csv"))
    assert "cannot be read" in result.stderr
    assert "leukoflow verify" in result.stderr
    assert not (tmp_path / "c.csv").exists()
    shutil.rmtree(copy / "predictions")
    with pytest.raises(StorageError, match="is gone"):
        diff_runs(night.root, str(copy))


def test_setup_tells_software_and_settings(night: Run) -> None:
    _, m = finished(night.root)
    newer = replace(m, software=tuple((n, "99" if n == "torch" else v) for n, v in m.software if n != "zarr"))
    found = setup_differences(m, newer, "leukoflow run a --out o --um-per-px 0.5", "leukoflow run a --out p")
    versions = dict(m.software)
    assert found == (
        ("--um-per-px", "0.5", "not given"),
        ("torch", versions["torch"], "99"),
        ("zarr", versions["zarr"], "absent"),
    )  # fmt: skip
