"""Runs that are started together: each gets a Prefect server, workers and ports of its own, and all end well."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from harness import smears, start, write_zip

from leukoflow.progress import list_runs, read_progress
from models.bundle import Bundle

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
