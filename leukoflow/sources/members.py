"""What was handed over: recognise it, list its members as a stream, read one member.

A source is a folder, a zip or tar archive (plain or compressed), or one image; on a local file system or under `s3://`.
Archives are read in place, never unpacked; names inside them are data and never become file-system paths.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import unquote_to_bytes

from leukoflow.archives.tar_reader import (
    BLOCK,
    ByteStream,
    CompressedStream,
    PlainStream,
    TarWalk,
    compression_of,
    is_header,
)
from leukoflow.archives.zip_names import key_of
from leukoflow.archives.zip_reader import SplitArchiveError, ZipEntry, ZipWalk, find_directory, read_entry
from leukoflow.core.errors import MemberError, SourceError, StorageError
from leukoflow.core.reading import GuardedReader
from leukoflow.runs.records import Member, Shard, Source, SourceKind
from leukoflow.sources.filenames import is_left_behind, is_litter, no_picture

DEFAULT_MEMBER_BYTES = 512 << 20
_IMAGES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM",
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51",
)  # fmt: skip
_FOREIGN = {
    b"Rar!\x1a\x07": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"\x1f\x9d": "compressed with compress (.Z)",
    b"MSCF": "a cabinet archive",
    b"070701": "a cpio archive",
}
_NESTED = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".jp2", ".j2k")
_ARCHIVE_ENDINGS = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_COPY_BYTES = 1 << 20
_PASSING = frozenset(
    {
        errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
        errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.EAGAIN,
    }
)  # fmt: skip
"""What a network share says when it is out of reach, or this machine when it is short of something."""
_S3_BLOCK = 4 << 20
_S3_PAGE = 1000
_MOST = (1 << 63) - 1  # what a column of the plan holds: a hostile header may state more


# ---------------------------------------------------------------- recognising


def identify(uri: str | Path) -> Source:
    """Recognise a source by its content, not by its name.

    Raises SourceError where it is absent, empty or of no known kind.
    """
    text = str(uri)
    if text.startswith("s3://"):
        return _identify_s3(text.rstrip("/") if text.count("/") > 3 else text)
    path = os.path.abspath(text)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return _identify_folder(path, _folder_digest(path))
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path} is neither a folder nor a regular file")
        with open(path, "rb") as plain, GuardedReader(plain, lambda: _local_errors(path)) as file:
            kind = _kind_of(cast(BinaryIO, file), status.st_size, path)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: check the path of the source") from None
    except PermissionError as error:
        words = f"{path} cannot be read: permission denied; let this user read it"
        raise SourceError(words) from _passing(words, error)
    except StorageError as error:
        raise SourceError(str(error)) from error
    except OSError as error:
        words = f"{path} cannot be read: {error.strerror}; check the path of the source, and whether it is mounted"
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):  # what no retry mends
            raise SourceError(words) from None
        raise SourceError(words) from _passing(words, error)
    return Source(path, kind, _file_identity(status), status.st_size)


def _passing(words: str, error: OSError) -> StorageError:
    """The cause of a SourceError that may pass: a night tries again then, and does not settle what it has taken."""
    cause = StorageError(words)
    cause.__cause__ = error
    return cause


def _file_identity(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _kind_of(file: BinaryIO, size: int, name: str) -> SourceKind:
    if size == 0:
        raise SourceError(f"{name} is empty (0 bytes): hand it over again")
    head = file.read(BLOCK)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")):
        return SourceKind.ZIP
    if is_header(head):  # ahead of the others: a tar begins with a name, and BM is one (bone marrow)
        return SourceKind.TAR
    compression = compression_of(head)
    if compression:
        file.seek(0)
        stream = CompressedStream(file, compression)
        block = stream.read(BLOCK)
        if is_header(block) or block == bytes(BLOCK):
            return SourceKind.COMPRESSED_TAR
        if stream.damage:
            raise SourceError(f"{name} is compressed ({compression}) and cannot be unpacked: {stream.damage}")
        raise SourceError(f"{name} is compressed ({compression}), but holds no tar archive: hand over a zip or tar")
    if head.startswith(_IMAGES):
        return SourceKind.IMAGE
    try:
        if find_directory(file, size) is not None:
            return SourceKind.ZIP  # with something in front, such as a self-extracting program
    except SplitArchiveError as error:
        raise SourceError(f"{name} is {error}") from None
    if head == bytes(BLOCK):
        return SourceKind.TAR  # or nothing but zeros, which is known once it is read
    if foreign := next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None):
        raise SourceError(f"{name} is {foreign}, which is not supported: hand it over as a zip or tar archive")
    raise SourceError(
        f"{name} is neither a zip or tar archive nor a JPEG, PNG, TIFF, BMP or "
        "JPEG 2000 image: look at what was handed over, or have it handed over again"
    )


def _folder_digest(path: str) -> Iterator[tuple[bytes, int, str]]:
    count, failed = 0, None
    for relative, status in _walk(path):
        if isinstance(status, os.stat_result):
            count += 1
            yield relative, status.st_size if stat.S_ISREG(status.st_mode) else 0, str(status.st_mtime_ns)
        elif relative:
            failed = failed or status
        else:
            words = f"{path} cannot be read: {status.strerror}; let this user read it, or mount it"
            raise SourceError(words) from _passing(words, status)
    if failed is not None and not count:
        words = f"nothing in {path} can be read: {failed.strerror}; let this user read its folders, or mount them"
        raise SourceError(words) from _passing(words, failed)


def _identify_folder(uri: str, listing: Iterable[tuple[bytes, int, str]]) -> Source:
    digest, total, count = hashlib.blake2b(digest_size=16), 0, 0
    for entry in listing:
        digest.update(_digested(*entry))
        total, count = total + entry[1], count + 1
    if not count:
        raise SourceError(f"{uri} holds no files: nothing was handed over")
    return Source(uri, SourceKind.DIRECTORY, digest.hexdigest(), total)


def _digested(name: bytes, size: int, version: str) -> bytes:
    return b"%d:%s %d %s\n" % (len(name), name, size, version.encode())


def _walk(root: str) -> Iterator[tuple[bytes, os.stat_result | OSError]]:
    """Everything below `root` but folders, in order of path; a folder that cannot be read comes with its error."""
    base = os.fsencode(root)
    pending: list[bytes] = [b""]
    while pending:
        relative = pending.pop()
        path = os.path.join(base, relative) if relative else base
        try:
            status = os.lstat(path) if relative else os.stat(path)
            if not stat.S_ISDIR(status.st_mode):
                yield relative, status
                continue
            names = os.listdir(path)
        except OSError as error:
            yield relative, error
            continue
        names.sort(reverse=True)
        pending.extend(os.path.join(relative, name) if relative else name for name in names)


# ---------------------------------------------------------------- S3


def _objects() -> Any:
    """The module of the S3 client; a slow import that local sources do without."""
    from leukoflow.storage import s3_client as objectstore

    return objectstore


def _s3() -> Any:
    """The file system of this process: never made before a fork, never with cached listings."""
    store = _objects()
    return store.filesystem(store.environment())


def _identify_s3(uri: str) -> Source:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        _objects().probe(uri)
        with _objects().store_errors(uri):
            filesystem = _s3()
            info = filesystem.info(f"{bucket}/{key}") if key else {"type": "directory"}
            if info["type"] != "directory":
                size = int(info["size"])
                with _s3_file(filesystem, uri) as file:
                    kind = _kind_of(file, size, uri)
                return Source(uri, kind, _s3_identity(info), size)
            return _identify_folder(uri, ((k.encode(), size, tag) for k, size, tag in _s3_listing(uri)))
    except FileNotFoundError:
        raise SourceError(f"{uri} does not exist: check bucket, key and endpoint") from None
    except StorageError as error:
        raise SourceError(str(error)) from error


def _s3_identity(info: dict[str, Any]) -> str:
    return f"{info['size']}-{str(info.get('ETag', '')).strip(chr(34))}"


def _s3_file(filesystem: Any, uri: str) -> Any:
    """A reader that fails when the object is replaced while it is read."""
    return _objects().guarded(
        filesystem.open(uri, "rb", block_size=_S3_BLOCK, cache_type="readahead"), uri
    )  # fmt: skip


def _s3_listing(uri: str) -> Iterator[tuple[str, int, str]]:
    """(key below the prefix, size, ETag) page by page, in the store's order; the client's own listing keeps all."""
    for key, item in _s3_objects(uri):
        yield key, int(item["Size"]), item["ETag"].strip('"')


def _s3_objects(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key below the prefix and what the store says of the object."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix + "/" if prefix else ""
    with _objects().store_errors(uri):
        for page in _objects().pages(_s3(), bucket, prefix, size=_S3_PAGE):
            for item in page.get("Contents", ()):
                yield item["Key"][len(prefix) :], item


# ---------------------------------------------------------------- opening


@contextmanager
def _open(source: Source) -> Iterator[BinaryIO]:
    """The source's file, after making sure that it is still the one that was identified."""
    if source.uri.startswith("s3://"):
        try:
            with _objects().store_errors(source.uri):
                file = _s3_file(_s3(), source.uri)
                identity = _s3_identity(file.details)
        except FileNotFoundError:
            raise SourceError(f"{source.uri} has gone since it was planned: put it back or start a new run") from None
    else:
        try:
            file = GuardedReader(open(source.uri, "rb"), lambda: _local_errors(source.uri))  # noqa: SIM115 - closed below
        except OSError as error:
            raise SourceError(f"{source.uri} cannot be read: {error.strerror}") from error
        identity = _file_identity(os.fstat(file.fileno()))
    with file:
        if identity != source.identity:
            raise SourceError(f"{source.uri} has changed since it was planned: start a new run for the new content")
        yield cast(BinaryIO, file)


