"""A run whose parts live on separate hosts, while hosts vanish, are cut off, restarted and upgraded.

Each ends reconciled, or with a message that says how to go on, and then the same command finishes; the tables are
always those of an undisturbed run. LEUKOFLOW_HOSTS_LONG=1 cuts hosts off for 60 s with Dask's usual time limits, and
also the scheduler's and the flow's host; else it is 25 s with shorter ones (15 s), and a worker's host.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Command, assert_same, screen_here, small_bundle, smears, table, until, write_zip
from hosts import (
    Lab,
    Unavailable,
    bucket,
    build_wheel,
    laboratory,
    start_prefect,
    start_run,
    start_scheduler,
    start_store,
    start_worker,
)

LONG = bool(os.environ.get("LEUKOFLOW_HOSTS_LONG"))
CUT_SECONDS = 60 if LONG else 25
IMAGES = 160 if LONG else 96
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@dataclass
class Night:
    """The hosts with everything on them, and what an undisturbed run makes of the source."""

    lab: Lab
    bundle: Path
    whole: Path
    folder: Path

    def run(self, run_id: str) -> Command:
        words = ["s3://lab/in/night.zip", "--out", "s3://lab/out", "--run-id", run_id, "--bundle", str(self.bundle)]
        words += ["--shard-size", "16", "--cluster", f"tcp://{self.lab['sched'].ip}:8786"]
        settings = {
            "LIMITS__RETRY_DELAY_SECONDS": "0.5",
            "CLUSTER__LOST_SECONDS": "120",
            "CLUSTER__WAIT_SECONDS": "120",
        }
        return start_run(self.lab, "flow", *words, **{f"LEUKOFLOW_{key}": value for key, value in settings.items()})

    def objects(self, prefix: str) -> int:
        """How many there are, up to 1,000."""
        found = self.lab.inside("store", lambda: bucket(self.lab).list_objects_v2(Bucket="lab", Prefix=prefix))
        return int(found["KeyCount"])

    def until_logged(self, run: Command, words: str) -> None:
        """Waits for a line of the run's log, which lies on its host until the run ends."""

        def logged() -> bool:
            with contextlib.suppress(FileNotFoundError):
                return any(words in log.read_text() for log in self.lab["flow"].folder.glob("leukoflow-log-*/run.log"))
            return False

        until(logged, 240, words, run)

    def until_committed(self, run: Command, run_id: str, shards: int) -> None:
        prefix = f"out/{run_id}/markers/predictions/"
        until(lambda: self.objects(prefix) >= shards, 240, f"{shards} shards are committed", run)

    def finish(self, run: Command, run_id: str) -> list[int]:
        """Exit codes until it is through; each failure says how to go on. Then the tables are compared."""
        codes = []
        while True:
            try:
                codes.append(run.wait(420))
            finally:
                run.end()
            if codes[-1] == 0:
                break
            words = " ".join(run.text().split())
            assert re.search(r"leukoflow (run s3://lab/in/night\.zip|rerun s3://lab/out) ", words), run.text()[-3000:]
            assert "Traceback" not in run.text(), run.text()[-3000:]
            assert len(codes) < 4, run.text()[-3000:]
            run = self.run(run_id)
        self.compare(run_id)
        return codes

    def compare(self, run_id: str) -> None:
        root = self.folder / run_id

        def fetch() -> None:
            client = bucket(self.lab)
            for page in client.get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix=f"out/{run_id}/"):
                for entry in page["Contents"]:
                    path = root / entry["Key"].removeprefix(f"out/{run_id}/")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(client.get_object(Bucket="lab", Key=entry["Key"])["Body"].read())

        self.lab.inside("store", fetch)
        assert (root / "manifest.json").is_file()
        assert table(root, "predictions").num_rows == IMAGES
        assert_same(self.whole, root)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    folder = tmp_path_factory.mktemp("lab")
    with contextlib.ExitStack() as stack:
        wheel = build_wheel(folder)
        try:
            lab = stack.enter_context(
                laboratory(folder, wheel, ["store", "prefect", "sched", "w1", "w2", "w3", "w4", "flow"])
            )
        except Unavailable as reason:
            pytest.skip(str(reason))
        lab.environment["TEST_DELAY_SECONDS"] = "0.3"
        if not LONG:
            lab.environment["DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP"] = "15s"
        bundle = small_bundle(folder / "bundle")
        source = write_zip(folder / "night.zip", smears(folder / "sample", IMAGES, seed=31))
        start_store(lab, "store")
        start_prefect(lab, "prefect")
        start_scheduler(lab, "sched")
        for name in ("w3", "w4"):
            lab.stop(name)
        for name in ("w1", "w2"):
            start_worker(lab, name, "sched")
        data = source.read_bytes()
        lab.inside("store", lambda: bucket(lab).put_object(Bucket="lab", Key="in/night.zip", Body=data))
        run = screen_here(source, folder / "here", "whole", bundle)
        yield Night(lab, bundle.path, Path(run.root), folder)


