"""Listing: members of whole sources in order with their bytes, and what is refused when a source is planned."""

from __future__ import annotations

import errno
import io
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import zstandard
from made_up_sources import FILES, JPEG, contents, listed, saved, tar_of, zip_of

from leukoflow.core.errors import MemberError, SourceError
from leukoflow.runs.records import Source, SourceKind
from leukoflow.sources.identify import identify
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader, read_member


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=str
)
def test_zip_members_come_in_order_with_their_bytes(tmp_path: Path, method: int) -> None:
    source = saved(tmp_path, zip_of(FILES, method))
    members, listing = listed(source)
    assert source.kind is SourceKind.ZIP
    assert [m.image_key for m in members] == list(FILES)
    assert [m.ordinal for m in members] == list(range(len(FILES)))
    assert contents(source, members) == FILES
    assert (listing.ignored, listing.truncated) == (0, None)


def test_zip_with_zstd_members(tmp_path: Path) -> None:
    """Written by hand: the standard library of Python 3.11 has no such method."""
    data = FILES["fields/f001.jpg"]
    whole = bytearray(zip_of({"a.jpg": zstandard.compress(data)}, zipfile.ZIP_STORED))
    local, central = 0, whole.find(b"PK\x01\x02")
    for at in (local + 8, central + 10):
        struct.pack_into("<H", whole, at, 93)
    for at in (local + 14, central + 16):
        struct.pack_into("<L", whole, at, zlib.crc32(data))
    for at in (local + 22, central + 24):
        struct.pack_into("<L", whole, at, len(data))
    source = saved(tmp_path, bytes(whole))
    assert contents(source, listed(source)[0]) == {"a.jpg": data}


def test_zip64_fields_are_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in FILES.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    whole = bytearray(buffer.getvalue())
    # Full 32-bit fields in the central directory and the end record, real values in the zip64 records.
    end = whole.rfind(b"PK\x05\x06")
    count, _, offset = struct.unpack_from("<HLL", whole, end + 10)
    directory, at = b"", offset
    for _ in range(count):
        fields = list(struct.unpack_from("<4s2B5H3L5H2L", whole, at))
        name = bytes(whole[at + 46 : at + 46 + fields[11]])
        extra = struct.pack("<2H3Q", 1, 24, fields[10], fields[9], fields[17])
        at += 46 + fields[11] + fields[12] + fields[13]
        fields[9] = fields[10] = fields[17] = 0xFFFFFFFF
        fields[12], fields[13] = len(extra), 0
        directory += struct.pack("<4s2B5H3L5H2L", *fields) + name + extra
    tail = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), offset)
    tail += struct.pack("<4sLQL", b"PK\x06\x07", 0, offset + len(directory), 1)
    tail += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    source = saved(tmp_path, bytes(whole[:offset]) + directory + tail)
    members, listing = listed(source)
    assert contents(source, members) == FILES
    assert listing.truncated is None


def test_zip_behind_a_program_and_before_a_comment(tmp_path: Path) -> None:
    buffer = io.BytesIO(zip_of(FILES))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"from the night shift"
    source = saved(tmp_path, b"#!/bin/sh\nexec unzip $0\n" * 50 + buffer.getvalue())
    assert source.kind is SourceKind.ZIP
    assert contents(source, listed(source)[0]) == FILES


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=str)
def test_tar_members_come_in_order_with_their_bytes(tmp_path: Path, form: int) -> None:
    source = saved(tmp_path, tar_of(FILES, form))
    members, listing = listed(source)
    assert source.kind is SourceKind.TAR
    assert [m.image_key for m in members] == list(FILES)
    assert contents(source, members) == FILES
    assert (listing.ignored, listing.truncated) == (0, None)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=str)
def test_tar_long_and_foreign_names(tmp_path: Path, form: int) -> None:
    files = {"x" * 90 + "/" + "y" * 200 + ".jpg": b"long", "Ausstrich/Fäden-血.jpg": b"foreign", "z.jpg": b"plain"}
    source = saved(tmp_path, tar_of(files, form))
    assert contents(source, listed(source)[0]) == files


def test_directory_members_come_sorted_whatever_was_created_first(tmp_path: Path) -> None:
    for name in reversed(list(FILES)):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[name])
    (tmp_path / "in" / "Thumbs.db").write_bytes(b"litter")
    source = identify(tmp_path / "in")
    members, listing = listed(source)
    assert source.kind is SourceKind.DIRECTORY
    assert [m.image_key for m in members] == list(FILES)
    assert contents(source, members) == FILES
    assert listing.ignored == 1


def test_one_image_is_a_source(tmp_path: Path) -> None:
    source = saved(tmp_path, JPEG, "smear 7.jpg")
    members, _ = listed(source)
    assert source.kind is SourceKind.IMAGE
    assert [m.image_key for m in members] == ["smear 7.jpg"]
    assert read_member(source, members[0]) == JPEG


