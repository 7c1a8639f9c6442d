"""The list of runs, and runs that change or go while somebody looks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from review_world import JANE, MARY, NIGHT

from leukoflow.core.errors import NotFoundError, RunBusyError, RunNotFoundError, StorageError
from leukoflow.storage.local import LocalStorage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.review.keys import patient_key_of, run_key_of
from leukoflow.tasks.review.runs import list_runs, open_run_table
from leukoflow.tasks.review.timeline import timeline
from leukoflow.tasks.upkeep.erase import erase_patient


def test_the_list_of_runs(night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = copy.parent
    shutil.copytree(copy, out / "broken")
    (out / "broken" / "manifest.json").write_text("{")
    (out / "not a run").mkdir()
    lines = {line.run_id: line for line in list_runs(str(out))}
    assert set(lines) == {"night", "broken"}
    assert lines["broken"].state == "damaged"
    found = lines["night"]
    assert (found.state, found.members, found.done, found.quarantined, found.missing) == ("finished", 38, 38, 2, 1)
    assert (found.run_key, found.source_kind, found.shadow_of) == (NIGHT, "zip", None)
    read: list[str] = []
    original = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, key: read.append(key) or original(self, key))
    list_runs(str(out))
    assert read.count("manifest.json") == 1  # of the broken one; the other is known
    with pytest.raises(StorageError):
        open_run_table(str(out), run_key_of("broken"))
    assert list_runs(str(out / "nothing")) == []


def test_what_is_deleted_or_changed_meanwhile(copy: Path) -> None:
    out = str(copy.parent)
    table = open_run_table(out, NIGHT)
    open_storage(str(copy)).write("amend.json", b"{}")
    with pytest.raises(RunBusyError, match="in a minute"):
        open_run_table(out, NIGHT)
    (copy / "amend.json").unlink()
    erase_patient(out, MARY)
    fresh = open_run_table(out, NIGHT)
    assert {p.patient for p in fresh.patients().items} == {JANE}
    assert fresh.stamp != table.stamp
    shutil.rmtree(copy)
    with pytest.raises(RunNotFoundError):
        open_run_table(out, NIGHT)
    with pytest.raises(RunNotFoundError, match="not there any more"):
        fresh.field(0)
    with pytest.raises(RunNotFoundError):
        fresh.cells(0)
    with pytest.raises(NotFoundError):
        timeline(out, patient_key_of(JANE))
    assert list_runs(out) == []
