"""Removing bundles: never one that is approved, that a rollback goes back to, or that a run needs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from harness import with_other_thresholds
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import BundleError, ConfigError, StorageError
from leukoflow.models.bundle import Bundle
from leukoflow.models.registry import Entry, Registry, RegistryState, fold
from leukoflow.runs.progress import RunBinding
from leukoflow.storage.base import Storage
from leukoflow.storage.local import LocalStorage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.upkeep.prune import decide, prune
from leukoflow.tasks.upkeep.retention import plan_retention, retain

MOMENT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def history(*actions: tuple[str, str, float]) -> RegistryState:
    """A state from (action, digest, days ago)."""
    entries = [
        Entry(i, (MOMENT - timedelta(days=days)).isoformat(), "ana", action, digest, digest, "", (), "")  # type: ignore[arg-type]
        for i, (action, digest, days) in enumerate(actions, 1)
    ]
    return fold(entries)


def test_the_policy() -> None:
    state = history(
        *(("register", name, 300) for name in "abcdefg"), ("approve", "a", 200), ("approve", "b", 150),
        ("approve", "c", 100), ("register", "new", 3), ("prune", "g", 50),
    )  # fmt: skip
    found = {v.bundle.digest: (v.remove, v.why) for v in decide(state, {"d": "out/night"}, 30, MOMENT)}
    assert found == {
        "a": (True, "retired for 150 days, and no run needs it"),
        "b": (False, "a rollback goes back to it"),
        "c": (False, "it is approved"),
        "d": (False, "run out/night needs it"),
        "e": (True, "registered for 300 days, and no run needs it"),
        "f": (True, "registered for 300 days, and no run needs it"),
        "new": (False, "registered within 30 days"),
    }
    assert not any(v.remove for v in decide(state, {}, 400, MOMENT))


@pytest.fixture
def registry(night: Run, small: Bundle, tmp_path: Path) -> Registry:
    made = Registry(str(tmp_path / "out" / "bundles"))  # also where somebody keeps it among the runs
    made.register(small.path, "ana", "needed", without_metrics="test")
    for i in range(4):
        bundle = with_other_thresholds(small, tmp_path / f"b{i}", 2.0 + i)
        made.register(bundle.path, "ana", f"b{i}", without_metrics="test")
    for name in ("b0", "b1", "b2"):
        made.approve(name, "ana", "")
    shutil.copytree(night.root, tmp_path / "out" / "night")
    return made


def test_what_nothing_needs_goes_and_the_history_tells(registry: Registry, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert [v.bundle.name for v in prune(registry, [out], 0, "ana", dry_run=True) if v.remove] == ["b0", "b3"]
    assert len(registry.entries()) == 8
    prune(registry, [out], 0, "ana")
    left = registry.storage.names("bundles")
    assert sorted(left) == sorted(b.digest for b in registry.state().bundles if b.state != "removed")
    assert len(left) == 3
    assert [(e.action, e.name, e.by) for e in registry.entries()[-2:]] == [
        ("prune", "b0", "ana"),
        ("prune", "b3", "ana"),
    ]
    with pytest.raises(BundleError, match="was removed from"):
        registry.resolve("registry:b0")
    assert registry.rollback("ana", "").name == "b1"
    registry.register(tmp_path / "b0", "ana", "b0", without_metrics="needed again")
    assert registry.resolve("registry:b0").state == "registered"
    assert [d.run_id for d in plan_retention(out, 0, 0)] == ["night"]  # a registry among the runs is none
    retain(out, 0, 0)
    assert registry.resolve("approved").name == "b1"


def test_what_a_run_needs_must_be_known(registry: Registry, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="name every folder"):
        prune(registry, [], 0, "ana")
    with pytest.raises(ConfigError, match="holds no run"):
        prune(registry, [str(out), str(tmp_path / "typo")], 0, "ana")
    (out / "night" / "run.json").write_text("{")
    with pytest.raises(StorageError, match="what bundle run night needs is not known"):
        prune(registry, [str(out)], 0, "ana")
    assert len(registry.storage.names("bundles")) == 5


def test_cut_off_the_next_call_removes_the_files(registry: Registry, tmp_path: Path, monkeypatch: Any) -> None:
    class Crash(BaseException):
        pass

    def delete(self: Storage, key: str) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "delete", delete)
        with pytest.raises(Crash):
            prune(registry, [str(tmp_path / "out")], 0, "ana")
    assert len(registry.storage.names("bundles")) == 5
    entries = registry.entries()
    prune(registry, [str(tmp_path / "out")], 0, "ana")
    assert len(registry.storage.names("bundles")) == 3
    assert registry.entries() == entries


def test_an_unfinished_run_needs_its_bundle_as_well(registry: Registry, night: Run, tmp_path: Path) -> None:
    root = tmp_path / "out" / "unfinished"
    root.mkdir()
    digest = registry.resolve("registry:b3").digest
    bound = loads(RunBinding, (Path(night.root) / "run.json").read_bytes(), "")
    (root / "run.json").write_bytes(dumps(replace(bound, run_id="unfinished", bundle_digest=digest)))
    assert [v.bundle.name for v in prune(registry, [str(tmp_path / "out")], 0, "ana") if v.remove] == ["b0"]


def test_the_commands(registry: Registry, tmp_path: Path, small: Bundle) -> None:
    def invoke(*arguments: str) -> Any:
        settings = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", "LEUKOFLOW_BUNDLES": registry.storage.root}
        return CliRunner().invoke(app, ["bundles", *arguments], env=settings)

    new = with_other_thresholds(small, tmp_path / "new", 9.0)
    refused = invoke("register", str(new.path))
    assert (refused.exit_code, "has no metrics" in refused.stderr) == (1, True)
    done = invoke("register", str(new.path), "--name", "new", "--without-metrics", "for a test")
    assert (done.exit_code, f"new  {new.digest[:12]}  registered" in done.output) == (0, True), done.output
    assert invoke("approve", "new", "--by", "ana").exit_code == 1  # why?
    assert "is approved" in invoke("approve", "new", "--by", "ana", "--why", "better").output
    listed = invoke("list").output
    assert ("retired" in listed, "none: for a test" in listed) == (True, True)
    assert f"b2  {registry.resolve('registry:b2').digest[:12]}  is approved again" in invoke("rollback").output
    shown = invoke("history").output
    assert all(word in shown for word in ("register", "approve", "rollback", "better"))
    out = str(tmp_path / "out")
    assert "new" in invoke("prune", "--keep-days", "0", "--out", out, "--dry-run").output
    assert invoke("prune", "--keep-days", "0").exit_code == 1
    assert "removed: registered for 0 days" in invoke("prune", "--keep-days", "0", "--out", out).output
