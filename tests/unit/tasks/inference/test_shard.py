from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

import leukoflow.tasks.inference.shard
from leukoflow.cluster.code import code_digest
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import ClusterError, ShardError, StorageError
from leukoflow.models.bundle import Bundle, random_bundle
from leukoflow.runs.records import Marker, Member, Quality, Shard, ShardReceipt, Source, SourceKind, Status
from leukoflow.storage.base import Storage
from leukoflow.tasks.inference.blocks import inference_batches
from leukoflow.tasks.inference.shard import (
    DIED,
    REVISIONS,
    Fact,
    ShardJob,
    adopt_stages,
    array_of,
    attempt_prefix,
    commit,
    committed,
    forget,
    known_culprits,
    marker_key,
    opened_bundle,
    prepare,
    read_facts,
    read_marker,
    stage_keys,
    write_rows,
)
from leukoflow.tasks.inference.shard import _write_facts as write_facts

SHARD = Shard(1, 16, 16)
KEYS = {"masks": "m", "features": "f", "activations": "a", "predictions": "p"}
RECEIPT = ShardReceipt(SHARD, 16, 0, 0, 0, 3, (16, 0, 0, 0), (), 1.0)


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    return ShardJob(
        root=str(tmp_path / "run"), run_id="run", source=Source("in.zip", SourceKind.ZIP, "i", 1), shard=SHARD,
        attempt="one", bundle="b", bundle_digest="d", device="cpu", code=code_digest(), limits=LimitSettings(),
        meta_columns=(),
    )  # fmt: skip


def produce(job: ShardJob, stage: str, data: bytes = b"data") -> list[str]:
    """Writes what a stage would write below the attempt, and returns its roots."""
    names = {
        "masks": ["masks.zarr/00001/zarr.json", "fields/part-00001.parquet"],
        "features": ["features.zarr/00001/zarr.json"],
        "activations": ["activations.zarr/00001/zarr.json"],
        "predictions": ["predictions/part-00001.parquet", "cells/part-00001.parquet"],
    }[stage]
    for name in names:
        Storage(job.root).write(f"{attempt_prefix(job.shard, job.attempt)}/{name}", data)
    return [name.removesuffix("/zarr.json") for name in names]


def finish(job: ShardJob, stage: str, data: bytes = b"data") -> Marker:
    return commit(job, stage, KEYS[stage], produce(job, stage, data), RECEIPT if stage == "predictions" else None)


HARMS = ["altered", "deleted", "made from something else"]


# --- commit and resume -----------------------------------------------------------------------------------------------


def test_a_commit_moves_the_files_and_leaves_a_marker(job: ShardJob) -> None:
    storage = Storage(job.root)
    for stage in KEYS:
        finish(job, stage)
    assert list(committed(storage, SHARD, KEYS)) == ["masks", "features", "activations", "predictions"]
    assert read_marker(storage, "predictions", SHARD) == Marker(finish_part(job, "predictions"), RECEIPT)
    assert storage.read("cells/part-00001.parquet") == b"data"


def finish_part(job: ShardJob, stage: str):  # type: ignore[no-untyped-def]
    marker = read_marker(Storage(job.root), stage, SHARD)
    assert marker is not None
    assert marker.part.attempt == job.attempt
    assert marker.part.key == KEYS[stage]
    return marker.part


def test_the_first_of_two_attempts_wins(job: ShardJob) -> None:
    first = finish(job, "masks", b"first")
    second = finish(replace(job, attempt="two"), "masks", b"other")
    assert second == first
    assert Storage(job.root).read("fields/part-00001.parquet") == b"first"


def test_a_commit_cut_off_before_its_files_moved_is_completed(job: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "promote", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finish(job, "masks")
    storage = Storage(job.root)
    assert read_marker(storage, "masks", SHARD) is not None
    with pytest.raises(FileNotFoundError):
        storage.read("fields/part-00001.parquet")
    assert list(committed(storage, SHARD, KEYS)) == ["masks"]
    assert storage.read("fields/part-00001.parquet") == b"data"


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        ("masks", []),
        ("features", ["masks"]),
        ("activations", ["masks", "features", "predictions"]),
        ("predictions", ["masks", "features", "activations"]),
    ],
)
@pytest.mark.parametrize("harm", HARMS)
def test_what_no_longer_holds_is_taken_back_with_what_follows(
    job: ShardJob, stage: str, left: list[str], harm: str
) -> None:
    storage = Storage(job.root)
    for each in KEYS:
        finish(job, each)
    keys = dict(KEYS)
    if harm == "made from something else":
        keys[stage] = "new"
    else:
        name = read_marker(storage, stage, SHARD).part.files[-1][0]  # type: ignore[union-attr]
        storage.delete(name)
        if harm == "altered":
            storage.write(name, b"dat4")
    assert list(committed(storage, SHARD, keys)) == left
    assert [s for s in KEYS if read_marker(storage, s, SHARD) is not None] == left


