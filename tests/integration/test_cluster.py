"""Workers are ours: bounded threads, our environment, one GPU each; what is missing is an error, not a hang."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import trustme
from dask_processes import DaskProcesses, dask_processes
from harness import ROOT, until
from on_workers import nap, note, surroundings

from leukoflow.cluster.cluster import open_cluster
from leukoflow.cluster.code import code_digest
from leukoflow.cluster.host import cores
from leukoflow.core.config import ClusterSettings, SlurmSettings, TlsSettings
from leukoflow.core.errors import AttemptError, ClusterError

SBATCH = 'job=job.$$; cp "$1" "$job"; setsid bash "$job" >>output 2>&1 & echo $! >>jobs; echo "Submitted batch job $!"'
pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def test_a_gpu_has_a_process_of_its_own_and_threads_are_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leukoflow.cluster.workers.visible_gpus", lambda: ["3"])
    with open_cluster(ClusterSettings(workers=1), gpu=True) as cluster:
        cluster.prepare_workers(partial(note, str(tmp_path)))
        assert (len(cluster.crew.gpu), len(cluster.crew.cpu), cluster.in_flight) == (1, 1, 3)
        client = cluster.client
        infos = client.scheduler_info(n_workers=-1)["workers"]
        assert {info["nthreads"] for info in infos.values()} == {1}
        _, gpu, _ = client.submit(surroundings, resources={"GPU": 1}).result(timeout=60)
        assert gpu == "3"
        found = client.run(surroundings)
        assert {threads for threads, _, _ in found.values()} == {max(1, cores() // 2)}
        assert {gpus for _, gpus, _ in found.values()} == {"3", ""}
        for _, _, born_with in found.values():
            if born_with:
                assert "MALLOC_TRIM_THRESHOLD_=268435456" in born_with
        assert set(client.run(code_digest).values()) == {code_digest()}
        assert [p.name for p in tmp_path.iterdir()] == [str(client.run(os.getpid)[cluster.crew.gpu[0]])]


def test_local_workers_come_when_work_waits(tmp_path: Path) -> None:
    """Dask decides about the number; shards in flight follow, and who joins loads the models, too."""
    with open_cluster(ClusterSettings(min_workers=1, max_workers=2)) as cluster:
        cluster.prepare_workers(partial(note, str(tmp_path)))
        assert (len(cluster.crew.cpu), cluster.in_flight) == (1, 2)
        naps = [cluster.client.submit(nap, 3.0, pure=False) for _ in range(8)]
        until(lambda: cluster.in_flight == 4, 60, "there are two workers")
        pids = {cluster.result(found) for found in naps}
        assert len(pids) == 2
        assert {p.name for p in tmp_path.iterdir()} == {str(pid) for pid in pids}


def test_an_address_where_nobody_answers_is_an_error_with_the_remedy() -> None:
    settings = ClusterSettings(address="tcp://127.0.0.1:9", wait_seconds=2)
    with pytest.raises(ClusterError, match="start one with `dask scheduler`"), open_cluster(settings):
        pass


# --- a scheduler and workers that somebody else runs, with TLS -------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> TlsSettings:
    """A certificate authority and one certificate of it; both live for this test alone."""
    return certificates(tmp_path_factory.mktemp("tls"))


def certificates(folder: Path) -> TlsSettings:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "leukoflow.test")
    files = [folder / name for name in ("ca.pem", "cert.pem", "key.pem")]
    authority.cert_pem.write_to_path(files[0])
    issued.cert_chain_pems[0].write_to_path(files[1])
    issued.private_key_pem.write_to_path(files[2])
    return TlsSettings(**dict(zip(("ca_file", "cert", "key"), map(str, files), strict=True)))


@pytest.fixture(scope="module")
def dask(authority: TlsSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskProcesses]:
    files = {"--tls-ca-file": authority.ca_file, "--tls-cert": authority.cert, "--tls-key": authority.key}
    options = tuple(word for pair in files.items() for word in map(str, pair))
    with dask_processes(tmp_path_factory.mktemp("dask"), options) as found:
        found.start_scheduler()
        found.start_worker()
        yield found


def test_tls_lets_in_everyone_with_a_certificate(dask: DaskProcesses, authority: TlsSettings, tmp_path: Path) -> None:
    with open_cluster(ClusterSettings(address=dask.address, tls=authority)) as cluster:
        assert cluster.client.scheduler.address.startswith("tls://")
        assert cluster.client.submit(nap, 0.0, pure=False).result(timeout=60) > 0

    with (
        pytest.raises(ClusterError, match="none is configured; set cluster"),
        open_cluster(ClusterSettings(address=dask.address)),
    ):
        pass
    stranger = ClusterSettings(address=dask.address, tls=certificates(tmp_path), wait_seconds=3)
    with pytest.raises(ClusterError, match="does not accept our certificate"), open_cluster(stranger):
        pass
    plain = ClusterSettings(address=dask.address.replace("tls", "tcp"), wait_seconds=3)
    with pytest.raises(ClusterError, match="no Dask scheduler answers"), open_cluster(plain):
        pass
    gone = ClusterSettings(address=dask.address, tls=authority.model_copy(update={"key": "/nowhere/key.pem"}))
    with pytest.raises(ClusterError, match="there is no file /nowhere/key"), open_cluster(gone):
        pass


def test_a_gpu_that_no_worker_offers_is_an_error_after_a_short_wait(
    dask: DaskProcesses, authority: TlsSettings
) -> None:
    settings = ClusterSettings(address=dask.address, tls=authority, wait_seconds=3)
    with pytest.raises(ClusterError, match="no worker offers the resource GPU"), open_cluster(settings, gpu=True):
        pass


def test_workers_with_other_code_are_sent_away_and_a_lost_scheduler_is_found_again(
    dask: DaskProcesses, authority: TlsSettings, tmp_path: Path
) -> None:
    """The scheduler's restart comes last: it takes the worker along."""
    other = tmp_path / "other"
    unneeded = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(ROOT / "leukoflow", other / "leukoflow", ignore=unneeded)
    with (other / "leukoflow" / "tasks" / "imaging" / "quality.py").open("a") as file:
        file.write("# one more line\n")
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    settings = ClusterSettings(address=dask.address, tls=authority, lost_seconds=120)
    with open_cluster(settings) as cluster:
        cluster.prepare_workers(partial(note, str(loaded)))
        assert len(cluster.crew.cpu) == 1
        joined, stranger = dask.start_worker(), dask.start_worker(code=other)
        until(lambda: len(cluster.crew.cpu) == 2, 60, "the worker with our code is taken up")
        assert stranger.wait(60) == 0  # asked to go, so its nanny does not start it again
        assert joined.poll() is None
        assert len(cluster.crew.cpu) == 2
        assert len(list(loaded.iterdir())) == 2

        waiting = cluster.client.submit(nap, 600.0, pure=False)
        dask.kill_scheduler()
        with pytest.raises(AttemptError, match="connection to the scheduler was lost"):
            cluster.result(waiting)
        dask.start_scheduler()
        dask.start_worker()
        cluster.settle()
        assert cluster.result(cluster.client.submit(nap, 0.0, pure=False)) > 0
        until(lambda: len(list(loaded.iterdir())) >= 3, 30, "the new worker has loaded the models")


