"""Erasing a patient: nothing of the patient stays, every image does, and the run is as whole as before."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from harness import arrays, digests, measure_here, table
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.core.errors import ConfigError, StorageError
from leukoflow.runs.layout import OutKey
from leukoflow.runs.progress import read_manifest
from leukoflow.storage.base import Storage
from leukoflow.storage.local import LocalStorage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.store.commit import adopt_stages
from leukoflow.tasks.store.compact import compact_run
from leukoflow.tasks.upkeep.amendment import rows_of
from leukoflow.tasks.upkeep.audit import verify_log
from leukoflow.tasks.upkeep.erase import erase_patient
from leukoflow.tasks.upkeep.patients import patient_name
from leukoflow.tasks.upkeep.verify import verify_run

KEY = b"a key that only these tests have"
MARY, JANE = pseudonym("mary", KEY), pseudonym("jane", KEY)
GONE = ("slide_id", "patient_id", "meta_ward")


def holds(root: Path, words: list[str]) -> list[str]:
    """Files that hold one of the words: as bytes, or as a value in a table."""
    found = []
    for path in root.rglob("*"):
        if not path.is_file():
            continue
        text = path.read_bytes()
        if path.suffix == ".parquet":
            text += json.dumps(pq.ParquetFile(path).read().to_pylist(), default=str).encode()
        if any(word.encode() in text for word in words):
            found.append(str(path.relative_to(root)))
    return found


@pytest.mark.parametrize("compacted", [False, True])
def test_nothing_of_the_patient_stays_and_every_image_does(night: Run, copy: Path, compacted: bool) -> None:
    if compacted:
        compact_run(str(copy))
    assert holds(copy, [MARY, '"S0"'])
    (copy / "report.html").write_text("a page that shows S0")
    before = {name: table(copy, name, drop=()).to_pylist() for name in ("predictions", "cells", "slides")}
    [done] = erase_patient(str(copy.parent), MARY)
    theirs = {i for i, row in enumerate(before["predictions"]) if row["patient_id"] == MARY}
    keys = {before["predictions"][i]["image_key"] for i in theirs}
    assert (done.run_id, done.images, done.missing) == ("night", len(theirs), 0)
    assert len(theirs) == 13
    assert holds(copy, [MARY, '"S0"']) == []
    assert not (copy / "report.html").exists()
    assert not (copy / "_attempts").exists()
    assert not (copy / "amend.json").exists()

    after = {name: table(copy, name, drop=()).to_pylist() for name in ("predictions", "cells", "slides")}
    for i, (old, new) in enumerate(zip(before["predictions"], after["predictions"], strict=True)):
        assert new == (old | dict.fromkeys(GONE) if i in theirs else old)
    for old, new in zip(before["cells"], after["cells"], strict=True):
        if old["image_key"] not in keys:
            assert new == old
            continue
        assert [new[c] for c in ("image_key", "cell_id", "zarr_index")] == [
            old[c] for c in ("image_key", "cell_id", "zarr_index")
        ]
        assert not any(v for c, v in new.items() if c not in ("run_id", "image_key", "cell_id", "zarr_index"))
    assert sum(s["n_images"] for s in after["slides"]) == 38
    pixels(night, copy, before["predictions"], theirs)
    found = verify_run(str(copy))
    assert found.findings == ()
    assert found.manifest_sha256 == done.manifest_after
    assert erase_patient(str(copy.parent), MARY) == ()


def pixels(night: Run, copy: Path, rows: list[dict[str, Any]], theirs: set[int]) -> None:
    """Masks and features: zeros for the patient's tiles and cells, the same numbers for all others."""
    for shard in range(3):
        mine = [i for i, r in enumerate(rows) if int(r["shard"]) == shard and r["zarr_index"] is not None]
        gone = [rows[i]["zarr_index"] for i in mine if i in theirs]
        kept = [rows[i]["zarr_index"] for i in mine if i not in theirs]
        offsets = arrays(copy, "masks.zarr", "cell_offsets")[shard]
        assert np.array_equal(offsets, arrays(Path(night.root), "masks.zarr", "cell_offsets")[shard])
        for store, name in (
            ("masks.zarr", "semantic"), ("masks.zarr", "cells"), ("masks.zarr", "cell_table"),
            ("features.zarr", "hybrid"), ("features.zarr", "cells"), ("activations.zarr", "maps"),
        ):  # fmt: skip
            old, new = (arrays(root, store, name)[shard] for root in (Path(night.root), copy))
            for tiles, blank in ((gone, True), (kept, False)):
                for t in tiles:
                    by_cell = name in ("cell_table", "maps") or (store, name) == ("features.zarr", "cells")
                    span = slice(offsets[t], offsets[t + 1]) if by_cell else slice(t, t + 1)
                    assert np.array_equal(new[span], np.zeros_like(old[span]) if blank else old[span])


