"""Kills what makes up a run at random moments until it is through: nothing may be lost, doubled or moved by a bit.

Four kills, one of each kind, in `make chaos`; LEUKOFLOW_CHAOS_KILLS=20 for a long evening, LEUKOFLOW_CHAOS_SEED for
other moments.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from harness import (
    ROOT,
    Command,
    assert_same,
    committed_shards,
    small_bundle,
    smears,
    start,
    table,
    until,
    write_tar,
    write_zip,
)

from leukoflow.runs.progress import read_manifest
from leukoflow.storage.opening import open_storage

KILLS = int(os.environ.get("LEUKOFLOW_CHAOS_KILLS", "4"))
SEED = int(os.environ.get("LEUKOFLOW_CHAOS_SEED", "1"))
IMAGES = 96 if KILLS <= 4 else 320
VICTIMS = ("flow", "one worker", "all workers", "server")
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600 + 180 * KILLS)]


def launch(folder: Path, source: Path, run_id: str, delay: float = 0.05, home: Path | None = None) -> Command:
    """The command as a user types it, with its own Prefect server; images are a little slow, so that it can be hit."""
    words = ["run", str(source), "--out", str(folder), "--run-id", run_id, "--bundle", str(folder / "bundle")]
    return start(
        [*words, "--shard-size", "16", "--workers", "2"],
        folder / f"{run_id}.log",
        EXTRA_PATH=str(ROOT / "tests" / "hooks"),
        TEST_DELAY_SECONDS=str(delay),
        LEUKOFLOW_PREFECT_HOME=str((home or folder) / "prefect"),
        LEUKOFLOW_LIMITS__RETRY_DELAY_SECONDS="0.1",
        PREFECT_CLIENT_MAX_RETRIES="2",  # the server that is killed here never comes back
    )


def strike(command: Command, victim: str) -> int:
    """Kills, if the victim is there; how many processes died."""
    targets: list[psutil.Process] = {
        "flow": lambda: [psutil.Process(command.pid)],
        "one worker": lambda: command.workers()[:1],
        "all workers": command.workers,
        "server": lambda: command.find("_prefect_process.py"),
    }[victim]()
    command.family()
    for target in targets:
        target.kill()
    return len(targets)


def attempts(root: Path) -> set[str]:
    """Attempts that have started to process images."""
    return {str(p) for p in (root / "_attempts").glob("*/*/started")}


@pytest.mark.parametrize("kind", ["zip", "tgz"] if KILLS > 3 else ["zip"])
def test_kills_at_random_moments(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_bundle(tmp_path / "bundle")
    images = smears(tmp_path / "sample", IMAGES, seed=21)
    if kind == "zip":
        source = write_zip(tmp_path / "night.zip", images)
    else:
        source = write_tar(tmp_path / "night.tgz", images, "gz")
    root = tmp_path / "chaos"
    whole = launch(tmp_path, source, "whole", delay=0)
    try:
        assert whole.wait(600) == 0, whole.text()[-3000:]
    finally:
        whole.end()
    dice = random.Random(SEED)
    struck, starts, codes = Counter[str](), 0, Counter[int]()
    kills = KILLS if kind == "zip" else 3
    began = time.monotonic()
    while True:
        command = launch(tmp_path, source, "chaos", delay=0.1)
        starts += 1
        try:
            while command.process.poll() is None and struck.total() < kills:
                # the next in turn, so that few kills meet everybody; the moment is what chance decides
                victim = VICTIMS[(struck.total() + SEED) % len(VICTIMS)]
                before = len(committed_shards(root))
                early = dice.random() < 0.2  # while the workers still start; else while shards are done
                seen = attempts(root)
                until(
                    lambda c=command, early=early, seen=seen: (
                        c.process.poll() is not None or (c.workers() if early else attempts(root) - seen)
                    ),
                    240,
                    "there is somebody to strike at",
                )
                moment = time.monotonic() + dice.uniform(0.0, 4.0)
                while time.monotonic() < moment and command.process.poll() is None:
                    if len(committed_shards(root)) >= min(before + 2, IMAGES // 16 - 1):
                        break  # enough is done: strike now, or nothing will be left to strike at
                    time.sleep(0.01)
                if command.process.poll() is None and strike(command, victim):
                    struck[victim] += 1
                    if victim in ("flow", "server"):
                        break
                    time.sleep(1.0)
            codes[command.wait(400)] += 1
            survivors = command.survivors(30)
            assert survivors == [], survivors
        finally:
            command.end()
        if command.process.returncode == 0:
            break
        assert starts < 3 * kills + 5, command.text()[-3000:]
    assert_same(tmp_path / "whole", root)
    rows = table(root, "predictions")["image_key"].to_pylist()
    assert rows == list(images)
    manifest = read_manifest(open_storage(str(root)))
    assert manifest is not None
    assert manifest.members == IMAGES
    with capsys.disabled():
        print(
            f"\nchaos, {kind}: {struck.total()} kills ({dict(struck)}) in {starts} starts, exit codes {dict(codes)}, "
            f"{time.monotonic() - began:.0f} s; {len(rows)} of {IMAGES} rows, all bytes as undisturbed"
        )
