"""What lies in a folder or prefix that others may still be writing to: an inbox."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from leukoflow.core.errors import SourceError, StorageError
from leukoflow.runs.records import SourceKind
from leukoflow.sources.filenames import is_left_behind
from leukoflow.sources.identify import identify
from leukoflow.sources.keys import image_key, locator_of
from leukoflow.sources.local import refusal_of_kind, walk_folder
from leukoflow.sources.s3 import filesystem, list_objects, object_identity, s3_client

_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".jp2", ".j2k")
_ARCHIVE_ENDINGS = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


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
    """List everything below a folder or prefix but folders and litter, in order of path.

    What cannot be read has a refusal. Unfinished files are litter to a run, but are listed here: an inbox waits for
    what is still being written.
    Raises SourceError where the folder itself is absent or cannot be read, StorageError where a retry may help.
    """
    if uri.startswith("s3://"):
        for key, item in list_objects(uri.rstrip("/")):
            size, tag = int(item["Size"]), item["ETag"].strip('"')
            if key and (size or not key.endswith("/")) and not is_left_behind(key):
                changed = item["LastModified"].timestamp()
                yield Entry(key, locator_of(key.encode()), size, f"{size}-{tag}", changed)
        return
    for relative, status in walk_folder(os.path.abspath(uri)):
        if isinstance(status, OSError):
            if not relative:
                raise SourceError(f"{uri} cannot be read: {status.strerror}; is it mounted?") from status
            if status.errno != errno.ENOENT:  # else it was taken away while we looked
                yield Entry(image_key(relative), locator_of(relative), 0, "", 0.0, f"cannot be read: {status.strerror}")
            continue
        if not relative:
            raise SourceError(f"{uri} is not a folder")
        path = image_key(relative)
        if is_left_behind(path):
            continue
        refusal = refusal_of_kind(status)
        size = 0 if refusal else status.st_size
        changed = max(status.st_mtime, status.st_ctime)
        yield Entry(path, locator_of(relative), size, f"{size}-{status.st_mtime_ns}", changed, refusal)


def unaltered(uri: str, entry: Entry) -> bool:
    """Tell whether one entry of a survey is still there as it was. Raises StorageError where a retry may help."""
    if uri.startswith("s3://"):
        where = f"{uri.rstrip('/')}/{unquote_to_bytes(entry.locator).decode()}"
        try:
            with s3_client().store_errors(uri):
                return object_identity(filesystem().info(where)) == entry.identity
        except FileNotFoundError:
            return False
    try:
        status = os.lstat(os.path.join(os.fsencode(os.path.abspath(uri)), unquote_to_bytes(entry.locator)))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StorageError(f"a file in {uri} cannot be examined ({error.strerror}); check the mount") from error
    size = 0 if refusal_of_kind(status) else status.st_size
    return f"{size}-{status.st_mtime_ns}" == entry.identity


def is_archive(uri: str, name: str) -> bool:
    """Tell whether a file of an inbox is an archive: by its ending, else by its first bytes."""
    if name.lower().endswith(_IMAGE_ENDINGS):
        return False
    if name.lower().endswith(_ARCHIVE_ENDINGS):
        return True
    try:
        return identify(uri).kind in (SourceKind.ZIP, SourceKind.TAR, SourceKind.COMPRESSED_TAR)
    except (SourceError, OSError):
        return False