def test_an_undisturbed_run_on_several_hosts(night: Night) -> None:
    """All that runs comes from the wheel; nobody sees a checkout."""
    assert night.finish(night.run("quiet"), "quiet") == [0]
    where = night.lab["flow"].folder / "where"
    words = f"import json, leukoflow, sys; json.dump([leukoflow.__file__, sys.path], open({str(where)!r}, 'w'))"
    assert night.lab.python("flow", "-c", words).wait(120) == 0
    origin, paths = json.loads(where.read_text())
    assert origin.startswith(str(night.lab.wheel))
    assert [path for path in paths if (Path(path) / "leukoflow").is_dir()] == [str(night.lab.wheel)]


def test_a_host_that_vanishes(night: Night) -> None:
    run = night.run("vanished")
    night.until_committed(run, "vanished", 1)
    night.lab.unplug("w1")
    night.lab.stop("w1")
    try:
        codes = night.finish(run, "vanished")
    finally:
        night.lab.plug("w1")
        start_worker(night.lab, "w1", "sched")
    assert codes == [0]  # the other worker does the rest


@pytest.mark.parametrize("victim", ["w1", "sched", "flow"] if LONG else ["w1"])
def test_a_host_that_is_cut_off_for_a_while(night: Night, victim: str) -> None:
    run = night.run(f"cut-{victim}")
    night.until_committed(run, f"cut-{victim}", 1)
    night.lab.unplug(victim)
    end = time.monotonic() + CUT_SECONDS
    while time.monotonic() < end:
        time.sleep(0.2)
    night.lab.plug(victim)
    night.finish(run, f"cut-{victim}")


def test_a_scheduler_that_is_restarted(night: Night) -> None:
    run = night.run("restarted")
    night.until_committed(run, "restarted", 1)
    night.lab.stop("sched")
    start_scheduler(night.lab, "sched")
    assert night.finish(run, "restarted") == [0]


def test_workers_are_replaced_while_a_run_goes_on(night: Night) -> None:
    """One with other code is refused; one with the same code takes over from those that retire."""
    other = night.folder / "other"
    shutil.copytree(night.lab.wheel, other)
    with (other / "leukoflow" / "tasks" / "imaging" / "quality.py").open("a") as file:
        file.write("# one more line\n")
    lab = night.lab
    run = night.run("rolling")
    try:
        until(lambda: night.objects("out/rolling/_attempts/0"), 240, "the first shard has started", run)
        paths = lab.environment["PYTHONPATH"].replace(str(lab.wheel), str(other))
        start_worker(lab, "w3", "sched", PYTHONPATH=paths, LAB_WHEEL=str(other))
        start_worker(lab, "w4", "sched")
        night.until_logged(run, "3 workers")
        night.until_logged(run, "is refused: it runs other code")
        lab.stop("w1", 15)
        lab.stop("w2", 15)
        assert night.finish(run, "rolling") == [0]
    finally:
        for name in ("w3", "w4"):
            lab.stop(name)
        for name in ("w1", "w2"):
            start_worker(lab, name, "sched")
