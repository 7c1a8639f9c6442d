"""What the command line shows: runs and their progress, outcomes, durations, evaluations."""

from __future__ import annotations

import io
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from made_up_run import manifest_of
from rich.console import Console
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.apps.cli.view import live
from leukoflow.apps.cli.view.console import duration, open_console
from leukoflow.apps.cli.view.evaluation import show_evaluation
from leukoflow.apps.cli.view.finished import show_audit
from leukoflow.apps.cli.view.live import Pace, live_progress
from leukoflow.apps.cli.view.outcome import show_outcome
from leukoflow.core.codec import dumps
from leukoflow.runs.progress import Heartbeat, RunBinding, now
from leukoflow.runs.records import (
    Marker,
    PartRef,
    Shard,
    ShardReceipt,
)
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.upkeep.audit import AuditVerdict


def _invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})


def _binding(run_id: str) -> RunBinding:
    return RunBinding(
        run_id=run_id, fingerprint="f", source_uri="smears.zip", members=100, shards=4, shard_size=32,
        bundle="pocket", bundle_digest="b", device="cpu", started_at=now(),
        command=f"leukoflow run smears.zip --out out --run-id {run_id}",
    )  # fmt: skip


def test_status_lists_runs_and_tells_how_to_continue_a_dead_one(tmp_path: Path) -> None:
    for run_id, state, pid in (("alive", "running", os.getpid()), ("dead", "running", 2**22 + 1), ("ill", "failed", 1)):
        root = tmp_path / run_id
        root.mkdir()
        (root / "run.json").write_bytes(dumps(_binding(run_id)))
        beat = Heartbeat(pid=pid, host=os.uname().nodename, at=now(), state=state, message="out of disk")  # type: ignore[arg-type]
        (root / "heartbeat.json").write_bytes(dumps(beat))
    (tmp_path / "ill" / "failures").mkdir()
    (tmp_path / "ill" / "failures" / "00002.json").write_text('{"message": "worker died"}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text('{"run_id": ')

    listed = _invoke("status", str(tmp_path)).output
    states = {line.split()[0]: line.split()[1] for line in listed.splitlines() if line.split()[:1] != ["run"] and line}
    assert states.items() >= {"alive": "running", "dead": "killed", "ill": "failed"}.items()
    assert states["torn"] == "damaged"
    assert "notes" not in states

    dead = _invoke("status", str(tmp_path), "dead").output
    assert "0 of 100 (0 %)" in dead
    assert "continue with  leukoflow run smears.zip --out out --run-id dead" in dead
    ill = _invoke("status", str(tmp_path), "ill").output
    assert "shard 00002: worker died" in ill
    assert "out of disk" in ill
    assert "continue with" not in _invoke("status", str(tmp_path), "alive").output


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_while_a_run_goes_on(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_PLAIN_SECONDS", 0.05)
    monkeypatch.setattr(live, "_POLL_SECONDS", 0.05)
    written = io.StringIO()
    target = Console(file=written, force_terminal=terminal, width=200)
    with live_progress(target, str(tmp_path)):  # at first there is no run yet, and that is no reason to fail
        time.sleep(0.2)
        (tmp_path / "run.json").write_bytes(dumps(_binding("smears-1")))
        shard = Shard(0, 0, 32)
        receipt = ShardReceipt(shard, 30, 1, 1, 0, 200, (10, 10, 10, 1), (), 1.0)
        (tmp_path / "markers/predictions").mkdir(parents=True)
        marker = Marker(PartRef("predictions", shard.name, "a", "k", ()), receipt)
        open_storage(str(tmp_path)).create("markers/predictions/00000.json", dumps(marker))
        time.sleep(0.6)
    text = written.getvalue()
    assert ("32/100" if terminal else "32 of 100 images, 1 of 4 shards") in text
    assert "30 predicted, 1 abstained, 1 rejected" in text


def test_status_of_a_finished_run_shows_its_outcome(tmp_path: Path) -> None:
    root = tmp_path / "smears-1"
    root.mkdir()
    (root / "run.json").write_bytes(dumps(_binding("smears-1")))
    (root / "manifest.json").write_bytes(dumps(manifest_of()))
    output = _invoke("status", str(tmp_path), "smears-1").output
    assert "finished" in output
    assert "balanced" in output
    assert re.search(r"labels +of predicted\s", output)


def test_labels_of_an_old_run_are_named_for_what_they_count(tmp_path: Path) -> None:
    written = io.StringIO()
    old = manifest_of(schema_version=1, labels=(40, 30, 20, 6))
    show_outcome(Console(file=written, width=160), str(tmp_path), old)
    assert "of predicted and abstained" in written.getvalue()


def test_a_small_share_is_not_shown_as_none(tmp_path: Path) -> None:
    written = io.StringIO()
    found = manifest_of(members=10_000, predicted=9_999, abstained=0, rejected=0, quarantined=1)
    show_outcome(Console(file=written, width=160), str(tmp_path), found)
    assert "> 99.9 %" in written.getvalue()
    assert "< 0.1 %" in written.getvalue()


def test_nothing_looked_at_is_not_called_well(tmp_path: Path) -> None:
    written = io.StringIO()
    out = Console(file=written, width=160)
    show_audit(out, str(tmp_path), AuditVerdict(0, "", ()))
    assert "is empty: nothing was looked at" in written.getvalue()


def test_status_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    result = _invoke("status", str(tmp_path))
    assert result.exit_code == 1
    assert "holds no run" in result.stderr
    assert _invoke("status", str(tmp_path), "absent").exit_code == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (65, "1 min 05 s"), (3599.6, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_durations_are_read_by_people(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_pace_counts_only_what_this_session_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    pace = Pace()
    assert pace.describe(500, 1000) == "no shard done yet"
    assert pace.describe(520, 1000) == "measuring the rate"
    assert pace.describe(620, 1000) == "10.0 images/s, 38 s left"


def test_an_evaluation_is_shown_beside_the_histogram(capsys: pytest.CaptureFixture[str]) -> None:
    plain = {"accuracy": 0.812, "macro_f1": 0.8, "mcc": 0.7, "auc_ovr": 0.9, "ece": 0.1}
    plain = plain | {"worst_group": {"group": "C03", "accuracy": 0.25}}
    model = plain | {
        "accuracy": 0.871, "worst_group": {"group": "C07", "accuracy": 0.5}, "coverage": 0.94, "mean_set_size": 1.3,
        "abstention_rate": 0.12,
    }  # fmt: skip
    found = {
        "protocols": {"cluster": {"models": {"leukoflow": model, "colour histogram": plain}}},
        "segmentation": {"dice_nucleus_d1": 0.91},
        "foreign": {"images": 53, "abstained_or_benign": 0.96},
    }
    show_evaluation(open_console(), found)
    text = " ".join(capsys.readouterr().out.split())
    for part in ("0.8710 0.8120", "C07 0.500 C03 0.250", "size 1.30", "12.0 %", "dice nucleus d1 0.91", "0.960 of 53"):
        assert part in text
