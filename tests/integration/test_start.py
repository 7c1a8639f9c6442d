"""Runs while they start: together with others, each with a server and ports of its own; and killed meanwhile."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from harness import smears, start, until, write_zip

from leukoflow.models.bundle import Bundle
from leukoflow.runs.progress import ProgressReader, list_runs, read_progress

pytestmark = pytest.mark.integration


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("runs", "shared"),
    [(2, True), pytest.param(10, True, marks=pytest.mark.chaos), pytest.param(10, False, marks=pytest.mark.chaos)],
    ids=["two into one folder", "ten into one folder", "ten into ten folders"],
)
def test_runs_that_are_started_together_all_end_well(runs: int, shared: bool, bundle: Bundle, tmp_path: Path) -> None:
    source = write_zip(tmp_path / "night.zip", smears(tmp_path / "sample", 16, seed=5))
    outs = [tmp_path / ("out" if shared else f"out-{i}") for i in range(runs)]
    with contextlib.ExitStack() as stack:
        commands = []
        for i, out in enumerate(outs):
            words = ["run", str(source), "--out", str(out), "--run-id", f"r{i}", "--workers", "1"]
            more = ["--bundle", str(bundle.path), "--device", "cpu"]
            home = str(tmp_path / "prefect")
            command = start([*words, *more], tmp_path / f"log-{i}", LEUKOFLOW_PREFECT_HOME=home)
            stack.callback(command.end)
            commands.append(command)
        codes = [command.wait(1200) for command in commands]
        assert codes == [0] * runs, "\n".join(command.text()[-1500:] for command in commands)
        dashboards = [line for c in commands for line in c.text().splitlines() if line.startswith("dashboard")]
        assert len(set(dashboards)) == runs
        assert [line for c in commands for line in c.survivors()] == []
    for i, out in enumerate(outs):
        progress = read_progress(str(out / f"r{i}"))
        assert (progress.state, progress.done) == ("finished", 16)
    assert list_runs(str(outs[0])) == ([f"r{i}" for i in range(runs)] if shared else ["r0"])


def test_a_start_that_is_killed_says_what_it_waited_for_and_the_same_command_repeats_it(
    bundle: Bundle, tmp_path: Path
) -> None:
    source = write_zip(tmp_path / "night.zip", smears(tmp_path / "sample", 16, seed=5))
    out = tmp_path / "out"
    words = ["run", str(source), "--out", str(out), "--run-id", "night", "--bundle", str(bundle.path), "--workers", "1"]
    home = str(tmp_path / "prefect")
    first = start(words, tmp_path / "first", LEUKOFLOW_PREFECT_HOME=home)
    try:

        def phase() -> str:
            beat = ProgressReader(str(out / "night")).heartbeat()
            return beat.phase if beat else ""

        until(lambda: phase() == "waiting for Prefect's server", 120, "the server is waited for", first)
        running = read_progress(str(out / "night"))
        assert (running.state, running.phase) == ("running", "waiting for Prefect's server")
        first.family()
        first.process.kill()
        first.process.wait()
        assert first.survivors() == []
    finally:
        first.end()
    killed = read_progress(str(out / "night"))
    assert killed.state == "killed"
    assert killed.message.startswith("it stopped while waiting for Prefect's server, without a last word")
    again = start(words, tmp_path / "again", LEUKOFLOW_PREFECT_HOME=home)
    try:
        assert again.wait() == 0, again.text()[-3000:]
    finally:
        again.end()
    assert read_progress(str(out / "night")).state == "finished"
