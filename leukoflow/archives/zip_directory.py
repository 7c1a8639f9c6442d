"""The central directory of a zip archive: find it, and read its records in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from leukoflow.archives.errors import SplitArchiveError
from leukoflow.archives.zip_format import (
    CENTRAL,
    CENTRAL_HEADER,
    CHUNK,
    DESCRIPTOR,
    END,
    END64,
    END64_RECORD,
    END_RECORD,
    FULL32,
    LOCAL,
    LOCATOR64,
    LOCATOR64_RECORD,
    wide_numbers,
)

_MOST_ENDS = 100  # end records that are tried: a comment may hold any number of signatures
_PROBES = 5  # members that tell where the archive's offsets count from


class ZipDirectory(NamedTuple):
    """Where the central directory is: `shift` is what its offsets lack, `end` the byte behind the archive's comment."""

    start: int
    length: int
    shift: int
    members: int
    end: int


class Record(NamedTuple):
    """One record of the central directory: `offset` without the shift, `end` of the record itself in the file."""

    name: bytes
    extra: bytes
    host: int
    flags: int
    method: int
    crc: int
    stored: int
    size: int
    unix_mode: int
    offset: int
    end: int


def find_directory(file: BinaryIO, size: int) -> ZipDirectory | None:
    """Find the last central directory whose end record fits it; None where there is none.

    Raises SplitArchiveError for one part of a split archive.
    """
    base = max(0, size - END_RECORD.size - 0xFFFF - CHUNK)  # a comment, and some rubbish or padding behind it
    file.seek(base)
    tail = file.read(size - base)
    at, split, empty = len(tail), None, None
    for _ in range(_MOST_ENDS):
        at = tail.rfind(END, 0, at)
        if at < 0:
            break
        if len(tail) - at < END_RECORD.size:
            continue
        _, disk, _, _, count, length, offset, n_comment = END_RECORD.unpack_from(tail, at)
        end, behind = base + at, base + at + END_RECORD.size + n_comment
        if end >= LOCATOR64_RECORD.size:
            file.seek(end - LOCATOR64_RECORD.size)
            signature, _, at64, _ = LOCATOR64_RECORD.unpack(file.read(LOCATOR64_RECORD.size))
            if signature == LOCATOR64:
                locator = end - LOCATOR64_RECORD.size
                for position in (locator - END64_RECORD.size, at64):
                    if not 0 <= position <= locator - END64_RECORD.size:
                        continue
                    file.seek(position)
                    record = file.read(END64_RECORD.size)
                    if record[:4] == END64 and position + 12 + int.from_bytes(record[4:12], "little") == locator:
                        count, length, offset = END64_RECORD.unpack(record)[7:]
                        end, disk = position, 0
                        break
        start = end - length
        if disk not in (0, 0xFFFF):
            split = disk if behind == size else split
        elif start >= 0:
            file.seek(start)
            directory = ZipDirectory(start, length, start - offset, count, min(size, behind))
            if length and file.read(4) == CENTRAL:
                return _well_placed(file, directory)
            if not length and not count:
                empty = empty or directory  # unless there is a better one: zeros in a comment look the same
    if empty is not None:
        return empty
    if split is not None:
        raise SplitArchiveError(_split_words(split))
    if size >= 8:
        file.seek(0)
        if file.read(8) == DESCRIPTOR + LOCAL:
            raise SplitArchiveError(_split_words(0))
    return None


def _split_words(disk: int) -> str:
    return (
        f"one part of a split zip archive (part {disk + 1}): join the parts into one archive (zip -s 0 FIRST.zip --out "
        "WHOLE.zip) before handing it over"
    )


def _well_placed(file: BinaryIO, directory: ZipDirectory) -> ZipDirectory:
    """Return the directory with the shift by which its first members are found.

    Something may stand between it and them.
    """
    file.seek(directory.start)
    block = file.read(min(directory.length, CHUNK))
    at = 0
    offsets: list[int] = []
    while len(offsets) < _PROBES and block[at : at + 4] == CENTRAL and len(block) - at >= CENTRAL_HEADER.size:
        fields = CENTRAL_HEADER.unpack_from(block, at)
        if fields[17] != FULL32:
            offsets.append(fields[17])
        at += CENTRAL_HEADER.size + sum(fields[11:14])
    for shift in {directory.shift: None, 0: None}:
        for offset in offsets:
            if 0 <= offset + shift < directory.start:
                file.seek(offset + shift)
                if file.read(4) == LOCAL:
                    return directory._replace(shift=shift)
    return directory


def read_records(file: BinaryIO, directory: ZipDirectory) -> Iterator[Record]:
    """Read the records of a central directory in pieces; ends early at the first that is none."""
    position, left = directory.start, directory.length
    buffer, at = b"", 0
    while True:
        if len(buffer) - at < 46 + 3 * 0xFFFF and left:  # a record with its longest name, extra and comment
            file.seek(position)
            more = file.read(min(CHUNK, left))
            position, left = position + len(more), left - len(more) if more else 0
            buffer, at = buffer[at:] + more, 0
        if len(buffer) - at < CENTRAL_HEADER.size:
            return
        fields = CENTRAL_HEADER.unpack_from(buffer, at)
        signature, _, host, _, flags, method, _, _, crc, stored, size, n_name, n_extra, n_comment = fields[:14]
        attributes, offset = fields[16:]
        stop = at + CENTRAL_HEADER.size + n_name + n_extra + n_comment
        if signature != CENTRAL or stop > len(buffer):
            return
        at += CENTRAL_HEADER.size
        name, extra = buffer[at : at + n_name], buffer[at + n_name : at + n_name + n_extra]
        if FULL32 in (stored, size, offset):
            size, stored, offset = wide_numbers(extra, size, stored, offset)
        at = stop
        unix_mode = attributes >> 16 if host in (3, 19) else 0
        yield Record(
            name, extra, host, flags, method, crc, stored, size, unix_mode, offset, position - len(buffer) + at
        )
