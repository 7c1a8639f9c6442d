"""The object store's bad days: whatever happens to single requests, what was written is there, once and whole."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import zarr
from faults import Answer, FaultyProxy, Request, failure, keys_of

from leukoflow.core.errors import StorageError
from leukoflow.storage.opening import open_storage

pytestmark = pytest.mark.slow  # a server of moto, behind a proxy


@pytest.mark.parametrize("seed", range(4))
def test_what_was_written_is_there_once_and_whole(proxy: FaultyProxy, direct: Any, seed: int) -> None:
    draw = random.Random(seed)
    storage = open_storage(f"s3://lab/weather-{seed}")
    proxy.set(rate=0.35, seed=seed)
    expected: dict[str, bytes] = {}
    for i in range(10):
        body = draw.randbytes(draw.choice((0, 1, 300, 70_000)))
        match draw.choice(("write", "create", "part", "delete")):
            case "write":
                storage.write(f"w/{i}", body)
                expected[f"w/{i}"] = body
            case "create":
                assert storage.create(f"c/{i}", body)
                assert not storage.create(f"c/{i}", b"another")
                expected[f"c/{i}"] = body
            case "part":
                storage.write(f"_attempts/{i}/parts/{i}", body)
                files = [storage.child(f"_attempts/{i}").digest(f"parts/{i}")]
                assert files[0][1] == len(body)
                storage.promote(f"_attempts/{i}", files)
                assert storage.intact(files)
                storage.delete(f"_attempts/{i}")
                expected[f"parts/{i}"] = body
            case "delete":
                storage.write(f"d/{i}", body)
                storage.delete(f"d/{i}")
        for key in draw.sample(sorted(expected), min(2, len(expected))):
            assert storage.read(key) == expected[key]
    assert len(proxy.made()) > 3
    proxy.set(rate=0.0)
    time.sleep(4 * proxy.faults.seconds)  # what is late has come by then
    storage.delete("_attempts")
    storage.delete("d")
    assert {key: storage.read(key) for key in storage.files("")} == expected
    assert keys_of(direct, f"weather-{seed}/") == [f"weather-{seed}/{key}" for key in sorted(expected)]


@pytest.mark.parametrize("kind", ["lost", "late", "cut_response", "error", "throttle", "cut_request"])
def test_a_lost_answer_is_not_a_lost_race(proxy: FaultyProxy, kind: str) -> None:
    """The first request of each creation goes wrong; whether it was carried out differs, and must not matter."""
    seen: set[str] = set()

    def first_put(request: Request) -> bool:
        new = request.method == "PUT" and request.target not in seen
        seen.add(request.target)
        return new

    storage = open_storage(f"s3://lab/lost-{kind}")
    proxy.set(rate=1.0, kinds=(kind,), only=first_put)
    for i in range(4):
        assert storage.create(f"markers/{i}", b"the same bytes")
        assert not storage.create(f"markers/{i}", b"the same bytes")
    assert proxy.made()[kind] == 4
    refused = [seen for seen in proxy.log if seen.status == 412]
    assert len(refused) >= (8 if kind == "lost" else 4)


def test_of_many_creators_one_wins_in_bad_weather(proxy: FaultyProxy) -> None:
    storage = open_storage("s3://lab/creators")
    proxy.set(rate=0.4, kinds=("lost", "late", "error", "cut_request"))
    for n in range(4):
        gate = threading.Barrier(6)

        def create(i: int, n: int = n, gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return storage.create(f"{n}", str(i).encode())

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(create, range(6)))
        assert won.count(True) == 1
        assert storage.read(f"{n}") == str(won.index(True)).encode()


def test_another_writer_in_between_is_waited_for(proxy: FaultyProxy) -> None:
    busy = iter([failure("ConditionalRequestConflict", 409)] * 2)
    proxy.says = lambda request: next(busy, None) if request.method == "PUT" else None
    assert open_storage("s3://lab/busy").create("a", b"1")


def test_half_an_answer_is_never_taken_for_the_whole(proxy: FaultyProxy) -> None:
    storage = open_storage("s3://lab/halves")
    data = random.Random(0).randbytes(300_000)
    storage.write("a", data)
    group = zarr.open_group(storage.zarr("z"), mode="a")
    array = group.create_array("x", shape=(64, 32), chunks=(8, 32), shards=(32, 32), dtype="u1", fill_value=0)
    array[:] = np.arange(64 * 32, dtype=np.uint8).reshape(64, 32)
    proxy.set(rate=0.25, kinds=("truncate", "cut_response"), only=lambda request: request.method == "GET")
    for offset in range(0, 300_000, 60_000):
        with storage.open("a") as file:
            file.seek(offset)
            assert file.read(1000) == data[offset : offset + 1000]
    assert storage.read("a") == data
    read = zarr.open_group(storage.zarr("z", read_only=True), mode="r")["x"]
    assert isinstance(read, zarr.Array)
    for row in range(0, 64, 8):
        assert np.array_equal(np.asarray(read[row : row + 8]), np.asarray(array[row : row + 8]))
    assert {"truncate", "cut_response"} <= set(proxy.made())


def test_a_deletion_that_is_refused_is_an_error(proxy: FaultyProxy) -> None:
    storage = open_storage("s3://lab/kept")
    storage.write("a/b", b"1")
    body = (
        b"<DeleteResult><Error><Key>kept/a/b</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"
    )
    answer = Answer(200, ("HTTP/1.1 200 OK", "Content-Type: application/xml"), body)
    proxy.says = lambda request: answer if request.method == "POST" else None
    with pytest.raises(StorageError, match="access denied"):
        storage.delete("a")
    proxy.says = None
    storage.delete("a")
    assert storage.files("") == []


def test_a_copy_that_fails_late_is_repeated(proxy: FaultyProxy) -> None:
    """S3 may say 200 to a copy and put the error into the body."""
    storage = open_storage("s3://lab/late-copy")
    storage.write("_attempts/x/parts/a", b"abc")
    files = [storage.child("_attempts/x").digest("parts/a")]
    broken = iter(
        [Answer(200, ("HTTP/1.1 200 OK", "Content-Type: application/xml"), failure("InternalError", 500).body)]
    )
    proxy.says = lambda request: next(broken, None) if request.header("x-amz-copy-source") else None
    storage.promote("_attempts/x", files)
    assert storage.intact(files)
    storage.delete("_attempts")
    storage.promote("_attempts/x", files)  # completing another's commit finds it done
    assert storage.intact(files)


def test_a_listing_that_lags_deletes_in_the_end(proxy: FaultyProxy) -> None:
    storage = open_storage("s3://lab/lag")
    storage.write("a/1", b"1")
    assert storage.files("a") == ["a/1"]
    storage.write("a/2", b"2")
    times = iter(range(100))
    proxy.set(rate=1.0, kinds=("stale",), only=lambda request: request.listing and next(times) < 2)
    assert storage.files("a") == ["a/1"]
    storage.delete("a")
    assert storage.files("a") == []
