"""Tar archives as a stream of headers, plain or compressed, in bounded memory.

Unlike the standard library's reader this one keeps no list of members, says when an archive ends early instead of
taking a damaged header for its end, and goes on after one. Layout: POSIX.1-2017 `pax`, GNU tar manual.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from leukoflow.archives.compression import is_junk
from leukoflow.archives.streams import ByteStream
from leukoflow.archives.tar_header import (
    BLOCK,
    ZEROS,
    header_within,
    is_header,
    name_of,
    number_of,
    padded_length,
    pax_records,
)

_EXAMPLES = 3  # ranges of bytes that are named
_MAX_EXTENDED = 1 << 20  # bytes of a long name or of pax records: more is an attack, not a name
CONTINUED = "continued from another volume: unpack all volumes together (tar --multi-volume)"
_REFUSALS = {
    b"1": "hard link: links are not followed",
    b"2": "symbolic link: links are not followed",
    b"3": "device: not a regular file",
    b"4": "device: not a regular file",
    b"6": "named pipe: not a regular file",
    b"M": CONTINUED,
    b"S": "sparse file: repack the archive without --sparse",
}


class TarEntry(NamedTuple):
    """One member. `offset` is of its data from the start of the (uncompressed) archive."""

    name: bytes
    size: int
    mtime: int
    offset: int
    refusal: str | None
    is_directory: bool


class TarWalk:
    """Members of a tar archive in order; between two of them the caller may read the first one's data from `stream`.

    Once the iteration has ended, `truncated` says why the archive is known to be incomplete, or is None, `remarks` say
    what is odd about it although nothing is missing, and `only_zeros` whether it holds nothing else.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._faults: list[str] = []
        self._remarks: list[str] = []
        self._torn = False  # whether something else stood in front of the last header
        self._damaged = 0  # ranges of bytes that belong to no member
        self.only_zeros = False

    @property
    def truncated(self) -> str | None:
        """Say why the archive is known to be incomplete; None where it is not."""
        more = self._damaged - _EXAMPLES
        return "; ".join([*self._faults, *([f"and {more:,} further ranges of bytes"] if more > 0 else [])]) or None

    @property
    def remarks(self) -> tuple[str, ...]:
        """Say what is odd although nothing is missing."""
        return (*self._remarks, *self._stream.remarks)

    def __iter__(self) -> Iterator[TarEntry]:
        name: bytes | None = None
        size: int | None = None
        refusal: str | None = None
        for kind, header in self._headers():
            if self._torn:  # what stood in front of lost bytes says nothing of the file behind them
                name = size = refusal = None
                self._torn = False
            length = number_of(header[124:136])
            stream = self._stream
            if kind in b"LKxXgV":
                data = stream.read(min(length, _MAX_EXTENDED))
                stream.skip(padded_length(length) - len(data))
                if kind == b"L":
                    name = data.rstrip(b"\0")
                elif kind == b"V":
                    self._remark("the tar archive has a volume label, which is no file")
                elif kind in b"xX":
                    records = dict(pax_records(data))
                    name = records.get(b"GNU.sparse.name", records.get(b"path", name))
                    stated = records.get(b"size", b"")
                    size = int(stated) if stated.isdigit() and len(stated) < 20 else size
                    if any(key.startswith(b"GNU.sparse.") for key in records):
                        refusal = _REFUSALS[b"S"]
                continue
            name = name if name is not None else name_of(header)
            length = size if size is not None else length
            if kind in b"123456":
                length = 0  # links, devices and folders have no data, whatever their size field says
            if kind == b"M":
                self._fault("the tar archive is a later volume of several: its first file begins in another one")
            more = kind == b"S" and header[482] != 0
            while more:  # the map of a sparse file goes on, in front of its data
                block = stream.read(BLOCK)
                more = len(block) == BLOCK and block[504] != 0
            is_directory = kind in (b"5", b"D") or (kind in (b"0", b"\0") and name.endswith(b"/") and not length)
            if refusal is None and kind not in (b"0", b"\0", b"7", b"5", b"D"):
                refusal = _REFUSALS.get(kind, f"tar entry of the unknown type {kind!r}: not a regular file")
            data_at = stream.position
            yield TarEntry(name, length, number_of(header[136:148]), data_at, refusal, is_directory)
            stream.skip(data_at + padded_length(length) - stream.position)
            name = size = refusal = None

    def _headers(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield kinds and headers; what is neither a header nor an end mark is named when its end is known."""
        stream = self._stream
        hole: int | None = None  # where bytes began that belong to nothing
        before = start_of_hole = b""  # the block before this one, and that with which they began
        zeros, ended, found, end_mark = 0, False, False, 0
        while True:
            at = stream.position
            block = stream.read(BLOCK)
            if hole is not None and (start := header_within(before + block)):
                stream.unread((before + block)[start + BLOCK :])
                at, block = at - len(before) + start, (before + block)[start : start + BLOCK]
            if is_header(block) and number_of(block[124:136]) >= 0:
                if hole is None and zeros == 1:
                    hole = at - BLOCK
                self._torn = hole is not None or zeros > 0 or ended
                if hole is not None:
                    self._damage(hole, at)
                elif ended:
                    self._remark(
                        f"more files follow behind an end mark at byte {end_mark:,}: archives that were joined, or "
                        "zeros in the place of files"
                    )
                hole, zeros, ended, found = None, 0, False, True
                yield block[156:157], block
                continue
            if block == ZEROS:  # two of them mark the end; what follows is read all the same, so nothing is lost
                zeros += 1
                end_mark = at if zeros == 1 else end_mark
                ended = ended or zeros > 1
                before = block
                continue
            if hole is None and block.strip(b"\0"):
                hole, start_of_hole = at, block
            if len(block) == BLOCK:
                zeros, before = 0, block
                continue
            end = at + len(block)
            if hole is not None and ended and not zeros and is_junk(start_of_hole, end - hole):
                self._remark(f"bytes {hole:,} to {end - 1:,} behind the end of the tar archive belong to no file")
            elif hole is not None and (hole < at or ended or zeros):  # else it is a header that is cut off
                self._damage(hole, end if block.strip(b"\0") else end - zeros * BLOCK)
            if not (zeros or ended) or stream.damage:
                self._fault(f"the tar archive is cut off at byte {end:,}: {stream.damage or 'it has no end mark'}")
            self.only_zeros = not found and hole is None and not stream.damage
            return

    def _damage(self, start: int, stop: int) -> None:
        self._damaged += 1
        if self._damaged <= _EXAMPLES:
            self._fault(
                f"the tar archive is damaged at byte {start:,}: bytes {start:,} to {stop - 1:,} belong to no file that "
                "can be read"
            )

    def _fault(self, words: str) -> None:
        if words not in self._faults:
            self._faults.append(words)

    def _remark(self, words: str) -> None:
        if words not in self._remarks and len(self._remarks) < _EXAMPLES:
            self._remarks.append(words)
