"""Prefect's server goes away in the middle of a run: the results matter more than the dashboard."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from chaos.world import World, healthy, kill
from harness import Command, committed_shards, small_bundle, smears, table, until, write_zip

from leukoflow.runs.progress import read_manifest
from leukoflow.storage.opening import open_storage

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
SHARDS = 8


def ask(api: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


def begin(world: World, folder: Path) -> Command:
    bundle = small_bundle(folder / "bundle")
    source = write_zip(folder / "night.zip", smears(folder / "sample", 16 * SHARDS, seed=31))
    words = ["run", str(source), "--out", str(folder), "--run-id", "night", "--bundle", str(bundle.path)]
    command = world.run([*words, "--shard-size", "16"], folder / "log", PREFECT_CLIENT_MAX_RETRIES="2")
    until(lambda: committed_shards(folder / "night"), 240, "the first shard is committed", command)
    return command


@pytest.mark.parametrize("seconds", [pytest.param(30, marks=pytest.mark.chaos_short), 120])
def test_the_run_does_not_wait_for_it_and_its_record_is_made_up(seconds: int, tmp_path: Path) -> None:
    with World(tmp_path) as world:
        command = begin(world, tmp_path)
        try:
            before = len(committed_shards(tmp_path / "night"))
            world.delay.write_text(str((seconds + 40) / 24))  # two workers have four shards or more to go
            kill(world.services["prefect server"].family())
            gone = time.monotonic()
            until(lambda: time.monotonic() > gone + seconds, seconds + 60, "it was away for long", command)
            world.supervise()
            until(lambda: healthy(world.api), 90, "it is back", command)
            assert len(committed_shards(tmp_path / "night")) > before, "no shard went on without it"
            world.delay.write_text("0")
            assert command.wait(240) == 0, command.text()[-3000:]
        finally:
            command.end()
        manifest = read_manifest(open_storage(str(tmp_path / "night")))
        assert manifest is not None
        (note,) = manifest.notes
        assert "the Prefect server did not answer from" in note
        assert "log lines of that time" in note
        assert "the Prefect server did not answer from" in (tmp_path / "night" / "report.html").read_text()
        log = next((tmp_path / "night" / "logs").iterdir()).read_text()
        assert "the Prefect server does not answer (" in log
        assert "the Prefect server answers again after" in log
        # the record is made up: every shard, the progress and the summary
        (run,) = ask(world.api, "/flow_runs/filter", {})
        assert run["state_type"] == "COMPLETED"
        shards: list[Any] = []

        def completed() -> bool:
            shards[:] = ask(world.api, "/task_runs/filter", {"limit": 200})
            return len([t for t in shards if t["state_type"] == "COMPLETED"]) == SHARDS

        until(completed, 60, f"all shards are known as completed: {[(t['name'], t['state_type']) for t in shards]}")
        artifacts = {a["key"]: a for a in ask(world.api, "/artifacts/filter", {})}
        assert artifacts["nightly-progress"]["data"] == 100.0
        assert f"{16 * SHARDS} of {16 * SHARDS} images accounted for" in artifacts["nightly-summary"]["data"]


@pytest.mark.chaos_short
def test_a_server_that_never_comes_back_is_reported_and_costs_nothing(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        command = begin(world, tmp_path)
        try:
            kill(world.services["prefect server"].family())
            assert command.wait(240) == 0, command.text()[-3000:]
        finally:
            command.end()
        words = " ".join(command.text().split())
        assert "its dashboard does not know how the run ended; the results are complete" in words
        assert "Error logging to API" not in words
        manifest = read_manifest(open_storage(str(tmp_path / "night")))
        assert manifest is not None
        (note,) = manifest.notes
        assert "may lack states of shards and log lines since then" in note
        assert note in words
        assert table(tmp_path / "night", "predictions").num_rows == 16 * SHARDS