def test_workers_are_jobs_of_slurm(authority: TlsSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm itself is played by two scripts that run a job here; the jobs are the real ones, with a GPU and without."""
    words = {"sbatch": SBATCH, "scancel": 'for job in "$@"; do kill -- "-$job"; done'}
    for name, body in words.items():
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    slurm = SlurmSettings(interface="lo", local_directory=str(tmp_path), prologue=(f"export PYTHONPATH={paths}",))
    settings = ClusterSettings(address="slurm", workers=1, gpu_workers=1, tls=authority, slurm=slurm)
    with open_cluster(settings, gpu=True) as cluster:
        assert cluster.client.scheduler.address.startswith("tls://127.0.0.1:")
        cluster.prepare_workers(partial(nap, 0.0))
        until(lambda: (len(cluster.crew.gpu), len(cluster.crew.cpu)) == (1, 1), 60, "both jobs have arrived")
        where = cluster.client.submit(surroundings, resources={"GPU": 1}, pure=False)
        _, _, born_with = cluster.result(where)
        assert "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=0" in born_with
        assert "MALLOC_TRIM_THRESHOLD_=268435456" in born_with
    asked = sorted("--gres=gpu:1" in job.read_text() for job in tmp_path.glob("job.*"))
    assert asked == [False, True]
    pids = [int(pid) for pid in (tmp_path / "jobs").read_text().split()]
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30, "the jobs are cancelled at the end")


def test_what_stays_lost_is_reported_to_those_who_wait(dask: DaskProcesses, authority: TlsSettings) -> None:
    settings = ClusterSettings(address=dask.address, tls=authority, lost_seconds=2)
    with open_cluster(settings) as cluster:
        cluster.prepare_workers(partial(nap, 0.0))
        waiting = cluster.client.submit(nap, 600.0, pure=False)
        for worker in dask.workers:
            worker.kill()
        dask.kill_scheduler()
        with pytest.raises(AttemptError):
            cluster.result(waiting)
        with pytest.raises(ClusterError, match=r"does not answer.*start it again.*the same command"):
            cluster.settle()
        with pytest.raises(ClusterError):
            cluster.check()
