"""The bytes of a source's members. Names inside an archive are data and never become file-system paths."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast
from urllib.parse import unquote_to_bytes

from leukoflow.archives.errors import EntryError
from leukoflow.archives.zip_entry import read_entry
from leukoflow.core.errors import MemberError, SourceError, StorageError
from leukoflow.runs.records import Member, Source, SourceKind
from leukoflow.sources.opening import open_source
from leukoflow.sources.s3 import filesystem, s3_client

DEFAULT_MEMBER_BYTES = 512 << 20
_TRANSIENT = frozenset(
    {
        errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
        errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.EAGAIN,
    }
)  # fmt: skip
"""What a network share says when it is out of reach, or this machine when it is short of something."""


class Reader(Protocol):
    """Reads members of one source; keeps what is worth keeping open."""

    def read(self, member: Member) -> bytes:
        """Return all bytes of a member.

        Raises MemberError with a reason for people, StorageError where a retry may help.
        """


@contextmanager
def open_reader(
    source: Source, spool_file: str | Path | None = None, member_bytes: int = DEFAULT_MEMBER_BYTES
) -> Iterator[Reader]:
    """Open a reader for the members of `source`.

    Of a compressed tar it reads those in `spool_file`, the shard's file from `spool`. Raises SourceError where an
    archive has changed since it was identified.
    """
    if source.kind is SourceKind.COMPRESSED_TAR:
        if spool_file is None:
            raise ValueError("members of a compressed tar are read from their shard's spool file")
        with open(spool_file, "rb") as file:
            yield _ArchiveReader(source, file, member_bytes)
    elif source.kind is not SourceKind.DIRECTORY:
        with open_source(source) as file:
            yield _ArchiveReader(source, file, member_bytes)
    elif source.uri.startswith("s3://"):
        yield _PrefixReader(source, member_bytes)
    else:
        yield _FolderReader(source, member_bytes)


def read_member(source: Source, member: Member, limit_bytes: int = DEFAULT_MEMBER_BYTES) -> bytes:
    """Return the bytes of one member (not of a compressed tar); `open_reader` is faster for several."""
    with open_reader(source, member_bytes=limit_bytes) as reader:
        return reader.read(member)


def _check(member: Member, limit: int) -> None:
    """Raise MemberError for a member that the plan refuses, or that is larger than the limit."""
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
                    crc_of(member),
                )
            self._file.seek(member.offset)
            data = self._file.read(member.size_bytes)
        except EntryError as error:
            raise MemberError(str(error)) from error
        except FileNotFoundError as error:
            raise SourceError(f"{self._source.uri} has gone since it was planned: put it back") from error
        if len(data) < member.size_bytes:
            raise MemberError(f"truncated: {len(data):,} of {member.size_bytes:,} bytes")
        if self._source.kind is SourceKind.COMPRESSED_TAR and zlib.crc32(data) != crc_of(member):
            raise StorageError("a spool file is damaged: its checksum does not match; it will be spooled again")
        return data


def crc_of(member: Member) -> int:
    """Return the CRC-32 of a zip's or compressed tar's member, with which its identity begins."""
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
        """Blame the member, unless its whole folder is out of reach: a share that is not mounted loses no images."""
        name = os.fsdecode(self._root)
        if error.errno == errno.ENOENT and not _holds_anything(self._root):
            return StorageError(f"{name} is empty or gone: mount or put it back, and run the same command again")
        if error.errno in _TRANSIENT:
            return StorageError(f"{name} cannot be read at the moment ({error.strerror}); a retry may help")
        return MemberError(_failure(error))


def _holds_anything(folder: bytes) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def _failure(error: OSError) -> str:
    """Put in words why a file cannot be opened or read."""
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
        self._filesystem = filesystem()

    def read(self, member: Member) -> bytes:
        _check(member, self._limit)
        client = s3_client()
        key = self._prefix + unquote_to_bytes(member.locator).decode()
        tag = member.identity.partition("-")[2]
        for _ in range(client.ROUNDS):
            try:
                with client.store_errors(self._uri):  # not with the key: the words are logged
                    data = client.read(self._filesystem, self._bucket, key, IfMatch=f'"{tag}"')
            except FileNotFoundError as error:
                raise MemberError("gone: it was deleted since it was planned") from error
            except StorageError as error:
                code = client.code_of(error)
                if code in ("PreconditionFailed", "412"):
                    raise MemberError("changed since it was planned: start a new run for the new content") from error
                if code == "InvalidObjectState":
                    raise MemberError("in an archive class of the store: restore it, then start a new run") from error
                raise
            if len(data) == member.size_bytes:
                return cast(bytes, data)
        raise MemberError(f"truncated: {len(data):,} of {member.size_bytes:,} bytes")
