"""Every byte of an archive is part of a row or is named: joined, cut, hidden, odd and foreign archives."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from harness import Pipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leukoflow.archives.errors import SplitArchiveError
from leukoflow.archives.streams import CompressedStream
from leukoflow.archives.zip_names import Separators, decode_name
from leukoflow.archives.zip_walk import ZipWalk
from leukoflow.core.errors import MemberError, SourceError
from leukoflow.runs.records import Member, Source, SourceKind
from leukoflow.sources.identify import identify
from leukoflow.sources.keys import image_key
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader
from leukoflow.sources.survey import is_archive

CENTRAL, END = b"PK\x01\x02", b"PK\x05\x06"
FULL = 0xFFFFFFFF


def noise(seed: int, size: int = 300) -> bytes:
    """Bytes without a signature: no `P` occurs."""
    return random.Random(seed).randbytes(size).replace(b"P", b"Q")


FILES = {f"s/{i}.jpg": noise(i, 300 + 40 * i) for i in range(4)}


def zip_of(
    files: dict[str, bytes], method: int = zipfile.ZIP_STORED, streamed: bool = False, zip64: bool = False
) -> bytes:
    sink: Pipe | io.BytesIO = Pipe() if streamed else io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=zip64) as member:
                member.write(data)
    return bytes(sink.data if isinstance(sink, Pipe) else sink.getvalue())


def part(files: dict[str, bytes], *numbers: int) -> dict[str, bytes]:
    return {name: data for i, (name, data) in enumerate(files.items()) if i in numbers}


def listed(folder: Path, data: bytes, name: str = "source.zip") -> tuple[Source, list[Member], Listing]:
    path = folder / name
    path.write_bytes(data)
    source = identify(path)
    listing = Listing(source)
    return source, list(listing), listing


def contents(source: Source, members: list[Member]) -> dict[str, bytes]:
    with open_reader(source) as reader:
        return {m.image_key: reader.read(m) for m in members if m.refusal is None}


# ---------------------------------------------------------------- zip archives


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=str)
def test_joined_zips_have_the_members_of_both(tmp_path: Path, method: int, streamed: bool) -> None:
    first, second = (zip_of(part(FILES, *n), method, streamed) for n in ((0, 1), (2, 3)))
    source, members, listing = listed(tmp_path, first + second)
    assert contents(source, members) == FILES
    assert [m.image_key for m in members] == list(FILES)
    assert listing.truncated is None
    assert listing.remarks == (
        "2 files that the zip archive's central directory does not list were found in its bytes, and have rows like "
        "the others",
    )


def test_a_whole_zip_before_one_that_is_cut_off(tmp_path: Path) -> None:
    second = zip_of(part(FILES, 2, 3))
    _, members, listing = listed(tmp_path, zip_of(part(FILES, 0, 1)) + second[: second.find(CENTRAL) - 10])
    assert [(m.image_key, (m.refusal or "").split(":")[0]) for m in members] == [
        ("s/0.jpg", ""), ("s/1.jpg", ""), ("s/2.jpg", ""), ("s/3.jpg", "truncated"),
    ]  # fmt: skip
    assert "its last central directory is missing" in (listing.truncated or "")


def test_a_cut_zip_before_a_whole_one(tmp_path: Path) -> None:
    """The member that is cut states more bytes than it has: what follows it is not its data."""
    files = FILES | {"s/1.jpg": noise(9, 5000)}
    cut = zip_of(part(files, 0, 1))[:2000]
    source, members, _ = listed(tmp_path, cut + zip_of(part(files, 2, 3)))
    assert {m.image_key: m.refusal for m in members} == {
        "s/0.jpg": None,
        "s/1.jpg": "damaged: the next file of the archive begins within its data",
        "s/2.jpg": None,
        "s/3.jpg": None,
    }
    assert contents(source, members) == part(files, 0, 2, 3)


def test_members_that_the_directory_lacks_are_found(tmp_path: Path) -> None:
    """As a tool leaves them that deletes from the directory alone: in front, in the middle, at the end."""
    whole = zip_of(FILES)
    start = whole.find(CENTRAL)
    records = [whole[at : at + 53] for at in range(start, start + 4 * 53, 53)]
    for hidden in ((0,), (1, 2), (3,), (0, 3)):
        kept = b"".join(record for i, record in enumerate(records) if i not in hidden)
        count = 4 - len(hidden)
        end = struct.pack("<4s4H2LH", END, 0, 0, count, count, len(kept), start, 0)
        source, members, listing = listed(tmp_path, whole[:start] + kept + end)
        assert contents(source, members) == FILES
        assert listing.truncated is None
        assert listing.remarks[0].startswith(f"{len(hidden)} files that the zip archive's central directory does not")


@pytest.mark.parametrize("where", ["between", "before the directory", "behind"])
def test_bytes_that_belong_to_no_member_are_named(tmp_path: Path, where: str) -> None:
    rubbish = noise(5, 1000)
    first = zip_of(part(FILES, 0, 1))
    if where == "behind":
        whole, at = first + rubbish, len(first)
    else:
        buffer = bytearray(first)
        at = first.find(CENTRAL) if where == "before the directory" else first.find(b"PK\x03\x04", 4)
        end = first.rfind(END)
        struct.pack_into("<L", buffer, end + 16, first.find(CENTRAL) + 1000)
        if where == "between":
            struct.pack_into("<L", buffer, first.rfind(CENTRAL) + 42, at + 1000)
        whole = bytes(buffer[:at]) + rubbish + bytes(buffer[at:])
    source, members, listing = listed(tmp_path, whole)
    assert contents(source, members) == part(FILES, 0, 1)
    assert listing.truncated == f"bytes {at:,} to {at + 999:,} of the zip archive belong to no file that can be read"


def test_zeros_behind_an_archive_are_a_remark(tmp_path: Path) -> None:
    whole = zip_of(FILES)
    for count in (1000, 100_000, 2_000_000):  # the last hides the end record from where it is looked for
        source, members, listing = listed(tmp_path, whole + bytes(count))
        assert contents(source, members) == FILES
        assert listing.truncated is None
        assert f"bytes {len(whole):,} to {len(whole) + count - 1:,} of the zip archive are zeros" in listing.remarks


def test_a_program_in_front_is_a_remark_and_one_with_members_is_not(tmp_path: Path) -> None:
    stub = b"#!/bin/sh\nexec unzip $0\n" * 50
    source, members, listing = listed(tmp_path, stub + zip_of(FILES))
    assert contents(source, members) == FILES
    assert (listing.truncated, listing.remarks) == (
        None, ("the first 1,200 bytes hold no file: the zip archive begins behind them",),
    )  # fmt: skip
    source, members, listing = listed(tmp_path, stub + zip_of(part(FILES, 0)) + zip_of(part(FILES, 1)))
    assert contents(source, members) == part(FILES, 0, 1)
    assert listing.truncated == "bytes 0 to 1,199 of the zip archive belong to no file that can be read"


@pytest.mark.parametrize("behind", [0, 500])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_end_of_an_inner_archive_is_not_that_of_the_outer(tmp_path: Path, streamed: bool, behind: int) -> None:
    """Cut right behind a stored inner zip, or a little later: the last end record is the inner one's."""
    inner = zip_of({"in/x.jpg": noise(20), "in/y.jpg": noise(21)})
    whole = zip_of({"a.jpg": FILES["s/0.jpg"], "more.zip": inner, "b.jpg": noise(22, 2000)}, streamed=streamed)
    cut = whole.find(inner) + len(inner) + behind
    source, members, listing = listed(tmp_path, whole[:cut])
    assert [m.image_key for m in members] == ["a.jpg", "more.zip"] + ["b.jpg"] * bool(behind)
    assert contents(source, members) == {"a.jpg": FILES["s/0.jpg"]}
    assert "cut off: its central directory is missing" in (listing.truncated or "")
    assert "archive within the source" in (members[1].refusal or "") or "truncated" in (members[1].refusal or "")