@contextmanager
def _local_errors(path: str) -> Iterator[None]:
    """A local archive that cannot be read is told from a damaged one: a retry may mend it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be read at the moment ({error.strerror}); a retry may help") from error


def _stream(source: Source, file: BinaryIO) -> ByteStream:
    if source.kind is SourceKind.TAR:
        return PlainStream(file, source.size_bytes)
    compression = compression_of(file.read(8))
    file.seek(0)
    return CompressedStream(file, compression or "gz")


# ---------------------------------------------------------------- listing


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
        with _open(self._source) as file:
            walk = ZipWalk(file, self._source.size_bytes)
            for entry in self._whole(walk):
                if entry.is_directory or is_litter(entry.name):
                    self.ignored += 1
                    continue
                identity = f"{entry.crc:08x}-{entry.size}-{entry.offset}"
                yield self._member(
                    entry.name, entry.size, identity, offset=entry.offset, stored=entry.stored, method=entry.method,
                    refusal=entry.refusal,
                )  # fmt: skip
            self.truncated, self.remarks = walk.truncated, walk.remarks

    def _whole(self, walk: ZipWalk) -> Iterator[ZipEntry]:
        try:
            yield from walk
        except SplitArchiveError as error:
            raise SourceError(f"{self._source.uri} is {error}") from None

    def _tar(self) -> Iterator[Member]:
        compressed = self._source.kind is SourceKind.COMPRESSED_TAR
        with _open(self._source) as file:
            stream = _stream(self._source, file)
            walk = TarWalk(stream)
            for entry in walk:
                path = key_of(entry.name)
                if entry.is_directory or is_litter(path):
                    self.ignored += 1
                    continue
                refusal = entry.refusal
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
                raise SourceError(f"{self._source.uri} is all zeros, no archive: hand it over again")

    def _folder(self) -> Iterator[Member]:
        unread: dict[str, int] = {}  # folders by the reason; their names may be those of patients
        for relative, status in _walk(self._source.uri):
            path = key_of(relative)
            if isinstance(status, OSError):
                if not relative:
                    words = f"{self._source.uri} cannot be read: {status.strerror}; is it mounted?"
                    raise SourceError(words) from _passing(words, status)
                reason = status.strerror or type(status).__name__
                unread[reason] = unread.get(reason, 0) + 1
                self.truncated = "; ".join(_unread_words(reason, count) for reason, count in unread.items())
                continue
            if is_litter(path):
                self.ignored += 1
                continue
            refusal = _special(status)
            size = 0 if refusal else status.st_size
            yield self._member(
                path, size, f"{size}-{status.st_mtime_ns}", locator=locator_of(relative), refusal=refusal
            )

    def _prefix(self) -> Iterator[Member]:
        digest = hashlib.blake2b(digest_size=16)
        for key, size, tag in _s3_listing(self._source.uri):
            digest.update(_digested(key.encode(), size, tag))
            if not key or (key.endswith("/") and not size) or is_litter(key):
                self.ignored += 1
                continue
            yield self._member(key, size, f"{size}-{tag}", locator=locator_of(key.encode()))
        if digest.hexdigest() != self._source.identity:  # an upload that goes on, or a listing that lags
            raise SourceError(
                f"{self._source.uri} changed while it was being planned: wait until it is handed over completely, and "
                "give the same command again"
            )

    def _chosen(self, entries: Iterable[Entry]) -> Iterator[Member]:
        """Members as they were when somebody chose them: what has changed or gone since is found when it is read."""
        for e in entries:
            yield self._member(e.key, e.size_bytes, e.identity, locator=e.locator, refusal=e.refusal)

    def _image(self) -> Iterator[Member]:
        name = self._source.uri.rpartition("/")[2]
        yield self._member(key_of(os.fsencode(name)), self._source.size_bytes, self._source.identity)
        with _open(self._source) as file, suppress(SplitArchiveError):
            if (behind := find_directory(file, self._source.size_bytes)) is not None:
                self.truncated = (
                    f"behind the image lies a zip archive with {behind.members:,} files (its directory begins at byte "
                    f"{behind.start:,}): hand it over by itself"
                )


def _unread_words(reason: str, count: int) -> str:
    which = "a folder or file of it" if count == 1 else f"{count:,} folders or files of it"
    return f"{which} cannot be read: {reason}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or object below a folder or prefix that others may still be writing to.

    `identity` is what a `Member` of it has. `changed_at` is when it last changed, in seconds since the epoch by the
    clock of the store; a copy that keeps modification times does not deceive it on a local disk.
    """

    key: str
    locator: str
    size_bytes: int
    identity: str
    changed_at: float
    refusal: str | None = None


