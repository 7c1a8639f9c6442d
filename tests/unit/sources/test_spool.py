"""Spooling: a compressed tar is unpacked shard by shard."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from made_up_sources import COMPRESSORS, FILES, listed, payload, saved, shards_of, tar_of

from leukoflow.core.errors import SourceError
from leukoflow.runs.records import SourceKind
from leukoflow.sources.reading import open_reader
from leukoflow.sources.spool import spool


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_compressed_tar_is_spooled_shard_by_shard(tmp_path: Path, compression: str) -> None:
    files = {"lead/": b"", **FILES, "fields/.DS_Store": b"litter"}
    source = saved(tmp_path, COMPRESSORS[compression](tar_of(files)))
    members, listing = listed(source)
    assert source.kind is SourceKind.COMPRESSED_TAR
    assert (listing.ignored, listing.truncated) == (2, None)
    shards = shards_of(members, 3)
    done, got = [], {}
    for shard in spool(source, shards, lambda shard: (tmp_path / shard.name).open("wb")):
        assert not (tmp_path / f"{shard.ordinal + 1:05d}").exists(), "must not run ahead of the consumer"
        done.append(shard.ordinal)
        with open_reader(source, spool_file=tmp_path / shard.name) as reader:
            got |= {m.image_key: reader.read(m) for m in shards[shard.ordinal][1]}
    assert done == [0, 1, 2]
    assert got == FILES


def test_spool_skips_shards_that_nobody_wants(tmp_path: Path) -> None:
    source = saved(tmp_path, gzip.compress(tar_of(FILES)))
    shards = shards_of(listed(source)[0], 2)
    wanted = [shards[1], shards[3]]
    assert [s.ordinal for s in spool(source, wanted, lambda s: (tmp_path / s.name).open("wb"))] == [1, 3]
    with open_reader(source, spool_file=tmp_path / "00003") as reader:
        assert reader.read(shards[3][1][0]) == FILES["fields/f006.jpg"]


def test_spool_notices_another_archive(tmp_path: Path) -> None:
    source = saved(tmp_path, gzip.compress(tar_of(FILES)))
    shards = shards_of(listed(source)[0], 4)
    altered = FILES | {"fields/f002.jpg": payload(99, len(FILES["fields/f002.jpg"]))}
    other = saved(tmp_path, gzip.compress(tar_of(altered)), "other.bin")
    with pytest.raises(SourceError, match=r"does not match its plan at file 3: start a new run"):
        list(spool(other, shards, lambda s: (tmp_path / s.name).open("wb")))
