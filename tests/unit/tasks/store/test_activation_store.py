"""What the extract task leaves in `activations.zarr`: a shard from its images, without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from harness import digests, small_bundle, smears, with_other_classifier, write_zip

from leukoflow.cluster.code import code_digest
from leukoflow.core.config import LimitSettings, load_config
from leukoflow.models.bundle import Bundle
from leukoflow.runs.records import CLASSES
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.imaging.classify import standardize
from leukoflow.tasks.inference.stages import classify, extract, prepare, probe, recall, segment, written_by
from leukoflow.tasks.inference.worker import members_of
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.intake.plan_file import shards
from leukoflow.tasks.store.commit import STAGES, adopt_stages, committed, stage_keys
from leukoflow.tasks.store.job import ShardJob


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return write_zip(folder / "ward.zip", smears(folder / "sample", 9, seed=3) | {"slide-b/notes.txt": b"no image"})


def begin(source: Path, bundle: Bundle, out: Path, block_mb: int = 64) -> ShardJob:
    """A new run of a single shard."""
    config = load_config(source=str(source), out=str(out), run_id="r", bundle=str(bundle.path), shard_size=16)
    run = open_run(config)
    (shard,) = shards(run.summary)
    return ShardJob(
        run.root, run.run_id, run.source, shard, "one", config.bundle, bundle.digest, run.device, code_digest(),
        LimitSettings(block_mb=block_mb), (),
    )  # fmt: skip


def through(job: ShardJob) -> None:
    """The chain of a shard, block by block."""
    first, seen, features = job.shard.first, None, None
    while first < job.shard.first + job.shard.count:
        block = prepare(job, first)
        segmented = segment(job, block, seen)
        features, seen, first = extract(job, segmented, features), written_by(segmented), block.next
    classify(job, features)


def keys(job: ShardJob, bundle: Bundle) -> dict[str, str]:
    return stage_keys(bundle, members_of(job), job.device)


@pytest.fixture(scope="module")
def done(source: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> ShardJob:
    job = begin(source, bundle, tmp_path_factory.mktemp("out"))
    through(job)
    return job


def test_stored_maps_and_bias_are_the_evidence_of_stored_cells(done: ShardJob, bundle: Bundle) -> None:
    root: Any = zarr.open_group(done.root + "/activations.zarr", mode="r")
    features: Any = zarr.open_group(done.root + "/features.zarr/00000", mode="r")
    array = root["00000/maps"]
    maps, cells = array[:], features["cells"][:]
    assert (maps.dtype, maps.shape) == (np.float16, (len(cells), 4, 4, 4))
    assert len(cells) > 6
    assert dict(array.attrs) == {
        "classes": list(CLASSES),
        "window_px": 44,
        "grid": 4,
        "classifier_digest": bundle.component_digest("classifier"),
    }
    classifier, statistics = bundle.classifier(), bundle.statistics
    scores = standardize(cells, statistics.mean, statistics.std, bundle.spec.selected)
    with torch.inference_mode():
        evidence = classifier.evidence(torch.from_numpy(scores)).numpy()
    found = maps.astype(np.float64).sum((2, 3)) + classifier.evidence.bias.detach().numpy()
    np.testing.assert_allclose(found, evidence, atol=5e-3)


def test_all_stages_are_committed_and_the_maps_have_their_own_key(done: ShardJob, bundle: Bundle) -> None:
    mine = keys(done, bundle)
    markers = committed(open_storage(done.root), done.shard, mine)
    assert tuple(markers) == STAGES
    part = markers["activations"].part
    assert part.key == mine["activations"]
    assert part.files
    assert all(name.startswith("activations.zarr/00000/") for name, _, _ in part.files)
    held = {name for marker in markers.values() for name, _, _ in marker.part.files}
    for store in ("masks.zarr", "features.zarr", "activations.zarr"):
        assert {f"{store}/00000/{name}" for name in digests(Path(done.root, store, "00000"))} <= held


def test_features_are_those_of_a_run_without_maps(
    done: ShardJob, bundle: Bundle, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leukoflow.tasks.imaging.extract import blank_maps, extract_padded

    def unexplained(hybrid: Any, shown: Any, crops: Any, *rest: Any) -> Any:
        return extract_padded(hybrid, crops, *rest), blank_maps(len(crops), crops.shape[1], len(shown.weight))

    monkeypatch.setattr("leukoflow.tasks.inference.chain.explain_padded", unexplained)
    job = begin(source, bundle, tmp_path)
    through(job)
    assert digests(Path(job.root, "features.zarr")) == digests(Path(done.root, "features.zarr"))


def test_blocks_and_repetition_move_no_byte(done: ShardJob, bundle: Bundle, source: Path, tmp_path: Path) -> None:
    job = begin(source, bundle, tmp_path, block_mb=1)
    assert prepare(job, 0).next < job.shard.count  # more than one block
    through(job)
    assert digests(Path(job.root, "activations.zarr")) == digests(Path(done.root, "activations.zarr"))


def test_a_search_for_culprits_writes_nothing(bundle: Bundle, source: Path, tmp_path: Path) -> None:
    job = begin(source, bundle, tmp_path)
    before = digests(Path(job.root))
    probe(replace(job, only=(0, 1)))
    assert digests(Path(job.root)) == before


def test_maps_are_taken_over_by_the_same_classifier_only(
    done: ShardJob, bundle: Bundle, source: Path, tmp_path: Path
) -> None:
    same = begin(source, bundle, tmp_path / "same")
    assert tuple(adopt_stages(same, open_storage(done.root), keys(same, bundle), {})) == STAGES[:3]
    assert digests(Path(same.root, "activations.zarr")) == digests(Path(done.root, "activations.zarr"))
    other = with_other_classifier(bundle, tmp_path / "other-bundle", seed=9)
    new = begin(source, other, tmp_path / "new")
    assert tuple(adopt_stages(new, open_storage(done.root), keys(new, other), {})) == STAGES[:2]
    assert open_storage(new.root).files("activations.zarr") == ["activations.zarr/zarr.json"]
    receipt = classify(new, None, STAGES[:2])
    assert receipt.rows == done.shard.count
    assert tuple(committed(open_storage(new.root), new.shard, keys(new, other))) == ("masks", "features", "predictions")


def test_features_that_are_made_again_from_stored_masks_have_their_maps(
    done: ShardJob, bundle: Bundle, source: Path, tmp_path: Path
) -> None:
    job = begin(source, bundle, tmp_path)
    through(job)
    open_storage(job.root).delete("features.zarr/00000")
    assert tuple(committed(open_storage(job.root), job.shard, keys(job, bundle))) == ("masks",)
    again = replace(job, attempt="two")
    extract(again, recall(again, prepare(again, 0)))
    assert tuple(committed(open_storage(job.root), job.shard, keys(job, bundle))) == STAGES[:3]
    assert digests(Path(job.root, "activations.zarr")) == digests(Path(done.root, "activations.zarr"))
