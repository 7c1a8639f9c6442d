"""Computing a run again: the same bits here, and what is reported where they are not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import zarr
from harness import arrays, digests, table
from typer.testing import CliRunner

import leukoflow.tasks.upkeep.reproduce
from leukoflow.apps.cli.main import app
from leukoflow.cluster.host import this_host
from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import BundleError, SourceError
from leukoflow.runs.progress import RunBinding, read_manifest
from leukoflow.runs.records import Host
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.store.compact import compact_run
from leukoflow.tasks.upkeep.checks import as_written
from leukoflow.tasks.upkeep.correct import correct_patient
from leukoflow.tasks.upkeep.erase import erase_patient
from leukoflow.tasks.upkeep.recompute import compare_arrays, compare_columns
from leukoflow.tasks.upkeep.reproduce import Reproduction, environment_differences, reproduce_run, sample
from leukoflow.tasks.upkeep.verify import verify_run

pytestmark = pytest.mark.slow  # computes whole runs again

KEY = b"a key that only these tests have"


REAL_POOL = leukoflow.tasks.upkeep.reproduce._pool


class Here:
    """A pool that computes in this process, where the run was computed, too."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def pool(count: int, threads: int) -> Iterator[Here]:
        yield Here()

    monkeypatch.setattr("leukoflow.tasks.upkeep.reproduce._pool", pool)


def again(root: Path, **more: Any) -> Reproduction:
    return reproduce_run(str(root), **more)


# --- pure ------------------------------------------------------------------------------------------------------------


def test_arrays_are_compared_bit_for_bit() -> None:
    a = np.array([[1.0, 2.0], [np.nan, 0.0]], np.float32)
    assert compare_arrays("00000", "x", a, a.copy()) is None
    b = a.copy()
    b[0, 1] = np.nextafter(np.float32(2), np.float32(3))
    found = compare_arrays("00000", "x", a, b)
    assert found is not None
    assert (found.values, found.of, found.largest) == (1, 4, float(b[0, 1]) - 2.0)
    b = a.copy()
    b[1, 1] = -0.0
    assert compare_arrays("00000", "x", a, b) is not None
    assert compare_arrays("00000", "x", a, a[:1]).largest is None  # type: ignore[union-attr]
    empty = np.zeros((0, 3), np.uint8)
    assert compare_arrays("00000", "x", empty, empty) is None


def test_columns_are_compared_value_by_value() -> None:
    def column(*values: Any, kind: Any = None) -> Any:
        return pa.chunked_array([pa.array(values, kind)])

    assert compare_columns("0", "x", column(1.5, None), column(1.5, None)) is None
    found = compare_columns("0", "x", column(1.5, 2.0, None), column(1.5, 2.25, None))
    assert (found.values, found.of, found.largest) == (1, 3, 0.25)  # type: ignore[union-attr]
    assert compare_columns("0", "x", column("a"), column("b")).largest is None  # type: ignore[union-attr]
    assert compare_columns("0", "x", column("a"), column("a", "b")) is not None
    lists = [pa.list_(pa.field(name, pa.string())) for name in ("item", "element")]
    assert compare_columns("0", "x", column(["a"], kind=lists[0]), column(["a"], kind=lists[1])) is None


def test_shards_are_drawn_by_the_seed() -> None:
    assert sample(5, None, 0) == sample(5, 9, 0) == [0, 1, 2, 3, 4]
    assert sample(100, 3, 1) == sample(100, 3, 1) != sample(100, 3, 2)
    assert len(set(sample(100, 7, 1))) == 7


