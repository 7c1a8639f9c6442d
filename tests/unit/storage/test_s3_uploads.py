"""Uploads in several parts: whole in bad weather, and nothing left of one that failed or was killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from faults import Answer, FaultyProxy, Request, failure, keys_of, unfinished
from harness import ROOT

from leukoflow.core.errors import StorageError
from leukoflow.storage import s3_client
from leukoflow.storage.opening import open_storage

pytestmark = pytest.mark.slow  # a server of moto, behind a proxy


def test_a_large_upload_in_bad_weather(proxy: FaultyProxy, direct: Any) -> None:
    storage = open_storage("s3://lab/large")
    data = random.Random(1).randbytes(21 << 20)
    proxy.set(rate=0.5, kinds=("error", "throttle", "cut_request", "lost", "late", "cut_response"))
    with storage.writer("a") as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])
    assert proxy.made()
    proxy.set(rate=0.0)
    time.sleep(4 * proxy.faults.seconds)
    assert storage.read("a") == data
    storage.abort_uploads()
    assert unfinished(direct) == []


@pytest.mark.parametrize("what", ["the block", "the store"])
def test_an_upload_that_fails_leaves_nothing(proxy: FaultyProxy, direct: Any, what: str) -> None:
    storage = open_storage(f"s3://lab/failed-{what.split()[1]}")

    def refuse(request: Request) -> Answer | None:
        fatal = what == "the store" and request.query.get("partNumber") == "2"
        return failure("AccessDenied", 403) if fatal else None

    proxy.says = refuse

    def upload() -> None:
        with storage.writer("a") as file:
            for _ in range(20):
                file.write(bytes(1 << 20))
            if what == "the block":
                raise KeyError("something else went wrong")

    with pytest.raises((KeyError, StorageError)):
        upload()
    assert keys_of(direct, "failed-") == []
    assert unfinished(direct) == []


def test_a_copy_that_fails_leaves_no_upload(proxy: FaultyProxy, direct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "COPY_LIMIT", 4 << 20)
    monkeypatch.setattr(s3_client.ObjectStore._copy_managed, "__defaults__", (5 << 20,))
    storage = open_storage("s3://lab/copies")
    data = random.Random(2).randbytes(11 << 20)
    storage.write("_attempts/x/parts/a", data)
    files = [storage.child("_attempts/x").digest("parts/a")]
    refusals = iter([failure("AccessDenied", 403)])
    proxy.says = lambda request: next(refusals, None) if request.query.get("partNumber") == "2" else None
    with pytest.raises(StorageError, match="access denied"):
        storage.promote("_attempts/x", files)
    assert unfinished(direct) == []
    assert not storage.intact(files)
    storage.promote("_attempts/x", files)
    assert storage.read("parts/a") == data


UPLOAD = """
import sys
from leukoflow.storage.opening import open_storage
file = open_storage("s3://lab/killed").writer("a")
file.write(bytes(20 << 20))
print("half", flush=True)
sys.stdin.read()
"""


def test_a_process_killed_amid_an_upload(proxy: FaultyProxy, direct: Any) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", UPLOAD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    storage = open_storage("s3://lab/killed")
    assert unfinished(direct) == ["killed/a"]
    assert storage.files("") == []  # no half object
    assert open_storage("s3://lab/other").abort_uploads() == 0  # not ours
    assert open_storage("s3://lab/kill").abort_uploads() == 0  # nor is what merely begins alike
    assert storage.abort_uploads() == 1
    assert unfinished(direct) == []
