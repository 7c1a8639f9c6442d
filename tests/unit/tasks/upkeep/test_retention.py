"""Retention: the policy as a pure function, and runs that go without taking others along."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import ConfigError, StorageError
from leukoflow.runs.layout import OutKey
from leukoflow.runs.lock import held
from leukoflow.runs.progress import Heartbeat, RunBinding, now, read_manifest, read_state
from leukoflow.storage.base import Storage
from leukoflow.storage.local import LocalStorage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run, bound_config
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.upkeep.audit import verify_log
from leukoflow.tasks.upkeep.retention import Candidate, decide, plan_retention, retain

MOMENT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


# --- the policy ------------------------------------------------------------------------------------------------------


def run(name: str, days: float, state: str = "finished", **more: Any) -> Candidate:
    return Candidate(name, state, MOMENT - timedelta(days=days), **({"reuse": None} | more))


def gone(runs: list[Candidate], keep_days: float = 30, keep_last: int = 0) -> list[str]:
    found = decide(runs, keep_days, keep_last, MOMENT)
    assert sorted(d.run_id for d in found) == sorted(r.run_id for r in runs)
    return [d.run_id for d in found if d.delete]


def test_old_runs_go_the_oldest_first() -> None:
    runs = [run("young", 1), run("old", 31), run("ancient", 400), run("edge", 30), run("just", 29.99)]
    assert gone(runs) == ["ancient", "old", "edge"]
    assert gone(runs, 0) == ["ancient", "old", "edge", "just", "young"]
    assert gone(runs, 500) == []


@pytest.mark.parametrize("state", ["finished", "cancelled", "failed", "killed", "unknown"])
def test_finished_and_abandoned_runs_go_alike(state: str) -> None:
    assert gone([run("a", 40, state)]) == ["a"]


def test_the_last_finished_ones_stay_however_old() -> None:
    runs = [run("a", 400), run("b", 300), run("c", 200), run("dead", 100, "killed")]
    assert gone(runs, 30, 2) == ["a", "dead"]
    assert gone(runs, 30, 9) == ["dead"]


def test_what_must_not_be_touched_stays() -> None:
    runs = [run("busy", 400, "running", hindrance="in progress"), Candidate("torn", "damaged", None, None, "damaged")]
    assert gone(runs, 0) == []


def test_what_another_run_reuses_stays_as_long_as_that_one() -> None:
    base, again, later = run("base", 400), run("again", 300, reuse="base"), run("later", 5, reuse="again")
    found = {d.run_id: d for d in decide([base, again, later], 30, 0, MOMENT)}
    assert [d.delete for d in found.values()] == [False, False, False]
    assert found["base"].why == "run again reuses it"
    assert gone([base, again]) == ["again", "base"]  # users go before what they use
    assert gone([base, run("again", 300, "running", reuse="base", hindrance="in progress")]) == []
    assert gone([run("x", 40, reuse="y"), run("y", 50, reuse="x"), run("z", 60, reuse="z")]) == ["y", "x", "z"]
    assert gone([run("x", 40, reuse="never-was")]) == ["x"]


# --- an output folder ------------------------------------------------------------------------------------------------


def clone(night: Run, out: Path, name: str, days: float, state: str = "finished", **binding: Any) -> Path:
    """The finished run under another name and of another age; or one that was left in another state."""
    root = out / name
    shutil.copytree(night.root, root)
    at = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    bound = loads(RunBinding, (root / "run.json").read_bytes(), "run.json")
    (root / "run.json").write_bytes(dumps(replace(bound, run_id=name, started_at=at, **binding)))
    manifest = read_manifest(open_storage(str(root)))
    assert manifest is not None
    (root / "manifest.json").write_bytes(dumps(replace(manifest, run_id=name, finished_at=at)))
    if state != "finished":
        (root / "manifest.json").unlink()
        beat_at = now() if state == "running" else at  # who lives beats
        pid = os.getpid() if state == "running" else 2**22 + 1
        word = "running" if state == "killed" else state
        (root / "heartbeat.json").write_bytes(dumps(Heartbeat(pid, os.uname().nodename, beat_at, word)))  # type: ignore[arg-type]
    return root


@pytest.fixture
def out(night: Run, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    clone(night, out, "old", 100)
    clone(night, out, "young", 1)
    clone(night, out, "killed", 50, "killed")
    clone(night, out, "busy", 50, "running")
    clone(night, out, "base", 200)
    clone(night, out, "user", 50, "running", reuse="base")
    (out / "torn").mkdir()
    (out / "torn" / "run.json").write_text("{")
    (out / "notes").mkdir()
    (out / "notes" / "keep.txt").write_text("mine")
    return out


def test_runs_go_and_the_log_tells(night: Run, out: Path) -> None:
    sizes = sum(p.stat().st_size for name in ("old", "killed") for p in (out / name).rglob("*") if p.is_file())
    dry = plan_retention(str(out), 30, 0)
    assert {d.run_id for d in dry if d.delete} == {"old", "killed"}
    assert sum(d.bytes for d in dry) == sizes
    why = {d.run_id: d.why for d in dry}
    assert why["busy"] == why["user"] == "in progress"
    assert why["base"] == "run user reuses it"
    assert "cannot be read" in why["torn"]
    assert why["old"] == "finished, not active for 100 days"
    assert not (out / OutKey.AUDIT).exists()
    sha256 = hashlib.sha256((out / "old" / "manifest.json").read_bytes()).hexdigest()
    done = retain(str(out), 30, 0)
    assert [(d.run_id, d.delete, d.why, d.bytes) for d in done] == [(d.run_id, d.delete, d.why, d.bytes) for d in dry]
    assert sorted(p.name for p in out.iterdir()) == [OutKey.AUDIT, "base", "busy", "notes", "torn", "user", "young"]
    entries = [json.loads(line) for line in (out / OutKey.AUDIT).read_text().splitlines()]
    assert [(e["action"], e["run_id"]) for e in entries] == [
        ("delete", "old"), ("deleted", "old"), ("delete", "killed"), ("deleted", "killed"),
    ]  # fmt: skip
    assert entries[0]["manifest_sha256"] == sha256
    assert entries[2]["manifest_sha256"] is None
    assert "@" in entries[0]["who"]
    found = verify_log(str(out))
    assert found is not None
    assert found.problems == ()
    assert [d.run_id for d in retain(str(out), 30, 0)] == [d.run_id for d in dry if not d.delete]


def test_a_run_that_begins_or_beats_is_in_progress(night: Run, tmp_path: Path) -> None:
    root = clone(night, tmp_path, "r", 0, "killed")
    assert read_state(str(root)).in_progress  # its process cannot be seen from here, but it has just said something
    beat = Heartbeat(2**22 + 1, "elsewhere", now(), "running")
    (root / "heartbeat.json").write_bytes(dumps(beat))
    assert read_state(str(root)).in_progress
    (root / "heartbeat.json").write_bytes(dumps(replace(beat, state="failed")))
    assert not read_state(str(root)).in_progress
    (root / "heartbeat.json").unlink()
    assert (read_state(str(root)).state, read_state(str(root)).in_progress) == ("unknown", True)
    assert plan_retention(str(tmp_path), 0, 0)[0].why == "in progress"
    assert not read_state(str(clone(night, tmp_path, "s", 1, "killed"))).in_progress


def test_a_run_that_is_taken_up_meanwhile_stays(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import leukoflow.tasks.upkeep.retention

    original = leukoflow.tasks.upkeep.retention.plan_retention

    def plan(*arguments: Any) -> Any:
        found = original(*arguments)
        beat = Heartbeat(os.getpid(), os.uname().nodename, now(), "running")
        (out / "killed" / "heartbeat.json").write_bytes(dumps(beat))
        return found

    monkeypatch.setattr(leukoflow.tasks.upkeep.retention, "plan_retention", plan)
    found = {d.run_id: d for d in retain(str(out), 30, 0)}
    assert found["old"].delete
    assert (found["killed"].delete, found["killed"].why) == (False, "in progress")
    assert (out / "killed" / "plan.parquet").exists()


def test_cut_off_anywhere_the_next_call_finishes(night: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    original = LocalStorage.delete
    for step in range(30):
        out = tmp_path / str(step)
        root = clone(night, out, "old", 100)
        calls = []

        def delete(self: Storage, key: str, calls: list[str] = calls, step: int = step) -> None:
            if len(calls) >= step and key != OutKey.AUDIT_LOCK:
                raise Crash
            calls.extend([key] if key != OutKey.AUDIT_LOCK else [])
            original(self, key)

        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "delete", delete)
            try:
                retain(str(out), 30, 0)
            except Crash:
                assert read_manifest(open_storage(str(root))) is None or not calls
            else:
                assert step > 10
                break
        if (root / "run.json").exists():
            assert [d.delete for d in retain(str(out), 30, 0)] == [True]
        assert not (root / "plan.parquet").exists()
        found = verify_log(str(out))
        assert found is not None
        assert found.problems == ()
    else:
        pytest.fail("it never came to its end")


def test_links_locks_and_nothing_at_all(night: Run, copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "links"
    out.mkdir()
    (out / "linked").symlink_to(copy)
    assert [d.delete for d in retain(str(out), 0, 0)] == [False]
    root = clone(night, out, "locked", 100)
    (root / "compact.lock").touch()
    assert {d.run_id: d.delete for d in plan_retention(str(out), 0, 0)} == {"linked": False, "locked": False}
    with (
        held(open_storage(str(out)), OutKey.AUDIT_LOCK, "retention"),
        pytest.raises(StorageError, match="held for retention"),
    ):
        retain(str(out), 0, 0)
    with pytest.raises(ConfigError, match="holds no run"):
        plan_retention(str(tmp_path / "nothing"), 0, 0)


def test_reuse_is_remembered(night: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is only asked for when the run is taken up again; the command that resumes says so, too."""
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "a key that only these tests have")
    out = tmp_path / "out"
    shutil.copytree(night.root, out / "night")
    config = night.config.model_copy(update={"out": str(out), "run_id": "again", "reuse": "night"})
    first = open_run(config)
    assert read_state(first.root).reuse == "night"
    assert first.binding.command == f"leukoflow rerun {out} again"  # it has columns that no option says
    assert bound_config(first.binding).reuse == "night"
    config = config.model_copy(update={"run_id": "third", "reuse": None})
    assert read_state(open_run(config).root).reuse is None
    again = open_run(config.model_copy(update={"reuse": "night"}))
    assert (again.binding.reuse, bound_config(again.binding).reuse) == ("night", "night")
    assert read_state(str(out / "third")).reuse == "night"
    assert read_state(open_run(config).root).reuse == "night"
    assert {d.run_id: d.delete for d in plan_retention(str(out), 0, 0)}["night"] is False


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_goes_and_verify_checks_the_log(out: Path) -> None:
    dry = invoke("retention", str(out), "--keep-days", "30", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "2 of 7 runs would go" in dry.output
    assert (out / "old").exists()
    done = invoke("retention", str(out), "--keep-days", "30")
    assert "2 of 7 runs deleted" in done.output
    assert not (out / "old").exists()
    for name in ("base", "young", "torn", "busy", "user"):
        shutil.rmtree(out / name)
    log = invoke("verify", str(out))
    assert (log.exit_code, "4 entries" in log.output) == (0, True), log.output
    (out / OutKey.AUDIT).write_bytes((out / OutKey.AUDIT).read_bytes().replace(b"killed", b"saved_"))
    log = invoke("verify", str(out))
    assert log.exit_code == 1
    assert "audit log was tampered with" in log.output
    assert "line 3 was altered" in log.output


def test_the_command_is_one_line_where_it_cannot_be_done(tmp_path: Path) -> None:
    found = invoke("retention", str(tmp_path), "--keep-days", "3")
    assert (found.exit_code, len(found.stderr.splitlines())) == (1, 1)
    assert invoke("retention", str(tmp_path)).exit_code == 1
    assert invoke("retention", str(tmp_path), "--keep-days", "-1").exit_code == 1


# --- shadow runs -----------------------------------------------------------------------------------------------------


def test_a_shadow_run_stays_and_goes_with_its_run() -> None:
    def shadow(name: str, days: float, state: str = "finished", **more: Any) -> Candidate:
        return run(name, days, state, reuse="main", shadow_of="main", **more)

    main, young = run("main", 40), shadow("young", 1)
    assert gone([main, young]) == ["young", "main"]  # it does not keep an old run, and does not outlive it
    assert gone([run("main", 5), shadow("old", 400)]) == []
    assert gone([main, shadow("busy", 1, "running", hindrance="in progress")]) == []
    found = {d.run_id: d.why for d in decide([run("main", 5), shadow("s", 400)], 30, 0, MOMENT)}
    assert found["s"] == "it accompanies run main, which stays"
    found = {d.run_id: d.why for d in decide([main, young], 30, 0, MOMENT)}
    assert found["young"] == "it accompanies run main, which goes"
    assert gone([main, run("next", 35), young], 30, 1) == ["young", "main"]  # and it is none of the last ones
    assert gone([young], 30) == []
    assert gone([shadow("left", 40)], 30) == ["left"]