def survey(uri: str) -> Iterator[Entry]:
    """Everything below a folder or prefix but folders and litter, in order of path; what cannot be read has a refusal.

    Unfinished files are litter to a run, but are told here: an inbox waits for what is still being written.
    Raises SourceError where the folder itself is absent or cannot be read, StorageError where a retry may help.
    """
    if uri.startswith("s3://"):
        for key, item in _s3_objects(uri.rstrip("/")):
            size, tag = int(item["Size"]), item["ETag"].strip('"')
            if key and (size or not key.endswith("/")) and not is_left_behind(key):
                changed = item["LastModified"].timestamp()
                yield Entry(key, locator_of(key.encode()), size, f"{size}-{tag}", changed)
        return
    for relative, status in _walk(os.path.abspath(uri)):
        if isinstance(status, OSError):
            if not relative:
                raise SourceError(f"{uri} cannot be read: {status.strerror}; is it mounted?") from status
            if status.errno != errno.ENOENT:  # else it was taken away while we looked
                yield Entry(key_of(relative), locator_of(relative), 0, "", 0.0, f"cannot be read: {status.strerror}")
            continue
        if not relative:
            raise SourceError(f"{uri} is not a folder")
        path = key_of(relative)
        if is_left_behind(path):
            continue
        refusal = _special(status)
        size = 0 if refusal else status.st_size
        changed = max(status.st_mtime, status.st_ctime)
        yield Entry(path, locator_of(relative), size, f"{size}-{status.st_mtime_ns}", changed, refusal)


