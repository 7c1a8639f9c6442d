"""What the stack rests on: processes that are found again and ended, secrets, backups; nothing big is started."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import until

from infra import backup
from infra.configuration import SITE, make_secrets, read_env_file, write_private
from infra.processes import MARK, STEP, Processes, StackError
from infra.stack import Stack
from leukoflow.apps.prefect_server import free_port
from leukoflow.runs.layout import OutKey

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
STUBBORN = [
    sys.executable, "-S", "-c",
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]  # fmt: skip


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    for process in found.strays():
        process.kill()
    for name in list(found._mine):
        found.stop(name)


def test_a_process_is_found_again_by_another_command_and_ended(processes: Processes) -> None:
    pid = processes.start("a worker", SLEEP, dict(os.environ))
    other = Processes(processes.folder)
    found = other.find("a worker")
    assert found is not None
    assert found.pid == pid
    assert [p.pid for p in other.strays()] == [pid]
    other.stop("a worker")
    assert other.find("a worker") is None
    assert not other.strays()
    assert processes.log("dask worker, GPU 0").name == "dask-worker-GPU-0.log"


@pytest.mark.slow
def test_what_does_not_heed_is_killed_with_its_children(processes: Processes) -> None:
    shell = ["/bin/sh", "-c", 'trap "" TERM; "$@" & wait; wait', "sh", *STUBBORN]
    processes.start("stubborn", shell, dict(os.environ))
    until(lambda: "up" in processes.tail("stubborn"), 30, "the child is up")
    assert len(processes.strays()) == 2
    processes.stop("stubborn", seconds=0.5)
    assert not processes.strays()


def test_a_process_id_that_was_given_to_somebody_else_is_not_ours(processes: Processes) -> None:
    mine = psutil.Process()
    processes.record.write_text(json.dumps({"postgres": (mine.pid, mine.create_time() - 500)}))
    assert processes.find("postgres") is None
    processes.stop("postgres", signal.SIGKILL)  # would end this test
    processes.record.write_text("half-writ")
    assert processes.names() == []


def test_what_an_interrupted_start_has_left_is_ended(tmp_path: Path) -> None:
    left = subprocess.Popen(SLEEP, env=os.environ | {MARK: str(tmp_path)}, start_new_session=True)
    try:
        Stack(tmp_path)._end_leftovers()
        assert not Stack(tmp_path).processes.strays()
    finally:
        left.kill()
        left.wait()


def test_a_step_of_a_killed_start_is_ended_and_its_services_stay(tmp_path: Path) -> None:
    found = Stack(tmp_path)
    pid = found.processes.start("postgres", SLEEP, dict(os.environ))
    step = subprocess.Popen(SLEEP, env=os.environ | {MARK: str(tmp_path), STEP: str(tmp_path)})
    try:
        Stack(tmp_path)._end_leftovers()
        assert [p.pid for p in found.processes.strays()] == [pid]
    finally:
        step.kill()
        step.wait()
        found.processes.stop("postgres")


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    first = make_secrets(tmp_path / "secrets.env")
    assert stat.S_IMODE((tmp_path / "secrets.env").stat().st_mode) == 0o600
    assert make_secrets(tmp_path / "secrets.env") == first
    assert first["PREFECT_AUTH"].startswith("leukoflow:")
    assert len(set(first.values())) == len(first)
    assert make_secrets(tmp_path / "other.env")["POSTGRES_PASSWORD"] != first["POSTGRES_PASSWORD"]
    (tmp_path / "open.env").write_text("A=1\n")
    write_private(tmp_path / "open.env", "A=2\n")
    assert stat.S_IMODE((tmp_path / "open.env").stat().st_mode) == 0o600


def test_lines_are_read_as_systemd_reads_them(tmp_path: Path) -> None:
    (tmp_path / "x.env").write_text('# words\n\nA=1\nB={"a.b":2}\nC=x=y\n')
    assert read_env_file(tmp_path / "x.env") == {"A": "1", "B": '{"a.b":2}', "C": "x=y"}


def test_the_site_of_a_stack_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leukoflow.core.site import load_site

    for name in [n for n in os.environ if n.startswith("LEUKOFLOW_")]:
        monkeypatch.delenv(name)
    (tmp_path / "site.toml").write_text(SITE)
    site = load_site(tmp_path / "site.toml")
    assert site.inbox == str(tmp_path / "inbox")
    assert site.out == str(tmp_path / "results")


def _with_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A stack whose commands are not run; the one that draws the sample leaves an archive."""
    found = Stack(folder)
    for name in ("inbox", "results"):
        (folder / name).mkdir()

    def run(command: list[str], environment: object) -> str:
        assert command[1:2] == ["sample"]
        (folder / "sample").mkdir()
        (folder / "sample" / "smears.zip").write_bytes(b"an archive")
        return ""

    monkeypatch.setattr(found, "run", run)
    return found