def test_folders_that_cannot_be_read_are_counted_and_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("miller", "smith", "readable"):
        (tmp_path / "in" / name).mkdir(parents=True)
    (tmp_path / "in" / "readable" / "x.jpg").write_bytes(JPEG)
    listdir, closed = os.listdir, {b"miller", b"smith"}

    def guarded(path: bytes) -> list[bytes]:
        if os.path.basename(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr("leukoflow.sources.local.os.listdir", guarded)
    members, listing = listed(identify(tmp_path / "in"))
    assert [m.image_key for m in members] == ["readable/x.jpg"]
    assert listing.truncated == "2 folders or files of it cannot be read: Permission denied"
    closed.add(b"readable")
    with pytest.raises(SourceError, match=r"nothing in .* can be read: Permission denied; let this user read its"):
        identify(tmp_path / "in")
    closed.add(b"in")
    with pytest.raises(SourceError, match="in cannot be read: Permission denied; let this user read it, or mount it"):
        identify(tmp_path / "in")


def test_split_archive_is_refused(tmp_path: Path) -> None:
    whole = bytearray(zip_of(FILES))
    struct.pack_into("<H", whole, whole.rfind(b"PK\x05\x06") + 4, 2)
    source = saved(tmp_path, bytes(whole))
    with pytest.raises(SourceError, match="split zip archive"):
        listed(source)


def test_a_file_whose_picture_is_elsewhere_is_refused_by_its_name(tmp_path: Path) -> None:
    files = {"a/x.mrxs": b"1", "b.VSI": b"1", "mrxs/x.jpg": b"1", "y.mrxs.jpg": b"1"}
    (tmp_path / "x.mrxs").write_bytes(b"\xff\xd8\xff\xe0" + bytes(600))
    found = reasons(saved(tmp_path, zip_of(files), "slides"))
    assert "thumbnail of a MIRAX slide" in (found["a/x.mrxs"] or "")
    assert "overview of a VSI slide" in (found["b.VSI"] or "")
    assert (found["mrxs/x.jpg"], found["y.mrxs.jpg"]) == (None, None)
    assert "thumbnail of a MIRAX slide" in (reasons(identify(tmp_path / "x.mrxs"))["x.mrxs"] or "")


def reasons(source: Source) -> dict[str, str | None]:
    return {m.image_key: m.refusal for m in listed(source)[0]}


def test_zip_members_refused_at_planning(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("good.jpg", "secret.jpg", "odd.jpg", "more.zip"):
            archive.writestr(name, b"12345")
        archive.writestr("empty.jpg", b"")
        archive.writestr(link, "/etc/passwd")
    whole = bytearray(buffer.getvalue())
    secret = whole.rfind(b"secret.jpg") - 46
    whole[secret + 8] |= 1
    odd = whole.rfind(b"odd.jpg") - 46
    whole[odd + 10] = 9
    source = saved(tmp_path, bytes(whole))
    found = reasons(source)
    assert found.pop("good.jpg") is None
    assert {name: (reason or "").split(":")[0] for name, reason in found.items()} == {
        "secret.jpg": "encrypted",
        "odd.jpg": "compression method 9 (Deflate64) is not supported",
        "more.zip": "archive within the source",
        "empty.jpg": "empty",
        "link.jpg": "symbolic link",
    }
    members, _ = listed(source)
    with open_reader(source) as reader:
        assert reader.read(members[0]) == b"12345"
        with pytest.raises(MemberError, match="encrypted"):
            reader.read(members[1])


def test_tar_members_refused_at_planning(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        kinds = {
            "sym.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE, "char.jpg": tarfile.CHRTYPE,
            "pipe.jpg": tarfile.FIFOTYPE,
        }  # fmt: skip
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("good.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"123"))
    found = reasons(saved(tmp_path, buffer.getvalue()))
    assert {name: (reason or "good").split(":")[0] for name, reason in found.items()} == {
        "sym.jpg": "symbolic link",
        "hard.jpg": "hard link",
        "char.jpg": "device",
        "pipe.jpg": "named pipe",
        "good.jpg": "good",
    }


def test_directory_links_and_special_files_are_refused_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.jpg").write_bytes(JPEG)
    (folder / "good.jpg").write_bytes(JPEG)
    (folder / "file").symlink_to(tmp_path / "outside" / "x.jpg")
    (folder / "folder").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe")
    found = reasons(identify(folder))
    assert {name: (reason or "good").split(":")[0] for name, reason in found.items()} == {
        "good.jpg": "good",
        "file": "symbolic link",
        "folder": "symbolic link",
        "pipe": "special file",
    }


def test_members_beyond_the_size_limit_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, zip_of({"big.jpg": bytes(5000), "small.jpg": b"1"}))
    members = list(Listing(source, member_bytes=4999))
    assert [m.refusal for m in members] == ["too large: 5,000 bytes, the limit is 4,999", None]
    whole, _ = listed(source)
    with pytest.raises(MemberError, match="too large: 5,000 bytes"):
        read_member(source, whole[0], limit_bytes=4999)


def test_real_archive(shared_data: Path) -> None:
    source = identify(shared_data / "all_fields.zip")
    members, listing = listed(source)
    assert len(members) == 2604
    assert (listing.ignored, listing.truncated) == (0, None)
    with zipfile.ZipFile(shared_data / "all_fields.zip") as archive, open_reader(source) as reader:
        assert archive.namelist() == [m.image_key for m in members]
        for member in members[::200]:
            assert reader.read(member) == archive.read(member.image_key)