def unaltered(uri: str, entry: Entry) -> bool:
    """Whether one entry of a survey is still there as it was. Raises StorageError where a retry may help."""
    if uri.startswith("s3://"):
        where = f"{uri.rstrip('/')}/{unquote_to_bytes(entry.locator).decode()}"
        try:
            with _objects().store_errors(uri):
                return _s3_identity(_s3().info(where)) == entry.identity
        except FileNotFoundError:
            return False
    try:
        status = os.lstat(os.path.join(os.fsencode(os.path.abspath(uri)), unquote_to_bytes(entry.locator)))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StorageError(f"a file in {uri} cannot be looked at ({error.strerror}); check the mount") from error
    size = 0 if _special(status) else status.st_size
    return f"{size}-{status.st_mtime_ns}" == entry.identity


def _special(status: os.stat_result) -> str | None:
    if stat.S_ISLNK(status.st_mode):
        return "symbolic link: links are not followed"
    return None if stat.S_ISREG(status.st_mode) else "special file: not a regular file"


def is_archive(uri: str, name: str) -> bool:
    """Whether a file of an inbox is an archive: by its ending, else by its first bytes."""
    if name.lower().endswith(_IMAGE_ENDINGS):
        return False
    if name.lower().endswith(_ARCHIVE_ENDINGS):
        return True
    try:
        return identify(uri).kind in (SourceKind.ZIP, SourceKind.TAR, SourceKind.COMPRESSED_TAR)
    except (SourceError, OSError):
        return False


def locator_of(path: bytes) -> str:
    """Reversible text for a path of any bytes; unlike a key it also escapes the percent sign."""
    return key_of(path.replace(b"%", b"%25"))


