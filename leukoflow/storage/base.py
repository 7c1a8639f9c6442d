"""One storage root, a local folder or an `s3://` prefix: atomic writes, create-if-absent, publishing of attempts.

Nothing here trusts a listing or an existence check for what is done; that is what markers are for. Whatever goes wrong
with an object store is a StorageError in words; only a key that is absent is a FileNotFoundError.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zarr.storage

from leukoflow.core.errors import StorageError

CHUNK = 1 << 20
READERS = 8
"""Objects that are read at the same time, where each is waited for."""


def _objects() -> Any:
    """The module of the S3 client, imported only where an address needs it."""
    from leukoflow.storage import s3_client as objectstore

    return objectstore


def is_full(words: str) -> bool:
    """Whether an error's words say that a disk, or somebody's share of it, is full."""
    return any(os.strerror(number) in words for number in (errno.ENOSPC, errno.EDQUOT))


def _cannot_write(target: Path, error: OSError) -> StorageError:
    words = f"cannot write {target}: {error.strerror}"
    if is_full(words):
        return StorageError(f"{words}; make room on that disk, then give the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{words}; let this user write there, or choose another folder")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT):
        return StorageError(
            f"{words}; something else has that name, or no folder can be made there: choose another one"
        )
    return StorageError(f"{words}; run the same command again")


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(target, error) from error


class Storage:
    """Keys below one root. Pickles as its URI, so it can travel to any worker."""

    def __init__(self, root: str) -> None:
        self.is_local = "://" not in root
        if root.startswith("s3:") and not re.match(r"s3://[^/]", root):
            raise StorageError(f"{root}: an object store is written s3://BUCKET/PREFIX")
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
        store = _objects()
        return store.filesystem(store.environment())

    def _errors(self, key: str = "") -> AbstractContextManager[None]:
        return cast(AbstractContextManager[None], _objects().store_errors(self.uri(key).rstrip("/")))

    def probe(self) -> None:
        """Raises StorageError, within seconds, when an object store cannot be used at all; says what to do."""
        if not self.is_local:
            _objects().probe(self.root)

    def _address(self, key: str) -> tuple[str, str]:
        """Bucket and key of a key below an `s3://` root."""
        bucket, _, path = self.uri(key).removeprefix("s3://").partition("/")
        return bucket, path.rstrip("/")

    def read(self, key: str) -> bytes:
        """All bytes of a key. Raises FileNotFoundError."""
        if self.is_local:
            return Path(self.uri(key)).read_bytes()
        with self._errors(key):
            return cast(bytes, _objects().read(self.fs, *self._address(key)))

    def open(self, key: str) -> BinaryIO:
        """A seekable reader. Raises FileNotFoundError."""
        if self.is_local:
            return Path(self.uri(key)).open("rb")
        with self._errors(key):
            return cast(BinaryIO, _objects().guarded(self.fs.open(self.uri(key), "rb"), self.uri(key)))

    def writer(self, key: str) -> BinaryIO:
        """A writer for scratch, published when it is closed; a block that fails leaves nothing on an object store."""
        if not self.is_local:
            with self._errors(key):
                return cast(BinaryIO, _objects().StoreWriter(self.fs.open(self.uri(key), "wb"), self.uri(key)))
        path = Path(self.uri(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")

    def write(self, key: str, data: bytes) -> None:
        """Replaces a key atomically: readers see the old bytes or the new ones."""
        if not self.is_local:
            with self._errors(key):
                self.fs.pipe_file(self.uri(key), data)
            return
        target = Path(self.uri(key))
        _make_parent(target)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise _cannot_write(target, error) from error

    def create(self, key: str, data: bytes) -> bool:
        """Writes a key only if it is absent, atomically; False when somebody was first, and not this very call."""
        if not self.is_local:
            with self._errors(key):
                return cast(bool, _objects().create(self.fs, *self._address(key), data))
        target = Path(self.uri(key))
        _make_parent(target)
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
            raise _cannot_write(target, error) from error
        finally:
            with contextlib.suppress(OSError):
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
        with self._errors(key):
            _objects().delete(self.fs, *self._address(key))

    def sweep_attempts(self, kind: str) -> None:
        """Removes what was written aside as `_attempts/<kind>-...`; whoever calls holds the lock of that kind."""
        names = self.names("_attempts")
        for name in names:
            if name.startswith(f"{kind}-"):
                self.delete(f"_attempts/{name}")
        if names and not self.names("_attempts"):
            self.delete("_attempts")

    def prune(self, key: str) -> None:
        """Removes a folder and those above it, up to the root, while they are empty; an object store has none."""
        parts = key.split("/") if self.is_local else []
        with contextlib.suppress(OSError):
            for n in range(len(parts), 0, -1):
                os.rmdir(self.uri("/".join(parts[:n])))

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
        return sorted(key for key, _ in self._listed(prefix))

    def _listed(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key below the root, bytes) of the objects below a prefix."""
        bucket, path = self._address(prefix)
        strip = len(self._address("")[1])
        strip += strip > 0
        with self._errors(prefix):
            for page in _objects().pages(self.fs, bucket, f"{path}/" if path else ""):
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):  # what some programs leave to make a prefix look like a folder
                        yield item["Key"][strip:], int(item["Size"])

    def usage(self, prefix: str) -> tuple[int, int]:
        """Number of files below a prefix and their bytes; for people."""
        if not self.is_local:
            sizes = [size for _, size in self._listed(prefix)]
            return len(sizes), sum(sizes)
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
        bucket, path = self._address(prefix)
        top = f"{path}/" if path else ""
        with self._errors(prefix):
            found: set[str] = set()
            for page in _objects().pages(self.fs, bucket, top, "/"):
                found |= {item["Prefix"][len(top) : -1] for item in page.get("CommonPrefixes", ())}
                found |= {item["Key"][len(top) :] for item in page.get("Contents", ())}
        return sorted(found - {""})

    def digest(self, key: str) -> tuple[str, int, str]:
        """(key, bytes, sha256) of one object, read in pieces. Raises FileNotFoundError."""
        if not self.is_local:
            with self._errors(key):
                return key, *_objects().digest(self.fs, *self._address(key), CHUNK)
        digest, size = hashlib.sha256(), 0
        with self.open(key) as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
                size += len(piece)
        return key, size, digest.hexdigest()

    def digests(self, keys: Iterable[str], absent: bool = False) -> list[tuple[str, int, str]]:
        """`digest` of each key, in order; objects are read several at a time.

        Raises FileNotFoundError, unless keys may be `absent`; those are left out then.
        """

        def one(key: str) -> tuple[str, int, str] | None:
            try:
                return self.digest(key)
            except FileNotFoundError:
                if absent:
                    return None
                raise

        if self.is_local:
            return [found for key in keys if (found := one(key)) is not None]
        with ThreadPoolExecutor(READERS) as pool:
            return [found for found in pool.map(one, keys) if found is not None]

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
        each is one rename; on S3 each object is copied by the server, and the attempt deleted afterwards. What the
        attempt no longer has is passed over: `intact` decides whether the final keys are right.
        """
        listed = list(files)
        if not self.is_local:
            self._copy(self, [(f"{attempt}/{key}", key, size) for key, size, _ in listed])
            return
        for unit in dict.fromkeys("/".join(key.split("/")[:2]) for key, _, _ in listed):
            source, target = Path(self.uri(f"{attempt}/{unit}")), Path(self.uri(unit))
            self._place(source, target)

    def _copy(self, other: Storage, moves: Iterable[tuple[str, str, int]]) -> None:
        """Copies (key there, key here, bytes) from another storage within the object store."""
        with self._errors():
            _objects().copy(
                self.fs, [("/".join(other._address(a)), "/".join(self._address(b)), size) for a, b, size in moves]
            )

    def _place(self, source: Path, target: Path) -> None:
        """Moves a file or folder to `target`, in place of what is there; of several callers one does it."""
        bench = Path(self.uri(f"_attempts/moving-{uuid.uuid4().hex[:8]}"))
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

    def exists(self, key: str) -> bool:
        """Whether a key is there. Never decides what is done."""
        if self.is_local:
            return Path(self.uri(key)).exists()
        try:
            self.stamp(key)
        except FileNotFoundError:
            return False
        return True

    def stamp(self, key: str) -> str:
        """Differs when the key was written anew. Raises FileNotFoundError."""
        if self.is_local:
            found = os.stat(self.uri(key))
            return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"
        bucket, path = self._address(key)
        with self._errors(key):
            return str(self.fs.call_s3("head_object", Bucket=bucket, Key=path)["ETag"])

    def adopt(self, other: Storage, files: Iterable[tuple[str, int, str]], attempt: str) -> None:
        """Brings files of another run below `attempt` here: hard links on one file system, else copies."""
        listed = list(files)
        if not self.is_local and not other.is_local:
            self._copy(other, [(key, f"{attempt}/{key}", size) for key, size, _ in listed])
            return
        for key, _, _ in listed:
            target = f"{attempt}/{key}"
            if self.is_local and other.is_local:
                path = Path(self.uri(target))
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(other.uri(key), path)
                except OSError:
                    shutil.copyfile(other.uri(key), path)
            else:
                self.write(target, other.read(key))

    def zarr(self, key: str, read_only: bool = False) -> Any:
        """A zarr store at `key`."""
        if self.is_local:
            return zarr.storage.LocalStore(self.uri(key), read_only=read_only)
        store = _objects()
        files = store.filesystem(store.environment(), asynchronous=True)
        return store.ZarrStore(files, path="/".join(self._address(key)), read_only=read_only)

    def abort_uploads(self, prefix: str = "") -> int:
        """Aborts multipart uploads below a prefix that a killed process, or a lost answer, has left; their number.

        They are no objects, and no listing of objects shows them, but they are stored and paid for. Whoever calls knows
        that nobody else is writing there.
        """
        if self.is_local:
            return 0
        with self._errors(prefix):
            bucket, path = self._address(prefix)
            return cast(int, _objects().abort(self.fs, bucket, f"{path}/" if path else ""))

    def pieces(self, key: str) -> Iterator[bytes]:
        """The bytes of a key in pieces, for copying large objects."""
        with self.open(key) as file:
            while piece := file.read(CHUNK):
                yield piece
