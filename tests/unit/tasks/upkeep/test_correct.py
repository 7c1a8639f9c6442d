"""Correcting to whom images belong: every table says so, nothing else changes, and the run is as whole as before."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import digests, table, zarr_bytes
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
from leukoflow.tasks.publish.ranking import rank_slides
from leukoflow.tasks.store.compact import compact_run
from leukoflow.tasks.upkeep.audit import verify_log
from leukoflow.tasks.upkeep.correct import correct_patient
from leukoflow.tasks.upkeep.erase import erase_patient
from leukoflow.tasks.upkeep.verify import verify_run

KEY = b"a key that only these tests have"
MARY, JANE, RUTH = (pseudonym(name, KEY) for name in ("mary", "jane", "ruth"))


def patients(root: Path) -> list[str | None]:
    return table(root, "predictions")["patient_id"].to_pylist()


def others(root: Path) -> list[dict[str, Any]]:
    return table(root, "predictions").drop_columns(["patient_id"]).to_pylist()


@pytest.mark.parametrize("compacted", [False, True])
def test_a_patient_becomes_another_one_everywhere(night: Run, copy: Path, compacted: bool) -> None:
    if compacted:
        compact_run(str(copy))
    (copy / "report.html").write_text("a page")
    before, rest, pixels = patients(copy), others(copy), zarr_bytes(copy)
    cells = table(copy, "cells").to_pylist()
    [done] = correct_patient(str(copy.parent), RUTH, MARY)
    assert (done.run_id, done.images, done.missing) == ("night", 13, 0)
    assert patients(copy) == [RUTH if p == MARY else p for p in before]
    assert (others(copy), zarr_bytes(copy), table(copy, "cells").to_pylist()) == (rest, pixels, cells)
    plan = pq.ParquetFile(copy / "plan.parquet").read()
    assert plan["patient_id"].to_pylist() == patients(copy)
    slides = pq.read_table(copy / "slides.parquet")
    assert slides.equals(rank_slides(table(copy, "predictions", drop=()).to_pylist()))
    assert MARY not in slides["patient_id"].to_pylist()
    manifest = read_manifest(open_storage(str(copy)))
    assert manifest is not None
    assert manifest.conflicts == 2  # still the same image under two patients
    assert not (copy / "report.html").exists()
    assert not (copy / "amend.json").exists()
    assert verify_run(str(copy)).findings == ()
    assert correct_patient(str(copy.parent), RUTH, MARY) == ()


def test_a_mix_up_that_is_cleared_leaves_the_list_and_one_that_appears_enters_it(copy: Path) -> None:
    out = str(copy.parent)
    assert len(pq.read_table(copy / "duplicates.parquet")) == 2
    correct_patient(out, JANE, MARY)
    manifest = read_manifest(open_storage(str(copy)))
    assert manifest is not None
    assert (manifest.conflicts, "duplicates.parquet" in {key for key, _, _ in manifest.tables}) == (0, False)
    assert not (copy / "duplicates.parquet").exists()
    assert verify_run(str(copy)).findings == ()
    [done] = correct_patient(out, RUTH, slide="S0")
    assert done.images == 13
    assert verify_run(str(copy)).findings == ()
    assert set(pq.read_table(copy / "duplicates.parquet")["patient_id"].to_pylist()) == {JANE, RUTH}


def test_a_slide_gets_its_patient(copy: Path) -> None:
    rows = table(copy, "predictions").to_pylist()
    [done] = correct_patient(str(copy.parent), MARY, slide="S1")
    wanted = [MARY if r["slide_id"] == "S1" else r["patient_id"] for r in rows]
    assert patients(copy) == wanted
    assert done.images == sum(r["slide_id"] == "S1" for r in rows)
    assert correct_patient(str(copy.parent), MARY, slide="S1") == ()  # they are hers already
    assert correct_patient(str(copy.parent), JANE, RUTH, "S1") == ()  # the slide has nothing of that patient
    assert verify_run(str(copy)).findings == ()


def test_all_runs_missing_images_and_what_follows(night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = copy.parent
    shutil.copytree(copy, out / "second")
    found = correct_patient(str(out), RUTH, JANE)
    assert [(f.run_id, f.missing) for f in found] == [("night", 1), ("second", 1)]
    assert pq.read_table(copy / "missing.parquet")["patient_id"].to_pylist() == [RUTH]
    text = (out / OutKey.AUDIT).read_text()
    assert not any(word in text for word in (JANE, RUTH, "jane", "ruth"))
    entries = [json.loads(line) for line in text.splitlines()]
    assert [e["action"] for e in entries] == ["correct", "corrected"] * 2
    log = verify_log(str(out))
    assert log is not None
    assert log.problems == ()
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", KEY.decode())
    again = open_run(night.config.model_copy(update={"out": str(out)}))
    assert again.finished == read_manifest(open_storage(str(copy)))  # the run's command finds it finished
    erase_patient(str(out), RUTH)  # and what was corrected can be erased
    assert RUTH not in patients(copy)
    assert verify_run(str(copy)).findings == ()


def test_a_dry_run_and_what_makes_no_sense_change_nothing(copy: Path) -> None:
    before = digests(copy.parent)
    [found] = correct_patient(str(copy.parent), RUTH, JANE, dry_run=True)
    assert (found.images, found.missing, found.manifest_after) == (25, 1, None)
    for arguments, words in (((JANE, JANE), "are the same"), ((JANE,), "whose images")):
        with pytest.raises(ConfigError, match=words):
            correct_patient(str(copy.parent), *arguments)
    assert digests(copy.parent) == before


@pytest.mark.slow
def test_cut_off_anywhere_any_such_command_finishes(copy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Crash(BaseException):
        pass

    verbs = ("write", "promote", "delete")
    originals = {verb: getattr(LocalStorage, verb) for verb in verbs}
    log: list[str] = []

    def crash_at(patch: Any, step: int) -> None:
        for verb in verbs:

            def stepped(self: Storage, key: str, *more: Any, verb: str = verb) -> Any:
                if len(log) >= step and not key.endswith(".lock"):
                    raise Crash
                log.append(f"{verb} {key}")
                return originals[verb](self, key, *more)

            patch.setattr(LocalStorage, verb, stepped)

    with monkeypatch.context() as patch:
        shutil.copytree(copy, tmp_path / "count" / "night")
        crash_at(patch, 10**6)
        correct_patient(str(tmp_path / "count"), JANE, MARY)
    wanted = read_manifest(open_storage(str(tmp_path / "count" / "night")))
    intent = log.index("write amend.json")
    seen = set()
    for step in sorted({0, 1, intent - 1, *range(intent, len(log))}):
        out = tmp_path / str(step)
        shutil.copytree(copy, out / "night")
        log.clear()
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            with contextlib.suppress(Crash):
                correct_patient(str(out), JANE, MARY)
        root = out / "night"
        seen.add((root / "amend.json").exists())
        if (root / "amend.json").exists():
            with pytest.raises(StorageError, match="was cut off; finish it with the same command"):
                verify_run(str(root))
            erase_patient(str(out), RUTH)  # nobody knows her, but what was cut off is finished
        correct_patient(str(out), JANE, MARY)
        assert read_manifest(open_storage(str(root))) == wanted, step
        assert verify_run(str(root)).ok
        assert MARY not in patients(root)
        found = verify_log(str(out))
        assert found is not None
        assert found.problems == ()
        shutil.rmtree(out)
    assert seen == {True, False}


def test_the_command(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", KEY.decode())
    monkeypatch.setattr("leukoflow.apps.cli.bundles.use_configured_prefect", lambda debug: None)

    def invoke(*arguments: str) -> Any:
        settings = {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
        return CliRunner().invoke(app, ["correct", str(copy.parent), *arguments], env=settings)

    assert "13 images would be corrected" in invoke("--patient", "mary", "--to", "ruth", "--dry-run").output
    done = invoke("--patient", "mary", "--to", "ruth")
    assert (done.exit_code, "13 images corrected" in done.output) == (0, True), done.output
    assert "13 images corrected" in invoke("--slide", "S0", "--patient", "mary").output
    assert "no run has a patient (or slide) by that name" in invoke("--patient", "ruth", "--to", "mary").output
    before = patients(copy)
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "the key that somebody has mistyped")
    wrong = invoke("--slide", "S0", "--patient", "ruth")
    assert (wrong.exit_code, "another key than the one that made the pseudonyms of night" in wrong.stderr) == (1, True)
    with pytest.raises(ConfigError, match="run night is affected, but its pseudonyms were made with another"):
        correct_patient(str(copy.parent), RUTH, slide="S0", key=b"the key that somebody has mistyped")
    assert patients(copy) == before
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", KEY.decode())
    for arguments in (("--patient", "mary"), ("--slide", "S0"), ("--to", "mary")):
        wrong = invoke(*arguments)
        assert (wrong.exit_code, len(wrong.stderr.splitlines())) == (1, 1)
