"""A night on an object store on its bad days: source, output, bundle and manifest behind a proxy that makes faults."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import Answer, FaultyProxy, fetched, s3_account, unfinished
from harness import assert_same, digests, screen_here, start, until, write_folder, write_zip

from leukoflow.core.errors import BundleError, ConfigError, StorageError
from leukoflow.models.bundle import Bundle, load_bundle
from leukoflow.runs.progress import read_manifest
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.upkeep.verify import verify_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
DROP = ("run_id", "source_uri")


@pytest.fixture
def proxy(endpoint: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The store of `client`, with weather, for this process and those it starts; `client` itself goes past it."""
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda base, growth_factor, attempts: 0.05)
    with FaultyProxy(endpoint) as proxy:
        for name, value in s3_account(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEUKOFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bundles"


def slides(members: dict[str, bytes]) -> bytes:
    lines = [f"{name},S{i % 3},north" for i, name in enumerate(members)]
    return "\n".join(["image_key,slide_id,site", *lines]).encode()


@pytest.fixture(scope="module")
def undisturbed(bundle: Bundle, members: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same night on a local disk."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "slides.csv").write_bytes(slides(members))
    source = write_folder(folder / "night", members)
    return screen_here(source, folder / "out", "night", bundle, manifest=str(folder / "slides.csv"))


def hand_over(client: Any, members: dict[str, bytes], bundle: Bundle) -> None:
    for name, data in members.items():
        client.put_object(Bucket="lab", Key=f"in/night/{name}", Body=data)
    for file in bundle.path.iterdir():
        client.put_object(Bucket="lab", Key=f"bundles/small/{file.name}", Body=file.read_bytes())
    client.put_object(Bucket="lab", Key="in/slides.csv", Body=slides(members))


def remote(bundle: Bundle) -> Bundle:
    """For `screen_here`, which names a bundle by its path."""
    return dataclasses.replace(bundle, path="s3://lab/bundles/small")  # type: ignore[arg-type]


@pytest.mark.chaos
def test_a_whole_night_in_bad_weather(
    proxy: FaultyProxy, client: Any, server: str, undisturbed: Run, bundle: Bundle, members: dict[str, bytes],
    tmp_path: Path, cache: Path,
) -> None:  # fmt: skip
    """The real command, killed once amid its writes, on a store where every twentieth request goes wrong."""
    hand_over(client, members, bundle)
    proxy.set(rate=0.05, seed=3, seconds=0.3, only=lambda request: request.target.find("list-type") < 0 or
              "prefix=in" not in request.target)  # fmt: skip
    words = ["run", "s3://lab/in/night", "--out", "s3://lab/out", "--run-id", "night", "--shard-size", "16"]
    words += ["--bundle", "s3://lab/bundles/small", "--manifest", "s3://lab/in/slides.csv", "--workers", "2"]
    settings = s3_account(proxy.url) | {"PREFECT_API_URL": server, "LEUKOFLOW_CACHE": str(cache.parent)}
    place = open_storage("s3://lab/out/night")
    first = start(words, tmp_path / "first.log", **settings)
    try:
        until(lambda: place.names("markers/masks"), 240, "a stage is committed", first)
        first.process.kill()
        first.process.wait()
        assert first.survivors() == []
    finally:
        first.end()
    client.create_multipart_upload(Bucket="lab", Key="out/night/_attempts/00000/killed/masks.zarr/00000/semantic/c/0")
    second = start(words, tmp_path / "second.log", **settings)
    try:
        until(lambda: place.names("markers/predictions"), 300, "a shard is committed", second)
        with proxy.outage():
            time.sleep(5)
        assert second.wait(400) == 3, second.text()[-3000:]
    finally:
        second.end()
    made = proxy.made()
    assert sum(made.values()) > 20, made
    assert len(made) > 5, made
    proxy.set(rate=0.0)
    log = (tmp_path / "first.log").read_text() + second.text()
    assert "test-secret" not in log
    assert unfinished(client) == []
    time.sleep(2 * proxy.faults.seconds)
    root = fetched(client, "out/night", tmp_path / "fetched")
    assert not (root / "_attempts").exists()
    assert not [text for text in root.glob("logs/*") if "test-secret" in text.read_text()]
    manifest = read_manifest(place)
    assert manifest is not None
    assert manifest.members == 48 == manifest.predicted + manifest.abstained + manifest.rejected + manifest.quarantined
    assert_same(root, Path(undisturbed.root), DROP)
    assert verify_run(place.root).findings == ()
    assert [p.name for p in cache.iterdir()] == [bundle.digest]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.chaos)])
def test_every_third_request_goes_wrong(
    proxy: FaultyProxy, client: Any, undisturbed: Run, bundle: Bundle, members: dict[str, bytes], tmp_path: Path,
    seed: int,
) -> None:  # fmt: skip
    """The stages themselves, without Prefect and Dask; listings do not show anything of what is being written."""
    hand_over(client, members, bundle)
    proxy.set(rate=0.3, seed=seed, seconds=0.05, only=lambda request: not (
        request.listing and "prefix=in" in request.target))  # fmt: skip
    nothing = b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
    lagging = Answer(200, ("HTTP/1.1 200 OK", "Content-Type: application/xml"), nothing)
    proxy.says = lambda request: lagging if request.listing and "_attempts" in request.target else None
    run = screen_here(
        "s3://lab/in/night", "s3://lab/out", f"bad-{seed}", remote(bundle), manifest="s3://lab/in/slides.csv"
    )
    proxy.set(rate=0.0)
    proxy.says = None
    time.sleep(4 * proxy.faults.seconds)
    open_storage(run.root).delete("_attempts")
    assert {"late", "lost", "cut_response", "cut_request", "truncate"} <= set(proxy.made())
    assert_same(fetched(client, f"out/bad-{seed}", tmp_path / "fetched"), Path(undisturbed.root), DROP)
    assert verify_run(run.root).findings == ()


