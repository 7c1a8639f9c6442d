"""What an operator sees when a run failed, and that what docs/operating.md tells them to do mends it.

"A run failed, what now" names five causes. The server that is down is in test_prefect_away.py, the poisoned image in
tests/integration/test_poison.py; the others are here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.world import World, kill
from faults import FaultyProxy, moto_server, s3_account
from harness import ROOT, Command, committed_shards, small_bundle, smears, start, table, until, write_zip

from leukoflow.runs.progress import read_progress
from leukoflow.storage.opening import open_storage

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
IMAGES = 96


def words_of(command: Command) -> str:
    return " ".join(command.text().split())


def launch(bundle: Path, source: Path, out: str, log: Path, delay: float, home: Path, **environment: str) -> Command:
    """A run with local workers and a Prefect server of its own, as on a laptop."""
    words = ["run", str(source), "--out", out, "--run-id", "night", "--bundle", str(bundle)]
    return start(
        [*words, "--shard-size", "16", "--workers", "2"],
        log,
        EXTRA_PATH=str(ROOT / "tests" / "hooks"),
        TEST_DELAY_SECONDS=str(delay),
        LEUKOFLOW_PREFECT_HOME=str(home / "prefect"),
        LEUKOFLOW_LIMITS__RETRY_DELAY_SECONDS="0.1",
        **environment,
    )


def test_workers_that_are_lost_again_and_again(tmp_path: Path) -> None:
    """One lost worker is mended by the run itself; this is what is seen when something kills them all the time."""
    bundle = small_bundle(tmp_path / "bundle")
    source = write_zip(tmp_path / "night.zip", smears(tmp_path / "sample", 32, seed=41))
    with World(tmp_path) as world:
        world.delay.write_text("1")
        words = ["run", str(source), "--out", str(tmp_path), "--run-id", "night", "--bundle", str(bundle.path)]
        words += ["--shard-size", "16"]
        command = world.run(words, tmp_path / "log", LEUKOFLOW_LIMITS__SHARD_RETRIES="1")
        root = tmp_path / "night"
        try:
            seen: set[Path] = set()
            deaths = 0
            while command.process.poll() is None and deaths < 40:
                started = set(root.glob("_attempts/*/*/started/prepare-*")) - seen
                if started:
                    seen |= started
                    deaths += kill(world.worker_processes())
                world.supervise()
                until(lambda c=command: c.process.poll() is not None or world.worker_processes(), 60, "workers again")
            assert command.wait(240) == 1, command.text()[-3000:]
        finally:
            command.end()
        assert "shards failed after 2 attempts each" in words_of(command)
        assert f"leukoflow status {tmp_path} night" in words_of(command)
        failed = read_progress(str(root)).failed_shards
        assert failed
        assert any("its worker process died" in message for _, message in failed), failed
        world.delay.write_text("0")
        again = world.run(words, tmp_path / "log2")
        try:
            assert again.wait(300) == 0, again.text()[-3000:]
        finally:
            again.end()
    assert table(root, "predictions").num_rows == 32


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of limited size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=320m tmpfs '{folder}' 2>/dev/null"):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        os.system(f"umount -l '{folder}'")


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            return ballast


@pytest.mark.chaos_short
def test_a_full_disk(disk: Path, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle").path
    source = write_zip(tmp_path / "night.zip", smears(tmp_path / "sample", IMAGES, seed=22))
    command = launch(bundle, source, str(disk), tmp_path / "log", 0.1, tmp_path)
    try:
        until(lambda: committed_shards(disk / "night"), 240, "the first shard is committed", command)
        ballast = fill(disk)
        assert command.wait(400) == 1, command.text()[-3000:]
        words = words_of(command)
        assert f"the disk that holds {disk}/night is full" in words or "make room on that disk" in words, words[-2000:]
        assert "Traceback" not in words
        assert command.survivors() == []
    finally:
        command.end()
    assert len(committed_shards(disk / "night")) < IMAGES // 16
    too_early = launch(bundle, source, str(disk), tmp_path / "log2", 0, tmp_path)
    try:
        assert too_early.wait(400) == 1
        assert "make room on that disk" in words_of(too_early) or "free some space" in words_of(too_early)
    finally:
        too_early.end()
    ballast.unlink()
    again = launch(bundle, source, str(disk), tmp_path / "log3", 0, tmp_path)
    try:
        assert again.wait(400) == 0, again.text()[-3000:]
    finally:
        again.end()
    assert table(disk / "night", "predictions").num_rows == IMAGES


def test_a_store_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = small_bundle(tmp_path / "bundle").path
    source = write_zip(tmp_path / "night.zip", smears(tmp_path / "sample", IMAGES, seed=23))
    with moto_server() as url, FaultyProxy(url) as proxy:
        for name, value in s3_account(url).items():
            monkeypatch.setenv(name, value)
        storage = open_storage("s3://nights")
        storage.fs.mkdir("nights")
        away = {"AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "2"}
        command = launch(bundle, source, "s3://nights", tmp_path / "log", 0.2, tmp_path, **away)
        try:
            until(lambda: storage.names("night/markers/predictions"), 240, "the first shard is committed", command)
            with proxy.outage("refuse"):
                assert command.wait(400) == 1, command.text()[-3000:]
            words = words_of(command)
            assert "s3://nights/night/" in words, words[-2000:]
            assert "cannot be reached or breaks connections" in words, words[-2000:]
            assert "bug in the program" not in words, words[-2000:]
            assert command.survivors() == []
        finally:
            command.end()
        again = launch(bundle, source, "s3://nights", tmp_path / "log2", 0, tmp_path, **away)
        try:
            assert again.wait(400) == 0, again.text()[-3000:]
        finally:
            again.end()
