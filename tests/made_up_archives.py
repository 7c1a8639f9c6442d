"""Zip and tar archives made in memory, whole and odd, and what a listing makes of them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import zstandard
from harness import Pipe

from leukoflow.runs.records import Member, Source
from leukoflow.sources.identify import identify
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader

CENTRAL, END = b"PK\x01\x02", b"PK\x05\x06"


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


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress,
}  # fmt: skip


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
