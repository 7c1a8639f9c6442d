from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import jobs_of, measure_here

import leukoflow.tasks.publish.publish
from leukoflow.core.codec import dumps
from leukoflow.core.config import load_config
from leukoflow.core.errors import ReconciliationError
from leukoflow.models.bundle import random_bundle
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.records import Shard
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.inference.stages import classify, extract, prepare, segment
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.publish.publish import publish
from leukoflow.tasks.store.commit import marker_key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Run]:
    """A run whose shards are all done but which is not published: 20 members that are no images, no cluster."""
    folder = tmp_path_factory.mktemp("made")
    bundle = random_bundle(folder / "bundle", tiny=True)
    for i in range(20):
        path = folder / "ward" / f"slide-{i // 8}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"no image, number {i % 19}")

    def make(out: Path) -> Run:
        config = load_config(
            source=str(folder / "ward"), out=str(out), run_id="r", bundle=str(bundle.path), shard_size=16
        )
        run = open_run(config)
        measure_here(run)
        for shard, job in jobs_of(run).items():
            classify(job, extract(job, segment(job, prepare(job, shard.first))))
        return run

    return make


def rewrite(run: Run, change: Callable[[pa.Table], pa.Table]) -> None:
    path = Path(run.root) / "predictions" / "part-00001.parquet"
    pq.write_table(change(pq.read_table(path)), path, use_dictionary=False)


def test_the_totals_balance(made: Callable[[Path], Run], tmp_path: Path) -> None:
    run = made(tmp_path)
    manifest = publish(run, 1.0, 2.0, 20)
    assert read_manifest(open_storage(run.root)) == manifest
    assert (manifest.members, manifest.quarantined, manifest.cells) == (20, 20, 0)
    assert manifest.reasons == (("not an image", 20),)
    assert {t.stage for t in manifest.timings} == {"prepare", "segment", "extract", "classify"}
    assert [(p.stage, p.shard) for p in manifest.parts] == [
        (stage, shard) for shard in ("00000", "00001") for stage in ("masks", "features", "activations", "predictions")
    ]
    assert manifest.notes == ()
    assert open_storage(run.root).intact(manifest.tables)
    assert {name for name, _ in manifest.software} >= {"python", "torch", "zarr", "prefect"}
    assert open_run(run.config).finished == manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.slice(0, 3),
        lambda t: pa.concat_tables([t, t.slice(0, 1)]),
        lambda t: t.take([1, 0, 2, 3]),
        lambda t: t.set_column(1, t.schema.field(1), pa.array(["x.jpg", *t["image_key"].to_pylist()[1:]])),
    ],
    ids=["a row too few", "a row too many", "rows in disorder", "somebody else's row"],
)
def test_rows_that_are_not_the_plans_are_never_published(
    made: Callable[[Path], Run], tmp_path: Path, change: Callable[[pa.Table], pa.Table]
) -> None:
    run = made(tmp_path)
    rewrite(run, change)
    with pytest.raises(ReconciliationError, match="shard 00001"):
        publish(run, 0.0, 0.0, 0)
    assert read_manifest(open_storage(run.root)) is None


@pytest.mark.parametrize("stage", ["predictions", "masks"])
def test_a_shard_that_is_not_committed_is_never_published(
    made: Callable[[Path], Run], tmp_path: Path, stage: str
) -> None:
    run = made(tmp_path)
    open_storage(run.root).delete(marker_key(stage, Shard(1, 16, 4)))
    with pytest.raises(ReconciliationError, match=r"00001.* not committed"):
        publish(run, 0.0, 0.0, 0)
    assert read_manifest(open_storage(run.root)) is None


def test_abstentions_from_pictures_without_a_scale_are_said(made: Callable[[Path], Run], tmp_path: Path) -> None:
    run = made(tmp_path)
    sources = ["assumed", "manifest", "ruler", "assumed"]

    def abstain(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        for row, source in zip(rows, sources, strict=True):
            row |= {"status": "abstained", "um_per_px": 0.2, "um_per_px_source": source}
        return pa.Table.from_pylist(rows, table.schema)

    rewrite(run, abstain)
    (note,) = publish(run, 1.0, 2.0, 20).notes
    assert note.startswith("2 of 4 abstentions are from pictures without a scale, neither stated nor told by")
    assert "--um-per-px" in note
    assert "um_per_px in the manifest" in note


def test_absent_activation_maps_are_said_and_change_nothing_else(made: Callable[[Path], Run], tmp_path: Path) -> None:
    run = made(tmp_path)
    whole = publish(run, 1.0, 2.0, 20)
    open_storage(run.root).delete(marker_key("activations", Shard(1, 16, 4)))
    open_storage(run.root).delete("manifest.json")  # as opening a run does with one that holds no more
    manifest = publish(run, 1.0, 2.0, 20)
    (note,) = manifest.notes
    assert note.startswith("activation maps are absent for 1 of 2 shards (00001): their features were taken over")
    assert [(p.stage, p.shard) for p in manifest.parts if p.stage == "activations"] == [("activations", "00000")]
    assert replace(manifest, notes=(), parts=(), finished_at="") == replace(whole, parts=(), finished_at="")
    assert open_run(run.config).finished == manifest


def test_remarks_on_the_source_are_notes_of_the_run(made: Callable[[Path], Run], tmp_path: Path) -> None:
    run = made(tmp_path)
    odd = replace(run, summary=replace(run.summary, remarks=("the tar archive has a volume label",)))
    manifest = publish(odd, 1.0, 2.0, 20)
    assert manifest.notes == ("the tar archive has a volume label",)
    assert manifest.exit_code == 3  # as without: members are quarantined, none is missing


@pytest.mark.parametrize("when", ["before", "amid", "at last"])
def test_what_another_command_has_published_meanwhile_stands(
    made: Callable[[Path], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run = made(tmp_path)
    storage = open_storage(run.root)
    theirs = replace(publish(run, 1.0, 2.0, 20), finished_at="2026-03-01T00:00:00+00:00")
    storage.delete("manifest.json")
    slides = storage.stamp("slides.parquet")

    def meanwhile() -> None:
        storage.write("manifest.json", dumps(theirs))

    for moment, name in (("amid", "_read_tables"), ("at last", "_hosts")):
        original = getattr(leukoflow.tasks.publish.publish, name)

        def late(*arguments: Any, moment: str = moment, original: Any = original) -> Any:
            found = original(*arguments)
            if when == moment:
                meanwhile()
            return found

        monkeypatch.setattr(leukoflow.tasks.publish.publish, name, late)
    if when == "before":
        meanwhile()
    assert publish(run, 5.0, 6.0, 0) == theirs
    assert read_manifest(storage) == theirs
    assert (storage.stamp("slides.parquet") == slides) == (when != "at last")
