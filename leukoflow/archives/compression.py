"""Compressed data as a stream of plain pieces, frame after frame: gzip, bzip2, xz and zstd, in bounded memory."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

import zstandard

from leukoflow.archives.tar_header import BLOCK, is_header

_CHUNK = 1 << 18
_MAX_WINDOW = 1 << 28  # bytes that a zstd decoder may hold: `--long=28`
_MAX_XZ = 1 << 29  # bytes that an xz decoder may hold; `xz -9` needs 65 MiB
_MOST_JUNK = 10_240  # bytes behind compressed data that cannot be an archive with files: less than an empty tar
_COMPRESSIONS = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_CUT_OFF = "the compressed data is cut off"


class UnpackError(Exception):
    """Why no more can be unpacked, in words for people."""


def compression_of(head: bytes) -> str | None:
    """Name the compression that a file or a further frame begins with: gz, bz2, xz, zst or None."""
    if len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18":
        return "zst"  # a frame to be skipped, with which parallel zstd begins
    return next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)


class Feed:
    """The compressed bytes, in order, with those at hand that were read and not used."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.position = 0
        self._buffer = b""
        self._at = 0

    def peek(self, count: int) -> bytes:
        """Return the next bytes without using them; fewer only at the end."""
        while len(self._buffer) - self._at < count and (more := self.file.read(_CHUNK)):
            self._buffer, self._at = self._buffer[self._at :] + more, 0
        return self._buffer[self._at : self._at + count]

    def take(self, count: int = _CHUNK) -> bytes:
        """Return some of the next bytes, at most `count`; none only at the end."""
        data = self._buffer[self._at : self._at + count] or self.peek(min(count, _CHUNK))
        self._at += len(data)
        self.position += len(data)
        return data

    def exactly(self, count: int) -> bytes:
        """Return the next `count` bytes. Raises UnpackError where there are fewer."""
        if len(self.peek(count)) < count:
            raise UnpackError(_CUT_OFF)
        return self.take(count)

    def give_back(self, data: bytes) -> None:
        """Keep what a decoder has not used for the next reading."""
        self._buffer, self._at = data + self._buffer[self._at :], 0
        self.position -= len(data)

    def skip(self, count: int) -> None:
        """Pass over `count` bytes. Raises UnpackError where there are fewer."""
        while count > 0:
            data = self.take(count)
            if not data:
                raise UnpackError(_CUT_OFF)
            count -= len(data)

    def skip_zeros(self) -> None:
        """Pass over padding, as tapes have it."""
        while data := self.take():
            if kept := data.lstrip(b"\0"):
                self.give_back(kept)
                return

    def skip_text(self) -> None:
        """Pass over a text that ends with a zero."""
        while data := self.take():
            _, zero, kept = data.partition(b"\0")
            if zero:
                self.give_back(kept)
                return


def unpack_frames(feed: Feed, compression: str, remark: Callable[[str], None]) -> Iterator[bytes]:
    """Yield decompressed pieces of at most 1 MiB, frame after frame.

    Raises what the decoders raise, and UnpackError.
    """
    while feed.peek(1):
        if compression_of(feed.peek(6)) != compression:
            at = feed.position
            left = feed.file.seek(0, 2) - at
            if not is_junk(feed.peek(BLOCK), left):
                raise UnpackError(f"bytes {at:,} to {at + left - 1:,} behind its compressed data cannot be read")
            remark(f"{left:,} bytes behind the compressed data, from byte {at:,}, belong to no file")
            return
        match compression:
            case "gz":
                yield from _gzip_frame(feed, remark)
            case "zst":
                yield from _zstd_frame(feed)
            case "bz2":
                yield from _plain_frame(feed, bz2.BZ2Decompressor())
            case _:
                yield from _plain_frame(feed, lzma.LZMADecompressor(memlimit=_MAX_XZ))
        feed.skip_zeros()


