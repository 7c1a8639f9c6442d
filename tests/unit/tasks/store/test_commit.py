"""Commits of a shard: the first wins, what no longer holds is taken back, keys follow what a stage is made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leukoflow.cluster.code import code_digest
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import StorageError
from leukoflow.models.bundle import Bundle, random_bundle
from leukoflow.runs.records import ImageScale, Marker, Member, ScaleSource, Shard, ShardReceipt, Source, SourceKind
from leukoflow.storage.local import LocalStorage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.store.commit import (
    REVISIONS,
    adopt_stages,
    commit,
    committed,
    forget,
    marker_key,
    read_marker,
    stage_keys,
)
from leukoflow.tasks.store.job import ShardJob, attempt_prefix

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
        open_storage(job.root).write(f"{attempt_prefix(job.shard, job.attempt)}/{name}", data)
    return [name.removesuffix("/zarr.json") for name in names]


def finish(job: ShardJob, stage: str, data: bytes = b"data") -> Marker:
    return commit(job, stage, KEYS[stage], produce(job, stage, data), RECEIPT if stage == "predictions" else None)


HARMS = ["altered", "deleted", "made from something else"]


def test_a_commit_moves_the_files_and_leaves_a_marker(job: ShardJob) -> None:
    storage = open_storage(job.root)
    for stage in KEYS:
        finish(job, stage)
    assert list(committed(storage, SHARD, KEYS)) == ["masks", "features", "activations", "predictions"]
    assert read_marker(storage, "predictions", SHARD) == Marker(finish_part(job, "predictions"), RECEIPT)
    assert storage.read("cells/part-00001.parquet") == b"data"


def finish_part(job: ShardJob, stage: str):  # type: ignore[no-untyped-def]
    marker = read_marker(open_storage(job.root), stage, SHARD)
    assert marker is not None
    assert marker.part.attempt == job.attempt
    assert marker.part.key == KEYS[stage]
    return marker.part


def test_the_first_of_two_attempts_wins(job: ShardJob) -> None:
    first = finish(job, "masks", b"first")
    second = finish(replace(job, attempt="two"), "masks", b"other")
    assert second == first
    assert open_storage(job.root).read("fields/part-00001.parquet") == b"first"


def test_a_commit_cut_off_before_its_files_moved_is_completed(job: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "promote", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finish(job, "masks")
    storage = open_storage(job.root)
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
    storage = open_storage(job.root)
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
    storage = open_storage(job.root)
    chain = ("masks", "features", "predictions")
    for stage in chain:
        finish(job, stage)
    assert tuple(committed(storage, SHARD, KEYS)) == chain


def test_activation_maps_that_do_not_hold_leave_nothing_behind(job: ShardJob) -> None:
    storage = open_storage(job.root)
    for stage in KEYS:
        finish(job, stage)
    committed(storage, SHARD, KEYS | {"activations": "of another classifier"})
    assert storage.files("activations.zarr") == []
    assert storage.files("features.zarr") == ["features.zarr/00001/zarr.json"]


def test_activation_maps_of_features_that_do_not_hold_are_made_again(job: ShardJob) -> None:
    """Their rows are those of the features, so they go together."""
    storage = open_storage(job.root)
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
    open_storage(job.root).write(marker_key("masks", SHARD), b"{")
    with pytest.raises(StorageError, match=r"markers/masks/00001\.json is damaged"):
        committed(open_storage(job.root), SHARD, KEYS)


def test_forgetting_takes_back_all_commits(job: ShardJob) -> None:
    for stage in KEYS:
        finish(job, stage)
    forget(open_storage(job.root), SHARD)
    assert committed(open_storage(job.root), SHARD, KEYS) == {}


def test_stages_of_another_run_are_adopted_where_they_match(job: ShardJob, tmp_path: Path) -> None:
    for stage in KEYS:
        finish(job, stage)
    new = replace(job, root=str(tmp_path / "new"), attempt="two")
    other, storage = open_storage(job.root), open_storage(new.root)
    assert list(adopt_stages(new, other, KEYS, {})) == ["masks", "features", "activations"]
    assert list(committed(storage, SHARD, KEYS)) == ["masks", "features", "activations"]
    newer = replace(job, root=str(tmp_path / "newer"), attempt="three")
    assert list(adopt_stages(newer, other, KEYS | {"features": "x"}, {})) == ["masks"]
    plain = replace(job, root=str(tmp_path / "plain"), attempt="five")
    assert list(adopt_stages(plain, other, KEYS | {"activations": "x"}, {})) == ["masks", "features"]
    assert open_storage(plain.root).files("activations.zarr") == []
    other.write("masks.zarr/00001/zarr.json", b"altered")
    newest = replace(job, root=str(tmp_path / "newest"), attempt="four")
    assert adopt_stages(newest, other, KEYS, {}) == {}


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
        ({"um_per_px": 0.25}, []),  # what is stated counts where it is in use
        ({"scale": ImageScale(0.25, ScaleSource.RULER)}, list(KEYS)),
        ({"scale": ImageScale(remark="of the scale")}, ["predictions"]),
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