@pytest.mark.chaos
def test_an_outage_amid_the_night_quarantines_nothing(
    proxy: FaultyProxy, client: Any, undisturbed: Run, bundle: Bundle, members: dict[str, bytes], screen: Any,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The store goes away while images are being read; once for as long as is waited for, once for longer."""
    hand_over(client, members, bundle)
    (tmp_path / "slides.csv").write_bytes(slides(members))
    asked = threading.Event()
    proxy.says = lambda request: asked.set() if "/in/night/" in request.path else None  # type: ignore[func-returns-value]
    with _gone_once(proxy, asked, 1.0):
        run = screen_here(
            "s3://lab/in/night", "s3://lab/out", "gone", remote(bundle), manifest="s3://lab/in/slides.csv"
        )
    assert proxy.made()["outage"] > 3
    assert_same(fetched(client, "out/gone", tmp_path / "fetched"), Path(undisturbed.root), DROP)

    monkeypatch.setattr("leukoflow.storage.s3_client.ObjectStore.retries", 1)  # of an impatient client the stage fails
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.says = lambda request: asked.set() if "/in/night/" in request.path else None  # type: ignore[func-returns-value]
    asked.clear()
    with _gone_once(proxy, asked, 1.0), pytest.raises(StorageError, match="cannot be reached or breaks connections"):
        screen_here("s3://lab/in/night", "s3://lab/out", "given-up", remote(bundle), manifest="s3://lab/in/slides.csv")
    run = screen_here(
        "s3://lab/in/night", "s3://lab/out", "given-up", remote(bundle), manifest="s3://lab/in/slides.csv"
    )
    assert_same(fetched(client, "out/given-up", tmp_path / "again"), Path(undisturbed.root), DROP)
    assert verify_run(run.root).findings == ()


@contextlib.contextmanager
def _gone_once(proxy: FaultyProxy, asked: threading.Event, seconds: float) -> Iterator[None]:
    def watch() -> None:
        assert asked.wait(120)
        with proxy.outage():
            time.sleep(seconds)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_bundle_is_fetched_once_and_checked(
    proxy: FaultyProxy, client: Any, bundle: Bundle, members: dict[str, bytes], cache: Path
) -> None:
    hand_over(client, {}, bundle)
    uri = "s3://lab/bundles/small"
    proxy.set(rate=0.2, seed=1, seconds=0.05)
    found = load_bundle(uri)
    assert (found.digest, found.path) == (bundle.digest, cache / bundle.digest)
    assert digests(found.path) == digests(bundle.path)
    proxy.set(rate=0.0)

    def asked(act: Callable[[], Any]) -> list[str]:
        proxy.log.clear()
        act()
        return [seen.target.rpartition("/")[2] for seen in proxy.log]

    assert asked(lambda: load_bundle(uri)) == ["bundle.json"]
    assert asked(lambda: load_bundle(uri, bundle.digest)) == []
    weights = found.path / "classifier.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")  # a disk that forgets
    assert load_bundle(uri, bundle.digest).path == found.path
    assert digests(found.path) == digests(bundle.path)
    assert [p.name for p in cache.iterdir()] == [bundle.digest]

    client.put_object(Bucket="lab", Key="bundles/small/classifier.safetensors", Body=b"another")
    assert load_bundle(uri).digest == bundle.digest  # the cache holds what bundle.json names
    weights.unlink()
    with pytest.raises(BundleError, match=r"was altered: classifier\.safetensors"):
        load_bundle(uri)
    client.delete_object(Bucket="lab", Key="bundles/small/classifier.safetensors")
    with pytest.raises(BundleError, match="bundle s3://lab/bundles/small is incomplete"):
        load_bundle(uri)
    with pytest.raises(BundleError, match=r"no bundle s3://lab/none: there is no s3://lab/none/bundle\.json"):
        load_bundle("s3://lab/none")
    with pytest.raises(BundleError, match="bucket nowhere does not exist"):
        load_bundle("s3://nowhere/small")
    hostile = (bundle.path / "bundle.json").read_text().replace("classifier.safetensors", "../../x")
    client.put_object(Bucket="lab", Key="bundles/small/bundle.json", Body=hostile.encode())
    with pytest.raises(BundleError, match="cannot be one of its files"):
        load_bundle(uri)


def test_a_manifest_is_named_as_the_user_named_it(
    proxy: FaultyProxy, client: Any, bundle: Bundle, members: dict[str, bytes], tmp_path: Path
) -> None:
    source = write_zip(tmp_path / "night.zip", dict(list(members.items())[:3]))
    for key, body, words in (
        ("in/none.csv", None, r"--manifest s3://lab/in/none\.csv does not exist"),
        ("in/bad.csv", b"name\nx\n", r"^s3://lab/in/bad\.csv has no column image_key"),
        ("in/twice.csv", b"image_key,slide_id\nx,a\nx,b\n", r"^s3://lab/in/twice\.csv has more than one line for an"),
        ("in/odd.csv", b"image_key\n\x81\n", r"s3://lab/in/odd\.csv, line 2 is neither UTF-8 nor Windows-1252"),
    ):
        if body is not None:
            client.put_object(Bucket="lab", Key=key, Body=body)
        with pytest.raises(ConfigError, match=words):
            screen_here(source, tmp_path / "out", "night", bundle, manifest=f"s3://lab/{key}")