def test_what_is_different_here_is_reported() -> None:
    host = this_host()
    assert environment_differences([host], [host]) == ()
    other = replace(host, cpu="another", cores=99, threads=host.threads + 1, gpus=("a", "b"))
    found = {what: (then, now) for what, then, now in environment_differences([host], [other])}
    assert set(found) == {"cpu", "threads", "gpus"}
    assert found["gpus"] == ("none", "a, b")
    assert environment_differences([host, other], [other]) == ()  # one of the machines of the run
    newer = replace(host, software=(("torch", "99"), ("extra", "1")))
    found = {what: (then, now) for what, then, now in environment_differences([host], [newer])}
    assert found["torch"] == (dict(host.software)["torch"], "99")
    assert found["extra"] == ("absent", "1")
    assert {a: b for a, b, _ in environment_differences([], [host], [("torch", "1.0")])}["torch"] == "1.0"


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_computed_again_is_the_same_to_the_last_bit(night: Run, copy: Path) -> None:
    before = digests(copy)
    found = again(copy)
    assert (found.same, found.environment, found.notes, found.not_stored) == (True, (), (), ())
    assert (found.shards, found.images) == (("00000", "00001", "00002"), 38)
    values = dict(found.values)
    tiles = sum(len(a) for a in arrays(copy, "masks.zarr", "semantic"))
    assert values["predictions/confidence"] == 38
    assert values["masks.zarr/semantic"] == tiles * 224 * 224
    assert {"features.zarr/hybrid", "activations.zarr/maps", "cells/attention", "fields/focus"} <= set(values)
    assert digests(copy) == before
    compact_run(str(copy))
    last = next(seed for seed in range(100) if sample(3, 1, seed) == [2])  # the rows that begin within the merged file
    one = again(copy, shards=1, seed=last)
    assert (one.same, one.shards, one.of_shards) == (True, ("00002",), 3)


def test_every_run_records_what_it_was_computed_with(night: Run) -> None:
    data = (Path(night.root) / "manifest.json").read_bytes()
    manifest = read_manifest(open_storage(night.root))
    assert manifest is not None
    assert manifest.hosts == (this_host(),)
    assert json.loads(manifest.config)["limits"]["max_megapixels"] == 120
    assert json.loads(night.binding.config)["shard_size"] == 16
    older = json.loads(data)
    for name in ("hosts", "config", "bundle_reference", "shadow_of"):
        del older[name]
    text = (json.dumps(older, ensure_ascii=False, sort_keys=True, indent=1) + "\n").encode()
    read = loads(type(manifest), text, "")
    assert as_written(text, read)  # a manifest of an older version is no altered one
    assert read.hosts == ()


def test_an_older_run_is_compared_by_its_versions(copy: Path) -> None:
    for name, kind in (("manifest.json", None), ("run.json", RunBinding)):
        data = json.loads((copy / name).read_bytes())
        for field in ("hosts", "config", "bundle_reference", "shadow_of"):
            data.pop(field, None)
        text = json.dumps(data, ensure_ascii=False, sort_keys=True, indent=1) + "\n"
        (copy / name).write_text(text)
        assert kind is None or loads(kind, text.encode(), "").config == ""
    assert verify_run(str(copy)).findings == ()
    found = again(copy, shards=1)
    assert found.same
    assert [note.split(";")[0] for note in found.notes] == [
        "the run did not record its settings", "the run did not record on what machines it was computed",
    ]  # fmt: skip