def test_a_comment_may_hold_the_signature_of_an_end_record(tmp_path: Path) -> None:
    buffer = io.BytesIO(zip_of(FILES))
    for comment in (b"made by PK\x05\x06 tool, thank you very much indeed", END * 30, END + bytes(18)):
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = comment
        source, members, listing = listed(tmp_path, buffer.getvalue())
        assert contents(source, members) == FILES
        assert (listing.truncated, listing.remarks) == (None, ())


@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2], ids=str)
def test_streamed_zips_that_are_cut_off(tmp_path: Path, method: int, zip64: bool) -> None:
    whole = zip_of(FILES, method, streamed=True, zip64=zip64)
    starts = [i for i in range(len(whole)) if whole.startswith(b"PK\x03\x04", i)]
    for cut, kept, partial in ((starts[2] + 200, 2, 1), (whole.find(CENTRAL), 4, 0)):
        _, members, listing = listed(tmp_path, whole[:cut])
        assert [m.image_key for m in members] == list(FILES)[: kept + partial]
        assert "cut off" in (listing.truncated or "")
        assert [m.refusal for m in members[kept:]] == ["truncated: the archive ends within this file"] * partial
        if method != zipfile.ZIP_BZIP2:  # whose size is only known once it is unpacked
            assert [m.size_bytes for m in members[:kept]] == [len(d) for d in list(FILES.values())[:kept]]


def test_a_damaged_member_of_a_cut_zip_does_not_hide_the_rest(tmp_path: Path) -> None:
    whole = bytearray(zip_of(FILES, zipfile.ZIP_DEFLATED, streamed=True))
    second = whole.find(b"PK\x03\x04", 4)
    whole[second + 40 : second + 60] = b"\xff" * 20
    source, members, listing = listed(tmp_path, bytes(whole[: whole.find(CENTRAL)]))
    assert [m.image_key for m in members] == list(FILES)
    assert members[1].refusal == "damaged: the next file of the archive begins within its data"
    assert contents(source, members) == part(FILES, 0, 2, 3)
    assert listing.truncated == "the zip archive is cut off: its central directory is missing"