class UniqueKeys:
    """Gives a repeated name the smallest unused suffix `#2`, `#3` ... in order of appearance."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._last: dict[str, int] = {}

    def add(self, name: str) -> str:
        """The key for one more appearance of `name`."""
        if name not in self._used:
            self._used.add(name)
            return name
        number = self._last.get(name, 1) + 1
        while (key := f"{name}#{number}") in self._used:
            number += 1
        self._last[name] = number
        self._used.add(key)
        return key


def _checksum(stream: ByteStream, size: int) -> tuple[int, int]:
    """CRC-32 of the next `size` bytes and how many there were."""
    crc = present = 0
    while present < size:
        data = stream.read(min(_COPY_BYTES, size - present))
        if not data:
            break
        crc, present = zlib.crc32(data, crc), present + len(data)
    return crc, present


# ---------------------------------------------------------------- reading


class Reader(Protocol):
    """Reads members of one source; keeps what is worth keeping open."""

    def read(self, member: Member) -> bytes:
        """All bytes of a member. Raises MemberError with a reason for people, StorageError where a retry may help."""


@contextmanager
def open_reader(
    source: Source, spool_file: str | Path | None = None, member_bytes: int = DEFAULT_MEMBER_BYTES
) -> Iterator[Reader]:
    """A reader for the members of `source`; of a compressed tar those in `spool_file`, the shard's file from `spool`.

    Raises SourceError where an archive has changed since it was identified.
    """
    if source.kind is SourceKind.COMPRESSED_TAR:
        if spool_file is None:
            raise ValueError("members of a compressed tar are read from their shard's spool file")
        with open(spool_file, "rb") as file:
            yield _ArchiveReader(source, file, member_bytes)
    elif source.kind is not SourceKind.DIRECTORY:
        with _open(source) as file:
            yield _ArchiveReader(source, file, member_bytes)
    elif source.uri.startswith("s3://"):
        yield _PrefixReader(source, member_bytes)
    else:
        yield _FolderReader(source, member_bytes)


def read_member(source: Source, member: Member, limit_bytes: int = DEFAULT_MEMBER_BYTES) -> bytes:
    """Bytes of one member (not of a compressed tar); `open_reader` is faster for several."""
    with open_reader(source, member_bytes=limit_bytes) as reader:
        return reader.read(member)


def _check(member: Member, limit: int) -> None:
    if member.refusal:
        raise MemberError(member.refusal)
    if max(member.size_bytes, member.stored_bytes) > limit:
        raise MemberError(f"too large: {max(member.size_bytes, member.stored_bytes):,} bytes, the limit is {limit:,}")


class _ArchiveReader:
    """Members of a zip, a tar, a spool file, or the one image."""

    def __init__(self, source: Source, file: BinaryIO, limit: int) -> None:
        self._source = source
        self._file = file
        self._limit = limit

    def read(self, member: Member) -> bytes:
        _check(member, self._limit)
        try:
            if self._source.kind is SourceKind.ZIP:
                return read_entry(
                    self._file,
                    member.offset,
                    member.method,
                    member.stored_bytes,
                    member.size_bytes,
                    _crc_of(member),
                )
            self._file.seek(member.offset)
            data = self._file.read(member.size_bytes)
        except FileNotFoundError as error:
            raise SourceError(f"{self._source.uri} has gone since it was planned: put it back") from error
        if len(data) < member.size_bytes:
            raise MemberError(f"truncated: {len(data):,} of {member.size_bytes:,} bytes")
        if self._source.kind is SourceKind.COMPRESSED_TAR and zlib.crc32(data) != _crc_of(member):
            raise StorageError("a spool file is damaged: its checksum does not match; it will be spooled again")
        return data


def _crc_of(member: Member) -> int:
    return int(member.identity[:8], 16)


class _FolderReader:
    """Files below a local folder; no link is followed, whatever the folder has become since it was planned."""

    def __init__(self, source: Source, limit: int) -> None:
        self._root = os.fsencode(source.uri)
        self._limit = limit

    def read(self, member: Member) -> bytes:
        _check(member, self._limit)
        path = os.path.join(self._root, unquote_to_bytes(member.locator))
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed(error) from error
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or f"{status.st_size}-{status.st_mtime_ns}" != member.identity:
                raise MemberError("changed since it was planned: start a new run for the new content")
            try:
                data = file.read(member.size_bytes + 1)
            except OSError as error:
                raise self._failed(error) from error
        if len(data) != member.size_bytes:
            raise MemberError(f"truncated: {len(data):,} of {member.size_bytes:,} bytes")
        return data

    def _failed(self, error: OSError) -> MemberError | StorageError:
        """Blames the member, unless its whole folder is out of reach: a share that is not mounted loses no images."""
        name = os.fsdecode(self._root)
        if error.errno == errno.ENOENT and not _holds_anything(self._root):
            return StorageError(f"{name} is empty or gone: mount or put it back, and give the same command again")
        if error.errno in _PASSING:
            return StorageError(f"{name} cannot be read at the moment ({error.strerror}); a retry may help")
        return MemberError(_failure(error))


def _holds_anything(folder: bytes) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def _failure(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "gone: it was deleted since it was planned"
    if error.errno == errno.ELOOP:
        return "symbolic link: links are not followed"
    if error.errno == errno.EACCES:
        return "no permission to read it"
    return f"cannot be read: {error.strerror}"


class _PrefixReader:
    """Objects below an S3 prefix, one request each, only if they are still the planned ones.

    A member is blamed only for what the store says of it: that it is gone, was replaced, or has to be restored from an
    archive. A store that does not answer, or denies access, is no fault of the image.
    """

    def __init__(self, source: Source, limit: int) -> None:
        self._uri = source.uri
        self._bucket, _, prefix = source.uri.removeprefix("s3://").partition("/")
        self._prefix = prefix + "/" if prefix else ""
        self._limit = limit
        self._filesystem = _s3()

    def read(self, member: Member) -> bytes:
        _check(member, self._limit)
        objects = _objects()
        key = self._prefix + unquote_to_bytes(member.locator).decode()
        tag = member.identity.partition("-")[2]
        for _ in range(objects.ROUNDS):
            try:
                with objects.store_errors(self._uri):  # not with the key: the words are logged
                    data = objects.read(self._filesystem, self._bucket, key, IfMatch=f'"{tag}"')
            except FileNotFoundError as error:
                raise MemberError("gone: it was deleted since it was planned") from error
            except StorageError as error:
                code = objects.code_of(error)
                if code in ("PreconditionFailed", "412"):
                    raise MemberError("changed since it was planned: start a new run for the new content") from error
                if code == "InvalidObjectState":
                    raise MemberError("in an archive class of the store: restore it, then start a new run") from error
                raise
            if len(data) == member.size_bytes:
                return cast(bytes, data)
        raise MemberError(f"truncated: {len(data):,} of {member.size_bytes:,} bytes")


# ---------------------------------------------------------------- spooling compressed tars


def spool(
    source: Source, shards: Iterable[tuple[Shard, Sequence[Member]]], write: Callable[[Shard], BinaryIO]
) -> Iterator[Shard]:
    """Unpack the wanted shards of a compressed tar in one linear pass; yields each when its file is closed.

    `shards` come in ascending order with all their members; the bytes of each member that has no refusal are written
    one after the other to `write(shard)`, so that a member starts at its `offset`. The pass goes on only when the
    consumer asks for the next shard: how far it runs ahead, and so the scratch needed, is the consumer's choice.
    Raises SourceError where the archive no longer matches the plan.
    """
    with _open(source) as file:
        stream = _stream(source, file)
        entries = _plan_order(TarWalk(stream))
        position = 0
        for shard, members in shards:
            with write(shard) as sink:
                for member in members:
                    name = next(islice(entries, member.ordinal - position, None), None)
                    position = member.ordinal + 1
                    if name is None or not member.image_key.startswith(key_of(name)):  # a repeated one has a suffix
                        raise _altered(source, member)
                    if member.refusal is None and _copy(stream, sink, member.size_bytes) != _crc_of(member):
                        raise _altered(source, member)
            yield shard


def _altered(source: Source, member: Member) -> SourceError:
    return SourceError(f"{source.uri} does not match its plan at file {member.ordinal + 1:,}: start a new run for it")


def _plan_order(walk: TarWalk) -> Iterator[bytes]:
    """Names of the entries that are members of the plan: neither folders nor litter."""
    for entry in walk:
        if not entry.is_directory and not is_litter(key_of(entry.name)):
            yield entry.name


def _copy(stream: ByteStream, sink: BinaryIO, size: int) -> int:
    """Copy `size` bytes and return their CRC-32."""
    crc = 0
    while size > 0:
        data = stream.read(min(_COPY_BYTES, size))
        if not data:
            return -1
        sink.write(data)
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc
