"""Zip archives in bounded memory: list members as a stream, also those of a damaged archive, and read one member.

The standard library builds an object for every member before the first can be used, and gives up when the central
directory is missing. Here the central directory is parsed in pieces, and where it is missing or cut off, or does not
explain all of the archive, the local headers in front of every member's data take its place. Layout: PKWARE APPNOTE
6.3.10.
"""

from __future__ import annotations

import bz2
import lzma
import re
import stat
import struct
import zlib
from array import array
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from leukoflow.archives.zip_names import Separators, zip_key
from leukoflow.core.errors import MemberError, SourceError

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR64, _DESCRIPTOR = b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CENTRAL_HEADER = struct.Struct("<4s2B5H3L5H2L")
_END_RECORD = struct.Struct("<4s4H2LH")
_END64_RECORD = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64_RECORD = struct.Struct("<4sLQL")
_FOLLOWERS = (_LOCAL, _CENTRAL, _END64, _END)
_SIGNATURE = re.compile(rb"PK(?:\x03\x04|\x01\x02|\x05\x06|\x06\x06|\x06\x07|\x05\x05)")
_DESCRIPTOR32, _DESCRIPTOR64 = struct.Struct("<4s3L"), struct.Struct("<4sL2Q")
_SLACK = 64  # bytes of a local extra field (beyond the directory's) and of a descriptor: no image hides in so few
_EXAMPLES = 3  # ranges of bytes that are named
_MOST_ENDS = 100  # end records that are tried: a comment may hold any number of signatures
_PROBES = 5  # members that tell where the archive's offsets count from
_MOST_METHODS = 100  # compression methods have smaller numbers
_FULL32 = 0xFFFFFFFF
_CHUNK = 1 << 20
_ENCRYPTED = 0x2041  # bits 0 (traditional), 6 (strong) and 13 (masked header)
_HAS_DESCRIPTOR = 0x8
_METHODS = {0: "stored", 8: "deflate", 12: "bzip2", 14: "LZMA", 93: "zstd"}
_UNSUPPORTED = {1: "shrink", 6: "implode", 9: "Deflate64", 20: "zstd (old)", 95: "xz", 98: "PPMd", 99: "AES"}


class SplitArchiveError(SourceError):
    """The file is one part of an archive in several; the words follow the name of the file and "is"."""


class ZipEntry(NamedTuple):
    """One member as the archive describes it. `offset` is of the local header, from the start of the file."""

    name: str
    method: int
    crc: int
    stored: int
    size: int
    offset: int
    refusal: str | None
    is_directory: bool = False


class ZipDirectory(NamedTuple):
    """Where the central directory is: `shift` is what its offsets lack, `end` the byte behind the archive's comment."""

    start: int
    length: int
    shift: int
    members: int
    end: int


class _Record(NamedTuple):
    """One record of the central directory; `offset` without the shift."""

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


class _Hole(NamedTuple):
    """Bytes `start` to `stop` (exclusive) that belong to nothing."""

    start: int
    stop: int


class _Holes:
    """Ranges of bytes that belong to nothing: the first few, and how many there are. Neighbours make one."""

    def __init__(self) -> None:
        self.first: list[_Hole] = []
        self.count = 0
        self._last: _Hole | None = None

    def add(self, hole: _Hole) -> None:
        """One that lies behind all others, or ahead of them."""
        if self._last is not None and self._last.stop == hole.start:
            self._last = _Hole(self._last.start, hole.stop)
            if self.count <= _EXAMPLES:
                self.first[-1] = self._last
            return
        self._last = hole
        self.count += 1
        if self.count <= _EXAMPLES:
            self.first.append(hole)


class _Ranges(NamedTuple):
    """Of each listed member: where it starts, its length up to its data as the directory knows it, and its data's."""

    starts: npt.NDArray[np.int64]
    heads: npt.NDArray[np.int64]
    stored: npt.NDArray[np.int64]