def test_a_zip_without_its_beginning_has_rows_for_what_is_lost(tmp_path: Path) -> None:
    whole = zip_of(FILES)
    source, members, listing = listed(tmp_path, whole[400:])
    assert [m.image_key for m in members] == list(FILES)
    assert contents(source, members) == part(FILES, 2, 3)
    assert (members[0].refusal or "").startswith("missing: the archive has lost its beginning")
    assert listing.truncated is not None
    assert listing.truncated.startswith("the first 400 bytes of the zip archive are missing")


def test_parts_of_a_split_archive_are_named_as_such(tmp_path: Path) -> None:
    whole = zip_of(FILES)
    for data in (b"PK\x07\x08" + whole[:900], whole[900:-22] + struct.pack("<4s4H2LH", END, 2, 1, 1, 4, 212, 50, 0)):
        (tmp_path / "part.zip").write_bytes(data)
        with pytest.raises(SplitArchiveError, match="part of a split zip archive"):
            list(ZipWalk(io.BytesIO(data), len(data)))
    source, members, _ = listed(tmp_path, b"PK00" + whole)  # one that was meant to be split, and is whole
    assert contents(source, members) == FILES


def test_many_ranges_are_counted(tmp_path: Path) -> None:
    whole = b"".join(zip_of({f"{i}.jpg": noise(i)}) + noise(i, 100) for i in range(8))
    source, members, listing = listed(tmp_path, whole)
    assert contents(source, members) == {f"{i}.jpg": noise(i) for i in range(8)}
    one = len(whole) // 8
    named = ", ".join(f"{(i + 1) * one - 100:,} to {(i + 1) * one - 1:,}" for i in range(3))
    assert listing.truncated == (
        f"bytes {named} and 5 further ranges of the zip archive belong to no file that can be read"
    )


def test_the_bench_says_what_it_does_not_read() -> None:
    whole = zip_of({"a.jpg": noise(1)}) + zip_of({"b.jpg": noise(2)})
    walk = ZipWalk(io.BytesIO(whole), len(whole), repair=False)
    assert [e.name for e in walk] == ["b.jpg"]
    assert walk.truncated is not None
    assert walk.truncated == (
        f"bytes 0 to {len(whole) // 2 - 1:,} of the zip archive are not in its directory and were not read"
    )


def test_hostile_headers_end(tmp_path: Path) -> None:
    """Thousands of streamed members, none of which ends: each must not be unpacked to the end of the file."""
    header = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 8, 8, 0, 0, 0, 0, 0, 1, 0) + b"x"
    one = header + b"\x00\xff\xff\x00\x00"  # a stored block of 65,535 bytes that is not the last
    _, members, listing = listed(tmp_path, one * 3000)
    assert len(members) == 3000
    assert listing.truncated is not None


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.count += len(found)
        return found


def test_hostile_headers_that_unpack_into_a_listed_member_end() -> None:
    """Each unlisted member runs through the next ones into the data of a listed one: reading stays within bounds."""
    header = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 8, 8, 0, 0, 0, 0, 0, 1, 0) + b"x"

    def over(size: int) -> bytes:
        return struct.pack("<BHH", 0, size, size ^ 0xFFFF)  # a stored block that is not the last

    listed_member = zip_of({"b.jpg": zlib.compress(noise(1, 60_000), wbits=-15)})
    chain = (header + over(len(header))) * 299 + header + over(30 + len("b.jpg"))
    file = Counting(chain + listed_member)
    size = len(file.getvalue())
    assert "b.jpg" in [entry.name for entry in ZipWalk(file, size)]
    assert file.count < 8 * size + (2 << 20)