def test_a_dry_run_changes_nothing(copy: Path) -> None:
    before = {p: p.read_bytes() for p in copy.parent.rglob("*") if p.is_file()}
    [found] = erase_patient(str(copy.parent), JANE, dry_run=True)
    assert (found.images, found.missing, found.manifest_after) == (25, 1, None)
    assert {p: p.read_bytes() for p in copy.parent.rglob("*") if p.is_file()} == before


def test_missing_and_mixed_up_images_forget_the_patient_as_well(copy: Path) -> None:
    [found] = erase_patient(str(copy.parent), JANE)
    assert found.missing == 1
    assert holds(copy, [JANE]) == []
    assert pq.read_table(copy / "missing.parquet")["image_key"].to_pylist() == ["ward-2/absent.jpg"]
    assert len(pq.read_table(copy / "duplicates.parquet")) == 2
    assert verify_run(str(copy)).ok


def test_the_log_does_not_name_the_patient(copy: Path) -> None:
    manifest = read_manifest(open_storage(str(copy)))
    shutil.copytree(copy, copy.parent / "second")
    erase_patient(str(copy.parent), MARY)
    text = (copy.parent / OutKey.AUDIT).read_text()
    assert MARY not in text
    assert "mary" not in text
    entries = [json.loads(line) for line in text.splitlines()]
    assert [(e["action"], e["run_id"]) for e in entries] == [
        ("erase", "night"), ("erased", "night"), ("erase", "second"), ("erased", "second"),
    ]  # fmt: skip
    assert len({dict(e["details"])["patient"] for e in entries}) == 2  # a salt for each run
    found = verify_log(str(copy.parent))
    assert found is not None
    assert found.problems == ()
    assert manifest is not None