class ZipWalk:
    """Members of a zip archive: in the order of its central directory, then those that it does not list.

    Once the iteration has ended, `truncated` says why the archive is known to be incomplete, and `remarks` what is odd
    about it although nothing is missing. Every byte is part of a member, or of the archive's own records, or is named
    in one of the two; but up to 64 bytes between two members are taken for extra fields without a look at them.
    Memory: less than 100 bytes a member.
    """

    def __init__(self, file: BinaryIO, size: int, repair: bool = True) -> None:
        """Without `repair` a damaged archive ends early: looking for members may mean to unpack all of them."""
        self._file = file
        self._size = size
        self._repair = repair
        self._faults: list[str] = []
        self._remarks: list[str] = []
        self._holes, self._zeros = _Holes(), _Holes()  # what belongs to nothing; of that, what is only zeros
        self._separators = Separators()
        self._unlisted = 0
        self._patience = 4 * size + _CHUNK  # bytes that may be read in vain: hostile data cannot keep us for ever
        self._reached = 0  # where the last scan has ended
        self._parsed = 0  # where the records of the central directory end
        self._ended = False  # whether a scan has met an end record and no member behind it

    @property
    def truncated(self) -> str | None:
        """Why the archive is known to be incomplete, or None."""
        return "; ".join(self._faults) or None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is odd although nothing is missing."""
        return tuple(self._remarks)

    def __iter__(self) -> Iterator[ZipEntry]:
        directory = find_directory(self._file, self._size)
        if directory is None:
            yield from self._without_directory(0)
        else:
            yield from self._with_directory(directory)
        self._conclude()

    def _with_directory(self, directory: ZipDirectory) -> Iterator[ZipEntry]:
        ranges = self._survey(directory)
        first = int(ranges.starts.min(initial=directory.start))
        if first:
            yield from self._look(0, first, whole=directory.end)
            if self._reached > first:  # what the directory lists lies within a member: it is that of an inner archive
                yield from self._without_directory(self._reached)
                return
            if not self._unlisted and self._repair and self._holes.count:
                self._holes = _Holes()
                self._remarks.append(f"the first {first:,} bytes hold no file: the zip archive begins behind them")
        if shared := _repeated(ranges.starts, directory):
            self._remarks.append(
                f"{shared:,} records of the zip archive's central directory name the bytes of a file that another one "
                "names, too: each has a row"
            )
        if directory.shift < 0:
            self._faults.append(f"the first {-directory.shift:,} bytes of the zip archive are missing")
        if len(ranges.starts) < directory.members:
            self._faults.append(
                f"the zip archive's central directory is damaged after {len(ranges.starts):,} of "
                f"{directory.members:,} members"
            )
        for record in self._records(directory):
            yield self._entry(record, directory.shift)
        for start, stop in self._gaps(ranges, directory.start):
            yield from self._look(start, stop)
        yield from self._look(self._parsed, directory.start + directory.length)
        before = self._unlisted
        yield from self._look(directory.end, self._size)
        if self._unlisted > before and not self._ended:
            self._faults.append("the zip archive is cut off: its last central directory is missing")

    def _without_directory(self, position: int) -> Iterator[ZipEntry]:
        if self._repair:
            yield from self._scan(position, self._size)
        if not self._ended:
            self._faults.insert(0, "the zip archive is cut off: its central directory is missing")
            self._unlisted = 0  # none can be listed: no need to say it

    def _look(self, start: int, stop: int, whole: int | None = None) -> Iterator[ZipEntry]:
        """Entries in bytes that the central directory does not explain; without `repair` they are a hole."""
        if self._repair:
            for entry in self._scan(start, stop, whole):
                self._unlisted += not entry.is_directory
                yield entry
        else:
            if start < stop:
                self._holes.add(_Hole(start, stop))
            self._reached = stop

    def _conclude(self) -> None:
        if self._unlisted:
            self._remarks.append(
                f"{self._unlisted:,} files that the zip archive's central directory does not list were found in its "
                "bytes, and have rows like the others"
            )
        if self._zeros.count:
            self._remarks.append(f"{_named(self._zeros)} of the zip archive are zeros")
        if self._holes.count and self._repair:
            self._faults.append(f"{_named(self._holes)} of the zip archive belong to no file that can be read")
        elif self._holes.count:
            self._faults.append(f"{_named(self._holes)} of the zip archive are not in its directory and were not read")

    # ------------------------------------------------------------ what the central directory lists

    def _survey(self, directory: ZipDirectory) -> _Ranges:
        """Goes through the directory once, for what concerns all of its members."""
        starts, heads, stored = array("q"), array("q"), array("q")
        separators = Separators(slashes=False)
        for record in self._records(directory):
            separators = separators.joined(record.name)
            starts.append(max(0, min(record.offset + directory.shift, directory.start)))
            heads.append(_LOCAL_HEADER.size + len(record.name) + len(record.extra))
            stored.append(min(record.stored, self._size))
        self._separators = separators
        return _Ranges(*(np.frombuffer(column, np.int64) for column in (starts, heads, stored)))

    def _gaps(self, ranges: _Ranges, stop: int) -> Iterator[tuple[int, int]]:
        """Bytes between one listed member and the next, and between the last one and `stop`, if there are any.

        A local header is only read where the next member begins later than the directory can explain.
        """
        order = np.argsort(ranges.starts, kind="stable")
        starts, stored = ranges.starts[order], ranges.stored[order]
        ends = starts + ranges.heads[order] + stored
        following = np.append(starts[1:], stop)
        for i in np.flatnonzero(following - ends > _SLACK):
            end = self._end_of(int(starts[i]), int(stored[i])) or int(ends[i])
            if end < following[i]:
                yield end, int(following[i])

    def _end_of(self, start: int, stored: int) -> int | None:
        """Where a member ends, by its local header; None where there is none."""
        self._file.seek(start)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != _LOCAL:
            return None
        fields = _LOCAL_HEADER.unpack(header)
        end = start + _LOCAL_HEADER.size + int(fields[-2]) + int(fields[-1]) + stored
        return end + _descriptor_length(self._file, end, stored) if fields[2] & _HAS_DESCRIPTOR else end

    def _entry(self, record: _Record, shift: int) -> ZipEntry:
        name = zip_key(record.name, record.flags, record.extra, record.host, self._separators)
        refusal = _refusal(record.flags, record.method, record.unix_mode)
        offset = record.offset + shift
        if offset < 0:
            offset, refusal = 0, "missing: the archive has lost its beginning, where this file was"
        elif offset >= self._size:
            offset, refusal = 0, "damaged: the archive has no file at the place where its directory says"
        return ZipEntry(
            name, record.method, record.crc, record.stored, record.size, offset, refusal,
            name[-1:] == "/" and not record.size,
        )  # fmt: skip

    def _records(self, directory: ZipDirectory) -> Iterator[_Record]:
        """The central directory, read in pieces; ends early at the first record that is none."""
        position, left = directory.start, directory.length
        self._parsed = directory.start
        buffer, at = b"", 0
        while True:
            if len(buffer) - at < 46 + 3 * 0xFFFF and left:  # a record with its longest name, extra and comment
                self._file.seek(position)
                more = self._file.read(min(_CHUNK, left))
                position, left = position + len(more), left - len(more) if more else 0
                buffer, at = buffer[at:] + more, 0
            if len(buffer) - at < _CENTRAL_HEADER.size:
                return
            fields = _CENTRAL_HEADER.unpack_from(buffer, at)
            signature, _, host, _, flags, method, _, _, crc, stored, size, n_name, n_extra, n_comment = fields[:14]
            attributes, offset = fields[16:]
            stop = at + _CENTRAL_HEADER.size + n_name + n_extra + n_comment
            if signature != _CENTRAL or stop > len(buffer):
                return
            at += _CENTRAL_HEADER.size
            name, extra = buffer[at : at + n_name], buffer[at + n_name : at + n_name + n_extra]
            if _FULL32 in (stored, size, offset):
                size, stored, offset = _zip64(extra, size, stored, offset)
            at = stop
            self._parsed = position - len(buffer) + at
            unix_mode = attributes >> 16 if host in (3, 19) else 0
            yield _Record(name, extra, host, flags, method, crc, stored, size, unix_mode, offset)

    # ------------------------------------------------------------ what nothing lists

    def _scan(self, position: int, stop: int, whole: int | None = None) -> Iterator[ZipEntry]:
        """Entries found by their local headers between two bytes; what is neither these nor a record is a hole.

        A stored archive in front of which a local header stands reaches over `stop` if it reaches up to `whole`.
        """
        while position < stop:
            self._file.seek(position)
            header = self._file.read(_CENTRAL_HEADER.size)
            if header[:4] == _LOCAL and (found := self._local(position, header, stop, whole)):
                self._ended = False
                yield found[0]
                position = found[1]
            elif (after := _record_end(position, header, self._size)) and after <= stop:
                self._ended = self._ended or header[:4] == _END
                position = after
            else:
                after, zeros = self._following(position, stop)
                (self._zeros if zeros else self._holes).add(_Hole(position, after))
                position = after
        self._reached = max(position, stop)

    def _local(
        self, position: int, header: bytes, stop: int, whole: int | None
    ) -> tuple[ZipEntry, int] | None:  # fmt: skip
        """The entry whose local header this is, and where it ends; None if it is none."""
        if len(header) < _LOCAL_HEADER.size:
            return None
        _, _, flags, method, _, _, crc, stored, size, n_name, n_extra = _LOCAL_HEADER.unpack(
            header[: _LOCAL_HEADER.size]
        )
        self._file.seek(position + _LOCAL_HEADER.size)
        raw, extra = self._file.read(n_name), self._file.read(n_extra)
        data = position + _LOCAL_HEADER.size + n_name + n_extra
        if not raw or b"\0" in raw or method >= _MOST_METHODS or data > stop:
            return None
        if _FULL32 in (stored, size):
            size, stored, _ = _zip64(extra, size, stored, 0)
        name = zip_key(raw, flags, extra, 0, self._separators)
        streamed = bool(flags & _HAS_DESCRIPTOR) and not stored and name[-1:] != "/"
        after: int | None = data + stored
        if streamed:
            after = None
            if found := self._streamed(data, flags, method, stop):
                crc, stored, size, after = found
        elif flags & _HAS_DESCRIPTOR and data + stored <= self._size:
            after = data + stored + _descriptor_length(self._file, data + stored, stored)

        def entry(refusal: str | None) -> ZipEntry:
            return ZipEntry(
                name, method, crc, 0 if refusal else stored, size, position,
                refusal or _refusal(flags, method, 0), name[-1:] == "/" and not size,
            )  # fmt: skip

        if after is not None and after <= stop:
            return entry(None), after
        self._file.seek(data)
        archive = method == 0 and self._file.read(4) in (_LOCAL, _END, _DESCRIPTOR)
        if archive and (whole or stop == self._size):  # its members are not ours, whether it is whole or cut off
            if after is not None and (whole or 0) <= after <= self._size:
                return entry(None), after
            following = self._size if after is None or after > self._size else self._following(data, stop)[0]
        else:
            following = self._following(data, stop)[0]
        if following < self._size:
            return entry("damaged: the next file of the archive begins within its data"), following
        if streamed:
            return entry("truncated: the archive ends within this file"), following
        return entry(f"truncated: {self._size - data:,} of {stored:,} stored bytes"), following

    def _streamed(self, data: int, flags: int, method: int, stop: int) -> tuple[int, int, int, int] | None:
        """(crc, stored, size, end) of a member whose sizes follow its data; None if they cannot be found."""
        if self._patience <= 0:
            return None
        if method == 8 and not flags & _ENCRYPTED:
            found = _by_inflating(self._file, data)
        else:
            found = _by_descriptor(self._file, data, method if not flags & _ENCRYPTED else None)
        if found is None or found[3] > stop:
            self._patience -= self._file.tell() - data
        return found

    def _following(self, position: int, stop: int) -> tuple[int, bool]:
        """Where the next record begins behind `position`, at most `stop`, and whether there are only zeros until it."""
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
            at, tail, step = at + len(chunk), block[-3:], min(2 * step, _CHUNK)
        return stop, zeros


def _repeated(starts: npt.NDArray[np.int64], directory: ZipDirectory) -> int:
    """How many listed members begin where another one does; those that begin nowhere are left out."""
    real = starts[(starts < directory.start) & ((starts > 0) | (directory.shift >= 0))]
    return len(real) - len(np.unique(real))


def _named(holes: _Holes) -> str:
    """Ranges of bytes in words, as they are counted from 0."""
    more = f" and {holes.count - _EXAMPLES:,} further ranges" if holes.count > _EXAMPLES else ""
    return "bytes " + ", ".join(f"{hole.start:,} to {hole.stop - 1:,}" for hole in holes.first) + more


def _record_end(position: int, header: bytes, size: int) -> int | None:
    """Where a record of the archive ends that is no member; None if none begins with these bytes."""
    end = size + 1
    match header[:4]:
        case b"PK\x01\x02" if len(header) == _CENTRAL_HEADER.size:
            fields = _CENTRAL_HEADER.unpack(header)
            if fields[5] < _MOST_METHODS and fields[11]:
                end = position + _CENTRAL_HEADER.size + sum(fields[11:14])
        case b"PK\x05\x06" if len(header) >= _END_RECORD.size:
            fields = _END_RECORD.unpack(header[: _END_RECORD.size])
            if fields[3] == fields[4]:
                end = min(size, position + _END_RECORD.size + fields[7])
        case b"PK\x06\x06" if len(header) >= 12:
            end = position + 12 + int.from_bytes(header[4:12], "little")
            end = end if end <= position + _CHUNK else size + 1
        case b"PK\x06\x07":
            end = position + _LOCATOR64_RECORD.size
        case b"PK\x05\x05" if len(header) >= 6:  # digital signature
            end = position + 6 + int.from_bytes(header[4:6], "little")
        case b"PK\x07\x08" | b"PK00" if position == 0:  # the archive was meant to be split
            end = 4
        case b"PK\x07\x08":  # of a folder that was written as a stream
            end = position + (24 if header[24:28] in _FOLLOWERS and header[16:20] not in _FOLLOWERS else 16)
    return end if end <= size else None


def find_directory(file: BinaryIO, size: int) -> ZipDirectory | None:
    """The last central directory whose end record fits it; None where there is none.

    Raises SplitArchiveError for one part of a split archive.
    """
    base = max(0, size - _END_RECORD.size - 0xFFFF - _CHUNK)  # a comment, and some rubbish or padding behind it
    file.seek(base)
    tail = file.read(size - base)
    at, split, empty = len(tail), None, None
    for _ in range(_MOST_ENDS):
        at = tail.rfind(_END, 0, at)
        if at < 0:
            break
        if len(tail) - at < _END_RECORD.size:
            continue
        _, disk, _, _, count, length, offset, n_comment = _END_RECORD.unpack_from(tail, at)
        end, behind = base + at, base + at + _END_RECORD.size + n_comment
        if end >= _LOCATOR64_RECORD.size:
            file.seek(end - _LOCATOR64_RECORD.size)
            signature, _, at64, _ = _LOCATOR64_RECORD.unpack(file.read(_LOCATOR64_RECORD.size))
            if signature == _LOCATOR64:
                locator = end - _LOCATOR64_RECORD.size
                for position in (locator - _END64_RECORD.size, at64):
                    if not 0 <= position <= locator - _END64_RECORD.size:
                        continue
                    file.seek(position)
                    record = file.read(_END64_RECORD.size)
                    if record[:4] == _END64 and position + 12 + int.from_bytes(record[4:12], "little") == locator:
                        count, length, offset = _END64_RECORD.unpack(record)[7:]
                        end, disk = position, 0
                        break
        start = end - length
        if disk not in (0, 0xFFFF):
            split = disk if behind == size else split
        elif start >= 0:
            file.seek(start)
            directory = ZipDirectory(start, length, start - offset, count, min(size, behind))
            if length and file.read(4) == _CENTRAL:
                return _well_placed(file, directory)
            if not length and not count:
                empty = empty or directory  # unless there is a better one: zeros in a comment look the same
    if empty is not None:
        return empty
    if split is not None:
        raise SplitArchiveError(_split_words(split))
    if size >= 8:
        file.seek(0)
        if file.read(8) == _DESCRIPTOR + _LOCAL:
            raise SplitArchiveError(_split_words(0))
    return None


def _split_words(disk: int) -> str:
    return (
        f"one part of a split zip archive (part {disk + 1}): join the parts into one archive (zip -s 0 FIRST.zip --out "
        "WHOLE.zip) before handing it over"
    )


def _well_placed(file: BinaryIO, directory: ZipDirectory) -> ZipDirectory:
    """The directory with the shift by which its first members are found: something may stand between it and them."""
    file.seek(directory.start)
    block = file.read(min(directory.length, _CHUNK))
    at = 0
    offsets: list[int] = []
    while len(offsets) < _PROBES and block[at : at + 4] == _CENTRAL and len(block) - at >= _CENTRAL_HEADER.size:
        fields = _CENTRAL_HEADER.unpack_from(block, at)
        if fields[17] != _FULL32:
            offsets.append(fields[17])
        at += _CENTRAL_HEADER.size + sum(fields[11:14])
    for shift in {directory.shift: None, 0: None}:
        for offset in offsets:
            if 0 <= offset + shift < directory.start:
                file.seek(offset + shift)
                if file.read(4) == _LOCAL:
                    return directory._replace(shift=shift)
    return directory


def read_entry(file: BinaryIO, offset: int, method: int, stored: int, size: int, crc: int) -> bytes:
    """Bytes of the member whose local header is at `offset`, checked against its size and CRC-32.

    Never holds more than `size` + 1 decompressed bytes. Raises MemberError with a reason for people.
    """
    file.seek(offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != _LOCAL:
        raise MemberError("damaged: the archive has no file at the place where its directory says")
    fields = _LOCAL_HEADER.unpack(header)
    if fields[2] & _ENCRYPTED:
        raise MemberError(_refusal(fields[2], method, 0) or "")
    file.seek(fields[-2] + fields[-1], 1)
    raw = file.read(stored)
    if len(raw) < stored:
        raise MemberError(f"truncated: {len(raw):,} of {stored:,} stored bytes")
    data = _expand(raw, method, size)
    if len(data) < size:
        raise MemberError(f"damaged: only {len(data):,} of {size:,} bytes could be unpacked")
    if len(data) > size:
        raise MemberError(f"damaged: unpacks to more than the {size:,} bytes that the archive states")
    if zlib.crc32(data) != crc:
        raise MemberError("damaged: checksum does not match")
    return data


def _expand(raw: bytes, method: int, size: int) -> bytes:
    if method == 0:
        return raw
    try:
        if method == 8:
            return zlib.decompressobj(-15).decompress(raw, size + 1)
        if method == 12:
            return bz2.BZ2Decompressor().decompress(raw, size + 1)
        if method == 14:
            return _lzma(raw).decompress(raw[4 + raw[2] + 256 * raw[3] :], size + 1)
        if method == 93:
            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(raw) as reader:
                return reader.read(size + 1)
    except (zlib.error, OSError, EOFError, ValueError, IndexError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise MemberError("damaged: the compressed data cannot be unpacked") from error
    raise MemberError(_refusal(0, method, 0) or "")


def _lzma(raw: bytes) -> lzma.LZMADecompressor:
    """Decoder for a member's LZMA data: two bytes version, two bytes length, then the properties (APPNOTE 5.8.8)."""
    properties = raw[4 : 4 + raw[2] + 256 * raw[3]]
    first, dictionary = properties[0], int.from_bytes(properties[1:5], "little")
    if dictionary > 1 << 28:
        raise MemberError("refused: its LZMA dictionary is larger than 256 MiB; repack it with deflate")
    spec = {"id": lzma.FILTER_LZMA1, "dict_size": max(dictionary, 4096)}
    spec |= {"lc": first % 9, "lp": first // 9 % 5, "pb": first // 45}
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[spec])


