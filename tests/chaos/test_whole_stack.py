"""The stack of `make stack`: by itself every minute, through kills, from a backup, after an upgrade; and gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, smears, until, write_zip

from infra.processes import MARK
from infra.stack import Stack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]


LEUKOFLOW = ("-m", "leukoflow")


def environment(folder: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "LEUKOFLOW_"))}
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    mine = {"LEUKOFLOW_STACK": str(folder), "LEUKOFLOW_STACK_CRON": "* * * * *", "PYTHONPATH": path, "COLUMNS": "160"}
    return inherited | mine


def command(folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "infra.stack")) -> str:
    done = subprocess.run(
        [sys.executable, *program, *arguments], env=environment(folder), cwd=ROOT, timeout=600,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's: Postgres runs as another one where we are root."""
    with tempfile.TemporaryDirectory(prefix="leukoflow-stack-") as name:
        place = Path(name)
        place.chmod(0o755)
        yield place
        for stack in sorted(place.glob("*/stack.json")):
            Stack(stack.parent).down()


def loaded(folder: Path) -> Stack:
    stack = Stack(folder)
    stack._load()
    return stack


def runs(stack: Stack, flow: str = "leukoflow night") -> list[dict[str, Any]]:
    wanted = {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
    return list(stack.services.ask_prefect("/flow_runs/filter", wanted) or [])


def hand_over(stack: Stack, name: str, images: int, seed: int, scratch: Path) -> None:
    """An archive that is complete, as the hospital's system puts it there."""
    inbox = stack.folder / "inbox"
    made = write_zip(scratch / f"{name}.zip", smears(scratch / f"{name}-fields", images, seed=seed))
    (inbox / f"{name}.zip.part").write_bytes(made.read_bytes())
    (inbox / f"{name}.zip.part").rename(inbox / f"{name}.zip")
    (inbox / f"{name}.zip.done").touch()


def finished(stack: Stack, name: str) -> dict[str, Any] | None:
    """The manifest of the run of an archive."""
    found = list(stack.config.results.glob(f"*.{name}/manifest.json"))
    return json.loads(found[0].read_text()) if found else None


def assert_nothing_left(folder: Path, pids: list[int], ports: list[int]) -> None:
    assert not Stack(folder).processes.strays()
    for pid in pids:
        try:
            assert f"{MARK}={folder}" not in Path(f"/proc/{pid}/environ").read_text(errors="replace")
        except OSError:
            continue
    for port in ports:
        with socket.socket() as probe, pytest.raises(OSError, match="refused"):
            probe.connect(("127.0.0.1", port))


def test_a_stack_runs_its_nights_by_itself_and_survives_its_worker(folder: Path, tmp_path: Path) -> None:
    place = folder / "stack"
    began = time.monotonic()
    words = command(place, "up")
    print(f"up after {time.monotonic() - began:.0f} s")
    assert "does not answer" not in words
    stack = loaded(place)
    assert stat.S_IMODE((place / "secrets.env").stat().st_mode) == 0o600
    assert stat.S_IMODE((place / "env.sh").stat().st_mode) == 0o600
    assert all(secret not in words for secret in stack.config.secrets.values())

    # the schedule fires within its minute, takes the sample, and accounts for every image
    first = until(lambda: [r for r in runs(stack) if r["start_time"]], 150, "a night that begins")[0]
    due, began = (
        datetime.fromisoformat(first[k].replace("Z", "+00:00")) for k in ("expected_start_time", "start_time")
    )
    assert (began - due).total_seconds() < 60
    manifest = until(lambda: finished(stack, "smears"), 400, "the sample's manifest")
    assert manifest["members"] == 32
    assert sum(manifest[k] for k in ("predicted", "abstained", "rejected", "quarantined")) == 32
    command(place, "verify", str(stack.config.results), program=LEUKOFLOW)

    # a second time it is found running
    before = {name: stack.processes.find(name) for name in stack.processes.names()}
    assert "runs already" in command(place, "up")
    assert before == {name: stack.processes.find(name) for name in stack.processes.names()}

    # worker and flow are killed in the middle of a night; `up` starts the worker, a later night finishes the archive
    hand_over(stack, "second", 40, 11, tmp_path)
    until(lambda: list(stack.config.results.glob("*.second/run.json")), 180, "the run of the second archive")
    running = [r for r in runs(stack) if r["state_type"] == "RUNNING"]
    for process in [before["prefect worker"], *before["prefect worker"].children(recursive=True)]:  # type: ignore[union-attr]
        os.kill(process.pid, signal.SIGKILL)
    command(place, "up")
    until(lambda: finished(stack, "second"), 600, "the manifest of the second archive")
    ids = {r["id"] for r in running}
    crashed = until(
        lambda: [r for r in runs(stack) if r["id"] in ids and r["state_type"] == "CRASHED"], 300, "the verdict"
    )
    assert crashed[0]["state"]["message"].startswith("No sign of life")
    command(place, "verify", str(stack.config.results), program=LEUKOFLOW)

    pids = [p.pid for p in stack.processes.strays()]
    command(place, "down")
    assert_nothing_left(place, pids, list(stack.config.ports.values()))
    command(place, "down")  # a second time there is nothing to do


def test_a_backup_restores_into_a_fresh_stack_and_an_older_database_is_upgraded(folder: Path, tmp_path: Path) -> None:
    old, new = folder / "old", folder / "new"
    # a start that is killed in the middle is taken up by the next one
    half = subprocess.Popen(
        [sys.executable, "-m", "infra.stack", "up"], env=environment(old), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    until(lambda: Stack(old).processes.find("dask scheduler"), 120, "a start that is half done")
    half.kill()
    half.wait()
    command(old, "up")
    stack = loaded(old)
    until(lambda: finished(stack, "smears"), 400, "the sample's manifest")
    nights = until(lambda: {r["id"] for r in runs(stack) if r["state_type"] == "COMPLETED"}, 120, "its night's end")
    made = Path(command(old, "backup", str(folder / "backups")).strip().splitlines()[-1])
    again = Path(command(old, "backup", str(folder / "backups")).strip().splitlines()[-1])
    run = next((again / "results").glob("*.smears"))
    assert (run / "manifest.json").stat().st_ino == (made / "results" / run.name / "manifest.json").stat().st_ino
    command(old, "down")

    new.mkdir()
    (new / "secrets.env").write_text((old / "secrets.env").read_text())
    command(new, "restore", str(again))
    restored = loaded(new)
    # the database of the release before: one migration less than is installed
    service = next(iter(restored.services()))
    restored._start(service, print)
    restored._await(service)
    version = restored.postgres.query("prefect", "select version_num from alembic_version").strip()
    downgrade = [sys.executable, "-m", "prefect", "server", "database", "downgrade", "--yes", "-r", "-1"]
    restored.run(downgrade, restored.server_environment())
    assert restored.postgres.query("prefect", "select version_num from alembic_version").strip() != version
    # and a night of long ago, which the server forgets by itself
    aged = sorted(nights)[0]
    restored.postgres.query("prefect", f"update flow_run set end_time = now() - interval '91 days' where id = '{aged}'")
    restored.processes.stop(service.name, signal.SIGINT)

    command(new, "up")
    assert restored.postgres.query("prefect", "select version_num from alembic_version").strip() == version
    until(lambda: aged not in {r["id"] for r in runs(restored)}, 120, "the old record is gone")
    assert nights - {aged} <= {r["id"] for r in runs(restored)}
    command(new, "verify", str(restored.results), program=LEUKOFLOW)
    hand_over(restored, "after", 16, 5, tmp_path)
    until(lambda: finished(restored, "after"), 400, "a night after the upgrade")
    command(new, "verify", str(restored.results), program=LEUKOFLOW)
    assert len(list(restored.results.glob("*.smears"))) == 1  # the sample was not taken again
    command(new, "down")