def test_a_shard_without_activation_maps_is_whole(job: ShardJob) -> None:
    storage = Storage(job.root)
    chain = ("masks", "features", "predictions")
    for stage in chain:
        finish(job, stage)
    assert tuple(committed(storage, SHARD, KEYS)) == chain


def test_activation_maps_that_do_not_hold_leave_nothing_behind(job: ShardJob) -> None:
    storage = Storage(job.root)
    for stage in KEYS:
        finish(job, stage)
    committed(storage, SHARD, KEYS | {"activations": "of another classifier"})
    assert storage.files("activations.zarr") == []
    assert storage.files("features.zarr") == ["features.zarr/00001/zarr.json"]


def test_activation_maps_of_features_that_do_not_hold_are_made_again(job: ShardJob) -> None:
    """Their rows are those of the features, so they go together."""
    storage = Storage(job.root)
    for stage in ("masks", "activations"):  # cut off between the two commits of one task
        finish(job, stage)
    assert list(committed(storage, SHARD, KEYS)) == ["masks"]
    again = replace(job, attempt="two")
    for stage in ("activations", "features"):
        finish(again, stage, b"again")
    assert list(committed(storage, SHARD, KEYS)) == ["masks", "features", "activations"]
    assert storage.read("activations.zarr/00001/zarr.json") == b"again"


def test_a_damaged_marker_is_an_error_that_names_it(job: ShardJob) -> None:
    finish(job, "masks")
    Storage(job.root).write(marker_key("masks", SHARD), b"{")
    with pytest.raises(StorageError, match=r"markers/masks/00001\.json is damaged"):
        committed(Storage(job.root), SHARD, KEYS)


def test_forgetting_takes_back_all_commits(job: ShardJob) -> None:
    for stage in KEYS:
        finish(job, stage)
    forget(Storage(job.root), SHARD)
    assert committed(Storage(job.root), SHARD, KEYS) == {}


def test_stages_of_another_run_are_adopted_where_they_match(job: ShardJob, tmp_path: Path) -> None:
    for stage in KEYS:
        finish(job, stage)
    new = replace(job, root=str(tmp_path / "new"), attempt="two")
    other, storage = Storage(job.root), Storage(new.root)
    assert list(adopt_stages(new, other, KEYS, {})) == ["masks", "features", "activations"]
    assert list(committed(storage, SHARD, KEYS)) == ["masks", "features", "activations"]
    newer = replace(job, root=str(tmp_path / "newer"), attempt="three")
    assert list(adopt_stages(newer, other, KEYS | {"features": "x"}, {})) == ["masks"]
    plain = replace(job, root=str(tmp_path / "plain"), attempt="five")
    assert list(adopt_stages(plain, other, KEYS | {"activations": "x"}, {})) == ["masks", "features"]
    assert Storage(plain.root).files("activations.zarr") == []
    other.write("masks.zarr/00001/zarr.json", b"altered")
    newest = replace(job, root=str(tmp_path / "newest"), attempt="four")
    assert adopt_stages(newest, other, KEYS, {}) == {}


# --- what a stage is made from ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundle") / "b", tiny=True)


MEMBER = Member(0, "a.jpg", "a.jpg", 0, 10, 10, 0, "crc", slide_id="s", um_per_px=0.5)


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({}, []),
        ({"ordinal": 5, "offset": 99}, []),
        ({"slide_id": "t"}, ["predictions"]),
        ({"patient_id": "p_1"}, ["predictions"]),
        ({"meta": (("ward", "3"),)}, ["predictions"]),
        ({"identity": "other"}, list(KEYS)),
        ({"image_key": "b.jpg"}, list(KEYS)),
        ({"um_per_px": 0.25}, list(KEYS)),
        ({"refusal": "encrypted"}, list(KEYS)),
    ],
)
def test_keys_follow_what_a_stage_depends_on(bundle: Bundle, change: dict[str, object], moved: list[str]) -> None:
    before = stage_keys(bundle, [MEMBER], "cpu")
    after = stage_keys(bundle, [replace(MEMBER, **change)], "cpu")  # type: ignore[arg-type]
    assert [stage for stage in before if before[stage] != after[stage]] == moved


