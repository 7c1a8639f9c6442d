"""One storage root, a local folder or an `s3://` prefix: atomic writes, create-if-absent, publishing of attempts.

Nothing here trusts a listing or an existence check for what is done; that is what markers are for. S3 file systems are
opened in the process that uses them, without listing caches, since s3fs shares both across instances otherwise.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import zarr.storage

from leukoflow.errors import StorageError

CHUNK = 1 << 20
READERS = 8
"""Objects that are read at the same time, where each is waited for."""


@lru_cache(maxsize=8)
def _s3(pid: int) -> Any:
    """An S3 file system of this process (the pid keys the cache, so that a forked child never inherits a session)."""
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True, default_block_size=8 << 20)


class Storage:
    """Keys below one root. Pickles as its URI, so it can travel to any worker."""

    def __init__(self, root: str) -> None:
        self.is_local = "://" not in root
        if not self.is_local and not root.startswith("s3://"):
            raise StorageError(f"{root}: only local folders and s3:// prefixes are supported")
        self.root = str(Path(root).expanduser().absolute()) if self.is_local else root.rstrip("/")

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.root,)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def uri(self, key: str) -> str:
        """Path or URI of a key, for messages and readers."""
        return f"{self.root}/{key}"

    def child(self, key: str) -> Storage:
        """The storage below `key`."""
        return Storage(self.uri(key))

    @property
    def fs(self) -> Any:
        """The s3fs file system of this process; only for `s3://` roots."""
        return _s3(os.getpid())

    def read(self, key: str) -> bytes:
        """All bytes of a key. Raises FileNotFoundError."""
        if self.is_local:
            return Path(self.uri(key)).read_bytes()
        return cast(bytes, self.fs.cat_file(self.uri(key)))

    def open(self, key: str) -> BinaryIO:
        """A seekable reader. Raises FileNotFoundError."""
        if self.is_local:
            return Path(self.uri(key)).open("rb")
        return cast(BinaryIO, self.fs.open(self.uri(key), "rb"))

    def writer(self, key: str) -> BinaryIO:
        """A writer for scratch: what it holds after a crash means nothing."""
        if not self.is_local:
            return cast(BinaryIO, self.fs.open(self.uri(key), "wb"))
        path = Path(self.uri(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")

    def write(self, key: str, data: bytes) -> None:
        """Replaces a key atomically: readers see the old bytes or the new ones."""
        if not self.is_local:
            self.fs.pipe_file(self.uri(key), data)
            return
        target = Path(self.uri(key))
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise StorageError(f"cannot write {target}: {error.strerror}") from error

    def create(self, key: str, data: bytes) -> bool:
        """Writes a key only if it is absent, atomically; False when somebody was first."""
        if not self.is_local:
            try:
                self.fs.pipe_file(self.uri(key), data, mode="create")
            except FileExistsError:
                return False
            return True
        target = Path(self.uri(key))
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(scratch, target)  # fails when the name is taken, and never shows half a file
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error.strerror}") from error
        finally:
            scratch.unlink(missing_ok=True)
        return True

    def delete(self, key: str) -> None:
        """Removes a key or everything below it; nothing happens when it is absent."""
        if self.is_local:
            path = Path(self.uri(key))
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            return
        try:
            self.fs.rm(self.uri(key), recursive=True)
        except FileNotFoundError:
            return

    def sweep_attempts(self, kind: str) -> None:
        """Removes what was written aside as `_attempts/<kind>-...`; whoever calls holds the lock of that kind."""
        names = self.names("_attempts")
        for name in names:
            if name.startswith(f"{kind}-"):
                self.delete(f"_attempts/{name}")
        if names and not self.names("_attempts"):
            self.delete("_attempts")

    def files(self, prefix: str, hidden: bool = False) -> list[str]:
        """Keys below a prefix, sorted. For what this process wrote itself, and for people; never for what is done.

        Names that begin with a dot are scratch on a local disk, and left out unless `hidden` asks for them.
        """
        if self.is_local:
            top = Path(self.root)
            return sorted(
                str((Path(folder) / name).relative_to(top))
                for folder, _, names in os.walk(top / prefix)
                for name in names
                if hidden or not name.startswith(".")
            )
        found = self.fs.find(self.uri(prefix))
        strip = len(self.root.removeprefix("s3://")) + 1
        return sorted(name[strip:] for name in found)

    def usage(self, prefix: str) -> tuple[int, int]:
        """Number of files below a prefix and their bytes; for people."""
        if not self.is_local:
            found = self.fs.find(self.uri(prefix), detail=True)
            return len(found), sum(int(info["size"]) for info in found.values())
        count = size = 0
        for folder, _, names in os.walk(Path(self.root) / prefix):
            for name in names:
                try:
                    size += os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # gone meanwhile
                    continue
                count += 1
        return count, size

    def names(self, prefix: str) -> list[str]:
        """Names directly below a prefix, sorted; empty when there is none. For people and for progress."""
        if self.is_local:
            try:
                return sorted(n for n in os.listdir(self.uri(prefix)) if not n.startswith("."))
            except (FileNotFoundError, NotADirectoryError):
                return []
        try:
            return sorted(str(n).rsplit("/", 1)[-1] for n in self.fs.ls(self.uri(prefix), detail=False, refresh=True))
        except FileNotFoundError:
            return []

    def digest(self, key: str) -> tuple[str, int, str]:
        """(key, bytes, sha256) of one object, read in pieces. Raises FileNotFoundError."""
        digest, size = hashlib.sha256(), 0
        with self.open(key) as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
                size += len(piece)
        return key, size, digest.hexdigest()

    def digests(self, keys: Iterable[str]) -> list[tuple[str, int, str]]:
        """`digest` of each key, in order; objects are read several at a time. Raises FileNotFoundError."""
        if self.is_local:
            return list(map(self.digest, keys))
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.digest, keys))

    def intact(self, files: Iterable[tuple[str, int, str]]) -> bool:
        """Whether every (key, bytes, sha256) is there and unaltered. Objects are read several at a time."""

        def holds(file: tuple[str, int, str]) -> bool:
            try:
                return self.digest(file[0]) == tuple(file)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return False

        if self.is_local:
            return all(map(holds, files))
        with ThreadPoolExecutor(READERS) as pool:
            return all(pool.map(holds, files))

    def promote(self, attempt: str, files: Iterable[tuple[str, int, str]]) -> None:
        """Moves an attempt's files from below `attempt` to their final keys; repeating it after a crash is harmless.

        A unit is the first two parts of a key (`masks.zarr/00003`, `predictions/part-00003.parquet`). On a file system
        each is one rename; on S3 each object is copied by the server, and the attempt deleted afterwards.
        """
        listed = list(files)
        if not self.is_local:
            for key, _, _ in listed:
                self.fs.copy(self.uri(f"{attempt}/{key}"), self.uri(key))
            return
        for unit in dict.fromkeys("/".join(key.split("/")[:2]) for key, _, _ in listed):
            source, target = Path(self.uri(f"{attempt}/{unit}")), Path(self.uri(unit))
            self._place(source, target)

    def _place(self, source: Path, target: Path) -> None:
        """Moves a file or folder to `target`, in place of what is there; of several callers one does it."""
        bench = Path(self.uri(f"_attempts/moving-{uuid.uuid4().hex[:8]}"))
        mine, grave = bench / "new", bench / "old"
        bench.mkdir(parents=True)
        try:
            try:
                source.rename(mine)
            except FileNotFoundError:
                return  # another call has moved it; `intact` decides whether it is right
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():  # what is in the way was altered or never committed
                target.rename(grave)
            mine.replace(target)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error.strerror}; run the same command again") from error
        finally:
            shutil.rmtree(bench, ignore_errors=True)

    def exists(self, key: str) -> bool:
        """Whether a key is there. Never decides what is done."""
        return Path(self.uri(key)).exists() if self.is_local else bool(self.fs.exists(self.uri(key)))

    def stamp(self, key: str) -> str:
        """Differs when the key was written anew. Raises FileNotFoundError."""
        if self.is_local:
            found = os.stat(self.uri(key))
            return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"
        return str(self.fs.info(self.uri(key), refresh=True)["ETag"])

    def adopt(self, other: Storage, files: Iterable[tuple[str, int, str]], attempt: str) -> None:
        """Brings files of another run below `attempt` here: hard links on one file system, else copies."""
        for key, _, _ in files:
            target = f"{attempt}/{key}"
            if self.is_local and other.is_local:
                path = Path(self.uri(target))
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(other.uri(key), path)
                except OSError:
                    shutil.copyfile(other.uri(key), path)
            elif not self.is_local and not other.is_local:
                self.fs.copy(other.uri(key), self.uri(target))
            else:
                self.write(target, other.read(key))

    def zarr(self, key: str, read_only: bool = False) -> Any:
        """A zarr store at `key`."""
        if self.is_local:
            return zarr.storage.LocalStore(self.uri(key), read_only=read_only)
        return zarr.storage.FsspecStore.from_url(
            self.uri(key), storage_options={"use_listings_cache": False}, read_only=read_only
        )

    def pieces(self, key: str) -> Iterator[bytes]:
        """The bytes of a key in pieces, for copying large objects."""
        with self.open(key) as file:
            while piece := file.read(CHUNK):
                yield piece
