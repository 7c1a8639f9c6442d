"""A prefix of a bucket as a storage root. Importing this takes a second, so it is done where an address needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, cast

from leukoflow.storage import s3_client, s3_errors
from leukoflow.storage.base import CHUNK, READERS, Storage, Stored


class S3Storage(Storage):
    """Keys are objects below a prefix. Retries, short answers and errors are dealt with by `s3_client`."""

    is_local = False

    def __init__(self, root: str) -> None:
        super().__init__(root.rstrip("/"))

    @property
    def fs(self) -> s3_client.ObjectStore:
        """The s3fs file system of this process."""
        return s3_client.filesystem(s3_client.environment())

    def _errors(self, key: str = "") -> AbstractContextManager[None]:
        return s3_errors.store_errors(self.uri(key).rstrip("/"))

    def _address(self, key: str) -> tuple[str, str]:
        """Return bucket and key."""
        bucket, _, path = self.uri(key).removeprefix("s3://").partition("/")
        return bucket, path.rstrip("/")

    def _below(self, prefix: str) -> tuple[str, str]:
        """Return bucket and prefix of what lies below a key."""
        bucket, path = self._address(prefix)
        return bucket, f"{path}/" if path else ""

    def read(self, key: str) -> bytes:
        """Return all bytes of an object."""
        with self._errors(key):
            return s3_client.read(self.fs, *self._address(key))

    def open(self, key: str) -> BinaryIO:
        """Open an object for reading."""
        with self._errors(key):
            return cast(BinaryIO, s3_client.guarded(self.fs.open(self.uri(key), "rb"), self.uri(key)))

    def writer(self, key: str) -> BinaryIO:
        """Open an object for writing, published when it is closed; a block that fails leaves nothing behind."""
        with self._errors(key):
            return cast(BinaryIO, s3_client.StoreWriter(self.fs.open(self.uri(key), "wb"), self.uri(key)))

    def write(self, key: str, data: bytes) -> None:
        """Replace an object."""
        with self._errors(key):
            self.fs.pipe_file(self.uri(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object only if there is none; False when another writer was first, and not this very call."""
        with self._errors(key):
            return s3_client.create(self.fs, *self._address(key), data)

    def delete(self, key: str) -> None:
        """Remove an object and everything below it."""
        with self._errors(key):
            s3_client.delete(self.fs, *self._address(key))

    def exists(self, key: str) -> bool:
        """Tell whether an object is there."""
        try:
            self.stamp(key)
        except FileNotFoundError:
            return False
        return True

    def stamp(self, key: str) -> str:
        """Return the ETag."""
        bucket, path = self._address(key)
        with self._errors(key):
            return str(self.fs.call_s3("head_object", Bucket=bucket, Key=path)["ETag"])

    def digest(self, key: str) -> Stored:
        """Return (key, bytes, sha256), read in pieces."""
        with self._errors(key):
            return key, *s3_client.digest(self.fs, *self._address(key), CHUNK)

    def files(self, prefix: str, hidden: bool = False) -> list[str]:
        """List keys below a prefix, sorted; an object store has no hidden scratch."""
        return sorted(key for key, _ in self._listed(prefix))

    def _listed(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield (key below the root, bytes) of the objects below a prefix."""
        strip = len(self._below("")[1])
        with self._errors(prefix):
            for page in s3_client.pages(self.fs, *self._below(prefix)):
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):  # what some programs leave to make a prefix look like a folder
                        yield item["Key"][strip:], int(item["Size"])

    def names(self, prefix: str) -> list[str]:
        """List names directly below a prefix, sorted."""
        bucket, top = self._below(prefix)
        with self._errors(prefix):
            found: set[str] = set()
            for page in s3_client.pages(self.fs, bucket, top, "/"):
                found |= {item["Prefix"][len(top) : -1] for item in page.get("CommonPrefixes", ())}
                found |= {item["Key"][len(top) :] for item in page.get("Contents", ())}
        return sorted(found - {""})

    def usage(self, prefix: str) -> tuple[int, int]:
        """Return the number of objects below a prefix and their bytes."""
        sizes = [size for _, size in self._listed(prefix)]
        return len(sizes), sum(sizes)

    def _each(self, function: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[Any]:
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(function, things)

    def promote(self, attempt: str, files: Iterable[Stored]) -> None:
        """Have each object copied by the store to its final key; the attempt is deleted afterwards, by the caller."""
        self._copy(self, [(f"{attempt}/{key}", key, size) for key, size, _ in files])

    def adopt(self, other: Storage, files: Iterable[Stored], attempt: str) -> None:
        """Bring files of another run below `attempt` here: copied by the store where both lie in it."""
        if not isinstance(other, S3Storage):
            self._receive(other, files, attempt)
            return
        self._copy(other, [(key, f"{attempt}/{key}", size) for key, size, _ in files])

    def _copy(self, other: S3Storage, moves: Iterable[tuple[str, str, int]]) -> None:
        """Copy (key there, key here, bytes) within the object store."""
        with self._errors():
            s3_client.copy(
                self.fs, [("/".join(other._address(a)), "/".join(self._address(b)), size) for a, b, size in moves]
            )

    def zarr(self, key: str, read_only: bool = False) -> Any:
        """Return a zarr store whose errors come in words, and never as a chunk that seems absent."""
        from leukoflow.storage.s3_zarr import ZarrStore

        files = s3_client.filesystem(s3_client.environment(), asynchronous=True)
        return ZarrStore(files, path="/".join(self._address(key)), read_only=read_only)

    def probe(self) -> None:
        """Raise StorageError, within seconds, when the store cannot be used at all; say what to do."""
        s3_client.probe(self.root)

    def prune(self, key: str) -> None:
        """Do nothing: an object store has no folders."""

    def abort_uploads(self, prefix: str = "") -> int:
        """Abort multipart uploads below a prefix and return how many there were."""
        with self._errors(prefix):
            return s3_client.abort(self.fs, *self._below(prefix))
