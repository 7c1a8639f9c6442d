"""The life of a finished run on an object store: verified, compacted, compared and deleted as on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import digests, screen_here, with_other_thresholds, write_zip

from leukoflow.core.errors import BundleError
from leukoflow.models.bundle import Bundle
from leukoflow.models.registry import Registry
from leukoflow.runs.progress import read_manifest
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.storage.s3 import S3Storage
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.report.run_report import build_report
from leukoflow.tasks.review.field_view import view
from leukoflow.tasks.review.keys import patient_key_of
from leukoflow.tasks.review.query import Query
from leukoflow.tasks.review.runs import open_run_named
from leukoflow.tasks.review.timeline import timeline
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add, check_run
from leukoflow.tasks.store.compact import compact_run
from leukoflow.tasks.upkeep.audit import verify_log
from leukoflow.tasks.upkeep.correct import correct_patient
from leukoflow.tasks.upkeep.diff import diff_runs
from leukoflow.tasks.upkeep.erase import erase_patient
from leukoflow.tasks.upkeep.prune import prune
from leukoflow.tasks.upkeep.retention import retain
from leukoflow.tasks.upkeep.verify import finished_runs, verify_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def local(bundle: Bundle, members: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("local")
    lines = [f"{name},{'mary' if i % 5 == 0 else 'jane'}" for i, name in enumerate(members)]
    (folder / "slides.csv").write_text("\n".join(["image_key,patient_id", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEUKOFLOW_PATIENT_KEY", "a key that only these tests have")
        yield screen_here(
            write_zip(folder / "night.zip", members), folder / "out", "night", bundle,
            manifest=str(folder / "slides.csv"),
        )  # fmt: skip


def upload(local: Any, name: str) -> Storage:
    storage = open_storage(f"s3://lab/out/{name}")
    for key in digests(Path(local.root)):
        storage.write(key, (Path(local.root) / key).read_bytes())
    return storage


def test_verify_finds_what_is_wrong_on_the_store(client: Any, local: Any) -> None:
    storage = upload(local, "harmed")
    assert verify_run(storage.root).findings == ()
    key = "masks.zarr/00001/cell_offsets/zarr.json"
    data = storage.read(key)
    for harm, what in (
        (lambda: storage.write(key, data[:-1] + b"?"), "altered: same size"),
        (lambda: storage.write(key, data[:-1]), "bytes instead of"),
        (lambda: storage.delete(key), "missing"),
    ):
        harm()
        found = verify_run(storage.root)
        assert [f.where for f in found.findings] == [key]
        assert what in found.findings[0].what
    storage.write(key, data)
    storage.write("predictions/part-00009.parquet", b"x")
    assert [f.what.split(":")[0] for f in verify_run(storage.root).findings] == ["added"]
    assert finished_runs("s3://lab/out")[0] == ["harmed"]


def test_compacting_on_the_store_survives_being_cut_off(
    client: Any, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = upload(local, "night")
    before = read_manifest(storage)

    class Crash(BaseException):
        pass

    original = S3Storage.write

    def write(self: Storage, key: str, data: bytes) -> None:
        if key == "manifest.json":
            raise Crash
        original(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(S3Storage, "write", write)
        with pytest.raises(Crash):
            compact_run(storage.root)
    assert read_manifest(storage) == before
    assert {f.what for f in verify_run(storage.root).findings} == {"left behind by a compaction that was interrupted"}
    assert diff_runs(local.root, storage.root).same

    assert compact_run(storage.root).files_after == 2
    assert storage.names("predictions") == ["part-00000-00002.parquet"]
    assert storage.names("_attempts") == []
    assert not storage.exists("compact.lock")
    assert verify_run(storage.root).ok
    assert diff_runs(local.root, storage.root).same
    assert compact_run(storage.root).removed == 0
    opened = open_run(local.config.model_copy(update={"out": "s3://lab/out"}))
    assert opened.finished == read_manifest(storage)
    assert "cannot be read (" not in build_report(storage.root, opened.finished)

    storage.delete("slides.parquet")  # repaired from the very files that were merged
    assert open_run(local.config.model_copy(update={"out": "s3://lab/out"})).finished is None
    names = [f"part-0000{i}.parquet" for i in range(3)]
    assert storage.names("predictions") == storage.names("cells") == names
    for folder in ("predictions", "cells"):
        for name in names:
            assert storage.read(f"{folder}/{name}") == (Path(local.root) / folder / name).read_bytes()


def test_erasing_and_deleting_on_the_store(client: Any, local: Any) -> None:
    out, mary = "s3://lab/life", pseudonym("mary", b"a key that only these tests have")
    storage = open_storage(f"{out}/night")
    for key in digests(Path(local.root)):
        storage.write(key, (Path(local.root) / key).read_bytes())
    [done] = erase_patient(out, mary)
    assert done.images == 10
    found = verify_run(storage.root)
    assert found.findings == ()
    assert erase_patient(out, mary) == ()
    patients = pq.read_table("lab/life/night/predictions", filesystem=storage.fs)["patient_id"].to_pylist()
    assert (patients.count(None), mary in patients) == (10, False)
    assert [d.delete for d in retain(out, 1, 0)] == [False]
    assert [d.delete for d in retain(out, 0, 0)] == [True]
    assert open_storage(out).files("") == ["audit.jsonl"]
    log = verify_log(out)
    assert log is not None
    assert (log.entries, log.problems) == (4, ())


def test_correcting_a_patient_on_the_store(client: Any, local: Any) -> None:
    out = "s3://lab/corrected"
    mary, ruth = (pseudonym(name, b"a key that only these tests have") for name in ("mary", "ruth"))
    storage = open_storage(f"{out}/night")
    for key in digests(Path(local.root)):
        storage.write(key, (Path(local.root) / key).read_bytes())
    compact_run(storage.root)
    [done] = correct_patient(out, ruth, mary)
    assert done.images == 10
    assert verify_run(storage.root).findings == ()
    assert correct_patient(out, ruth, mary) == ()
    for name in ("predictions/part-00000-00002.parquet", "plan.parquet"):
        with storage.open(name) as file:
            patients = pq.ParquetFile(file).read()["patient_id"].to_pylist()
        assert (patients.count(ruth), patients.count(mary)) == (10, 0)
    log = verify_log(out)
    assert log is not None
    assert (log.entries, log.problems) == (2, ())


def test_the_registry_on_the_store(
    client: Any, local: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEUKOFLOW_CACHE", str(tmp_path / "cache"))
    registry = Registry("s3://lab/bundles")
    other = with_other_thresholds(bundle, tmp_path / "other", 2.0)
    for made, name in ((bundle, "first"), (other, "second")):
        registry.register(made.path, "ana", name, without_metrics="a test")
    registry.approve("first", "ana", "")
    settings = {"bundle": "approved", "bundles": registry.storage.root, "out": "s3://lab/approved", "run_id": None}
    config = local.config.model_copy(update=settings)
    opened = open_run(config)
    assert (opened.bundle.digest, opened.bundle_uri) == (bundle.digest, f"s3://lab/bundles/bundles/{bundle.digest}")
    registry.approve("second", "ana", "")
    assert open_run(config).bundle.digest == bundle.digest  # started, so it keeps its bundle
    assert open_run(config.model_copy(update={"run_id": "new"})).bundle.digest == other.digest
    assert registry.rollback("ana", "").name == "first"
    registry.storage.write(f"bundles/{other.digest}/classifier.safetensors", b"?")
    with pytest.raises(BundleError, match="was altered; register it again"):
        registry.approve("second", "ana", "")
    registry.register(other.path, "ana", "second", without_metrics="a test")
    registry.approve("second", "ana", "")
    assert [v.remove for v in prune(registry, ["s3://lab/approved"], 0, "ana")] == [False, False]


def test_verdicts_and_the_worklist_on_the_store(client: Any, local: Any) -> None:
    storage = upload(local, "said")
    out = "s3://lab/out"
    here = open_run_named(str(Path(local.root).parent), "night")
    for name in ("manifest.json", "run.json"):  # the same run under another name
        storage.write(name, storage.read(name).replace(b'"run_id": "night"', b'"run_id": "said"'))
    table = open_run_named(out, "said")
    assert table.fields(Query(limit=500)).total == len(here.frame)
    assert [s.summary for s in table.slides().items] == [s.summary for s in here.slides().items]
    assert table.cells(3).equals(here.cells(3))
    assert table.field(3).confidence == here.field(3).confidence
    given = [replace(table.verdict_on_field(3, Action.FLAG, "dr. grey"), comment=str(i)) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(lambda v: add(out, v), given)) == list(range(1, 13))
    mary = patient_key_of(pseudonym("mary", b"a key that only these tests have"))
    hers = table.rows_of(patient_key=mary)
    add(out, table.verdict_on_field(int(table.frame.ordinals[hers[0]]), Action.COMMENT, "dr. grey", comment="hers"))
    table = open_run_named(out, "said")
    assert table.field(3).standing.flagged
    assert len(table.reviews.verdicts.given) == 13
    assert check_run(storage, "said").problems == ()
    shown = view(table, 3)
    assert (len(shown.tiles) > 0, shown.pixels, shown.mapped) == (True, True, True)
    assert [p.run_id for p in timeline(out, mary).points if p.run_id == "said"] == ["said"]
    storage.delete("verdicts/00002.parquet")
    assert [w for w, _ in check_run(storage, "said").problems] == ["verdicts/00002.parquet"]
    storage.delete("")
