"""The command line: help that teaches, exit codes, one line for an error, and the order in which things are started."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from leukoflow.apps import prefect_server
from leukoflow.apps.cli.main import app
from leukoflow.apps.cli.view import live
from leukoflow.apps.cli.view.console import duration, open_console
from leukoflow.apps.cli.view.evaluation import show_evaluation
from leukoflow.apps.cli.view.finished import show_audit
from leukoflow.apps.cli.view.live import Pace, live_progress
from leukoflow.apps.cli.view.outcome import show_outcome
from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import BundleError, RunCancelledError, SourceError
from leukoflow.runs.progress import Heartbeat, RunBinding, now
from leukoflow.runs.records import (
    Marker,
    PartRef,
    PlanSummary,
    RunManifest,
    Shard,
    ShardReceipt,
    Source,
    SourceKind,
    StageTiming,
)
from leukoflow.storage.base import Storage
from leukoflow.tasks.upkeep.audit import AuditVerdict

COMMANDS = (
    "run", "status", "report", "verify", "diff", "compact", "retention", "erase", "doctor", "sample", "train",
    "evaluate", "prefect", "version", "bundles", "shadow", "rerun", "correct",
)  # fmt: skip

SUMMARY = PlanSummary(Source("smears.zip", SourceKind.ZIP, "1-2", 10), 100, 3, 0, None, 32, "d")


def _manifest(**changes: Any) -> RunManifest:
    return replace(
        RunManifest(
            run_id="smears-1", schema_version=2, fingerprint="f", source=SUMMARY.source, source_truncated=None,
            bundle="pocket", bundle_digest="b", device="cpu", shard_size=32, started_at=now(), finished_at=now(),
            startup_seconds=12.3, processing_seconds=10.0, processed=100, members=100, predicted=90, abstained=6,
            rejected=4, quarantined=0, missing=0, ignored=3, cells=500, labels=(39, 28, 18, 5),
            reasons=(("out of focus", 4),), conflicts=0,
            timings=(StageTiming("prepare", 2.0, 100),), slowest=(), parts=(), tables=(), software=(),
        ),
        **changes,
    )  # fmt: skip


def _invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})


# --- help and usage --------------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    result = _invoke("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("prefect", "version")])
def test_each_help_teaches_with_an_example(command: str) -> None:
    result = _invoke(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"leukoflow {command}" in result.output


def test_help_of_run_tells_the_exit_codes() -> None:
    text = " ".join(_invoke("run", "--help").output.split())
    for part in ("0 every image accounted for", "2 source unusable", "3 some members quarantined", "130 stopped"):
        assert part in text


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from leukoflow.apps.cli.main import app\n"
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'prefect', 'distributed', 'cv2', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["run"], ["run", "x.zip"], ["sample", "d", "--images", "0"]])
def test_a_command_that_cannot_be_understood_is_not_mistaken_for_a_bad_source(arguments: list[str]) -> None:
    assert _invoke(*arguments).exit_code == 1


def test_version_names_what_decides_the_numbers() -> None:
    output = _invoke("version").output
    for name in ("torch", "prefect", "python"):
        assert f"{name} " in output


# --- run -------------------------------------------------------------------------------------------------------------


class _Server:
    """Stands in for the local Prefect server; remembers what was asked of it."""

    url, ui_url, home = "http://127.0.0.1:1/api", "http://127.0.0.1:1", Path("home")

    def __init__(self, keep: bool, log: list[str]) -> None:
        self.keep, self.log, self.process = keep, log, object()

    def stop(self) -> None:
        self.log.append("server stopped")


class _State:
    """Stands in for the final state of a flow run."""

    name, message = "Completed", "done"

    def __init__(self, outcome: object = None) -> None:
        self.outcome = outcome

    def result(self, raise_on_failure: bool) -> object:
        assert not raise_on_failure
        return self.outcome

    def is_completed(self) -> bool:
        return self.outcome is None

    def is_cancelled(self) -> bool:
        return False

    def is_cancelling(self) -> bool:
        return False


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A stage on which `run` plays with stand-ins for the plan, the flow and the server."""
    for name in [n for n in os.environ if n.startswith(("PREFECT_", "LEUKOFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "NO_PROXY", "no_proxy", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")  # so that whatever the command sets is taken back after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "ERROR")
    monkeypatch.setattr("signal.signal", lambda number, handler: None)

    root = tmp_path / "out" / "smears-1"
    root.mkdir(parents=True)
    log: list[str] = []
    played = types.SimpleNamespace(
        log=log, root=root, finished=None, outcome=None, manifest=_manifest(), error=None, config=None
    )

    def open_run(config: Any, begun: Any) -> Any:
        log.append("planned")
        played.config = config
        begun(str(root))
        if played.error is not None:
            raise played.error
        return types.SimpleNamespace(run_id="smears-1", root=str(root), summary=SUMMARY, finished=played.finished)

    def screen(config: Any) -> _State:
        assert config.run_id == "smears-1"
        log.append(f"flow with {os.environ['PREFECT_API_URL']}")
        if played.outcome is None and played.manifest is not None:
            (root / "manifest.json").write_bytes(dumps(played.manifest))
        return _State(played.outcome)

    def start_server(keep: bool) -> _Server:
        log.append(f"server started, keep={keep}")
        return _Server(keep, log)

    for name, content in (
        ("leukoflow.tasks.intake.open_run", {"open_run": open_run}),
        ("leukoflow.flows.run", {"screen": screen}),
        ("leukoflow.tasks.inference.stages", {}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(prefect_server, "start_server", start_server)
    return played


def _run(stage: Any, *more: str) -> Any:
    return _invoke("run", "smears.zip", "--out", str(stage.root.parent), *more)


def test_a_run_plans_then_starts_a_server_then_the_flow_and_stops_the_server(stage: Any) -> None:
    result = _run(stage)
    assert result.exit_code == 0, result.output
    assert stage.log == ["planned", "server started, keep=False", "flow with http://127.0.0.1:1/api", "server stopped"]
    for part in (
        "http://127.0.0.1:1",
        "balanced",
        "90.0 %",
        "10.0/s",
        "12.3 s of start-up",
        "report.html",
        "duckdb -c",
    ):
        assert part in result.output


def test_options_reach_the_settings(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "night.toml").write_text('bundle = "mine"\nshard_size = 64\n[cluster]\nworkers = 7\n')
    _run(stage, "--config", str(tmp_path / "night.toml"), "--shard-size", "32", "--device", "cpu", "--um-per-px", "0.5")
    config = stage.config
    assert (config.source, config.bundle, config.shard_size, config.cluster.workers) == ("smears.zip", "mine", 32, 7)
    assert (config.device, config.um_per_px, config.cluster.address) == ("cpu", 0.5, "local")
    _run(
        stage, "--workers", "2", "--cluster", "tcp://host:8786", "--run-id", "x", "--reuse", "y", "--manifest", "m.csv"
    )
    config = stage.config
    assert (config.cluster.workers, config.cluster.address) == (2, "tcp://host:8786")
    assert (config.run_id, config.reuse, config.manifest) == ("x", "y", "m.csv")


def test_a_finished_run_starts_nothing(stage: Any) -> None:
    stage.finished = _manifest(quarantined=1, predicted=89)
    result = _run(stage)
    assert result.exit_code == 3
    assert stage.log == ["planned"]
    assert "finished already" in result.output


def test_a_configured_server_is_used_and_left_alone(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from leukoflow.apps import prefect_server

    monkeypatch.setenv("PREFECT_API_URL", "http://night:4200/api")
    monkeypatch.setattr(prefect_server, "require_server", lambda url: None)
    assert _run(stage).exit_code == 0
    assert stage.log == ["planned", "flow with http://night:4200/api"]


def test_a_server_can_be_kept(stage: Any) -> None:
    result = _run(stage, "--keep-prefect")
    assert "server started, keep=True" in stage.log
    assert "leukoflow prefect stop" in result.output


@pytest.mark.parametrize(
    ("manifest", "code"),
    [
        (_manifest(), 0),
        (_manifest(quarantined=1, predicted=89), 3),
        (_manifest(missing=2), 4),
        (_manifest(source_truncated="the end is missing", quarantined=1, predicted=89), 4),
    ],
)
def test_the_exit_code_is_that_of_the_manifest(stage: Any, manifest: RunManifest, code: int) -> None:
    stage.manifest = manifest
    assert _run(stage).exit_code == code


def test_a_cancelled_run_exits_130_and_the_server_is_stopped(stage: Any) -> None:
    stage.outcome = RunCancelledError("asked to stop; to take it up again: leukoflow run smears.zip")
    result = _run(stage)
    assert result.exit_code == 130
    assert "to take it up again" in result.stderr
    assert stage.log[-1] == "server stopped"


def test_a_flow_without_a_manifest_is_an_error(stage: Any) -> None:
    stage.manifest = None
    result = _run(stage)
    assert result.exit_code == 1
    assert "without a manifest" in result.stderr


def test_an_unusable_source_is_one_line_and_exit_code_2(stage: Any) -> None:
    stage.error = SourceError("smears.zip does not exist; check the path")
    result = _run(stage)
    assert result.exit_code == 2
    assert result.stderr == "error: smears.zip does not exist; check the path\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/tmp/x"), "no space left on the disk of /tmp/x; make room there"),
        (
            OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"),
            "that of /scratch (TMPDIR)",
        ),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "that of /scratch (TMPDIR)"),
        (
            PermissionError(13, "Permission denied", "/out/run.json"),
            "give the command as the user whom the runs belong",
        ),
    ],
)
def test_what_the_system_refuses_is_no_fault_of_the_program(
    stage: Any, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str
) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch")
    stage.error = error
    result = _run(stage)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "fault of the program" not in result.stderr


