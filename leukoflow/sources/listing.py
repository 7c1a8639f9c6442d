"""The members of a source as a stream, in its own order: archives are read in place, never unpacked."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress

from leukoflow.archives.errors import SplitArchiveError
from leukoflow.archives.streams import ByteStream
from leukoflow.archives.tar_walk import CONTINUED, TarEntry, TarWalk
from leukoflow.archives.zip_directory import find_directory
from leukoflow.archives.zip_entry import ZipEntry
from leukoflow.archives.zip_walk import ZipWalk
from leukoflow.core.errors import SourceError
from leukoflow.runs.records import Member, Source, SourceKind
from leukoflow.sources.filenames import is_litter, no_picture
from leukoflow.sources.identify import digest_line
from leukoflow.sources.keys import UniqueKeys, image_key, locator_of
from leukoflow.sources.local import refusal_of_kind, transient_cause, walk_folder
from leukoflow.sources.opening import open_source, tar_stream
from leukoflow.sources.reading import DEFAULT_MEMBER_BYTES
from leukoflow.sources.s3 import list_versions
from leukoflow.sources.survey import Entry

_NESTED = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_MOST = (1 << 63) - 1  # what a column of the plan holds: a hostile header may state more
_PIECE_BYTES = 1 << 20


class Listing:
    """Members of a source in its own order, as a stream that can be walked once; with `entries` only these.

    `ignored` (folders and litter), `truncated` (why the source is known to be incomplete, or
    None) and `remarks` (what is odd, though nothing is missing) are complete once the iteration has ended. Of a
    compressed tar the members' `offset` is left at 0: it depends on the shards (see `spool`).
    """

    def __init__(
        self, source: Source, member_bytes: int = DEFAULT_MEMBER_BYTES, entries: Iterable[Entry] | None = None
    ) -> None:
        self._source = source
        self._entries = entries
        self._limit = member_bytes
        self._keys = UniqueKeys()
        self._ordinal = 0
        self.ignored = 0
        self.truncated: str | None = None
        self.remarks: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Member]:
        if self._entries is not None:
            return self._chosen(self._entries)
        match self._source.kind:
            case SourceKind.ZIP:
                return self._zip()
            case SourceKind.TAR | SourceKind.COMPRESSED_TAR:
                return self._tar()
            case SourceKind.DIRECTORY if self._source.uri.startswith("s3://"):
                return self._prefix()
            case SourceKind.DIRECTORY:
                return self._folder()
            case _:
                return self._image()

    def _member(
        self, path: str, size: int, identity: str, *, locator: str = "", offset: int = 0, stored: int | None = None,
        method: int = 0, refusal: str | None = None,
    ) -> Member:  # fmt: skip
        if refusal is None:
            refusal = self._refusal(path, max(size, stored or 0) if size else 0)
        size, stored = min(size, _MOST), min(size if stored is None else stored, _MOST)
        member = Member(
            self._ordinal, self._keys.add(path), locator, offset, stored, size, method,
            identity, refusal,
        )  # fmt: skip
        self._ordinal += 1
        return member

    def _refusal(self, path: str, size: int) -> str | None:
        if size == 0:
            return "empty: 0 bytes"
        if size > self._limit:
            return f"too large: {size:,} bytes, the limit is {self._limit:,}"
        if path[-5:].lower().endswith(_NESTED):
            return "archive within the source: unpack it and hand over its images"
        return no_picture(path)

    def _zip(self) -> Iterator[Member]:
        with open_source(self._source) as file:
            walk = ZipWalk(file, self._source.size_bytes)
            for entry in self._whole(walk):
                path = image_key(entry.name)
                if entry.is_directory or is_litter(path):
                    self.ignored += 1
                    continue
                identity = f"{entry.crc:08x}-{entry.size}-{entry.offset}"
                yield self._member(
                    path, entry.size, identity, offset=entry.offset, stored=entry.stored, method=entry.method,
                    refusal=entry.refusal,
                )  # fmt: skip
            self.truncated, self.remarks = walk.truncated, walk.remarks

    def _whole(self, walk: ZipWalk) -> Iterator[ZipEntry]:
        """Walk through an archive. Raises SourceError where it is one part of several."""
        try:
            yield from walk
        except SplitArchiveError as error:
            raise SourceError(f"{self._source.uri} is {error}") from None

    def _tar(self) -> Iterator[Member]:
        compressed = self._source.kind is SourceKind.COMPRESSED_TAR
        with open_source(self._source) as file:
            stream = tar_stream(self._source, file)
            walk = TarWalk(stream)
            for entry in walk:
                path = image_key(entry.name)
                if entry.is_directory or is_litter(path):
                    self.ignored += 1
                    continue
                refusal = _refusal_of(entry)
                if compressed:  # every byte passes by anyway, so its checksum costs little and makes the identity
                    crc, present = _checksum(stream, entry.size)
                    identity = f"{crc:08x}-{entry.size}-{entry.offset}"
                else:
                    present = min(entry.size, max(0, self._source.size_bytes - entry.offset))
                    identity = f"{entry.mtime}-{entry.size}-{entry.offset}-{self._source.identity}"
                if present < entry.size:
                    refusal = refusal or f"truncated: {present:,} of {entry.size:,} bytes"
                member = self._member(
                    path, entry.size, identity, offset=0 if compressed else entry.offset, refusal=refusal
                )
                yield member
            self.truncated, self.remarks = walk.truncated, walk.remarks
            if walk.only_zeros:
                raise SourceError(f"{self._source.uri} is all zeros, not an archive: hand it over again")

    def _folder(self) -> Iterator[Member]:
        unread: dict[str, int] = {}  # folders by the reason; their names may be those of patients
        for relative, status in walk_folder(self._source.uri):
            path = image_key(relative)
            if isinstance(status, OSError):
                if not relative:
                    words = f"{self._source.uri} cannot be read: {status.strerror}; is it mounted?"
                    raise SourceError(words) from transient_cause(words, status)
                reason = status.strerror or type(status).__name__
                unread[reason] = unread.get(reason, 0) + 1
                self.truncated = "; ".join(_unread_words(reason, count) for reason, count in unread.items())
                continue
            if is_litter(path):
                self.ignored += 1
                continue
            refusal = refusal_of_kind(status)
            size = 0 if refusal else status.st_size
            yield self._member(
                path, size, f"{size}-{status.st_mtime_ns}", locator=locator_of(relative), refusal=refusal
            )

    def _prefix(self) -> Iterator[Member]:
        digest = hashlib.blake2b(digest_size=16)
        for key, size, tag in list_versions(self._source.uri):
            digest.update(digest_line(key.encode(), size, tag))
            if not key or (key.endswith("/") and not size) or is_litter(key):
                self.ignored += 1
                continue
            yield self._member(key, size, f"{size}-{tag}", locator=locator_of(key.encode()))
        if digest.hexdigest() != self._source.identity:  # an upload that goes on, or a listing that lags
            raise SourceError(
                f"{self._source.uri} changed while it was being planned: wait until it is handed over completely, and "
                "run the same command again"
            )

    def _chosen(self, entries: Iterable[Entry]) -> Iterator[Member]:
        """Yield members as they were when they were chosen: what has changed or gone since is found when it is read."""
        for e in entries:
            yield self._member(e.key, e.size_bytes, e.identity, locator=e.locator, refusal=e.refusal)

    def _image(self) -> Iterator[Member]:
        name = self._source.uri.rpartition("/")[2]
        yield self._member(image_key(os.fsencode(name)), self._source.size_bytes, self._source.identity)
        with open_source(self._source) as file, suppress(SplitArchiveError):
            if (behind := find_directory(file, self._source.size_bytes)) is not None:
                self.truncated = (
                    f"behind the image lies a zip archive with {behind.members:,} files (its directory begins at byte "
                    f"{behind.start:,}): hand it over by itself"
                )


def _refusal_of(entry: TarEntry) -> str | None:
    return f"{entry.refusal}, hand over the images" if entry.refusal == CONTINUED else entry.refusal


def _unread_words(reason: str, count: int) -> str:
    which = "a folder or file of it" if count == 1 else f"{count:,} folders or files of it"
    return f"{which} cannot be read: {reason}"


def _checksum(stream: ByteStream, size: int) -> tuple[int, int]:
    """Return the CRC-32 of the next `size` bytes and how many there were."""
    crc = present = 0
    while present < size:
        data = stream.read(min(_PIECE_BYTES, size - present))
        if not data:
            break
        crc, present = zlib.crc32(data, crc), present + len(data)
    return crc, present
