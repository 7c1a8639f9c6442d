"""Zip archives in bounded memory: list members as a stream, also those of a damaged archive.

The standard library builds an object for every member before the first can be used, and gives up when the central
directory is missing. Here the central directory is parsed in pieces, and where it is missing or cut off, or does not
explain all of the archive, the local headers in front of every member's data take its place.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from leukoflow.archives.zip_directory import Record, ZipDirectory, find_directory, read_records
from leukoflow.archives.zip_entry import ZipEntry
from leukoflow.archives.zip_format import HAS_DESCRIPTOR, LOCAL, LOCAL_HEADER, descriptor_length, refusal_of
from leukoflow.archives.zip_names import Separators, decode_name
from leukoflow.archives.zip_recovery import EXAMPLES, Hole, Holes, LocalScan

_SLACK = 64  # bytes of a local extra field (beyond the directory's) and of a descriptor: no file hides in so few


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
        self._scan = LocalScan(file, size)
        self._unlisted = 0

    @property
    def truncated(self) -> str | None:
        """Say why the archive is known to be incomplete; None where it is not."""
        return "; ".join(self._faults) or None

    @property
    def remarks(self) -> tuple[str, ...]:
        """Say what is odd although nothing is missing."""
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
            if self._scan.reached > first:  # what the directory lists lies within a member, an inner archive
                yield from self._without_directory(self._scan.reached)
                return
            if not self._unlisted and self._repair and self._scan.holes.count:
                self._scan.holes = Holes()
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
        parsed = directory.start
        for record in read_records(self._file, directory):
            parsed = record.end
            yield self._entry(record, directory.shift)
        for start, stop in self._gaps(ranges, directory.start):
            yield from self._look(start, stop)
        yield from self._look(parsed, directory.start + directory.length)
        before = self._unlisted
        yield from self._look(directory.end, self._size)
        if self._unlisted > before and not self._scan.ended:
            self._faults.append("the zip archive is cut off: its last central directory is missing")

    def _without_directory(self, position: int) -> Iterator[ZipEntry]:
        if self._repair:
            yield from self._scan.entries(position, self._size)
        if not self._scan.ended:
            self._faults.insert(0, "the zip archive is cut off: its central directory is missing")
            self._unlisted = 0  # none can be listed: no need to say it

    def _look(self, start: int, stop: int, whole: int | None = None) -> Iterator[ZipEntry]:
        """Yield entries in bytes that the central directory does not explain; without `repair` they are a hole."""
        if self._repair:
            for entry in self._scan.entries(start, stop, whole):
                self._unlisted += not entry.is_directory
                yield entry
        else:
            if start < stop:
                self._scan.holes.add(Hole(start, stop))
            self._scan.reached = stop

    def _conclude(self) -> None:
        if self._unlisted:
            self._remarks.append(
                f"{self._unlisted:,} files that the zip archive's central directory does not list were found in its "
                "bytes, and have rows like the others"
            )
        if self._scan.zeros.count:
            self._remarks.append(f"{_named(self._scan.zeros)} of the zip archive are zeros")
        named = _named(self._scan.holes)
        if self._scan.holes.count and self._repair:
            self._faults.append(f"{named} of the zip archive belong to no file that can be read")
        elif self._scan.holes.count:
            self._faults.append(f"{named} of the zip archive are not in its directory and were not read")

    # ------------------------------------------------------------ what the central directory lists

    def _survey(self, directory: ZipDirectory) -> _Ranges:
        """Go through the directory once, for what concerns all of its members."""
        starts, heads, stored = array("q"), array("q"), array("q")
        separators = Separators(slashes=False)
        for record in read_records(self._file, directory):
            separators = separators.joined(record.name)
            starts.append(max(0, min(record.offset + directory.shift, directory.start)))
            heads.append(LOCAL_HEADER.size + len(record.name) + len(record.extra))
            stored.append(min(record.stored, self._size))
        self._scan.separators = separators
        return _Ranges(*(np.frombuffer(column, np.int64) for column in (starts, heads, stored)))

    def _gaps(self, ranges: _Ranges, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the bytes between one listed member and the next, and between the last one and `stop`.

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
        """Find where a member ends by its local header; None where there is none."""
        self._file.seek(start)
        header = self._file.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or header[:4] != LOCAL:
            return None
        fields = LOCAL_HEADER.unpack(header)
        end = start + LOCAL_HEADER.size + int(fields[-2]) + int(fields[-1]) + stored
        return end + descriptor_length(self._file, end, stored) if fields[2] & HAS_DESCRIPTOR else end

    def _entry(self, record: Record, shift: int) -> ZipEntry:
        name = decode_name(record.name, record.flags, record.extra, record.host, self._scan.separators)
        refusal = refusal_of(record.flags, record.method, record.unix_mode)
        offset = record.offset + shift
        if offset < 0:
            offset, refusal = 0, "missing: the archive has lost its beginning, where this file was"
        elif offset >= self._size:
            offset, refusal = 0, "damaged: the archive has no file at the place where its directory says"
        return ZipEntry(
            name, record.method, record.crc, record.stored, record.size, offset, refusal,
            name[-1:] == "/" and not record.size,
        )  # fmt: skip


def _repeated(starts: npt.NDArray[np.int64], directory: ZipDirectory) -> int:
    """Count the listed members that begin where another one does; those that begin nowhere are left out."""
    real = starts[(starts < directory.start) & ((starts > 0) | (directory.shift >= 0))]
    return len(real) - len(np.unique(real))


def _named(holes: Holes) -> str:
    """Put ranges of bytes in words, counted from 0."""
    more = f" and {holes.count - EXAMPLES:,} further ranges" if holes.count > EXAMPLES else ""
    return "bytes " + ", ".join(f"{hole.start:,} to {hole.stop - 1:,}" for hole in holes.first) + more
