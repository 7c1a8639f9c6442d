"""What a walk through a tar archive reads from: a seekable file, or compressed data unpacked as they are needed."""

from __future__ import annotations

import lzma
import zlib
from typing import BinaryIO, Protocol

import zstandard

from leukoflow.archives.compression import Feed, UnpackError, unpack_frames


class ByteStream(Protocol):
    """What a walk needs: bytes in order. A short read means that there are no more."""

    position: int
    damage: str | None
    remarks: list[str]

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes; fewer only at the end."""

    def unread(self, data: bytes) -> None:
        """Give back what was read last."""

    def skip(self, count: int) -> int:
        """Pass over `count` bytes and return how many there were."""


class PlainStream:
    """A seekable file; passing over data costs a seek."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.position = 0
        self.damage: str | None = None
        self.remarks: list[str] = []

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes."""
        data = self._file.read(count)
        self.position += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Seek back."""
        self.position -= len(data)
        self._file.seek(self.position)

    def skip(self, count: int) -> int:
        """Seek forward, at most to the end."""
        count = min(count, self._size - self.position)
        if count > 0:
            self._file.seek(count, 1)
            self.position += count
        return max(count, 0)


class CompressedStream:
    """A gzip, bzip2, xz or zstd file as one stream, however many frames it has; `damage` says why it ended early.

    `remarks` say what is odd although all of it was unpacked. At most about 1 MiB is decompressed ahead of the reader,
    whatever the ratio.
    """

    def __init__(self, file: BinaryIO, compression: str) -> None:
        self.position = 0
        self.damage: str | None = None
        self.remarks: list[str] = []
        self._chunks = unpack_frames(Feed(file), compression, self._remark)
        self._buffer = memoryview(b"")

    def _remark(self, words: str) -> None:
        if words not in self.remarks:
            self.remarks.append(words)

    def _pull(self) -> bool:
        try:
            self._buffer = memoryview(next(self._chunks, b""))
        except UnpackError as error:
            self.damage = str(error)
            self._buffer = memoryview(b"")
        except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError, zstandard.ZstdError):
            self.damage = "the compressed data is damaged"
            self._buffer = memoryview(b"")
        return len(self._buffer) > 0

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes; fewer only at the end or where the data is damaged."""
        parts = []
        while count > 0 and (len(self._buffer) or self._pull()):
            parts.append(bytes(self._buffer[:count]))
            self._buffer = self._buffer[count:]
            count -= len(parts[-1])
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.position += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Keep it for the next reading."""
        self.position -= len(data)
        self._buffer = memoryview(data + bytes(self._buffer))

    def skip(self, count: int) -> int:
        """Decompress and drop."""
        left = count
        while left > 0 and (len(self._buffer) or self._pull()):
            step = min(left, len(self._buffer))
            self._buffer = self._buffer[step:]
            left -= step
        self.position += count - left
        return count - left