def test_an_erased_run_is_finished_and_nobody_takes_its_blank_parts_over(
    night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", KEY.decode())
    erase_patient(str(copy.parent), MARY)
    run = open_run(night.config.model_copy(update={"out": str(copy.parent)}))
    assert run.finished == read_manifest(open_storage(str(copy)))
    from leukoflow.cluster.code import code_digest
    from leukoflow.tasks.inference.worker import members_of
    from leukoflow.tasks.intake.plan_file import shards
    from leukoflow.tasks.store.commit import stage_keys
    from leukoflow.tasks.store.job import ShardJob

    new = open_run(night.config.model_copy(update={"out": str(copy.parent), "run_id": "again", "reuse": "night"}))
    shard = next(iter(shards(new.summary)))
    job = ShardJob(new.root, "again", new.source, shard, "x", new.config.bundle, new.bundle.digest, new.device,
                   code_digest(), new.config.limits, new.config.meta_columns)  # fmt: skip
    measure_here(new)
    keys = stage_keys(new.bundle, members_of(job), new.device)
    assert list(adopt_stages(job, open_storage(night.root), keys, {})) == ["masks", "features", "activations"]
    open_storage(new.root).delete("markers")
    assert adopt_stages(job, open_storage(str(copy)), keys, {}) == {}


@pytest.mark.slow
def test_cut_off_anywhere_the_same_command_finishes(night: Run, copy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Crash(BaseException):
        pass

    verbs = ("write", "promote", "delete")
    originals = {verb: getattr(LocalStorage, verb) for verb in verbs}
    shutil.copytree(copy, tmp_path / "whole" / "night")
    erase_patient(str(tmp_path / "whole"), MARY)
    wanted = read_manifest(open_storage(str(tmp_path / "whole" / "night")))
    log: list[str] = []

    def crash_at(patch: Any, step: int) -> None:
        def wrap(verb: str) -> None:
            def stepped(self: Storage, key: str, *more: Any) -> Any:
                if len(log) >= step and not key.endswith(".lock"):
                    raise Crash
                log.append(f"{verb} {key}")
                return originals[verb](self, key, *more)

            patch.setattr(LocalStorage, verb, stepped)

        for verb in verbs:
            wrap(verb)

    with monkeypatch.context() as patch:
        shutil.copytree(copy, tmp_path / "count" / "night")
        crash_at(patch, 10**6)
        erase_patient(str(tmp_path / "count"), MARY)
    total, seen = len(log), set()
    intent = next(i for i, line in enumerate(log) if line == "write amend.json")
    steps = sorted({0, 1, 5, intent - 1, *range(intent, total)})
    for step in steps:
        out = tmp_path / str(step)
        shutil.copytree(copy, out / "night")
        log.clear()
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            with contextlib.suppress(Crash):
                erase_patient(str(out), MARY)
        root = out / "night"
        seen.add((root / "amend.json").exists())
        if (root / "amend.json").exists():
            with pytest.raises(StorageError, match="was cut off; finish it with the same command"):
                verify_run(str(root))
        else:
            assert verify_run(str(root)).ok
        erase_patient(str(out), MARY)
        assert read_manifest(open_storage(str(root))) == wanted, step
        assert not any(p.is_file() for p in (root / "_attempts").rglob("*"))
        assert verify_run(str(root)).ok
        assert holds(out, [MARY]) == []
        found = verify_log(str(out))
        assert found is not None
        assert found.problems == ()
        shutil.rmtree(out)
    assert seen == {True, False}


def test_runs_that_are_not_finished_or_damaged_stop_it_before_anything_is_changed(copy: Path) -> None:
    out = copy.parent
    shutil.copytree(copy, out / "second")
    (out / "second" / "manifest.json").unlink()
    with pytest.raises(StorageError, match=r"second knows the patient and is not finished .*Nothing was changed"):
        erase_patient(str(out), MARY)
    (out / "second" / "plan.parquet").write_bytes(b"?")
    with pytest.raises(StorageError, match="run second cannot be searched for the patient"):
        erase_patient(str(out), MARY)
    shutil.rmtree(out / "second")
    assert holds(copy, [MARY])
    path = copy / "masks.zarr" / "00000" / "zarr.json"
    whole = path.read_bytes()
    path.write_bytes(whole + b" ")
    with pytest.raises(StorageError, match=r"zarr\.json is not what was committed, and nothing was changed"):
        erase_patient(str(out), MARY)
    path.write_bytes(whole)
    assert verify_run(str(copy)).ok
    assert len(erase_patient(str(out), MARY)) == 1


def test_arrays_that_nobody_knows_are_refused_rather_than_left() -> None:
    assert rows_of("masks.zarr", "cells", 5, 5, 5) == "tiles"
    assert rows_of("features.zarr", "cells", 5, 5, 5) == "cells"
    assert rows_of("activations.zarr", "early", 5, 5, 9) == "tiles"
    assert rows_of("activations.zarr", "early", 9, 5, 9) == "cells"
    assert rows_of("activations.zarr", "cell_offsets", 6, 5, 9) is None
    for length, cells in ((5, 5), (7, 9)):
        with pytest.raises(StorageError, match="not known what the rows of the array early are"):
            rows_of("activations.zarr", "early", length, 5, cells)


def test_patients_are_given_by_name_or_pseudonym() -> None:
    assert patient_name("mary", KEY) == patient_name(MARY, None) == MARY
    with pytest.raises(ConfigError, match="LEUKOFLOW_PATIENT_KEY"):
        patient_name("mary", None)


def test_the_command(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", KEY.decode())
    monkeypatch.setattr("leukoflow.apps.cli.finished.use_configured_prefect", lambda debug: None)

    def invoke(*arguments: str) -> Any:
        settings = {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
        return CliRunner().invoke(app, ["erase", *arguments], env=settings)

    out = str(copy.parent)
    before = digests(copy.parent)
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "the key that somebody has mistyped")
    for more in (("--dry-run",), ()):
        wrong = invoke(out, "--patient", "mary", *more)
        assert (wrong.exit_code, len(wrong.stderr.splitlines())) == (1, 1)
        assert "another key than the one that made the pseudonyms of night, so nobody would be found" in wrong.stderr
    assert digests(copy.parent) == before
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", KEY.decode())
    assert "13 images would be erased" in invoke(out, "--patient", "mary", "--dry-run").output
    done = invoke(out, "--patient", "mary")
    assert done.exit_code == 0, done.output
    assert "13 images erased" in done.output
    assert "no run has a patient (or slide) by that name" in invoke(out, "--patient", "mary").output
    nothing = invoke(str(tmp_path / "nothing"), "--patient", "mary")
    assert (nothing.exit_code, len(nothing.stderr.splitlines())) == (1, 1)
