"""What was handed over, by its content: a folder, a zip or tar archive (plain or compressed), or one image.

It lies on a local file system or under `s3://`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from leukoflow.archives.compression import compression_of
from leukoflow.archives.errors import SplitArchiveError
from leukoflow.archives.streams import CompressedStream
from leukoflow.archives.tar_header import BLOCK, is_header
from leukoflow.archives.zip_directory import find_directory
from leukoflow.core.errors import SourceError, StorageError
from leukoflow.core.reading import GuardedReader
from leukoflow.runs.records import Source, SourceKind
from leukoflow.sources.local import file_identity, reading_errors, transient_cause, walk_folder
from leukoflow.sources.s3 import filesystem, list_versions, object_identity, open_object, s3_client

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
            return _identify_folder(path, _folder_entries(path))
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path} is neither a folder nor a regular file")
        with open(path, "rb") as plain, GuardedReader(plain, lambda: reading_errors(path)) as file:
            kind = _kind_of(cast(BinaryIO, file), status.st_size, path)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: check the path of the source") from None
    except PermissionError as error:
        words = f"{path} cannot be read: permission denied; let this user read it"
        raise SourceError(words) from transient_cause(words, error)
    except StorageError as error:
        raise SourceError(str(error)) from error
    except OSError as error:
        words = f"{path} cannot be read: {error.strerror}; check the path of the source, and whether it is mounted"
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):  # what no retry mends
            raise SourceError(words) from None
        raise SourceError(words) from transient_cause(words, error)
    return Source(path, kind, file_identity(status), status.st_size)


def _identify_s3(uri: str) -> Source:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        s3_client().probe(uri)
        with s3_client().store_errors(uri):
            store = filesystem()
            info = store.info(f"{bucket}/{key}") if key else {"type": "directory"}
            if info["type"] != "directory":
                size = int(info["size"])
                with open_object(store, uri) as file:
                    kind = _kind_of(file, size, uri)
                return Source(uri, kind, object_identity(info), size)
            return _identify_folder(uri, ((k.encode(), size, tag) for k, size, tag in list_versions(uri)))
    except FileNotFoundError:
        raise SourceError(f"{uri} does not exist: check bucket, key and endpoint") from None
    except StorageError as error:
        raise SourceError(str(error)) from error


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
        "JPEG 2000 image: check what was handed over, or have it sent again"
    )


def _folder_entries(path: str) -> Iterator[tuple[bytes, int, str]]:
    """Yield (relative path, size, version) of a folder's files. Raises SourceError where none can be read."""
    count, failed = 0, None
    for relative, status in walk_folder(path):
        if isinstance(status, os.stat_result):
            count += 1
            yield relative, status.st_size if stat.S_ISREG(status.st_mode) else 0, str(status.st_mtime_ns)
        elif relative:
            failed = failed or status
        else:
            words = f"{path} cannot be read: {status.strerror}; let this user read it, or mount it"
            raise SourceError(words) from transient_cause(words, status)
    if failed is not None and not count:
        words = f"nothing in {path} can be read: {failed.strerror}; let this user read its folders, or mount them"
        raise SourceError(words) from transient_cause(words, failed)


def _identify_folder(uri: str, listing: Iterable[tuple[bytes, int, str]]) -> Source:
    digest, total, count = hashlib.blake2b(digest_size=16), 0, 0
    for entry in listing:
        digest.update(digest_line(*entry))
        total, count = total + entry[1], count + 1
    if not count:
        raise SourceError(f"{uri} holds no files: nothing was handed over")
    return Source(uri, SourceKind.DIRECTORY, digest.hexdigest(), total)


def digest_line(name: bytes, size: int, version: str) -> bytes:
    """Return what an entry adds to the digest that is its folder's identity."""
    return b"%d:%s %d %s\n" % (len(name), name, size, version.encode())