def test_processes_of_its_own_compute_with_the_threads_of_the_run(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leukoflow.tasks.upkeep.reproduce._pool", REAL_POOL)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen: list[tuple[int, int]] = []
    found = again(
        copy, shards=1, workers=1, scratch=str(tmp_path), report=lambda done, total: seen.append((done, total))
    )
    assert found.differences == ()
    assert {what for what, _, _ in found.environment} <= {"thread variables"}
    assert seen == [(0, 1), (1, 1)]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing stays in the scratch folder
    assert "OMP_NUM_THREADS" not in os.environ


def test_what_was_altered_is_found_and_how_far_it_is_off(copy: Path) -> None:
    group = zarr.open_group(str(copy / "features.zarr/00001"), mode="r+")
    group["hybrid"][2, 3] += np.float32(0.5)  # type: ignore[index, operator]
    path = copy / "predictions" / "part-00000.parquet"
    rows = pq.ParquetFile(path).read()
    i = rows.schema.get_field_index("confidence")
    pq.write_table(rows.set_column(i, rows.schema.field(i), pc.multiply(rows["confidence"], 0.5)), path)
    found = again(copy)
    assert not found.same
    by_place = {(d.shard, d.where): d for d in found.differences}
    assert set(by_place) == {("00001", "features.zarr/hybrid"), ("00000", "predictions/confidence")}
    assert by_place["00001", "features.zarr/hybrid"].values == 1
    assert by_place["00001", "features.zarr/hybrid"].largest == pytest.approx(0.5, rel=1e-3)
    assert found.environment == ()


def test_erased_images_are_left_out_and_corrected_ones_are_not(copy: Path) -> None:
    out, mary, jane = str(copy.parent), pseudonym("mary", KEY), pseudonym("jane", KEY)
    correct_patient(out, pseudonym("ruth", KEY), slide="S1")
    erase_patient(out, mary)
    found = again(copy)
    assert (found.differences, found.left_out) == ((), 13)
    erase_patient(out, jane)
    found = again(copy, shards=1)
    gone = table(copy, "predictions").filter(pc.field("shard") == found.shards[0])["patient_id"].null_count
    assert (found.same, found.left_out) == (True, gone)
    group = zarr.open_group(str(copy / "masks.zarr" / found.shards[0]), mode="r+")
    group["semantic"][:] = 1 - group["semantic"][:]  # type: ignore[index, operator]
    assert not again(copy, shards=1).same


def test_maps_that_the_run_does_not_have_are_named(copy: Path) -> None:
    [name] = again(copy, shards=1, seed=1).shards
    shutil.rmtree(copy / "activations.zarr" / name)
    found = again(copy, shards=1, seed=1)
    assert (found.same, found.not_stored) == (True, (f"activations.zarr/{name}",))


def test_without_the_source_or_the_bundle_it_says_so(night: Run, copy: Path, tmp_path: Path) -> None:
    manifest = read_manifest(open_storage(str(copy)))
    assert manifest is not None
    shutil.copytree(night.bundle.path, tmp_path / "moved")
    lost = replace(manifest, bundle=str(tmp_path / "gone"))
    (copy / "manifest.json").write_bytes(dumps(lost))
    with pytest.raises(BundleError, match="say with --bundle where it is"):
        again(copy)
    assert again(copy, shards=1, bundle=str(tmp_path / "moved")).same
    with pytest.raises(BundleError, match=r"\bis [0-9a-f]{12} now"):
        again(copy, bundle="pocket")
    changed = replace(manifest, source=replace(manifest.source, identity="another"))
    (copy / "manifest.json").write_bytes(dumps(changed))
    with pytest.raises(SourceError, match="was changed since run night"):
        again(copy)


def test_the_command(copy: Path, tmp_path: Path) -> None:
    def invoke(*arguments: str) -> Any:
        settings = {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
        return CliRunner().invoke(app, ["rerun", str(copy.parent), "night", *arguments], env=settings)

    same = invoke("--verify", "--shards", "1")
    assert (same.exit_code, "all the same, to the last bit" in same.output) == (0, True), same.output
    manifest = read_manifest(open_storage(str(copy)))
    assert manifest is not None
    elsewhere: Host = replace(manifest.hosts[0], cpu="another processor")
    (copy / "manifest.json").write_bytes(dumps(replace(manifest, hosts=(elsewhere,))))
    group = zarr.open_group(str(copy / "features.zarr/00000"), mode="r+")
    group["cells"][0, 0] += np.float32(1)  # type: ignore[index, operator]
    other = invoke("--verify", "--json", str(tmp_path / "found.json"))
    assert other.exit_code == 3
    assert "different here: cpu: another processor then" in other.output
    assert "features.zarr/cells: 1 of" in other.output
    assert json.loads((tmp_path / "found.json").read_text())["same"] is False
    lone = invoke("--shards", "1")
    assert (lone.exit_code, "belong to --verify" in lone.stderr) == (1, True)
