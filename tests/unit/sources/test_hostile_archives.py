"""What hostile or odd archives state is a row, a remark, or nothing; never a failure."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path

import pytest
from made_up_archives import (
    CENTRAL,
    FILES,
    contents,
    end_of,
    listed,
    noise,
    part,
    tar_of_names,
    tar_with,
    zip64_record,
    zip_of,
)

from leukoflow.runs.records import SourceKind
from leukoflow.sources.survey import is_archive


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