pieces = st.lists(
    st.tuples(
        st.lists(st.integers(64, 400), min_size=1, max_size=4),  # sizes of the members
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
        st.booleans(),  # streamed
        st.booleans(),  # zip64
        st.integers(0, 300),  # bytes of rubbish behind it
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=pieces, front=st.integers(0, 300), cut=st.floats(0.3, 1.0))
def test_whatever_is_joined_and_cut_is_a_row_or_is_named(
    pieces: list[tuple[list[int], int, bool, bool, int]], front: int, cut: float
) -> None:
    whole, present, spans, serial = noise(front, front), [], [], 0
    for sizes, method, streamed, zip64, behind in pieces:
        files = {f"{serial + i}.jpg": noise(serial + i, size) for i, size in enumerate(sizes)}
        serial += len(sizes)
        begin = len(whole)
        archive = zip_of(files, method, streamed, zip64)
        starts = [i.header_offset for i in zipfile.ZipFile(io.BytesIO(archive)).infolist()]
        ends = [*starts[1:], archive.find(CENTRAL)]
        present += [(begin + end, data) for end, data in zip(ends, files.values(), strict=True)]
        whole += archive + noise(1000 + behind, behind)
        spans.append((begin, begin + len(archive), begin + len(archive) + behind))
    size = max(int(len(whole) * cut), front + 40)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.zip"
        path.write_bytes(whole[:size])
        source = Source(str(path), SourceKind.ZIP, f"{size}-{path.stat().st_mtime_ns}", size)
        listing = Listing(source)
        members = list(listing)
        got = Counter[bytes]()
        with open_reader(source) as reader:
            for member in members:
                try:
                    got[reader.read(member)] += 1
                except MemberError:
                    assert listing.truncated is not None
    assert not Counter(data for end, data in present if end <= size) - got
    assert not got - Counter(data for _, data in present)  # one whose descriptor is cut off may be there all the same
    if any(begin < size < end for begin, end, _ in spans) or any(end < min(size, stop) for _, end, stop in spans):
        assert listing.truncated is not None
    if front:
        assert listing.truncated is not None or any("first" in remark for remark in listing.remarks)
    if size == len(whole) == spans[-1][1] and len(pieces) == 1 and not front:
        assert (listing.truncated, listing.remarks) == (None, ())


# ---------------------------------------------------------------- tar archives


def tar_of(files: dict[str, bytes], end: int = 20) -> bytes:
    """A tar archive with `end` zero blocks behind its members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            archive.addfile(tar_info(name, len(data)), io.BytesIO(data))
    return buffer.getvalue()[: sum(512 - -len(d) // 512 * 512 for d in files.values())] + bytes(512 * end)


def tar_info(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def block_of(name: str, size: int, kind: bytes, patch: dict[int, bytes] | None = None) -> bytes:
    """A header with bytes set at some places, and its checksum."""
    block = bytearray(tar_info(name, size, kind).tobuf(tarfile.GNU_FORMAT))
    for at, value in (patch or {}).items():
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


TAR = tar_of(FILES)
BODY = tar_of(FILES, 0)


def rows(members: list[Member]) -> dict[str, str | None]:
    return {m.image_key: m.refusal for m in members}


def test_a_volume_label_is_no_member(tmp_path: Path) -> None:
    source, members, listing = listed(tmp_path, block_of("night", 0, b"V") + TAR)
    assert contents(source, members) == FILES
    assert rows(members) == dict.fromkeys(FILES)
    assert (listing.truncated, listing.remarks) == (None, ("the tar archive has a volume label, which is no file",))


def test_a_later_volume_lacks_the_beginning_of_its_first_file(tmp_path: Path) -> None:
    source, members, listing = listed(tmp_path, block_of("s/big.jpg", 700, b"M") + padded(noise(8, 700)) + TAR)
    assert contents(source, members) == FILES
    assert rows(members)["s/big.jpg"] == (
        "continued from another volume: unpack all volumes together (tar --multi-volume), hand over the images"
    )
    assert listing.truncated == "the tar archive is a later volume of several: its first file begins in another one"


def test_a_sparse_file_with_a_long_map_costs_no_neighbour(tmp_path: Path) -> None:
    header = block_of("s/sparse.jpg", 1024, b"S", {482: b"\1"})
    maps = (bytes([48]) * 504 + b"\1" + bytes(7)) + (bytes([48]) * 504 + bytes(8))
    source, members, listing = listed(tmp_path, header + maps + noise(3, 1024) + TAR)
    assert contents(source, members) == FILES
    assert rows(members)["s/sparse.jpg"] == "sparse file: repack the archive without --sparse"
    assert listing.truncated is None


def test_sparse_files_of_pax_keep_their_names(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tar_info("GNUSparseFile.0/x.jpg", 100)
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s/x.jpg"}
        archive.addfile(info, io.BytesIO(noise(1, 100)))
    _, members, _ = listed(tmp_path, buffer.getvalue())
    assert rows(members) == {"s/x.jpg": "sparse file: repack the archive without --sparse"}


def test_rubbish_behind_the_end_of_a_tar_is_a_remark(tmp_path: Path) -> None:
    source, members, listing = listed(tmp_path, TAR + noise(1, 2222))
    assert contents(source, members) == FILES
    assert listing.truncated is None
    at = len(TAR)
    assert listing.remarks == (f"bytes {at:,} to {at + 2221:,} behind the end of the tar archive belong to no file",)


@pytest.mark.parametrize(
    "behind", [noise(1, 20_000), zip_of(FILES), gzip.compress(TAR), noise(2, 600) + bytes(1024)], ids=len
)
def test_what_may_be_files_behind_the_end_of_a_tar_is_no_rubbish(tmp_path: Path, behind: bytes) -> None:
    """The last is what is left of a member whose header and first data were overwritten with zeros."""
    source, members, listing = listed(tmp_path, TAR + padded(behind))
    assert contents(source, members) == FILES
    assert f"bytes {len(TAR):,} to " in (listing.truncated or "")


def test_tar_members_behind_an_end_mark_and_out_of_step_are_found(tmp_path: Path) -> None:
    first, second = tar_of(part(FILES, 0, 1)), tar_of(part(FILES, 2, 3))
    source, members, listing = listed(tmp_path, first + second)
    assert contents(source, members) == FILES
    assert listing.truncated is None
    assert "more files follow behind an end mark" in listing.remarks[0]
    source, members, listing = listed(tmp_path, first + noise(4, 100) + second)
    assert contents(source, members) == FILES
    at = len(first)
    assert listing.truncated == (
        f"the tar archive is damaged at byte {at:,}: bytes {at:,} to {at + 99:,} belong to no file that can be read"
    )


def test_bytes_that_are_lost_within_a_tar_cost_one_member(tmp_path: Path) -> None:
    source, members, listing = listed(tmp_path, BODY[:700] + BODY[800:] + bytes(1024), "x.tar")
    assert list(rows(members)) == ["s/0.jpg", "s/2.jpg", "s/3.jpg"]
    assert listing.truncated is not None
    assert contents(source, members)["s/3.jpg"] == FILES["s/3.jpg"]


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_follows_compressed_data(tmp_path: Path, name: str) -> None:
    packed = COMPRESSORS[name](TAR)
    at = len(packed)
    _, members, listing = listed(tmp_path, packed + b"TRAILER junk")
    assert rows(members) == dict.fromkeys(FILES)
    assert listing.truncated is None
    assert listing.remarks == (f"12 bytes behind the compressed data, from byte {at:,}, belong to no file",)
    for behind in (noise(1, 20_000), zip_of(FILES)):
        _, members, listing = listed(tmp_path, packed + behind)
        assert rows(members) == dict.fromkeys(FILES)
        assert f"bytes {at:,} to {at + len(behind) - 1:,} behind its compressed data" in (listing.truncated or "")
    second = COMPRESSORS[name](tar_of({"t.jpg": noise(7)}))
    _, members, listing = listed(tmp_path, packed + bytes(1 << 19) + second)
    assert list(rows(members)) == [*FILES, "t.jpg"]
    assert listing.truncated is None


def test_a_gzip_checksum_that_does_not_match_is_a_remark(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(TAR))
    packed[-6] ^= 1
    _, members, listing = listed(tmp_path, bytes(packed))
    assert rows(members) == dict.fromkeys(FILES)
    assert listing.truncated is None
    assert listing.remarks == (
        "the checksum of its gzip data does not match: some of its files may be damaged without a trace",
    )


def test_gzip_headers_with_all_that_they_may_hold() -> None:
    body = gzip.compress(TAR)[10:]
    head = b"\x1f\x8b\x08\x1e" + bytes(6) + b"\x03\x00abc" + b"name\0" + b"comment\0" + b"\0\0"
    assert CompressedStream(io.BytesIO(head + body), "gz").read(1 << 20) == TAR


def test_zstd_frames_to_be_skipped_and_large_windows(tmp_path: Path) -> None:
    skipped = struct.pack("<2L", 0x184D2A5D, 5) + b"hello"
    _, members, listing = listed(tmp_path, skipped + zstandard.compress(TAR) + skipped)
    assert rows(members) == dict.fromkeys(FILES)
    assert (listing.truncated, listing.remarks) == (None, ())

    def long(window: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(window_log=window, write_content_size=False)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return compressor.compress(TAR) + compressor.flush()

    _, members, listing = listed(tmp_path, long(28))
    assert rows(members) == dict.fromkeys(FILES)
    head = bytearray(long(28))
    head[5] = 21 << 3  # what --long=31 states
    with pytest.raises(SourceError, match="window of 2,048 MiB is larger than 256 MiB"):
        listed(tmp_path, bytes(head))
    packed = zstandard.compress(TAR)
    stream = CompressedStream(io.BytesIO(packed[:-3]), "zst")
    stream.read(1 << 20)
    assert stream.damage == "the compressed data is cut off"


def test_xz_with_a_dictionary_beyond_the_limit_is_named(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    packed = bytearray(lzma.compress(TAR, filters=filters))
    packed[16] = 38  # the property of LZMA2 that means 2 GiB
    packed[20:24] = zlib.crc32(packed[12:20]).to_bytes(4, "little")
    with pytest.raises(SourceError, match="its xz dictionary needs more than 512 MiB"):
        listed(tmp_path, bytes(packed))


def test_zeros_are_no_archive(tmp_path: Path) -> None:
    for data in (bytes(4096), bytes(10_240), gzip.compress(bytes(10_240))):
        with pytest.raises(SourceError, match=r"source\.zip is all zeros, no archive"):
            listed(tmp_path, data)
    source, members, listing = listed(tmp_path, bytes(4096) + zip_of(FILES))
    assert contents(source, members) == FILES
    assert listing.truncated is None


def test_an_archive_behind_an_image_is_named(tmp_path: Path) -> None:
    image = b"\xff\xd8\xff" + noise(1)
    _, members, listing = listed(tmp_path, image + zip_of(FILES), "x.jpg")
    assert [m.image_key for m in members] == ["x.jpg"]
    assert "behind the image lies a zip archive with 4 files" in (listing.truncated or "")
    _, _, listing = listed(tmp_path, image, "x.jpg")
    assert listing.truncated is None


def test_archives_of_other_kinds_are_named(tmp_path: Path) -> None:
    for data, words in ((b"Rar!\x1a\x07\x01\x00", "a RAR archive"), (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive")):
        with pytest.raises(
            SourceError, match=rf"source\.zip is {words}, which is not supported: hand it over as a zip"
        ):
            listed(tmp_path, data + noise(1))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=st.lists(
        st.tuples(st.lists(st.integers(1, 1500), min_size=1, max_size=4), st.integers(0, 1500)), min_size=1, max_size=3
    ),
    cut=st.floats(0.2, 1.0),
    compress=st.booleans(),
)
def test_whatever_tars_are_joined_and_cut_is_a_row_or_is_named(
    pieces: list[tuple[list[int], int]], cut: float, compress: bool
) -> None:
    whole, present, inside, serial = b"", [], [], 0
    for sizes, behind in pieces:
        files = {f"{serial + i}.jpg": noise(serial + i, size) for i, size in enumerate(sizes)}
        serial += len(sizes)
        begin = len(whole)
        for i, data in enumerate(files.values()):
            end = begin + sum(512 - -size // 512 * 512 for size in sizes[: i + 1])
            present.append((end, data))
        inside.append((begin, present[-1][0] + 512))
        whole += tar_of(files) + noise(1000 + behind, behind)
    size = max(int(len(whole) * cut), 512 + pieces[0][0][0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        path.write_bytes(gzip.compress(whole[:size], 1) if compress else whole[:size])
        listing = Listing(identify(path))
        members = list(listing)
    got = Counter(m.size_bytes for m in members if m.refusal is None)
    assert not Counter(len(data) for end, data in present if end <= size) - got
    assert not got - Counter(len(data) for _, data in present)
    if any(begin < size < end for begin, end in inside):  # a header that is cut off may pass for rubbish
        assert listing.truncated is not None or any("belong to no file" in remark for remark in listing.remarks)
    if any(behind for _, behind in pieces[:-1]) and size == len(whole):
        assert listing.truncated is not None
    if pieces[-1][1] and size == len(whole):
        assert listing.truncated is not None or any("belong to no file" in remark for remark in listing.remarks)
    if len(pieces) == 1 and not pieces[0][1] and size == len(whole):
        assert (listing.truncated, listing.remarks) == (None, ())


# ---------------------------------------------------------------- names in zip archives

FAT, UNIX = 0, 3


def image_key_of(raw: bytes, flags: int, extra: bytes, host: int, separators: Separators) -> str:
    return image_key(decode_name(raw, flags, extra, host, separators))


@pytest.mark.parametrize(
    ("name", "encoding", "host", "key"),
    [
        ("Müller.jpg", "cp437", FAT, "Müller.jpg"),
        ("Größe/Zürich.jpg", "cp437", FAT, "Größe/Zürich.jpg"),
        ("Größe/Zürich.jpg", "cp850", FAT, "Größe/Zürich.jpg"),
        ("Café/表.jpg", "utf-8", UNIX, "Café/表.jpg"),
        ("Müller.jpg", "cp437", UNIX, "M%81ller.jpg"),
        ("Müller.jpg", "latin-1", FAT, "M%FCller.jpg"),
        ("表.jpg", "cp932", FAT, "%95%5C.jpg"),
        ("ソフト/slide表.jpg", "cp932", FAT, "%83%5C%83t%83g/slide%95%5C.jpg"),
        ("slide表.jpg", "cp932", FAT, "slide%95%5C.jpg"),
        ("許功蓋.jpg", "big5", FAT, "%B3%5C%A5%5C%BB%5C.jpg"),
        ("a\\b.jpg", "ascii", FAT, "a/b.jpg"),
        ("a/b\\c.jpg", "ascii", FAT, "a/b\\c.jpg"),
    ],
)
def test_what_the_bytes_of_a_name_mean(name: str, encoding: str, host: int, key: str) -> None:
    raw = name.encode(encoding)
    assert image_key_of(raw, 0, b"", host, Separators()) == key


def test_one_folder_has_one_name_whatever_lies_in_it() -> None:
    """Programs declare UTF-8 only for those names that their own code page lacks."""
    keys = [
        image_key_of("Größe/a.jpg".encode("cp437"), 0, b"", FAT, Separators()),
        image_key_of("Größe/骨.jpg".encode(), 0x800, b"", FAT, Separators()),
        image_key_of("Größe/".encode("cp437") + b"\xfe.jpg", 0, b"", FAT, Separators()),
    ]
    assert {key.partition("/")[0] for key in keys} == {"Größe"}


def test_a_unicode_path_counts_for_the_name_that_it_was_made_for() -> None:
    raw = b"M\x81ller.jpg"

    def extra(of: bytes) -> bytes:
        value = struct.pack("<BL", 1, zlib.crc32(of)) + "Mühler/血.jpg".encode()
        return struct.pack("<2HB", 0x5455, 1, 0) + struct.pack("<2H", 0x7075, len(value)) + value

    assert image_key_of(raw, 0, extra(raw), UNIX, Separators()) == "Mühler/血.jpg"
    assert image_key_of(raw, 0, extra(b"older.jpg"), UNIX, Separators()) == "M%81ller.jpg"


def named_zip(names: list[tuple[bytes, int]]) -> bytes:
    """A stored zip with names of any bytes, each with the system that it says it was made on."""
    data, directory = b"", b""
    for i, (name, host) in enumerate(names):
        content = noise(i, 100)
        crc = zlib.crc32(content)
        header = struct.pack("<5H3L2H", 20, 0, 0, 0, 0, crc, 100, 100, len(name), 0)
        fields = (20, host, 20, 0, 0, 0, 0, crc, 100, 100, len(name), 0, 0, 0, 0, 0, len(data))
        directory += CENTRAL + struct.pack("<2B5H3L5H2L", *fields) + name
        data += b"PK\x03\x04" + header + name + content
    return data + directory + struct.pack("<4s4H2LH", END, 0, 0, len(names), len(names), len(directory), len(data), 0)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        ([(b"slide1\\a.jpg", UNIX), (b"slide2\\a.jpg", UNIX)], ["slide1/a.jpg", "slide2/a.jpg"]),
        ([(b"slide1/a.jpg", UNIX), (b"odd\\a.jpg", UNIX)], ["slide1/a.jpg", "odd\\a.jpg"]),
        ([(b"slide1/a.jpg", UNIX), (b"new\\a.jpg", FAT)], ["slide1/a.jpg", "new/a.jpg"]),
        ([(b"Caf\x82\\1.jpg", FAT), (b"slide\\2.jpg", FAT)], ["Café/1.jpg", "slide/2.jpg"]),
        ([("表示\\1.jpg".encode("cp932"), FAT), (b"s\\2.jpg", FAT)], ["%95%5C%8E%A6/1.jpg", "s/2.jpg"]),
        ([("表.jpg".encode("cp932"), FAT), ("ソフト.jpg".encode("cp932"), FAT)], ["%95%5C.jpg", "%83%5C%83t%83g.jpg"]),
    ],
)  # fmt: skip
def test_backslashes_in_an_archive(tmp_path: Path, names: list[tuple[bytes, int]], keys: list[str]) -> None:
    source, members, listing = listed(tmp_path, named_zip(names))
    assert [m.image_key for m in members] == keys
    assert list(contents(source, members).values()) == [noise(i, 100) for i in range(len(names))]
    assert listing.truncated is None


# ---------------------------------------------------------------- what hostile or odd archives state


def tar_with(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def zip64_record(name: bytes, size: int, stored: int, offset: int, crc: int = 0) -> bytes:
    """A record of a central directory whose numbers are in a zip64 field."""
    extra = struct.pack("<2H3Q", 1, 24, size, stored, offset)
    full = 0xFFFFFFFF
    fixed = struct.pack(
        "<4s6H3L5H2L", CENTRAL, 45, 45, 0, 0, 0, 0, crc, full, full, len(name), len(extra), 0, 0, 0, 0, full
    )
    return fixed + name + extra


def end_of(count: int, length: int, offset: int) -> bytes:
    return struct.pack("<4s4H2LH", END, 0, 0, count, count, length, offset, 0)


@pytest.mark.parametrize("name", ["BM/1.jpg", "BZh9.jpg", "MM.jpg"])
def test_a_tar_is_one_whatever_its_first_name_looks_like(tmp_path: Path, name: str) -> None:
    source, members, _ = listed(tmp_path, tar_with((tarfile.TarInfo(name), FILES["s/0.jpg"])), "source.tar")
    assert source.kind is SourceKind.TAR
    assert contents(source, members) == {name: FILES["s/0.jpg"]}


@pytest.mark.parametrize("hole", [b"?" * 512, bytes(512)], ids=["overwritten", "zeros"])
def test_a_long_name_is_not_given_to_the_file_behind_a_hole(tmp_path: Path, hole: bytes) -> None:
    long = tar_with((tarfile.TarInfo("patient-1/" + "x" * 120 + ".jpg"), b""))[:1024]  # without the file's own header
    other = tar_with((tarfile.TarInfo("patient-2.jpg"), FILES["s/1.jpg"]))
    source, members, listing = listed(tmp_path, long + hole + other, "source.tar")
    assert contents(source, members) == {"patient-2.jpg": FILES["s/1.jpg"]}
    assert "bytes 1,024 to 1,535 belong to no file" in (listing.truncated or "")


def test_a_size_of_thousands_of_digits_is_no_size(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": "9" * 5000}
    source, members, _ = listed(tmp_path, tar_with((info, FILES["s/0.jpg"])), "source.tar")
    assert contents(source, members) == {"a.jpg": FILES["s/0.jpg"]}


def test_bytes_behind_a_single_block_of_zeros_are_named(tmp_path: Path) -> None:
    whole = tar_with((tarfile.TarInfo("a.jpg"), b"1" * 512))[:1024]
    _, members, listing = listed(tmp_path, whole + bytes(512) + b"?" * 100, "source.tar")
    assert [m.image_key for m in members] == ["a.jpg"]
    assert "bytes 1,536 to 1,635 belong to no file that can be read" in (listing.truncated or "")


def test_a_locator_without_a_record_is_no_reason_to_fail(tmp_path: Path) -> None:
    data = b"PK\x06\x07" + bytes(16) + b"PK\x05\x06" + bytes(18)
    source, members, _ = listed(tmp_path, data)
    assert source.kind is SourceKind.ZIP
    assert members == []
    (tmp_path / "inner").write_bytes(data)
    assert is_archive(str(tmp_path / "inner"), "inner")
    assert not is_archive(str(tmp_path / "inner" / "deeper"), "deeper")


def test_joined_zip64_archives_of_one_size_have_the_members_of_both(tmp_path: Path) -> None:
    def wide(files: dict[str, bytes]) -> bytes:
        plain = zip_of(files)
        start, length = plain.find(CENTRAL), len(plain) - 22 - plain.find(CENTRAL)
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, len(files), len(files), length, start)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(plain) - 22, 1)
        return plain[:-22] + end64 + locator + end_of(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)

    first, second = ({f"{n}.jpg": noise(n)} for n in (1, 2))
    assert len(wide(first)) == len(wide(second))
    source, members, listing = listed(tmp_path, wide(first) + wide(second))
    assert contents(source, members) == first | second
    assert listing.truncated is None


def test_bytes_within_the_directory_behind_its_last_record_are_looked_at(tmp_path: Path) -> None:
    whole, hidden = zip_of(part(FILES, 0)), zip_of(part(FILES, 1))
    start, local = whole.find(CENTRAL), hidden[: hidden.find(CENTRAL)]
    for behind, keys, words in ((local, list(FILES)[:2], None), (b"?" * 100, list(FILES)[:1], "belong to no file")):
        directory = whole[start:-22] + behind
        data = whole[:start] + directory + end_of(1, len(directory), start)
        _, members, listing = listed(tmp_path, data)
        assert [m.image_key for m in members] == keys
        assert listing.truncated is None if words is None else words in (listing.truncated or "")


def test_numbers_beyond_any_file_are_reasons_of_rows(tmp_path: Path) -> None:
    whole = zip_of(part(FILES, 0))
    start = whole.find(CENTRAL)
    far = zip64_record(b"far.jpg", 300, 300, 2**62)
    large = zip64_record(b"large.jpg", 2**64 - 1, 2**64 - 1, 0)
    directory = whole[start:-22] + far + large
    source, members, _ = listed(tmp_path, whole[:start] + directory + end_of(3, len(directory), start))
    assert {m.image_key: m.refusal for m in members} == {
        "s/0.jpg": None,
        "far.jpg": "damaged: the archive has no file at the place where its directory says",
        "large.jpg": "too large: 18,446,744,073,709,551,615 bytes, the limit is 536,870,912",
    }
    assert members[2].size_bytes == members[2].stored_bytes == 2**63 - 1
    assert contents(source, members) == part(FILES, 0)


def test_an_unlisted_file_of_any_size_is_a_row(tmp_path: Path) -> None:
    """Its sizes are followed by a descriptor, which lies beyond any place in a file."""
    extra = struct.pack("<2H2Q", 1, 16, 2**64 - 1, 2**64 - 1)
    header = struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 8, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 5, len(extra))
    _, members, _ = listed(tmp_path, header + b"x.jpg" + extra + noise(1))
    assert [(m.image_key, (m.refusal or "").partition(":")[0]) for m in members] == [("x.jpg", "truncated")]


def test_two_records_for_one_file_are_remarked(tmp_path: Path) -> None:
    whole = zip_of(part(FILES, 0))
    start = whole.find(CENTRAL)
    directory = 2 * whole[start:-22]
    _, members, listing = listed(tmp_path, whole[:start] + directory + end_of(2, len(directory), start))
    assert [m.image_key for m in members] == ["s/0.jpg", "s/0.jpg#2"]
    assert listing.remarks == (
        "1 records of the zip archive's central directory name the bytes of a file that another one names, too: each "
        "has a row",
    )


def test_a_folder_that_has_data_is_a_member(tmp_path: Path) -> None:
    files = {"a/": b"", "b/": FILES["s/0.jpg"]}
    tar = tar_of_names(files)
    for data, name in ((zip_of(files), "source.zip"), (tar, "source.tar"), (zip_of(files)[:-60], "cut.zip")):
        source, members, listing = listed(tmp_path, data, name)
        assert contents(source, members) == {"b/": FILES["s/0.jpg"]}
        assert listing.ignored == 1


def tar_of_names(files: dict[str, bytes]) -> bytes:
    """A tar of regular files, as old programs write it: a folder is one whose name ends with a slash."""
    sink = io.BytesIO()
    for name, data in files.items():
        info = tarfile.TarInfo("?" * len(name))
        info.size = len(data)
        header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        header[: len(name)] = name.encode()
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        sink.write(bytes(header) + data + bytes(-len(data) % 512))
    return sink.getvalue() + bytes(1024)
