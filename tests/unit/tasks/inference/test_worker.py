"""What a worker process keeps and refuses, and how it ends."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leukoflow.cluster.code import code_digest
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import BundleError, ClusterError, ShardError, StorageError
from leukoflow.models.bundle import Bundle, random_bundle, save_bundle
from leukoflow.runs.records import Shard, Source, SourceKind
from leukoflow.storage.local import LocalStorage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.inference import worker
from leukoflow.tasks.inference.stages import prepare
from leukoflow.tasks.inference.worker import guarded, open_plan, opened_bundle
from leukoflow.tasks.store.job import ShardJob

SHARD = Shard(1, 16, 16)


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    return ShardJob(
        root=str(tmp_path / "run"), run_id="run", source=Source("in.zip", SourceKind.ZIP, "i", 1), shard=SHARD,
        attempt="one", bundle="b", bundle_digest="d", device="cpu", code=code_digest(), limits=LimitSettings(),
        meta_columns=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "b", tiny=True)


def test_another_bundle_under_the_name_is_refused(bundle: Bundle) -> None:
    assert opened_bundle(str(bundle.path), bundle.digest).digest == bundle.digest
    with pytest.raises(ShardError, match="install the same one"):
        opened_bundle(str(bundle.path), "0" * 64)


def test_other_code_is_refused(job: ShardJob) -> None:
    with pytest.raises(ClusterError, match="runs other code"):
        prepare(replace(job, code="other"), 16)


def test_a_plan_that_was_made_again_is_seen(job: ShardJob) -> None:
    """A worker may outlive a run that was deleted and started again under the same name."""

    def write(text: str) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"image_key": [text]}), sink)
        open_storage(job.root).write("plan.parquet", sink.getvalue().to_pybytes())

    for text in ("old", "new"):
        write(text)
        assert open_plan(job.root).read()["image_key"].to_pylist() == [text]


@pytest.mark.parametrize("store", ["away", "silent"])
def test_a_process_that_exceeds_its_time_ends_though_its_note_cannot_be_written(
    job: ShardJob, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    ended, release, codes = threading.Event(), threading.Event(), list[int]()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    def write(*_: object) -> None:
        if store == "silent":
            release.wait(60)
            return
        raise StorageError("the store is away")

    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    monkeypatch.setattr(worker.os, "_exit", end)
    monkeypatch.setattr(worker, "NOTE_SECONDS", 0.05 if store == "silent" else 60.0)
    limited = replace(job, limits=LimitSettings.model_construct(stage_seconds=0.01))
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", write)
        with guarded(limited, "segment"):
            assert ended.wait(30)
        release.set()
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.cancel()
                timer.join()
    assert set(codes) == {75}


def test_a_bundle_whose_classes_a_run_cannot_store_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    spec = bundle.spec.model_copy(update={"classes": ("Benign", "Early", "Pre", "Other")})
    modules = {"segmenter": bundle.segmenter(), "classifier": bundle.classifier(), **bundle.hybrid().backbones}
    other = save_bundle(tmp_path / "other", spec, modules, bundle.statistics)
    with pytest.raises(BundleError, match="names the classes Benign, Early, Pre, Other; a run can store Benign"):
        opened_bundle(str(other.path), other.digest)
