"""The deployments of prefect.yaml: valid, importable, and a night that a cron fires on a process work pool."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import ROOT, smears, table, until, write_folder

from leukoflow.models.bundle import Bundle
from leukoflow.runs.ledger import Ledger
from leukoflow.runs.progress import read_manifest
from leukoflow.storage.opening import open_storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
FILE = ROOT / "deployments" / "prefect.yaml"
NIGHTLY = "leukoflow night/nightly"

KILL_AFTER_CLAIM = """
import importlib.abc, importlib.util, os, pathlib, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "leukoflow.tasks.intake.inbox":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            take = module.take
            def trapped(*args):
                head = take(*args)
                flag = pathlib.Path(os.environ["TEST_KILLED"])
                if head is not None and not flag.exists():
                    flag.write_text("killed")
                    os.kill(os.getpid(), signal.SIGKILL)
                return head
            module.take = trapped
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def test_every_deployment_is_valid_and_its_flow_can_be_imported() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.flows import load_flow_from_entrypoint

    model = PrefectYamlModel.model_validate(yaml.safe_load(FILE.read_text()))
    names = [d.name for d in model.deployments]
    assert len(set(names)) == len(names)
    assert {"nightly", "rerun", "train", "evaluate", "retention"} <= set(names)
    assert model.pull == []
    for deployment in model.deployments:
        assert deployment.entrypoint is not None
        assert ":" not in deployment.entrypoint  # a file would give the module a name that workers cannot import
        flow: Any = load_flow_from_entrypoint(deployment.entrypoint, use_placeholder_flow=False)
        accepted = set(flow.parameters.properties)
        assert set(deployment.parameters) <= accepted, deployment.name
        assert deployment.work_pool is not None
    for name in ("nightly", "nightly-kubernetes", "nightly-docker"):
        (nightly,) = [d for d in model.deployments if d.name == name]
        assert nightly.concurrency_limit.limit == 1  # type: ignore[union-attr]
        assert nightly.concurrency_limit.collision_strategy == "ENQUEUE"  # type: ignore[union-attr]
        assert nightly.schedules


def prefect(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def nights() -> list[Any]:
    """Runs of the deployment that have ended, the earliest first."""
    from prefect.client.orchestration import get_client  # not before the server is chosen: settings are read at import

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(NIGHTLY)
        runs = [r for r in client.read_flow_runs(limit=200) if r.deployment_id == deployment.id]
    ended = [r for r in runs if r.state is not None and r.state.is_final() and r.start_time is not None]
    return sorted(ended, key=lambda r: r.start_time)


@pytest.fixture
def worker(server: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker that polls every second, and whose first night is killed right after its claim."""
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "sitecustomize.py").write_text(KILL_AFTER_CLAIM)
    prefect("work-pool", "create", "--type", "process", "leukoflow")
    settings = {
        "PYTHONPATH": f"{tmp_path / 'trap'}{os.pathsep}{ROOT}",
        "TEST_KILLED": str(tmp_path / "killed"),
        "LEUKOFLOW_SITE": str(tmp_path / "site.toml"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    }
    with (tmp_path / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "leukoflow", "--name", "site"],
            cwd=tmp_path, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    yield process
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.mark.chaos
def test_a_cron_fires_the_night_and_the_next_one_finishes_what_was_killed(
    server: str, worker: subprocess.Popen[bytes], bundle: Bundle, tmp_path: Path
) -> None:
    fields = smears(tmp_path / "sample", 20, seed=4)
    names = list(fields)
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    write_folder(inbox, {f"slide-1/{i:02d}.jpg": fields[name] for i, name in enumerate(names[:16])})
    (tmp_path / "site.toml").write_text(
        f'name = "ward"\ninbox = "inbox"\nout = "out"\n[arrival]\nsettle_seconds = 0\n'
        f'[run]\nbundle = "{bundle.path}"\nshard_size = 16\n[run.cluster]\nworkers = 1\n'
    )
    every_minute = FILE.read_text().replace('cron: "0 20 * * *"', 'cron: "* * * * *"')
    assert every_minute.count("* * * * *") == 1
    (tmp_path / "prefect.yaml").write_text(every_minute)
    prefect("deploy", "--prefect-file", str(tmp_path / "prefect.yaml"), "-n", "nightly")

    def log() -> str:
        return (tmp_path / "worker.log").read_text(errors="replace")[-3000:]

    until(lambda: (tmp_path / "killed").exists(), 150, "the first firing claims")
    ledger = Ledger(str(out), "ward")
    (claim,) = ledger.read().heads
    assert ledger.outcome(1) is None
    assert not (out / claim.name / "run.json").exists()

    until(lambda: ledger.outcome(1), 180, "the second firing finishes the claim of the first")
    manifest = read_manifest(open_storage(str(out / claim.name)))
    assert manifest is not None
    assert manifest.members == 16
    rows = table(out / claim.name, "predictions")
    assert rows["image_key"].to_pylist() == [f"slide-1/{i:02d}.jpg" for i in range(16)]

    # Another slide, and a night that somebody starts by hand: what was taken is not taken again.
    write_folder(inbox, {f"slide-2/{i}.jpg": fields[name] for i, name in enumerate(names[16:])})
    prefect("deployment", "run", NIGHTLY)
    until(lambda: ledger.outcome(2), 180, "the slide that came later is screened")
    heads = ledger.read().heads
    assert [h.number for h in heads] == [1, 2]
    later = table(out / heads[1].name, "predictions")
    assert later["image_key"].to_pylist() == [f"slide-2/{i}.jpg" for i in range(4)]
    assert {p.name for p in out.iterdir()} == {"inbox", *(h.name for h in heads)}

    ended = until(lambda: found if len(found := nights()) >= 3 else None, 120, "Prefect knows of the ends")
    assert ended[0].state.is_crashed(), log()
    assert ended[1].state.is_completed(), log()
    assert claim.name in str(ended[1].state.message)
    assert worker.poll() is None
