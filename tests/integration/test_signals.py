"""Being stopped and being killed: a wish to stop is heeded in an orderly way, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Command, assert_same, committed_shards, digests, smears, start, until, write_zip

from leukoflow.models.bundle import Bundle
from leukoflow.runs.progress import read_progress

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
HOOKS = str(ROOT / "tests" / "hooks")
Launch = Callable[..., Command]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    return write_zip(folder / "long.zip", smears(folder / "sample", 128, seed=8))


@pytest.fixture(scope="module")
def undisturbed(screen: Any, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    state = screen(archive, out, "long")
    assert state.is_completed(), state.message
    return out / "long"


@pytest.fixture
def launch(archive: Path, bundle: Bundle, tmp_path: Path) -> Iterator[Launch]:
    """Starts the run as a command with two worker processes of its own; images are slow, so that it can be met."""
    started: list[Command] = []

    def launch(**environment: str) -> Command:
        words = ["run", str(archive), "--out", str(tmp_path), "--run-id", "long", "--bundle", str(bundle.path)]
        words += ["--shard-size", "16", "--workers", "2"]
        settings = {"EXTRA_PATH": HOOKS, "TEST_DELAY_SECONDS": "0.1"} | environment
        started.append(start(words, tmp_path / f"log{len(started)}", **settings))
        return started[-1]

    yield launch
    for command in started:
        command.end()


def first_commit(command: Command, root: Path) -> None:
    until(lambda: committed_shards(root), 240, "the first shard is committed", command)


def assert_drained(command: Command, root: Path) -> None:
    assert command.wait() == 130, command.text()[-3000:]
    words = " ".join(command.text().split())
    assert "asked to stop and has drained" in words
    assert "To take it up again: leukoflow run" in words
    assert command.survivors() == []
    progress = read_progress(str(root))
    assert progress.state == "cancelled"
    assert progress.failed_shards == ()
    assert 1 <= progress.shards_done < 8
    left = {p.parts[-2] for p in (root / "_attempts").glob("*/*") if p.parts[-2].isdigit()}
    assert left <= set(committed_shards(root))  # nothing was torn: all that had started have finished


def assert_resumes(screen: Any, archive: Path, root: Path, undisturbed: Path) -> None:
    before = {f: digests(root / f) for f in ("predictions", "cells")}
    state = screen(archive, root.parent, "long")
    assert state.is_completed(), state.message
    assert_same(undisturbed, root)
    for folder, kept in before.items():
        assert kept.items() <= digests(root / folder).items()


def test_sigterm_drains(
    launch: Launch, server: str, screen: Any, archive: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = launch(PREFECT_API_URL=server)
    first_commit(command, tmp_path / "long")
    command.family()
    command.process.terminate()
    assert_drained(command, tmp_path / "long")
    assert_resumes(screen, archive, tmp_path / "long", undisturbed)


@pytest.mark.chaos  # as SIGTERM, by another key
def test_ctrl_c_drains(
    launch: Launch, server: str, screen: Any, archive: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A terminal sends it to the whole process group, workers and decoders included."""
    command = launch(PREFECT_API_URL=server)
    first_commit(command, tmp_path / "long")
    workers = {p.pid for p in command.workers()}
    assert len(workers) == 2
    os.killpg(command.pid, signal.SIGINT)
    assert_drained(command, tmp_path / "long")
    assert command.worker_pids == workers
    assert_resumes(screen, archive, tmp_path / "long", undisturbed)


def test_cancel_in_prefect_drains(launch: Launch, server: str, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.states import Cancelling

    command = launch(PREFECT_API_URL=server, TEST_DELAY_SECONDS="1.0")  # it is asked for every few seconds
    # Four of eight shards are on their way, and none is through before somebody looks whether Cancel was pressed.
    attempts = (tmp_path / "long" / "_attempts").glob
    until(lambda: any(attempts("*/*/started/prepare-*")), 240, "the first shard has started", command)
    with get_client(sync_client=True) as client:
        ours = FlowRunFilter(tags=FlowRunFilterTags(all_=["run:long"]))
        newest = client.read_flow_runs(flow_run_filter=ours, limit=1, sort=FlowRunSort.EXPECTED_START_TIME_DESC)[0]
        assert newest.name == "screening, run long"
        assert set(newest.tags) == {"leukoflow", "run:long"}
        client.set_flow_run_state(uuid.UUID(str(newest.id)), Cancelling())
        assert_drained(command, tmp_path / "long")
        state = client.read_flow_run(newest.id).state
    assert state is not None
    assert state.is_cancelled()


def test_a_second_signal_ends_at_once(launch: Launch, server: str, tmp_path: Path) -> None:
    command = launch(PREFECT_API_URL=server, TEST_DELAY_SECONDS="20")
    until(lambda: command.find("leukoflow.tasks.decoding.decode_child"), 240, "a worker decodes", command)
    command.process.terminate()
    log = tmp_path / "long" / "logs"
    until(lambda: "finishing what is in progress" in next(log.iterdir()).read_text(), 60, "the first is heard", command)
    began = time.monotonic()
    command.process.terminate()
    assert command.wait(100) == 130, command.text()[-3000:]
    assert time.monotonic() - began < 100  # a shard would take 320 s
    assert command.survivors() == []
    assert committed_shards(tmp_path / "long") == []


def test_kill_leaves_nobody_behind(
    launch: Launch, screen: Any, archive: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """With a server of its own: that one, the workers and their decoders notice by themselves."""
    command = launch(LEUKOFLOW_PREFECT_HOME=str(tmp_path / "prefect"))
    first_commit(command, tmp_path / "long")
    assert len(command.workers()) == 2
    assert command.find("leukoflow.tasks.decoding.decode_child")
    assert command.find("_prefect_process.py")
    command.process.kill()
    command.process.wait()
    assert command.survivors() == []
    assert read_progress(str(tmp_path / "long")).state == "killed"
    assert_resumes(screen, archive, tmp_path / "long", undisturbed)
    assert read_progress(str(tmp_path / "long")).state == "finished"
