"""What a zip archive holds beside its central directory, or without one: members found by their local headers.

A header stands in front of every member's data, so the members of an archive whose directory is lost or cut off, or
does not explain all of its bytes, are found by going through these.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from leukoflow.archives.zip_entry import ZipEntry
from leukoflow.archives.zip_format import (
    CENTRAL_HEADER,
    CHUNK,
    DESCRIPTOR,
    DESCRIPTOR32,
    DESCRIPTOR64,
    ENCRYPTED,
    END,
    END_RECORD,
    FOLLOWERS,
    FULL32,
    HAS_DESCRIPTOR,
    LOCAL,
    LOCAL_HEADER,
    LOCATOR64_RECORD,
    descriptor_length,
    refusal_of,
    wide_numbers,
)
from leukoflow.archives.zip_names import Separators, decode_name

_SIGNATURE = re.compile(rb"PK(?:\x03\x04|\x01\x02|\x05\x06|\x06\x06|\x06\x07|\x05\x05)")
_MOST_METHODS = 100  # compression methods have smaller numbers
EXAMPLES = 3  # ranges of bytes that are named


class Hole(NamedTuple):
    """Bytes `start` to `stop` (exclusive) that belong to nothing."""

    start: int
    stop: int


class Holes:
    """Ranges of bytes that belong to nothing: the first few, and how many there are. Neighbours make one."""

    def __init__(self) -> None:
        self.first: list[Hole] = []
        self.count = 0
        self._last: Hole | None = None

    def add(self, hole: Hole) -> None:
        """Add one that lies behind all others, or ahead of them."""
        if self._last is not None and self._last.stop == hole.start:
            self._last = Hole(self._last.start, hole.stop)
            if self.count <= EXAMPLES:
                self.first[-1] = self._last
            return
        self._last = hole
        self.count += 1
        if self.count <= EXAMPLES:
            self.first.append(hole)


class LocalScan:
    """Goes through bytes of an archive for local headers; what belongs to nothing is added to `holes` and `zeros`.

    `reached` is where the last scan has ended, and `ended` says whether it has met an end record and no member behind
    it. Names are decoded by `separators`.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._patience = 4 * size + CHUNK  # bytes that may be read in vain: hostile data cannot keep us for ever
        self.holes, self.zeros = Holes(), Holes()  # what belongs to nothing; of that, what is only zeros
        self.separators = Separators()
        self.reached = 0
        self.ended = False

    def entries(self, position: int, stop: int, whole: int | None = None) -> Iterator[ZipEntry]:
        """Yield entries found by their local headers between two bytes; what is neither these nor a record is a hole.

        A stored archive in front of which a local header stands reaches over `stop` if it reaches up to `whole`.
        """
        while position < stop:
            self._file.seek(position)
            header = self._file.read(CENTRAL_HEADER.size)
            if header[:4] == LOCAL and (found := self._entry_at(position, header, stop, whole)):
                self.ended = False
                yield found[0]
                position = found[1]
            elif (after := _end_of_record(position, header, self._size)) and after <= stop:
                self.ended = self.ended or header[:4] == END
                position = after
            else:
                after, zeros = self._find_record(position, stop)
                (self.zeros if zeros else self.holes).add(Hole(position, after))
                position = after
        self.reached = max(position, stop)

    def _entry_at(
        self, position: int, header: bytes, stop: int, whole: int | None
    ) -> tuple[ZipEntry, int] | None:  # fmt: skip
        """Return the entry whose local header this is, and where it ends; None if it is none."""
        if len(header) < LOCAL_HEADER.size:
            return None
        _, _, flags, method, _, _, crc, stored, size, n_name, n_extra = LOCAL_HEADER.unpack(header[: LOCAL_HEADER.size])
        self._file.seek(position + LOCAL_HEADER.size)
        raw, extra = self._file.read(n_name), self._file.read(n_extra)
        data = position + LOCAL_HEADER.size + n_name + n_extra
        if not raw or b"\0" in raw or method >= _MOST_METHODS or data > stop:
            return None
        if FULL32 in (stored, size):
            size, stored, _ = wide_numbers(extra, size, stored, 0)
        name = decode_name(raw, flags, extra, 0, self.separators)
        streamed = bool(flags & HAS_DESCRIPTOR) and not stored and name[-1:] != "/"
        after: int | None = data + stored
        if streamed:
            after = None
            if found := self._measure(data, flags, method, stop):
                crc, stored, size, after = found
        elif flags & HAS_DESCRIPTOR and data + stored <= self._size:
            after = data + stored + descriptor_length(self._file, data + stored, stored)

        def entry(refusal: str | None) -> ZipEntry:
            return ZipEntry(
                name, method, crc, 0 if refusal else stored, size, position,
                refusal or refusal_of(flags, method, 0), name[-1:] == "/" and not size,
            )  # fmt: skip

        if after is not None and after <= stop:
            return entry(None), after
        self._file.seek(data)
        archive = method == 0 and self._file.read(4) in (LOCAL, END, DESCRIPTOR)
        if archive and (whole or stop == self._size):  # its members are not ours, whether it is whole or cut off
            if after is not None and (whole or 0) <= after <= self._size:
                return entry(None), after
            following = self._size if after is None or after > self._size else self._find_record(data, stop)[0]
        else:
            following = self._find_record(data, stop)[0]
        if following < self._size:
            return entry("damaged: the next file of the archive begins within its data"), following
        if streamed:
            return entry("truncated: the archive ends within this file"), following
        return entry(f"truncated: {self._size - data:,} of {stored:,} stored bytes"), following

    def _measure(self, data: int, flags: int, method: int, stop: int) -> tuple[int, int, int, int] | None:
        """Find (crc, stored, size, end) of a member whose sizes follow its data; None if they cannot be found."""
        if self._patience <= 0:
            return None
        if method == 8 and not flags & ENCRYPTED:
            found = _measure_by_inflating(self._file, data)
        else:
            found = _measure_by_descriptor(self._file, data, method if not flags & ENCRYPTED else None)
        if found is None or found[3] > stop:
            self._patience -= self._file.tell() - data
        return found

    def _find_record(self, position: int, stop: int) -> tuple[int, bool]:
        """Find the next record behind `position`, at most at `stop`, and tell whether only zeros lie before it."""
        zeros, at, tail, step = True, position, b"", 4096
        while at < stop:
            self._file.seek(at)
            chunk = self._file.read(min(step, stop - at))
            if not chunk:
                break
            block = tail + chunk
            for match in _SIGNATURE.finditer(block):
                begin = at - len(tail) + match.start()
                if begin > position:
                    return begin, zeros and not any(block[: match.start()])
            zeros = zeros and chunk.count(0) == len(chunk)
            at, tail, step = at + len(chunk), block[-3:], min(2 * step, CHUNK)
        return stop, zeros


