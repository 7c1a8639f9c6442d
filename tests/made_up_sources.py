"""Small sources made in memory: zip and tar archives saved to a file, listed and read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import zstandard
from harness import Pipe

from leukoflow.runs.records import Member, Shard, Source
from leukoflow.sources.identify import identify
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader

JPEG = b"\xff\xd8\xff" + b"not really" * 20


def payload(seed: int, size: int = 3000) -> bytes:
    """Half of it compressible."""
    generator = random.Random(seed)
    return generator.randbytes(size // 2) + bytes(size - size // 2)


FILES = {f"fields/f{i:03}.jpg": payload(i, 1000 + 37 * i) for i in range(7)}


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def streamed_zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """As a program writes it into a pipe: sizes and checksums only after the data."""

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return bytes(pipe.data)


def tar_of(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def saved(folder: Path, data: bytes, name: str = "source.bin") -> Source:
    path = folder / name
    path.write_bytes(data)
    return identify(path)


def listed(source: Source) -> tuple[list[Member], Listing]:
    listing = Listing(source)
    return list(listing), listing


def contents(source: Source, members: list[Member]) -> dict[str, bytes]:
    with open_reader(source) as reader:
        return {m.image_key: reader.read(m) for m in members if m.refusal is None}


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}


def shards_of(members: list[Member], size: int) -> list[tuple[Shard, list[Member]]]:
    """As the plan lays a compressed tar out: offsets within the shard's file."""
    out = []
    for ordinal, first in enumerate(range(0, len(members), size)):
        part, position = [], 0
        for m in members[first : first + size]:
            part.append(
                Member(m.ordinal, m.image_key, "", position, m.size_bytes, m.size_bytes, 0, m.identity, m.refusal)
            )
            position += 0 if m.refusal else m.size_bytes
        out.append((Shard(ordinal, first, len(part)), part))
    return out
