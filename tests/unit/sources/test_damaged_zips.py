"""Every byte of a zip archive is part of a row or is named: joined, cut, hidden and odd archives."""

from __future__ import annotations

import io
import struct
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_archives import CENTRAL, END, FILES, contents, listed, noise, part, zip_of

from leukoflow.archives.errors import SplitArchiveError
from leukoflow.archives.zip_walk import ZipWalk
from leukoflow.core.errors import MemberError
from leukoflow.runs.records import Source, SourceKind
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader


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


def test_hostile_headers_end(tmp_path: Path) -> None:
    """Thousands of streamed members, none of which ends: each must not be unpacked to the end of the file."""
    header = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 8, 8, 0, 0, 0, 0, 0, 1, 0) + b"x"
    one = header + b"\x00\xff\xff\x00\x00"  # a stored block of 65,535 bytes that is not the last
    _, members, listing = listed(tmp_path, one * 3000)
    assert len(members) == 3000
    assert listing.truncated is not None


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