def _end_of_record(position: int, header: bytes, size: int) -> int | None:
    """Find where a record of the archive ends that is no member; None if none begins with these bytes."""
    end = size + 1
    match header[:4]:
        case b"PK\x01\x02" if len(header) == CENTRAL_HEADER.size:
            fields = CENTRAL_HEADER.unpack(header)
            if fields[5] < _MOST_METHODS and fields[11]:
                end = position + CENTRAL_HEADER.size + sum(fields[11:14])
        case b"PK\x05\x06" if len(header) >= END_RECORD.size:
            fields = END_RECORD.unpack(header[: END_RECORD.size])
            if fields[3] == fields[4]:
                end = min(size, position + END_RECORD.size + fields[7])
        case b"PK\x06\x06" if len(header) >= 12:
            end = position + 12 + int.from_bytes(header[4:12], "little")
            end = end if end <= position + CHUNK else size + 1
        case b"PK\x06\x07":
            end = position + LOCATOR64_RECORD.size
        case b"PK\x05\x05" if len(header) >= 6:  # digital signature
            end = position + 6 + int.from_bytes(header[4:6], "little")
        case b"PK\x07\x08" | b"PK00" if position == 0:  # the archive was meant to be split
            end = 4
        case b"PK\x07\x08":  # of a folder that was written as a stream
            end = position + (24 if header[24:28] in FOLLOWERS and header[16:20] not in FOLLOWERS else 16)
    return end if end <= size else None


def _measure_by_descriptor(file: BinaryIO, data: int, method: int | None) -> tuple[int, int, int, int] | None:
    """Find (crc, stored, size, end) of a streamed member that cannot be unpacked by its descriptor."""
    position, tail = data, b""
    file.seek(data)
    while chunk := file.read(CHUNK):
        block = tail + chunk
        base = position - len(tail)
        at = block.find(DESCRIPTOR)
        while at >= 0:
            stored = base + at - data
            for form in (DESCRIPTOR64, DESCRIPTOR32):
                if len(block) - at < form.size:
                    continue
                _, crc, stated, size = form.unpack_from(block, at)
                if stated == stored and (method != 0 or size == stored):
                    follower = block[at + form.size : at + form.size + 4]
                    if form is DESCRIPTOR64 and not stored and follower not in FOLLOWERS:
                        continue  # without data, eight zeros may be both sizes of the short form
                    return crc, stored, size, base + at + form.size
            at = block.find(DESCRIPTOR, at + 1)
        position += len(chunk)
        tail = block[-(DESCRIPTOR64.size + 3) :]
    return None


def _measure_by_inflating(file: BinaryIO, data: int) -> tuple[int, int, int, int] | None:
    """Find (crc, stored, size, end) of a streamed member by unpacking it; None where it does not end."""
    inflater = zlib.decompressobj(-15)
    file.seek(data)
    crc = size = stored = 0
    while not inflater.eof:
        chunk = inflater.unconsumed_tail
        if not chunk:
            chunk = file.read(CHUNK)
            stored += len(chunk)
            if not chunk:
                return None
        try:
            out = inflater.decompress(chunk, CHUNK)
        except zlib.error:
            return None
        crc, size = zlib.crc32(out, crc), size + len(out)
    stored -= len(inflater.unused_data)
    return crc, stored, size, data + stored + descriptor_length(file, data + stored, stored)