def _refusal(flags: int, method: int, unix_mode: int) -> str | None:
    if flags & _ENCRYPTED or method == 99:
        return "encrypted: hand it over without a password"
    if unix_mode and stat.S_IFMT(unix_mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        link = stat.S_ISLNK(unix_mode)
        return "symbolic link: links are not followed" if link else "special file: not a regular file"
    if method not in _METHODS:
        name = f" ({_UNSUPPORTED[method]})" if method in _UNSUPPORTED else ""
        return f"compression method {method}{name} is not supported: repack it with deflate"
    return None


def _zip64(extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset with those that were full taken from the zip64 field of `extra`."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            wide = iter(int.from_bytes(extra[i : i + 8], "little") for i in range(at, at + length - 7, 8))
            size = next(wide, size) if size == _FULL32 else size
            stored = next(wide, stored) if stored == _FULL32 else stored
            offset = next(wide, offset) if offset == _FULL32 else offset
            break
        at += length
    return size, stored, offset


def _by_descriptor(file: BinaryIO, data: int, method: int | None) -> tuple[int, int, int, int] | None:
    """(crc, stored, size, end) of a streamed member that cannot be unpacked, by looking for its descriptor."""
    position, tail = data, b""
    file.seek(data)
    while chunk := file.read(_CHUNK):
        block = tail + chunk
        base = position - len(tail)
        at = block.find(_DESCRIPTOR)
        while at >= 0:
            stored = base + at - data
            for form in (_DESCRIPTOR64, _DESCRIPTOR32):
                if len(block) - at < form.size:
                    continue
                _, crc, stated, size = form.unpack_from(block, at)
                if stated == stored and (method != 0 or size == stored):
                    follower = block[at + form.size : at + form.size + 4]
                    if form is _DESCRIPTOR64 and not stored and follower not in _FOLLOWERS:
                        continue  # without data, eight zeros may be both sizes of the short form
                    return crc, stored, size, base + at + form.size
            at = block.find(_DESCRIPTOR, at + 1)
        position += len(chunk)
        tail = block[-(_DESCRIPTOR64.size + 3) :]
    return None


def _by_inflating(file: BinaryIO, data: int) -> tuple[int, int, int, int] | None:
    inflater = zlib.decompressobj(-15)
    file.seek(data)
    crc = size = stored = 0
    while not inflater.eof:
        chunk = inflater.unconsumed_tail
        if not chunk:
            chunk = file.read(_CHUNK)
            stored += len(chunk)
            if not chunk:
                return None
        try:
            out = inflater.decompress(chunk, _CHUNK)
        except zlib.error:
            return None
        crc, size = zlib.crc32(out, crc), size + len(out)
    stored -= len(inflater.unused_data)
    return crc, stored, size, data + stored + _descriptor_length(file, data + stored, stored)


def _descriptor_length(file: BinaryIO, position: int, stored: int) -> int:
    """Length of the data descriptor at `position`: with or without signature, with sizes of four or eight bytes."""
    file.seek(position)
    block = file.read(28)
    signed = 4 if block[:4] == _DESCRIPTOR else 0
    if not signed and block[:4] in _FOLLOWERS:
        return 0
    for width in (8, 4):
        length = signed + 4 + 2 * width
        stated = int.from_bytes(block[signed + 4 : signed + 4 + width], "little")
        if stated == stored and (stored or block[length : length + 4] in _FOLLOWERS):
            return length
    return signed + 12 if signed else 0