def test_keys_follow_the_device_and_the_bundle(bundle: Bundle) -> None:
    before = stage_keys(bundle, [MEMBER], "cpu")
    assert set(before.values()).isdisjoint(stage_keys(bundle, [MEMBER], "cuda").values())
    spec = bundle.spec
    colder = spec.model_copy(update={"calibration": spec.calibration.model_copy(update={"temperature": 2.0})})
    after = stage_keys(replace(bundle, spec=colder), [MEMBER], "cpu")
    assert [stage for stage in before if before[stage] != after[stage]] == ["activations", "predictions"]


def test_predictions_do_not_depend_on_activation_maps(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage_keys(bundle, [MEMBER], "cpu")
    monkeypatch.setitem(REVISIONS, "activations", 99)
    after = stage_keys(bundle, [MEMBER], "cpu")
    assert [stage for stage in before if before[stage] != after[stage]] == ["activations"]


def test_another_bundle_under_the_name_is_refused(bundle: Bundle) -> None:
    assert opened_bundle(str(bundle.path), bundle.digest).digest == bundle.digest
    with pytest.raises(ShardError, match="install the same one"):
        opened_bundle(str(bundle.path), "0" * 64)


def test_other_code_is_refused(job: ShardJob) -> None:
    with pytest.raises(ClusterError, match="runs other code"):
        prepare(replace(job, code="other"), 16)


# --- batches and rows ------------------------------------------------------------------------------------------------


def test_members_keep_their_slot_whoever_is_missing() -> None:
    everybody = inference_batches(np.arange(16, 24, dtype=np.int32), 4)
    assert everybody == ((0, 1, 2, 3), (4, 5, 6, 7))
    without_18_and_20 = inference_batches(np.array([16, 17, 19, 21, 22, 23], np.int32), 4)
    assert without_18_and_20 == ((0, 1, -1, 2), (-1, 3, 4, 5))


def test_a_large_member_fills_batches_of_its_own() -> None:
    owners = np.array([16, 17, 17, 17, 17, 17, 18], np.int32)
    assert inference_batches(owners, 4) == ((0, -1, 6, -1), (1, 2, 3, 4), (5, -1, -1, -1))
    assert inference_batches(np.zeros(0, np.int32), 4) == ()


def test_rows_are_written_at_their_place_and_may_be_written_again() -> None:
    group = zarr.open_group(zarr.storage.MemoryStore(), mode="a")
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    for start, end in ((0, 4), (4, 6), (4, 6)):
        write_rows(group, "hybrid", start, rows[start:end], (2, 2), (4, 2))
    assert np.array_equal(np.asarray(array_of(group, "hybrid")[:]), rows)
    with pytest.raises(StorageError, match="lacks the array nothing"):
        array_of(group, "nothing")


def test_facts_survive_the_way_through_parquet(job: ShardJob) -> None:
    quality = Quality(5.5, 0.8, 0.01, 0.2, 0.1, 1.2, 0.6, 0.4, ("a flag",), ("too dark: 0.1 < 0.25",))
    facts = [
        Fact(16, None, None, "ab", 640, 480, replace(quality, reasons=()), 4, 0),
        Fact(17, Status.REJECTED, "too dark: 0.1 < 0.25", "cd", 640, 480, quality, 0, None),
        Fact(18, Status.QUARANTINED, f"{DIED}: signal 9", None, None, None, None, 0, None),
        Fact(19, Status.QUARANTINED, "empty: 0 bytes", "ef", None, None, None, 0, None),
    ]
    write_facts(job, facts)
    roots = ["fields/part-00001.parquet"]
    commit(job, "masks", "m", roots)
    assert read_facts(job.root, SHARD) == facts
    assert known_culprits(job) == ((18, f"{DIED}: signal 9"),)


def test_a_plan_that_was_made_anew_is_seen(job: ShardJob) -> None:
    """A worker may outlive a run that was deleted and begun again under the same name."""
    from leukoflow.tasks.inference.shard import open_plan

    def write(text: str) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"image_key": [text]}), sink)
        Storage(job.root).write("plan.parquet", sink.getvalue().to_pybytes())

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
    monkeypatch.setattr(leukoflow.tasks.inference.shard.os, "_exit", end)
    monkeypatch.setattr(leukoflow.tasks.inference.shard, "NOTE_SECONDS", 0.05 if store == "silent" else 60.0)
    limited = replace(job, limits=LimitSettings.model_construct(stage_seconds=0.01))
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", write)
        with leukoflow.tasks.inference.shard._guard(limited, "segment"):
            assert ended.wait(30)
        release.set()
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.cancel()
                timer.join()
    assert set(codes) == {75}
