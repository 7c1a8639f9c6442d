"""A folder of this machine as a storage root."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from leukoflow.core.errors import StorageError
from leukoflow.storage.base import CHUNK, Storage, Stored


def is_full(words: str) -> bool:
    """Tell whether an error's words say that a disk, or somebody's share of it, is full."""
    return any(os.strerror(number) in words for number in (errno.ENOSPC, errno.EDQUOT))


def _cannot_write(target: Path, error: OSError) -> StorageError:
    words = f"cannot write {target}: {error.strerror}"
    if is_full(words):
        return StorageError(f"{words}; make room on that disk, then run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{words}; let this user write there, or choose another folder")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT):
        return StorageError(
            f"{words}; something else has that name, or no folder can be made there: choose another place"
        )
    return StorageError(f"{words}; run the same command again")


@contextlib.contextmanager
def _scratch_of(target: Path, data: bytes) -> Iterator[Path]:
    """Write the data, down to the disk, under a hidden name beside the target; it is gone afterwards if still there."""
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield scratch
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


class LocalStorage(Storage):
    """Keys are files below a folder. A file comes into being by a rename or a hard link, never half written."""

    is_local = True

    def __init__(self, root: str) -> None:
        super().__init__(str(Path(root).expanduser().absolute()))

    def _path(self, key: str) -> Path:
        return Path(self.uri(key))

    def read(self, key: str) -> bytes:
        """Return all bytes of a file."""
        return self._path(key).read_bytes()

    def open(self, key: str) -> BinaryIO:
        """Open a file for reading."""
        return self._path(key).open("rb")

    def writer(self, key: str) -> BinaryIO:
        """Open a file for writing; its folders are made."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")

    def write(self, key: str, data: bytes) -> None:
        """Replace a file by a rename."""
        target = self._path(key)
        try:
            with _scratch_of(target, data) as scratch:
                scratch.replace(target)
        except OSError as error:
            raise _cannot_write(target, error) from error

    def create(self, key: str, data: bytes) -> bool:
        """Make a file by a hard link, which fails when the name is taken, and never shows half a file."""
        target = self._path(key)
        try:
            with _scratch_of(target, data) as scratch:
                try:
                    os.link(scratch, target)
                except FileExistsError:
                    return False
        except OSError as error:
            raise _cannot_write(target, error) from error
        return True

    def delete(self, key: str) -> None:
        """Remove a file or a folder."""
        path = self._path(key)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        """Tell whether a file or folder is there."""
        return self._path(key).exists()

    def stamp(self, key: str) -> str:
        """Return inode, time and size."""
        found = os.stat(self.uri(key))
        return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"

    def digest(self, key: str) -> Stored:
        """Return (key, bytes, sha256), read in pieces."""
        digest, size = hashlib.sha256(), 0
        with self.open(key) as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
                size += len(piece)
        return key, size, digest.hexdigest()

    def files(self, prefix: str, hidden: bool = False) -> list[str]:
        """List keys below a prefix, sorted."""
        top = Path(self.root)
        return sorted(
            str((Path(folder) / name).relative_to(top))
            for folder, _, names in os.walk(top / prefix)
            for name in names
            if hidden or not name.startswith(".")
        )

    def names(self, prefix: str) -> list[str]:
        """List names directly below a prefix, sorted."""
        try:
            return sorted(n for n in os.listdir(self.uri(prefix)) if not n.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def usage(self, prefix: str) -> tuple[int, int]:
        """Return the number of files below a prefix and their bytes."""
        count = size = 0
        for folder, _, names in os.walk(self._path(prefix)):
            for name in names:
                try:
                    size += os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # gone meanwhile
                    continue
                count += 1
        return count, size

    def _each(self, function: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[Any]:
        return map(function, things)

    def promote(self, attempt: str, files: Iterable[Stored]) -> None:
        """Move an attempt's units to their final keys, each by one rename.

        A unit is the first two parts of a key (`masks.zarr/00003`, `predictions/part-00003.parquet`).
        """
        for unit in dict.fromkeys("/".join(key.split("/")[:2]) for key, _, _ in files):
            self._place(self._path(f"{attempt}/{unit}"), self._path(unit))

    def _place(self, source: Path, target: Path) -> None:
        """Move a file or folder to `target`, in place of what is there; of several callers one does it."""
        bench = self._path(f"_attempts/moving-{uuid.uuid4().hex[:8]}")
        grave = bench / "old"
        try:
            bench.mkdir(parents=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.exists() and target.is_dir():  # what is in the way was altered or never committed
                with contextlib.suppress(FileNotFoundError):  # another call was quicker to clear it away
                    os.rename(target, grave)
            # What is new lies at its old place or at its new one, never at a third where nobody would look for it.
            with contextlib.suppress(FileNotFoundError):  # another call has moved it; `intact` decides about it
                os.rename(source, target)
        except OSError as error:
            raise _cannot_write(target, error) from error
        finally:
            if grave.exists() and not target.exists():  # what was cleared away is perhaps what another call put there
                with contextlib.suppress(OSError):
                    os.rename(grave, target)
            shutil.rmtree(bench, ignore_errors=True)

    def adopt(self, other: Storage, files: Iterable[Stored], attempt: str) -> None:
        """Bring files of another run below `attempt` here: hard links on one file system, else copies."""
        if not isinstance(other, LocalStorage):
            self._receive(other, files, attempt)
            return
        for key, _, _ in files:
            path = self._path(f"{attempt}/{key}")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(other.uri(key), path)
            except OSError:
                shutil.copyfile(other.uri(key), path)

    def zarr(self, key: str, read_only: bool = False) -> Any:
        """Return zarr's own store of a folder."""
        import zarr.storage

        return zarr.storage.LocalStore(self.uri(key), read_only=read_only)

    def probe(self) -> None:
        """Do nothing: a folder answers at once, and each error names it."""

    def prune(self, key: str) -> None:
        """Remove a folder and those above it, up to the root, while they are empty."""
        parts = key.split("/")
        with contextlib.suppress(OSError):
            for n in range(len(parts), 0, -1):
                os.rmdir(self.uri("/".join(parts[:n])))

    def abort_uploads(self, prefix: str = "") -> int:
        """Return 0: a local disk has no uploads."""
        return 0
