"""One Prefect server and one Dask cluster for all tests of whole runs; every run is a real one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from faults import moto_server, s3_account
from harness import small_bundle, smears, white, write_folder, write_tar, write_zip

from leukoflow.models.bundle import Bundle
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.records import RunManifest
from leukoflow.storage.opening import open_storage

Screen = Callable[..., Any]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a real Prefect server, for this process and those it starts."""
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    from leukoflow.apps.prefect_server import client_environment, start_server

    started = start_server(keep=False, home=tmp_path_factory.mktemp("prefect"))
    before = dict(os.environ)
    os.environ.update(client_environment(started))
    refresh_global_settings_context()  # Prefect was imported when the tests were collected, and knew no server then
    try:
        assert PREFECT_API_URL.value() == started.url
        yield started.url
    finally:
        started.stop()
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
        refresh_global_settings_context()


@pytest.fixture(scope="session")
def dask_address() -> Iterator[str]:
    """Two worker processes that most runs share, so that only the tests about clusters pay for starting one."""
    import dask
    from distributed import LocalCluster

    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    settings: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(names, "1"),
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", silence_logs=40
        ) as cluster,
    ):
        yield cluster.scheduler_address


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture(scope="session")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """44 fields with what a real archive also brings: damaged and empty files, text, a blank field; 48 in all."""
    fields = smears(tmp_path_factory.mktemp("sample"), 44, seed=3)
    names = list(fields)
    bad = {
        "slide-b/cut.jpg": fields[names[0]][:700],
        "slide-b/empty.jpg": b"",
        "slide-b/notes.txt": b"nothing to see here",
        "slide-b/blank.png": white(),
    }
    return dict(sorted((fields | bad).items()))


@pytest.fixture(scope="session")
def archives(members: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same members four times; litter and folders besides, which are no members."""
    folder = tmp_path_factory.mktemp("archives")
    littered = {**members, "slide-a/Thumbs.db": b"litter"}
    return {
        "zip": str(write_zip(folder / "night.zip", littered)),
        "directory": str(write_folder(folder / "night", littered)),
        "tar": str(write_tar(folder / "night.tar", littered)),
        "tgz": str(write_tar(folder / "night.tar.gz", littered, "gz")),
    }


@pytest.fixture(scope="session")
def screen(server: str, dask_address: str, bundle: Bundle) -> Screen:
    """Runs the nightly flow here, on the shared cluster; returns its final state."""

    def screen(source: str | Path, out: str | Path, run_id: str, **settings: Any) -> Any:
        from leukoflow.core.config import load_config
        from leukoflow.flows.run import nightly

        chosen = {
            "bundle": str(bundle.path),
            "shard_size": 16,
            "cluster": {"address": dask_address, "workers": 2},
            "limits": {"retry_delay_seconds": 0.1},
        }
        config = load_config(source=str(source), out=str(out), run_id=run_id, **(chosen | settings))
        return nightly(config, return_state=True)

    return screen


def manifest_of(root: Path | str) -> RunManifest:
    found = read_manifest(open_storage(str(root)))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A real S3 API over HTTP, on a free port of this machine."""
    with moto_server() as url:
        yield url


@pytest.fixture
def account(endpoint: str) -> dict[str, str]:
    """What the environment of everybody who talks to the store holds."""
    return s3_account(endpoint)


@pytest.fixture
def client(account: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of its own for the store, past our code; this process and those it starts find the store as well."""
    for name, value in account.items():
        monkeypatch.setenv(name, value)
    found = boto3.client("s3")
    found.create_bucket(Bucket="lab")
    return found