def test_the_first_start_leaves_a_sample_although_the_web_application_has_started_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _with_folders(tmp_path, monkeypatch)
    (tmp_path / "results" / OutKey.WEB_AUDIT).write_text("{}\n")
    found._leave_sample(lambda words: None)
    assert sorted(p.name for p in (tmp_path / "inbox").iterdir()) == ["smears.zip", "smears.zip.done"]
    for taken in (tmp_path / "inbox").iterdir():
        taken.unlink()
    found._leave_sample(lambda words: None)
    assert not any((tmp_path / "inbox").iterdir())  # once


@pytest.mark.parametrize("there", ["night-1/run.json", "inbox/stack/claims/00001.json"])
def test_a_restored_stack_gets_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    found = _with_folders(tmp_path, monkeypatch)
    (tmp_path / "results" / there).parent.mkdir(parents=True)
    (tmp_path / "results" / there).write_text("{}")
    found._leave_sample(lambda words: None)
    assert not any((tmp_path / "inbox").iterdir())


def test_a_taken_port_is_replaced() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        taken = listening.getsockname()[1]
        assert free_port(taken) != taken
    assert free_port(0) > 0


def test_there_is_no_stack_before_it_was_started(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="`make stack` starts one"):
        Stack(tmp_path / "none").status()
    assert Stack(tmp_path / "none").down() == 0


def test_one_command_at_a_time(tmp_path: Path) -> None:
    one, other = Stack(tmp_path), Stack(tmp_path)
    with one._exclusively(), pytest.raises(StackError, match="another command"), other._exclusively():
        pass


# --- backups of results ----------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two finished runs, one that is not, and what is no run; a database whose dump is a few bytes."""
    monkeypatch.setattr(backup, "find_binaries", lambda: None)
    monkeypatch.setattr(backup, "dump", lambda binaries, url, path: path.write_bytes(b"dump of " + url.encode()))
    for run, done in (("a", True), ("b", True), ("c", False)):
        (tmp_path / "out" / run / "predictions").mkdir(parents=True)
        (tmp_path / "out" / run / "run.json").write_text("{}")
        (tmp_path / "out" / run / "predictions" / "part-00000.parquet").write_text(run)
        if done:
            (tmp_path / "out" / run / "manifest.json").write_text(f'{{"run": "{run}"}}')
    (tmp_path / "out" / "inbox" / "ward" / "claims").mkdir(parents=True)
    (tmp_path / "out" / "inbox" / "ward" / "claims" / "00001.parquet").write_text("claim")
    (tmp_path / "out" / "audit.jsonl").write_text("{}\n")
    return tmp_path / "out"


def test_a_backup_has_what_is_finished_and_what_is_no_run(out: Path, tmp_path: Path) -> None:
    folder, made = backup.create(tmp_path / "backups", "postgresql://x/y", out)
    assert sorted(made.runs) == ["a", "b"]
    assert made.unfinished == ("c",)
    assert backup.read(folder) == made
    kept = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert "results/inbox/ward/claims/00001.parquet" in kept
    assert "results/audit.jsonl" in kept
    assert not any(name.startswith("results/c") for name in kept)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_has_not_changed_is_not_copied_again(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = backup.create(tmp_path / "backups", "postgresql://x/y", out)
    (out / "b" / "manifest.json").write_text('{"run": "b", "erased": true}')
    until(lambda: time.strftime("%H-%M-%S", time.gmtime()) not in first.name, 5, "another second")
    second, made = backup.create(tmp_path / "backups", "postgresql://x/y", out)
    name = "predictions/part-00000.parquet"
    assert (second / "results/a" / name).stat().st_ino == (first / "results/a" / name).stat().st_ino
    assert (second / "results/b" / name).stat().st_ino != (first / "results/b" / name).stat().st_ino
    assert made.runs["b"] != backup.read(first).runs["b"]


def test_a_backup_that_fails_leaves_nothing(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise StackError("pg_dump ended with status 1")

    monkeypatch.setattr(backup, "dump", broken)
    with pytest.raises(StackError, match="pg_dump"):
        backup.create(tmp_path / "backups", "postgresql://x/y", out)
    assert not list((tmp_path / "backups").iterdir())


def test_a_backup_is_restored_into_what_is_empty_and_only_when_whole(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored: list[bytes] = []
    monkeypatch.setattr(backup, "restore", lambda binaries, url, path: restored.append(path.read_bytes()))
    folder, made = backup.create(tmp_path / "backups", "postgresql://x/y", out)
    with pytest.raises(StackError, match="is not empty"):
        backup.put_back(folder, "postgresql://x/y", out)
    assert backup.put_back(folder, "postgresql://x/y", tmp_path / "new") == made
    assert restored == [b"dump of postgresql://x/y"]
    assert (tmp_path / "new/a/manifest.json").read_bytes() == (out / "a/manifest.json").read_bytes()
    (folder / "prefect.dump").write_bytes(b"other")
    with pytest.raises(StackError, match="damaged"):
        backup.put_back(folder, "postgresql://x/y", tmp_path / "third")
    with pytest.raises(StackError, match="no backup"):
        backup.read(tmp_path)