def is_junk(head: bytes, size: int) -> bool:
    """Tell whether bytes behind a whole archive can be passed over: few, and not the beginning of another archive."""
    return size <= _MOST_JUNK and not is_header(head) and compression_of(head) is None and head[:2] != b"PK"


def _plain_frame(feed: Feed, decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> Iterator[bytes]:
    """Unpack one bzip2 or xz stream; what follows it goes back to the feed."""
    while not decompressor.eof:
        raw = feed.take() if decompressor.needs_input else b""
        if decompressor.needs_input and not raw:
            raise UnpackError(_CUT_OFF)
        try:
            out = decompressor.decompress(raw, 4 * _CHUNK)
        except lzma.LZMAError as error:
            if "emory" not in str(error):
                raise
            raise UnpackError(
                f"its xz dictionary needs more than {_MAX_XZ >> 20} MiB: compress it with xz -9"
            ) from None
        if out:
            yield out
    feed.give_back(decompressor.unused_data)


def _gzip_frame(feed: Feed, remark: Callable[[str], None]) -> Iterator[bytes]:
    """Unpack one gzip member (RFC 1952).

    Its checksum stands behind the data, so the data is there even where they differ.
    """
    flags = feed.exactly(10)[3]
    if flags & 4:
        feed.skip(int.from_bytes(feed.exactly(2), "little"))
    for named in (8, 16):  # a name, a comment
        if flags & named:
            feed.skip_text()
    if flags & 2:
        feed.skip(2)
    inflater, crc, size = zlib.decompressobj(-15), 0, 0
    while not inflater.eof:
        raw = inflater.unconsumed_tail or feed.take()
        if not raw:
            raise UnpackError(_CUT_OFF)
        out = inflater.decompress(raw, 4 * _CHUNK)
        crc, size = zlib.crc32(out, crc), size + len(out)
        if out:
            yield out
    feed.give_back(inflater.unused_data)
    trailer = feed.exactly(8)
    if trailer != crc.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little"):
        remark("the checksum of its gzip data does not match: some of its files may be damaged without a trace")


def _zstd_frame(feed: Feed) -> Iterator[bytes]:
    """Unpack one zstd frame, or nothing where it is to be skipped (RFC 8878)."""
    head = feed.peek(18)
    if head[0] & 0xF0 == 0x50:
        feed.skip(int.from_bytes(feed.exactly(8)[4:], "little"))
        return
    if len(head) < 6 or len(head) < zstandard.frame_header_size(head):
        raise UnpackError(_CUT_OFF)
    window = zstandard.get_frame_parameters(head).window_size
    if window > _MAX_WINDOW:
        raise UnpackError(
            f"its zstd window of {window >> 20:,} MiB is larger than {_MAX_WINDOW >> 20} MiB: compress it with "
            "--long=28 at most"
        )
    raw = _ZstdBlocks(feed, head)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    with decompressor.stream_reader(cast(BinaryIO, raw), read_across_frames=False, closefd=False) as reader:
        while out := reader.read1(_CHUNK):
            yield out
    if not raw.ended:
        raise UnpackError(_CUT_OFF)


class _ZstdBlocks:
    """The bytes of one frame, to be read by a decoder, and not one byte more."""

    def __init__(self, feed: Feed, head: bytes) -> None:
        self._feed = feed
        self._left = zstandard.frame_header_size(head)  # bytes until the next block begins
        self._checksum = 4 if zstandard.get_frame_parameters(head).has_checksum else 0
        self._last = False
        self.ended = False

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes (at least three); none at the frame's end, and where the file ends before it."""
        if not self._left:
            if self._last:
                self.ended = True
                return b""
            header = self._feed.peek(3)
            if len(header) < 3:
                return b""
            block = int.from_bytes(header, "little")
            self._last = bool(block & 1)
            self._left = 3 + (1 if block >> 1 & 3 == 1 else block >> 3) + (self._checksum if self._last else 0)
        data = self._feed.take(min(count, self._left))
        self._left -= len(data)
        self.ended = self._last and not self._left
        return data
