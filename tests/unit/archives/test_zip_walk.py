"""Walking through zip archives: what is not read is named, and reading stays within bounds."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

from made_up_archives import CENTRAL, noise, zip_of

from leukoflow.archives.zip_walk import ZipWalk


def test_the_bench_says_what_it_does_not_read() -> None:
    whole = zip_of({"a.jpg": noise(1)}) + zip_of({"b.jpg": noise(2)})
    walk = ZipWalk(io.BytesIO(whole), len(whole), repair=False)
    assert [e.name for e in walk] == ["b.jpg"]
    assert walk.truncated is not None
    assert walk.truncated == (
        f"bytes 0 to {len(whole) // 2 - 1:,} of the zip archive are not in its directory and were not read"
    )


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


def test_an_empty_member_written_as_a_stream_does_not_hide_the_next() -> None:
    """The short descriptor of deflated nothing reads as the beginning of a long one, eight bytes longer."""
    whole = zip_of({"empty.jpg": b"", "b.jpg": noise(1)}, zipfile.ZIP_DEFLATED, streamed=True)
    data = whole[: whole.find(CENTRAL)]
    assert [(e.name, e.size, e.refusal) for e in ZipWalk(io.BytesIO(data), len(data))] == [
        ("empty.jpg", 0, None),
        ("b.jpg", 300, None),
    ]
