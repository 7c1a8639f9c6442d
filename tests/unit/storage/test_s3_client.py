"""The object store's bad days: whatever happens to single requests, what was written is there, once and whole."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import zarr
from botocore.exceptions import ClientError, EndpointConnectionError, SSLError
from faults import Answer, Faults, FaultyProxy, Request, failure, moto_server, s3_account
from harness import ROOT

from leukoflow.core.errors import MemberError, PreflightError, SourceError, StorageError
from leukoflow.runs.records import SourceKind
from leukoflow.sources.identify import identify
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader
from leukoflow.storage import s3_client
from leukoflow.storage.opening import open_storage
from leukoflow.storage.s3_errors import explain
from leukoflow.tasks.intake.preflight import conditional_writes


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with moto_server() as url:
        boto3.client("s3", endpoint_url=url, **_keys(url)).create_bucket(Bucket="lab")
        yield url


def _keys(url: str) -> dict[str, str]:
    account = s3_account(url)
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    return {k: account[v] for k, v in names.items()} | {"region_name": "us-east-1"}


@pytest.fixture(scope="module")
def weather(upstream: str) -> Iterator[FaultyProxy]:
    """Pauses between retries are short, their number is the real one."""
    with pytest.MonkeyPatch.context() as patch, FaultyProxy(upstream) as proxy:
        patch.setattr("botocore.retryhandler.delay_exponential", lambda base, growth_factor, attempts: 0.01)
        yield proxy


@pytest.fixture
def proxy(weather: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """A store with weather, which is fair until the test says otherwise."""
    weather.faults, weather.down, weather.says = Faults(seconds=0.05), None, None
    weather.log.clear()
    for name, value in s3_account(weather.url).items():
        monkeypatch.setenv(name, value)
    return weather


@pytest.fixture(scope="module")
def direct(upstream: str) -> Any:
    """A client past the proxy and past our code."""
    return boto3.client("s3", endpoint_url=upstream, **_keys(upstream))


def keys_of(direct: Any, prefix: str) -> list[str]:
    return [item["Key"] for item in direct.list_objects_v2(Bucket="lab", Prefix=prefix).get("Contents", ())]


def uploads_of(direct: Any) -> list[str]:
    return [item["Key"] for item in direct.list_multipart_uploads(Bucket="lab").get("Uploads", ())]


# ---------------------------------------------------------------- any weather


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


# ---------------------------------------------------------------- uploads in several parts


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
    assert uploads_of(direct) == []


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
    assert uploads_of(direct) == []


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
    assert uploads_of(direct) == []
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
    assert uploads_of(direct) == ["killed/a"]
    assert storage.files("") == []  # no half object
    assert open_storage("s3://lab/other").abort_uploads() == 0  # not ours
    assert open_storage("s3://lab/kill").abort_uploads() == 0  # nor is what merely begins alike
    assert storage.abort_uploads() == 1
    assert uploads_of(direct) == []


# ---------------------------------------------------------------- deletions and copies that are not


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


# ---------------------------------------------------------------- what it says


REFUSALS = (
    ("AccessDenied", 403, "access denied; give these credentials the rights"),
    ("InvalidAccessKeyId", 403, "does not know these credentials"),
    ("SignatureDoesNotMatch", 403, "does not know these credentials"),
    ("ExpiredToken", 400, "credentials have expired"),
    ("RequestTimeTooSkewed", 403, "the clock of this machine"),
    ("AuthorizationHeaderMalformed", 400, "in another region"),
    ("NoSuchBucket", 404, "bucket lab does not exist at"),
)


def test_refusals_name_the_thing_and_the_remedy(proxy: FaultyProxy) -> None:
    storage = open_storage("s3://lab/out")
    acts = (
        storage.probe,
        lambda: storage.read("a"),
        lambda: storage.create("a", b""),
        lambda: storage.write("a", b""),
        lambda: storage.files(""),
        lambda: storage.delete("a"),
        lambda: zarr.open_group(storage.zarr("z"), mode="r"),
    )
    for code, status, words in REFUSALS:
        answer = failure(code, status)
        proxy.says = lambda request, answer=answer: answer  # type: ignore[misc]
        for act in acts:
            before = len(proxy.log)
            with pytest.raises(StorageError, match=words) as caught:
                act()
            assert "s3://lab/out" in str(caught.value)
            assert "test-secret" not in str(caught.value)
            assert "\n" not in str(caught.value)
            assert len(proxy.log) - before <= 4  # Zarr asks for several keys at once; asking again is of no use
        with pytest.raises(PreflightError, match=words):
            conditional_writes(storage)
        with pytest.raises(SourceError, match=words):
            identify("s3://lab/in.zip")


def test_a_store_that_is_not_there_is_noticed_soon(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("s3://lab/out")
    with proxy.outage(), pytest.raises(StorageError, match="cannot be reached or breaks connections"):
        storage.probe()
    proxy.says = lambda request: Answer(404, ("HTTP/1.1 404 Not Found", "Content-Type: text/html"), b"<html>nginx")
    with pytest.raises(StorageError, match="does not answer as an S3 store does"):
        storage.probe()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1 cannot be reached"):
        storage.probe()


def test_no_credentials(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for act in (open_storage("s3://lab/out").probe, lambda: open_storage("s3://lab/out").read("a")):
        with pytest.raises(StorageError, match="no credentials for the store; set AWS_ACCESS_KEY_ID"):
            act()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="correct AWS_PROFILE"):
        open_storage("s3://lab/out").probe()


def test_a_profile_names_credentials_and_endpoint(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_storage("s3://lab/profile").write("a", b"1")
    account = s3_account(proxy.url)
    lines = ["[profile night]", f"endpoint_url = {proxy.url}", "region = us-east-1"]
    lines += [f"aws_access_key_id = {account['AWS_ACCESS_KEY_ID']}", "aws_secret_access_key = another"]
    (tmp_path / "config").write_text("\n".join(lines))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "night")
    open_storage("s3://lab/profile").probe()
    assert open_storage("s3://lab/profile").read("a") == b"1"


@pytest.mark.parametrize(("style", "path"), [("path", "/lab/style/a"), ("virtual", "/style/a")])
def test_the_addressing_style_is_a_setting(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, style: str, path: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{proxy.port}")
    monkeypatch.setenv("LEUKOFLOW_S3_ADDRESSING_STYLE", style)
    hosts: list[str] = []

    def note(request: Request) -> Answer:
        hosts.append(request.header("host") or "")
        return failure("AccessDenied", 403)

    proxy.says = note
    monkeypatch.setattr("socket.getaddrinfo", _resolving_to_loopback())
    with pytest.raises(StorageError, match="access denied"):
        open_storage("s3://lab/style").read("a")
    assert [seen.target for seen in proxy.log] == [path]
    assert hosts == [f"{'lab.' if style == 'virtual' else ''}localhost:{proxy.port}"]
    monkeypatch.setenv("LEUKOFLOW_S3_ADDRESSING_STYLE", "sideways")
    with pytest.raises(StorageError, match="must be path, virtual or auto"):
        open_storage("s3://lab/style").read("a")


def _resolving_to_loopback() -> Any:
    import socket

    real = socket.getaddrinfo
    return lambda host, *rest, **more: real("127.0.0.1", *rest, **more)


# ---------------------------------------------------------------- sources


def put(direct: Any, prefix: str, count: int = 6) -> dict[str, bytes]:
    files = {f"f{i}.png": bytes([i]) * (1000 + i) for i in range(count)}
    for name, data in files.items():
        direct.put_object(Bucket="lab", Key=f"{prefix}/{name}", Body=data)
    return files


@pytest.mark.parametrize("how", ["refuse", "503", "throttle", "denied", "no bucket"])
def test_an_outage_blames_no_image(proxy: FaultyProxy, direct: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client.ObjectStore, "retries", 2)
    files = put(direct, f"night-{how}")
    source = identify(f"s3://lab/night-{how}")
    members = list(Listing(source))
    with open_reader(source) as reader:
        assert reader.read(members[0]) == files["f0.png"]
        if how in ("refuse", "503"):
            with proxy.outage(how):
                for member in members[1:3]:
                    with pytest.raises(StorageError):
                        reader.read(member)
        else:
            words = {"throttle": ("SlowDown", 503), "denied": ("AccessDenied", 403), "no bucket": ("NoSuchBucket", 404)}
            proxy.says = lambda request: failure(*words[how])
            with pytest.raises(StorageError):
                reader.read(members[1])
            proxy.says = None
        assert reader.read(members[1]) == files["f1.png"]
        direct.delete_object(Bucket="lab", Key=f"night-{how}/f2.png")
        direct.put_object(Bucket="lab", Key=f"night-{how}/f3.png", Body=b"another")
        for member, reason in ((members[2], "gone"), (members[3], "changed since")):
            with pytest.raises(MemberError, match=reason):
                reader.read(member)
        proxy.says = lambda request: failure("InvalidObjectState", 403)
        with pytest.raises(MemberError, match="archive class"):
            reader.read(members[4])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [SourceKind.DIRECTORY, SourceKind.ZIP, SourceKind.COMPRESSED_TAR])
def test_sources_in_bad_weather(proxy: FaultyProxy, direct: Any, kind: SourceKind, seed: int) -> None:
    import tarfile
    import zipfile

    place = f"weather-{kind}-{seed}"
    files = {f"f{i}.bin": random.Random(i).randbytes(40_000) for i in range(8)}
    sink = io.BytesIO()
    if kind is SourceKind.DIRECTORY:
        for name, data in files.items():
            direct.put_object(Bucket="lab", Key=f"{place}/{name}", Body=data)
    elif kind is SourceKind.ZIP:
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=sink, mode="w:gz") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    if kind is not SourceKind.DIRECTORY:
        direct.put_object(Bucket="lab", Key=place, Body=sink.getvalue())
    kinds = ("error", "throttle", "cut_response", "truncate", "cut_request", "lost", "slow")
    proxy.set(rate=0.4, seed=seed, kinds=kinds)
    source = identify(f"s3://lab/{place}")
    assert source.kind is kind
    listing = Listing(source)
    members = list(listing)
    assert [m.image_key for m in members] == sorted(files)
    assert listing.truncated is None
    assert [m.refusal for m in members] == [None] * 8
    if kind is not SourceKind.COMPRESSED_TAR:
        with open_reader(source) as reader:
            assert {m.image_key: reader.read(m) for m in members} == files
    assert proxy.made()


def test_an_outage_does_not_cut_an_archive_short(
    proxy: FaultyProxy, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is unpacked, an archive that cannot be read must not be taken for one that ends there."""
    import tarfile

    monkeypatch.setattr("leukoflow.sources.s3._S3_BLOCK", 100_000)
    monkeypatch.setattr(s3_client.ObjectStore, "retries", 2)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        for i in range(40):
            info = tarfile.TarInfo(f"f{i}.bin")
            info.size = 50_000
            archive.addfile(info, io.BytesIO(random.Random(i).randbytes(50_000)))
    direct.put_object(Bucket="lab", Key="long.tgz", Body=sink.getvalue())
    source = identify("s3://lab/long.tgz")
    members = iter(Listing(source))
    next(members)
    with proxy.outage(), pytest.raises(StorageError, match="cannot be reached"):
        list(members)
    assert len(list(Listing(source))) == 40


def test_a_source_that_grows_while_it_is_planned_is_refused(proxy: FaultyProxy, direct: Any) -> None:
    put(direct, "grows")
    source = identify("s3://lab/grows")
    direct.put_object(Bucket="lab", Key="grows/late.png", Body=b"1")
    with pytest.raises(SourceError, match="changed while it was being planned"):
        list(Listing(source))


ADDRESS = "https://s/b/in/miller.jpg"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EndpointConnectionError(endpoint_url=ADDRESS), "or breaks connections (EndpointConnectionError)"),
        (
            SSLError(endpoint_url=ADDRESS, error="certificate verify failed: self-signed certificate (_ssl.c:1)"),
            "no secure connection to the store (certificate verify failed: self-signed certificate)",
        ),
        (ClientError({"Error": {"Code": "InternalError", "Message": "in/miller.jpg"}}, "GetObject"), "(InternalError)"),
        (OSError("in/miller.jpg"), "(OSError)"),
    ],
)  # fmt: skip
def test_what_is_said_of_the_store_names_no_object(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    said = explain(error, "s3://b/in")
    assert words in said
    assert "miller" not in said
