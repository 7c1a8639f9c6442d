"""Local files and folders as sources: what is there, what it is by its status, and what a failure means."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from leukoflow.core.errors import StorageError


def walk_folder(root: str) -> Iterator[tuple[bytes, os.stat_result | OSError]]:
    """Yield everything below `root` but folders, in order of path; an unreadable folder comes with its error."""
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


def refusal_of_kind(status: os.stat_result) -> str | None:
    """Say why what has this status is not read; None for a regular file."""
    if stat.S_ISLNK(status.st_mode):
        return "symbolic link: links are not followed"
    return None if stat.S_ISREG(status.st_mode) else "special file: not a regular file"


def file_identity(status: os.stat_result) -> str:
    """Return size and modification time (ns): a file of another content has another identity."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def transient_cause(words: str, error: OSError) -> StorageError:
    """Make the cause of a SourceError that may pass.

    A night tries again then, and does not settle what it has taken.
    """
    cause = StorageError(words)
    cause.__cause__ = error
    return cause


@contextmanager
def reading_errors(path: str) -> Iterator[None]:
    """Raise StorageError where a local file cannot be read: that is no damage, and a retry may mend it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be read at the moment ({error.strerror}); a retry may help") from error
