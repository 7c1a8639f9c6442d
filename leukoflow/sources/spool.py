"""Spooling: the members of a compressed tar, unpacked shard by shard in one linear pass."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import BinaryIO

from leukoflow.archives.streams import ByteStream
from leukoflow.archives.tar_walk import TarWalk
from leukoflow.core.errors import SourceError
from leukoflow.runs.records import Member, Shard, Source
from leukoflow.sources.filenames import is_litter
from leukoflow.sources.keys import image_key
from leukoflow.sources.opening import open_source, tar_stream
from leukoflow.sources.reading import crc_of

_PIECE_BYTES = 1 << 20


def spool(
    source: Source, shards: Iterable[tuple[Shard, Sequence[Member]]], write: Callable[[Shard], BinaryIO]
) -> Iterator[Shard]:
    """Unpack the wanted shards of a compressed tar in one linear pass; yields each when its file is closed.

    `shards` come in ascending order with all their members; the bytes of each member that has no refusal are written
    one after the other to `write(shard)`, so that a member starts at its `offset`. The pass goes on only when the
    consumer asks for the next shard: how far it runs ahead, and so the scratch needed, is the consumer's choice.
    Raises SourceError where the archive no longer matches the plan.
    """
    with open_source(source) as file:
        stream = tar_stream(source, file)
        entries = _plan_order(TarWalk(stream))
        position = 0
        for shard, members in shards:
            with write(shard) as sink:
                for member in members:
                    name = next(islice(entries, member.ordinal - position, None), None)
                    position = member.ordinal + 1
                    if name is None or not member.image_key.startswith(image_key(name)):  # a repeated one has a suffix
                        raise _altered(source, member)
                    if member.refusal is None and _copy(stream, sink, member.size_bytes) != crc_of(member):
                        raise _altered(source, member)
            yield shard


def _altered(source: Source, member: Member) -> SourceError:
    return SourceError(f"{source.uri} does not match its plan at file {member.ordinal + 1:,}: start a new run for it")


def _plan_order(walk: TarWalk) -> Iterator[bytes]:
    """Yield the names of the entries that are members of the plan: neither folders nor litter."""
    for entry in walk:
        if not entry.is_directory and not is_litter(image_key(entry.name)):
            yield entry.name


def _copy(stream: ByteStream, sink: BinaryIO, size: int) -> int:
    """Copy `size` bytes and return their CRC-32."""
    crc = 0
    while size > 0:
        data = stream.read(min(_PIECE_BYTES, size))
        if not data:
            return -1
        sink.write(data)
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc
