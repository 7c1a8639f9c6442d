"""What the bytes of names in zip archives mean, as keys."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from made_up_archives import contents, listed, named_zip, noise

from leukoflow.archives.zip_names import Separators, decode_name
from leukoflow.sources.keys import image_key

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
