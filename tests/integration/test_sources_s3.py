"""Sources in an object store, over its real HTTP interface."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from leukoflow.core.errors import MemberError, SourceError
from leukoflow.runs.records import SourceKind
from leukoflow.sources.identify import identify
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader
from leukoflow.sources.spool import spool
from leukoflow.tasks.intake.plan import plan
from leukoflow.tasks.intake.plan_file import read_shard, shards

pytestmark = pytest.mark.integration
FILES = {f"fields/f{i:04}.jpg": bytes([i % 256]) * (100 + i) for i in range(60)}


@pytest.fixture
def smears(client: Any) -> Any:
    client.create_bucket(Bucket="smears")
    return client


def test_prefix(smears: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leukoflow.sources.s3._S3_PAGE", 25)  # more than one page
    for name, data in {**FILES, "fields/": b"", "fields/Thumbs.db": b"litter"}.items():
        smears.put_object(Bucket="smears", Key=f"night/{name}", Body=data)
    smears.put_object(Bucket="smears", Key="night-2/other.jpg", Body=b"not ours")
    source = identify("s3://smears/night/")
    listing = Listing(source)
    members = list(listing)
    assert source.kind is SourceKind.DIRECTORY
    assert [m.image_key for m in members] == list(FILES)
    assert listing.ignored == 2
    with open_reader(source) as reader:
        assert all(reader.read(m) == FILES[m.image_key] for m in members[::10])
        smears.put_object(Bucket="smears", Key="night/fields/f0000.jpg", Body=b"another")
        smears.delete_object(Bucket="smears", Key="night/fields/f0001.jpg")
        with pytest.raises(MemberError, match="changed since"):
            reader.read(members[0])
        with pytest.raises(MemberError, match="gone"):
            reader.read(members[1])
        assert reader.read(members[2]) == FILES[members[2].image_key]
    assert identify("s3://smears/night").identity != source.identity


def test_zip_object(smears: Any, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    smears.put_object(Bucket="smears", Key="fields.zip", Body=buffer.getvalue())
    source = identify("s3://smears/fields.zip")
    assert source.kind is SourceKind.ZIP
    summary = plan(source, tmp_path / "plan.parquet", shard_size=32)
    file = pq.ParquetFile(tmp_path / "plan.parquet")
    with open_reader(source) as reader:
        for shard in shards(summary):
            for member in read_shard(file, shard.ordinal)[::5]:
                assert reader.read(member) == FILES[member.image_key]
    smears.put_object(Bucket="smears", Key="fields.zip", Body=buffer.getvalue() + b" ")
    with pytest.raises(SourceError, match="has changed since"), open_reader(source):
        pass


def test_joined_zips_in_one_object(smears: Any) -> None:
    parts = []
    for half in (0, 1):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in list(FILES.items())[half::2]:
                archive.writestr(name, data)
        parts.append(buffer.getvalue())
    smears.put_object(Bucket="smears", Key="joined.zip", Body=b"".join(parts) + b"\xde\xad" * 50)
    source = identify("s3://smears/joined.zip")
    listing = Listing(source)
    members = list(listing)
    with open_reader(source) as reader:
        assert {m.image_key: reader.read(m) for m in members} == FILES
    size = sum(map(len, parts))
    assert listing.truncated == f"bytes {size:,} to {size + 99:,} of the zip archive belong to no file that can be read"


def test_compressed_tar_object(smears: Any, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in list(FILES.items())[:20]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    smears.put_object(Bucket="smears", Key="fields.tgz", Body=buffer.getvalue())
    source = identify("s3://smears/fields.tgz")
    assert source.kind is SourceKind.COMPRESSED_TAR
    summary = plan(source, tmp_path / "plan.parquet", shard_size=8)
    file = pq.ParquetFile(tmp_path / "plan.parquet")
    wanted = [(shard, read_shard(file, shard.ordinal)) for shard in shards(summary)]
    seen = {}
    for shard in spool(source, wanted, lambda shard: (tmp_path / shard.name).open("wb")):
        with open_reader(source, spool_file=tmp_path / shard.name) as reader:
            seen |= {m.image_key: reader.read(m) for m in wanted[shard.ordinal][1]}
    assert seen == dict(list(FILES.items())[:20])


def test_what_is_not_there(smears: Any) -> None:
    for uri in ("s3://smears/nothing.zip", "s3://no-such-bucket/x", "s3://no-such-bucket"):
        with pytest.raises(SourceError, match=r"s3://smears/nothing.zip does not|bucket no-such-bucket does not exist"):
            identify(uri)
    smears.create_bucket(Bucket="empty")
    with pytest.raises(SourceError, match="holds no files"):
        identify("s3://empty")
