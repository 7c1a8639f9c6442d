"""The command line: help that teaches, exit codes, one line for an error, and the order in which things are started."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from made_up_run import SUMMARY, manifest_of
from typer.testing import CliRunner

from leukoflow.apps import prefect_connection, prefect_server
from leukoflow.apps.cli.main import app
from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import BundleError, RunCancelledError, SourceError
from leukoflow.runs.progress import Heartbeat
from leukoflow.runs.records import (
    RunManifest,
)

COMMANDS = (
    "run", "status", "report", "verify", "diff", "compact", "retention", "erase", "doctor", "sample", "train",
    "evaluate", "prefect", "version", "bundles", "shadow", "rerun", "correct",
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
        log=log, root=root, finished=None, outcome=None, manifest=manifest_of(), error=None, config=None
    )

    def open_run(config: Any, report: Any) -> Any:
        log.append("planned")
        played.config = config
        report(str(root))
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


@pytest.mark.slow
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
    stage.finished = manifest_of(quarantined=1, predicted=89)
    result = _run(stage)
    assert result.exit_code == 3
    assert stage.log == ["planned"]
    assert "finished already" in result.output


def test_a_configured_server_is_used_and_left_alone(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from leukoflow.apps import prefect_connection

    monkeypatch.setenv("PREFECT_API_URL", "http://night:4200/api")
    monkeypatch.setattr(prefect_connection, "require_server", lambda url: None)
    assert _run(stage).exit_code == 0
    assert stage.log == ["planned", "flow with http://night:4200/api"]


def test_a_server_can_be_kept(stage: Any) -> None:
    result = _run(stage, "--keep-prefect")
    assert "server started, keep=True" in stage.log
    assert "leukoflow prefect stop" in result.output


@pytest.mark.parametrize(
    ("manifest", "code"),
    [
        (manifest_of(), 0),
        (manifest_of(quarantined=1, predicted=89), 3),
        (manifest_of(missing=2), 4),
        (manifest_of(source_truncated="the end is missing", quarantined=1, predicted=89), 4),
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
            "run the command as the user who owns the runs",
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
    assert "bug in the program" not in result.stderr


def test_ctrl_c_promises_no_more_than_every_command_holds(stage: Any) -> None:
    stage.error = KeyboardInterrupt()
    result = _run(stage)
    assert result.exit_code == 130
    assert result.stderr == (
        "error: stopped; nothing that was committed is lost, and the same command can be run again\n"
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
        raise prefect_connection.PrefectServerError("the local Prefect server ended at once; run `leukoflow doctor`")

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
    monkeypatch.setattr(prefect_connection, "configured_api_url", lambda: None)
    assert "none is running" in _invoke("prefect", "status").output
    assert "none was running" in _invoke("prefect", "stop").output
    monkeypatch.setattr(prefect_connection, "configured_api_url", lambda: "http://127.0.0.1:1/api")
    answer = _invoke("prefect", "status")
    assert answer.exit_code == 1
    assert "does not answer" in answer.output


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
