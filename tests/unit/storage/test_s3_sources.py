"""Sources in an object store: bad weather blames no image and cuts no archive short."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
from faults import FaultyProxy, failure

from leukoflow.core.errors import MemberError, SourceError, StorageError
from leukoflow.runs.records import SourceKind
from leukoflow.sources.identify import identify
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader
from leukoflow.storage import s3_client

pytestmark = pytest.mark.slow  # a server of moto, behind a proxy


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
