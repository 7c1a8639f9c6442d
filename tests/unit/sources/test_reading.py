"""Reading: bytes or a reason, from changed, damaged and cut off sources."""

from __future__ import annotations

import contextlib
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_sources import (
    COMPRESSORS,
    FILES,
    JPEG,
    contents,
    listed,
    saved,
    shards_of,
    streamed_zip_of,
    tar_of,
    zip_of,
)

from leukoflow.core.errors import MemberError, SourceError
from leukoflow.sources.identify import identify
from leukoflow.sources.reading import open_reader, read_member
from leukoflow.sources.spool import spool


def test_a_source_that_changed_after_planning_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, zip_of(FILES))
    members, _ = listed(source)
    (tmp_path / "source.bin").write_bytes(zip_of(FILES, zipfile.ZIP_STORED))
    with pytest.raises(SourceError, match="has changed since"):
        read_member(source, members[0])


def test_a_file_that_changed_after_planning_is_a_member_error(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        (folder / name).write_bytes(JPEG)
    source = identify(folder)
    members, _ = listed(source)
    (folder / "a.jpg").write_bytes(JPEG * 2)
    (folder / "b.jpg").unlink()
    (folder / "c.jpg").unlink()
    (folder / "c.jpg").symlink_to("/etc/passwd")
    with open_reader(source) as reader:
        for member, words in zip(members, ("changed since", "gone", "symbolic link"), strict=False):
            with pytest.raises(MemberError, match=words):
                reader.read(member)
        assert reader.read(members[3]) == JPEG


def test_a_zip_bomb_cannot_unpack_to_more_than_it_states(tmp_path: Path) -> None:
    whole = bytearray(zip_of({"bomb.jpg": bytes(50_000_000)}))
    for at in (22, whole.rfind(b"PK\x01\x02") + 24):
        struct.pack_into("<L", whole, at, 1000)
    source = saved(tmp_path, bytes(whole))
    members, _ = listed(source)
    with pytest.raises(MemberError, match="unpacks to more than the 1,000 bytes"):
        read_member(source, members[0])


def test_damaged_zip_members_say_so_and_harm_no_neighbour(tmp_path: Path) -> None:
    whole = bytearray(zip_of(FILES, zipfile.ZIP_STORED))
    members, _ = listed(saved(tmp_path, bytes(whole)))
    whole[members[1].offset + 60] ^= 0xFF  # a byte of the data
    whole[members[3].offset] ^= 0xFF  # the local header's signature
    source = saved(tmp_path, bytes(whole))
    outcome = {}
    with open_reader(source) as reader:
        for member in listed(source)[0]:
            try:
                outcome[member.image_key] = reader.read(member)
            except MemberError as error:
                outcome[member.image_key] = str(error).encode()
    assert outcome.pop("fields/f001.jpg") == b"damaged: checksum does not match"
    assert outcome.pop("fields/f003.jpg").startswith(b"damaged: the archive has no file at the place")
    assert outcome == {k: v for k, v in FILES.items() if k not in ("fields/f001.jpg", "fields/f003.jpg")}


@pytest.mark.parametrize("build", [zip_of, streamed_zip_of])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=str)
def test_truncated_zip_keeps_every_whole_member(
    tmp_path: Path, build: Callable[[dict[str, bytes], int], bytes], method: int
) -> None:
    whole = build(FILES, method)
    directory = whole.find(b"PK\x01\x02")
    expected, _ = listed(saved(tmp_path, whole))
    starts = [m.offset for m in expected] + [directory]
    # Cut within the directory, right before it, and within the data of the fourth member.
    for cut, kept, partial in (
        (directory + 100, 7, 0), (directory, 7, 0), ((starts[3] + starts[4]) // 2, 3, 1), (starts[3], 3, 0),
    ):  # fmt: skip
        source = saved(tmp_path, whole[:cut])
        members, listing = listed(source)
        assert listing.truncated is not None
        assert "cut off" in listing.truncated
        assert len(members) == kept + partial
        assert [m.identity for m in members[:kept]] == [m.identity for m in expected[:kept]]
        assert list(contents(source, members).values()) == list(FILES.values())[:kept]
        assert all("truncated" in (m.refusal or "") for m in members[kept:])


def test_damaged_central_directory_falls_back_to_local_headers(tmp_path: Path) -> None:
    whole = bytearray(zip_of(FILES))
    at = [i for i in range(len(whole)) if whole.startswith(b"PK\x01\x02", i)][4]
    whole[at] ^= 0xFF
    source = saved(tmp_path, bytes(whole))
    members, listing = listed(source)
    assert contents(source, members) == FILES
    assert listing.truncated == (
        "the zip archive's central directory is damaged after 4 of 7 members; bytes 4,716 to 4,776 of the zip archive "
        "belong to no file that can be read"
    )


def test_truncated_tar_keeps_every_whole_member(tmp_path: Path) -> None:
    whole = tar_of(FILES)
    expected, _ = listed(saved(tmp_path, whole))
    for cut, kept, partial in ((expected[3].offset + 10, 3, 1), (expected[3].offset - 512, 3, 0)):
        source = saved(tmp_path, whole[:cut])
        members, listing = listed(source)
        assert "cut off" in (listing.truncated or "")
        assert len(members) == kept + partial
        assert list(contents(source, members).values()) == list(FILES.values())[:kept]
        assert all("truncated: 10 of" in (m.refusal or "") for m in members[kept:])


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_truncated_compressed_tar_keeps_every_whole_member(tmp_path: Path, compression: str) -> None:
    files = {f"f{i}.jpg": random.Random(i).randbytes(300_000) for i in range(8)}  # incompressible
    whole = COMPRESSORS[compression](tar_of(files))
    source = saved(tmp_path, whole[: len(whole) * 2 // 3])
    members, listing = listed(source)
    assert "cut off" in (listing.truncated or "")
    good = [m for m in members if m.refusal is None]
    # bzip2 and xz only give back whole blocks (0.9 MB here), the others everything up to the cut.
    assert len(good) >= (2 if compression in ("bz2", "xz") else 5)
    assert [m.image_key for m in good] == list(files)[: len(good)]
    assert len(members) in (len(good), len(good) + 1)
    shards = shards_of(members, 100)
    for shard in spool(source, shards, lambda s: (tmp_path / s.name).open("wb")):
        with open_reader(source, spool_file=tmp_path / shard.name) as reader:
            for member in shards[0][1]:
                if member.refusal is None:
                    assert reader.read(member) == files[member.image_key]


def test_a_damaged_tar_header_costs_one_member_not_the_rest(tmp_path: Path) -> None:
    whole = bytearray(tar_of(FILES, tarfile.USTAR_FORMAT))
    members, _ = listed(saved(tmp_path, bytes(whole)))
    whole[members[2].offset - 512] ^= 0xFF
    source = saved(tmp_path, bytes(whole))
    left, listing = listed(source)
    assert contents(source, left) == {k: v for k, v in FILES.items() if k != "fields/f002.jpg"}
    assert "damaged at byte" in (listing.truncated or "")


def test_tars_put_together_are_read_whole(tmp_path: Path) -> None:
    first, second = tar_of({"a.jpg": b"1"}), tar_of({"b.jpg": b"2"})
    source = saved(tmp_path, first + second)
    members, listing = listed(source)
    assert contents(source, members) == {"a.jpg": b"1", "b.jpg": b"2"}
    assert listing.truncated is None


def test_a_header_of_zeros_does_not_pass_for_the_end(tmp_path: Path) -> None:
    whole = bytearray(tar_of(FILES, tarfile.USTAR_FORMAT))
    members, _ = listed(saved(tmp_path, bytes(whole)))
    at = members[2].offset
    whole[at - 512 : at] = bytes(512)
    left, listing = listed(saved(tmp_path, bytes(whole)))
    assert [m.image_key for m in left] == [name for name in FILES if name != "fields/f002.jpg"]
    assert "damaged at byte" in (listing.truncated or "")


def test_random_damage_never_raises_anything_else(tmp_path: Path) -> None:
    """Whatever bytes are flipped, listing ends and reading gives the bytes or a reason."""
    generator = random.Random(7)
    for build in (zip_of, streamed_zip_of, tar_of):
        pristine = build(FILES)
        for _ in range(60):
            damaged = bytearray(pristine)
            for _ in range(generator.choice((1, 5, 50))):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            try:
                source = saved(tmp_path, bytes(damaged))
                members, _ = listed(source)
                reader_context = open_reader(source)
            except SourceError:
                continue
            with reader_context as reader:
                for member in members:
                    with contextlib.suppress(MemberError):
                        assert len(reader.read(member)) == member.size_bytes
