"""Taking a run up again: what is committed stays as it is, what is not, lost or altered is done again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from harness import (
    assert_same,
    digests,
    start,
    table,
    with_other_classifier,
    write_zip,
    zarr_bytes,
)

from leukoflow.core.errors import RunConflictError
from leukoflow.models.bundle import Bundle
from leukoflow.runs.progress import read_manifest, read_progress
from leukoflow.runs.records import Shard
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.store.commit import read_marker

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
SHARD = "00001"


@pytest.fixture(scope="module")
def base(screen: Any, archives: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    state = screen(archives["zip"], out, "night")
    assert state.is_completed(), state.message
    return out / "night"


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """The finished run once more, to be harmed."""
    shutil.copytree(base, tmp_path / "night")
    return tmp_path / "night"


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a cluster was opened")

    monkeypatch.setattr("leukoflow.flows.run.open_cluster", refuse)


def times(root: Path, without: str) -> dict[str, int]:
    """Modification times of everything committed that belongs to other shards."""
    folders = ("predictions", "cells", "fields", "masks.zarr", "features.zarr", "activations.zarr", "markers")
    return {
        str(p.relative_to(root)): p.stat().st_mtime_ns
        for folder in folders
        for p in (root / folder).rglob("*")
        if p.is_file() and without not in str(p.relative_to(root))
    }


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_finished_run_starts_nothing(screen: Any, archives: dict[str, str], copy: Path, no_cluster: None) -> None:
    before = digests(copy)
    state = screen(archives["zip"], copy.parent, "night")
    assert state.is_completed()
    assert "finished already" in state.message
    assert digests(copy) == before


def test_a_finished_run_starts_no_server_either(
    archives: dict[str, str], bundle: Bundle, copy: Path, tmp_path: Path
) -> None:
    words = ["run", archives["zip"], "--out", str(copy.parent), "--run-id", "night", "--bundle", str(bundle.path)]
    home = tmp_path / "prefect"
    command = start([*words, "--shard-size", "16"], tmp_path / "log", LEUKOFLOW_PREFECT_HOME=str(home))
    try:
        assert command.wait() == 3  # as the run itself: some members are quarantined
        assert "nothing was started" in command.text()
        assert not home.exists()
        assert not command.worker_pids  # importing torch asks ldconfig, so that not every child is one of ours
    finally:
        command.end()


HARMS: dict[str, Callable[[Path], None]] = {
    "predictions deleted": lambda root: (root / f"predictions/part-{SHARD}.parquet").unlink(),
    "predictions altered": lambda root: flip(root / f"predictions/part-{SHARD}.parquet"),
    "cells altered": lambda root: flip(root / f"cells/part-{SHARD}.parquet"),
    "features altered": lambda root: flip(largest(root / "features.zarr" / SHARD)),
    "masks altered": lambda root: flip(largest(root / "masks.zarr" / SHARD)),
    "masks deleted": lambda root: shutil.rmtree(root / "masks.zarr" / SHARD),
    "fields altered": lambda root: flip(root / f"fields/part-{SHARD}.parquet"),
    "marker deleted": lambda root: (root / f"markers/features/{SHARD}.json").unlink(),
}


@pytest.mark.parametrize("harm", HARMS)
def test_only_what_was_harmed_is_redone(
    screen: Any, archives: dict[str, str], base: Path, copy: Path, harm: str
) -> None:
    HARMS[harm](copy)
    before = times(copy, SHARD)
    state = screen(archives["zip"], copy.parent, "night")
    assert state.is_completed(), state.message
    if harm == "marker deleted":  # the manifest vouches for all files, so nothing needs to be done
        assert "finished already" in state.message
        return
    assert times(copy, SHARD) == before
    assert_same(base, copy, drop=())
    marker = read_marker(open_storage(str(copy)), "predictions", Shard(1, 16, 16))
    assert marker is not None
    assert marker.receipt is not None
    most = ("masks", "features", "activations")
    kept = {"predictions": most, "cells": most, "features": ("masks",)}
    assert marker.receipt.resumed == kept.get(harm.split()[0], ())
    assert digests(copy / "activations.zarr") == digests(base / "activations.zarr")


@pytest.mark.parametrize("harm", ["altered", "deleted"])
def test_activation_maps_that_were_harmed_cost_no_other_part(
    screen: Any, archives: dict[str, str], base: Path, copy: Path, no_cluster: None, harm: str
) -> None:
    """Maps would cost all pixels again: they are given up, the rest stays as it is, and the manifest says so."""
    maps = copy / "activations.zarr" / SHARD
    if harm == "altered":
        flip(largest(maps))
    else:
        shutil.rmtree(maps)
    before = times(copy, SHARD) | {k: v for k, v in times(copy, "nothing").items() if "activations" not in k}
    state = screen(archives["zip"], copy.parent, "night")
    assert state.is_completed(), state.message
    assert "finished already" not in state.message
    assert times(copy, "nothing") == before
    assert not maps.exists()
    assert_same(base, copy, drop=())
    manifest = read_manifest(open_storage(str(copy)))
    assert manifest is not None
    assert f"activation maps are absent for 1 of 3 shards ({SHARD})" in manifest.notes[0]
    assert [p.shard for p in manifest.parts if p.stage == "activations"] == ["00000", "00002"]
    again = screen(archives["zip"], copy.parent, "night")
    assert "finished already" in again.message


def test_an_altered_summary_table_needs_no_worker(
    screen: Any, archives: dict[str, str], base: Path, copy: Path, no_cluster: None
) -> None:
    flip(copy / "slides.parquet")
    assert screen(archives["zip"], copy.parent, "night").is_completed()
    assert_same(base, copy, drop=())


def test_a_run_without_its_manifest_is_only_published(
    screen: Any, archives: dict[str, str], base: Path, copy: Path, no_cluster: None
) -> None:
    (copy / "manifest.json").unlink()
    before = times(copy, "nothing")
    assert screen(archives["zip"], copy.parent, "night").is_completed()
    assert times(copy, "nothing") == before
    assert_same(base, copy, drop=())


def test_other_settings_under_the_same_name_are_refused(
    screen: Any, archives: dict[str, str], copy: Path, no_cluster: None
) -> None:
    before = digests(copy)
    for other in ({"shard_size": 32}, {"um_per_px": 0.5}):
        state = screen(archives["zip"], copy.parent, "night", **other)
        assert state.is_failed()
        error = state.result(raise_on_failure=False)
        assert isinstance(error, RunConflictError)
        assert "--run-id" in str(error)
        assert "--reuse night" in str(error)
    assert isinstance(screen(archives["tar"], copy.parent, "night").result(raise_on_failure=False), RunConflictError)
    assert digests(copy) == before


def test_a_new_classifier_takes_over_masks_and_features(
    screen: Any, archives: dict[str, str], bundle: Bundle, base: Path, copy: Path, tmp_path: Path
) -> None:
    other = with_other_classifier(bundle, tmp_path / "other", seed=9)
    before = digests(copy)
    assert screen(archives["zip"], copy.parent, "again", bundle=str(other.path), reuse="night").is_completed()
    assert screen(archives["zip"], tmp_path / "fresh", "again", bundle=str(other.path)).is_completed()
    root = copy.parent / "again"
    manifest = read_manifest(open_storage(str(root)))
    assert manifest is not None
    assert {t.stage for t in manifest.timings} == {"classify"}
    assert "activation maps are absent for 3 of 3 shards" in manifest.notes[0]  # those there are show another evidence
    assert {p.stage for p in manifest.parts} == {"masks", "features", "predictions"}
    assert [p.name for p in (root / "activations.zarr").iterdir()] == ["zarr.json"]
    assert "These fields have no activation maps." in (root / "report.html").read_text()
    for i in range(3):
        marker = read_marker(open_storage(str(root)), "predictions", Shard(i, 0, 0))
        assert marker is not None
        assert marker.receipt is not None
        assert marker.receipt.resumed == ("masks", "features")
    assert digests(copy) == before
    assert zarr_bytes(root) == zarr_bytes(base)
    assert_same(tmp_path / "fresh" / "again", root)
    assert table(root, "predictions")["confidence"] != table(base, "predictions")["confidence"]


def test_the_same_classifier_takes_over_activation_maps_too(
    screen: Any, archives: dict[str, str], base: Path, copy: Path
) -> None:
    assert screen(archives["zip"], copy.parent, "twin", reuse="night").is_completed()
    root = copy.parent / "twin"
    manifest = read_manifest(open_storage(str(root)))
    assert manifest is not None
    assert manifest.notes == ()
    assert {t.stage for t in manifest.timings} == {"classify"}
    assert digests(root / "activations.zarr") == digests(base / "activations.zarr")
    assert "heat" in (root / "report.html").read_text().partition("<main>")[2]
    assert_same(base, root)


def test_an_unknown_run_cannot_be_reused(screen: Any, archives: dict[str, str], tmp_path: Path) -> None:
    state = screen(archives["zip"], tmp_path, "one", reuse="never-was")
    assert state.is_failed()
    assert "never-was" in state.message


def test_two_flows_at_once_on_one_run(
    screen: Any, server: str, dask_address: str, bundle: Bundle, archives: dict[str, str], base: Path, tmp_path: Path
) -> None:
    words = ["run", archives["zip"], "--out", str(tmp_path), "--run-id", "night", "--bundle", str(bundle.path)]
    words += ["--shard-size", "16", "--cluster", dask_address]
    pair = [start(words, tmp_path / f"log{i}", PREFECT_API_URL=server) for i in range(2)]
    try:
        codes = [command.wait() for command in pair]
        assert 3 in codes, "\n".join(command.text()[-2000:] for command in pair)
        state = screen(archives["zip"], tmp_path, "night")  # whatever the other one met, the run is whole
        assert state.is_completed(), state.message
        assert_same(base, tmp_path / "night")
        assert read_progress(str(tmp_path / "night")).state == "finished"
    finally:
        for command in pair:
            command.end()


def test_a_source_that_changed_is_another_run(
    screen: Any, members: dict[str, bytes], copy: Path, tmp_path: Path
) -> None:
    """The archive is replaced after planning: nothing of the old run is mixed with the new content."""
    source = write_zip(tmp_path / "ward.zip", dict(list(members.items())[:16]))
    assert screen(source, tmp_path, "ward").is_completed()
    before = digests(tmp_path / "ward")
    write_zip(source, dict(list(members.items())[1:17]))
    state = screen(source, tmp_path, "ward")
    assert isinstance(state.result(raise_on_failure=False), RunConflictError)
    assert digests(tmp_path / "ward") == before


def test_a_damaged_plan_is_an_error_that_says_so(
    screen: Any, archives: dict[str, str], base: Path, copy: Path, no_cluster: None
) -> None:
    flip(copy / "plan.parquet")
    state = screen(archives["zip"], copy.parent, "night")
    assert state.is_failed()
    assert "plan.parquet was altered" in state.message
    (copy / "plan.parquet").unlink()  # as the message says
    state = screen(archives["zip"], copy.parent, "night")
    assert state.is_completed(), state.message
    assert_same(base, copy, drop=())