def test_ctrl_c_promises_no_more_than_every_command_holds(stage: Any) -> None:
    stage.error = KeyboardInterrupt()
    result = _run(stage)
    assert result.exit_code == 130
    assert result.stderr == (
        "error: stopped; nothing that was committed is lost, and the same command can be given again\n"
    )


def test_a_fault_of_the_program_is_owned_and_debug_shows_where(stage: Any) -> None:
    stage.error = ZeroDivisionError("division by zero")
    result = _run(stage)
    assert result.exit_code == 1
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in _run(stage, "--debug").stderr


def test_a_stop_while_starting_exits_130(stage: Any) -> None:
    stage.error = KeyboardInterrupt()
    assert _run(stage).exit_code == 130


def _last_word(stage: Any) -> Heartbeat:
    return loads(Heartbeat, (stage.root / "heartbeat.json").read_bytes(), "heartbeat.json")


def test_a_server_that_does_not_start_is_the_last_word_of_the_run(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_server(keep: bool) -> None:
        last = _last_word(stage)
        assert (last.state, last.phase) == ("running", "waiting for Prefect's server")
        raise prefect_server.PrefectServerError("the local Prefect server ended at once; run `leukoflow doctor`")

    monkeypatch.setattr(prefect_server, "start_server", start_server)
    assert _run(stage).exit_code == 1
    last = _last_word(stage)
    assert (last.state, last.exit_code) == ("failed", 1)
    assert last.message == "the local Prefect server ended at once; run `leukoflow doctor`"
    (log,) = (stage.root / "logs").glob("*.log")
    assert "leukoflow doctor" in log.read_text()


def test_settings_that_make_no_sense_are_explained(stage: Any) -> None:
    result = _run(stage, "--shard-size", "100")
    assert result.exit_code == 1
    assert "shard_size" in result.stderr
    assert "try 112" in result.stderr
    assert stage.log == []


# --- status ----------------------------------------------------------------------------------------------------------


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
        Storage(str(tmp_path)).create("markers/predictions/00000.json", dumps(marker))
        time.sleep(0.6)
    text = written.getvalue()
    assert ("32/100" if terminal else "32 of 100 images, 1 of 4 shards") in text
    assert "30 predicted, 1 abstained, 1 rejected" in text


def test_status_of_a_finished_run_shows_its_outcome(tmp_path: Path) -> None:
    root = tmp_path / "smears-1"
    root.mkdir()
    (root / "run.json").write_bytes(dumps(_binding("smears-1")))
    (root / "manifest.json").write_bytes(dumps(_manifest()))
    output = _invoke("status", str(tmp_path), "smears-1").output
    assert "finished" in output
    assert "balanced" in output
    assert re.search(r"labels +of predicted\s", output)


def test_labels_of_an_old_run_are_named_for_what_they_count(tmp_path: Path) -> None:
    written = io.StringIO()
    old = _manifest(schema_version=1, labels=(40, 30, 20, 6))
    show_outcome(Console(file=written, width=160), str(tmp_path), old)
    assert "of predicted and abstained" in written.getvalue()


def test_a_small_share_is_not_told_as_none(tmp_path: Path) -> None:
    written = io.StringIO()
    found = _manifest(members=10_000, predicted=9_999, abstained=0, rejected=0, quarantined=1)
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


# --- the rest --------------------------------------------------------------------------------------------------------


def test_sample_writes_an_archive_and_says_what_comes_next(tmp_path: Path) -> None:
    result = _invoke("sample", str(tmp_path / "demo"), "--images", "3", "--seed", "1")
    assert result.exit_code == 0
    assert (tmp_path / "demo" / "smears.zip").is_file()
    assert f"next: leukoflow run {tmp_path / 'demo' / 'smears.zip'}" in result.output
    (tmp_path / "mine.txt").touch()
    refused = _invoke("sample", str(tmp_path))
    assert refused.exit_code == 1
    assert "holds other files" in refused.stderr


def test_prefect_commands_without_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEUKOFLOW_PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(prefect_server, "configured_api_url", lambda: None)
    assert "none is running" in _invoke("prefect", "status").output
    assert "none was running" in _invoke("prefect", "stop").output
    monkeypatch.setattr(prefect_server, "configured_api_url", lambda: "http://127.0.0.1:1/api")
    answer = _invoke("prefect", "status")
    assert answer.exit_code == 1
    assert "does not answer" in answer.output


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


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_training_and_evaluation_run_on_a_server_that_is_stopped(
    command: str, stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def flow(**arguments: Any) -> Any:
        calls.append(arguments)
        raise BundleError("nothing of this kind here")

    module = types.ModuleType(f"leukoflow.flows.{command}")
    module.__dict__.update({command: flow, "FULL_MINUTES": 60.0})
    monkeypatch.setitem(sys.modules, f"leukoflow.flows.{command}", module)
    out = str(tmp_path / "mine")
    words = {
        "train": ["data", "--out", out, "--without", "nasnet"],
        "evaluate": [out, "data", "--out", str(tmp_path / "evaluation"), "--protocol", "cluster"],
    }[command]
    result = _invoke(command, *words)
    assert result.exit_code == 1
    assert result.stderr == "error: nothing of this kind here\n"
    assert stage.log == ["server started, keep=False", "server stopped"]
    if command == "train":
        assert calls[0]["without"] == ("nasnet",)
        assert calls[0]["work_dir"] == tmp_path / "mine.work"
    else:
        assert calls[0]["bundle"] == out
        assert calls[0]["record"] is True
        assert calls[0]["protocols"] == ("cluster",)


def test_an_unknown_protocol_is_refused(stage: Any, tmp_path: Path) -> None:
    result = _invoke("evaluate", "pocket", "data", "--out", str(tmp_path), "--protocol", "patient")
    assert result.exit_code == 1
    assert "no protocol named 'patient'" in result.stderr
    assert stage.log == []
