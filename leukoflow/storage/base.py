"""The contract of a storage root: atomic writes, create-if-absent, publishing of attempts.

`LocalStorage` and `S3Storage` keep it, and one suite of tests holds both to it. Nothing here trusts a listing or an
existence check for what is done; that is what markers are for. Whatever goes wrong with an object store is a
StorageError in words; only a key that is absent is a FileNotFoundError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, ClassVar

CHUNK = 1 << 20
"""Bytes that are read at once from large files."""
READERS = 8
"""Objects that are read at the same time, where each is waited for."""

Stored = tuple[str, int, str]
"""A key, its bytes, and their sha256 as hex digits."""


class Storage(ABC):
    """Keys below one root; `open_storage` opens it.

    Keys are relative paths with `/`. Pickles as its root, so it can travel to any worker.
    """

    is_local: ClassVar[bool]
    """Whether `uri` gives a path of this machine."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __reduce__(self) -> tuple[Callable[[str], Storage], tuple[str]]:
        return type(self), (self.root,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"

    def uri(self, key: str) -> str:
        """Return path or URI of a key, for messages and readers."""
        return f"{self.root}/{key}"

    def child(self, key: str) -> Storage:
        """Return the storage below `key`."""
        return type(self)(self.uri(key))

    # --- one key ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Return all bytes of a key. Raises FileNotFoundError."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """Open a seekable reader. Raises FileNotFoundError."""

    @abstractmethod
    def writer(self, key: str) -> BinaryIO:
        """Open a writer for scratch, published when it is closed; a block that fails publishes nothing on S3."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Replace a key atomically: readers see the old bytes or the new ones."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write a key only if it is absent, atomically; False when another writer was first."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a key or everything below it; nothing happens when it is absent."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Tell whether a key is there. Never decides what is done."""

    @abstractmethod
    def stamp(self, key: str) -> str:
        """Return what differs when the key was written again. Raises FileNotFoundError."""

    @abstractmethod
    def digest(self, key: str) -> Stored:
        """Return (key, bytes, sha256) of one file, read in pieces. Raises FileNotFoundError."""

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yield the bytes of a key in pieces, for copying large files."""
        with self.open(key) as file:
            while piece := file.read(CHUNK):
                yield piece

    # --- many keys ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def files(self, prefix: str, hidden: bool = False) -> list[str]:
        """List keys below a prefix, sorted. For what this process wrote itself, and for people; never for what is done.

        Names that start with a dot are scratch on a local disk, and left out unless `hidden` asks for them.
        """

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """List names directly below a prefix, sorted; empty when there is none. For people and for progress."""

    @abstractmethod
    def usage(self, prefix: str) -> tuple[int, int]:
        """Return the number of files below a prefix and their bytes; for people."""

    @abstractmethod
    def _each(self, function: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[Any]:
        """Yield `function` of each thing in order, several at a time where answers are waited for."""

    def digests(self, keys: Iterable[str], absent: bool = False) -> list[Stored]:
        """Return `digest` of each key, in order.

        Raises FileNotFoundError, unless keys may be `absent`; those are left out then.
        """

        def one(key: str) -> Stored | None:
            try:
                return self.digest(key)
            except FileNotFoundError:
                if absent:
                    return None
                raise

        return [found for found in self._each(one, keys) if found is not None]

    def intact(self, files: Iterable[Stored]) -> bool:
        """Tell whether every (key, bytes, sha256) is there and unaltered."""

        def holds(file: Stored) -> bool:
            try:
                return self.digest(file[0]) == tuple(file)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return False

        return all(self._each(holds, files))

    # --- attempts -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def promote(self, attempt: str, files: Iterable[Stored]) -> None:
        """Move an attempt's files from below `attempt` to their final keys; repeating it after a crash is harmless.

        What the attempt no longer has is passed over: `intact` decides whether the final keys are right.
        """

    @abstractmethod
    def adopt(self, other: Storage, files: Iterable[Stored], attempt: str) -> None:
        """Bring files of another run below `attempt` here, without moving bytes where both lie in one place."""

    def sweep_attempts(self, kind: str) -> None:
        """Remove what was written aside as `_attempts/<kind>-...`; the caller holds the lock of that kind."""
        names = self.names("_attempts")
        for name in names:
            if name.startswith(f"{kind}-"):
                self.delete(f"_attempts/{name}")
        if names and not self.names("_attempts"):
            self.delete("_attempts")

    def _receive(self, other: Storage, files: Iterable[Stored], attempt: str) -> None:
        """Bring files here through this process."""
        for key, _, _ in files:
            self.write(f"{attempt}/{key}", other.read(key))

    # --- what only one kind of storage has ----------------------------------------------------------------------------

    @abstractmethod
    def zarr(self, key: str, read_only: bool = False) -> Any:
        """Return a zarr store at `key`."""

    @abstractmethod
    def probe(self) -> None:
        """Raise StorageError, within seconds, when an object store cannot be used at all; say what to do."""

    @abstractmethod
    def prune(self, key: str) -> None:
        """Remove a folder and those above it, up to the root, while they are empty; an object store has none."""

    @abstractmethod
    def abort_uploads(self, prefix: str = "") -> int:
        """Abort multipart uploads below a prefix that a killed process, or a lost answer, left; return their number.

        They are no objects, and no listing of objects shows them, but they are stored and paid for. The caller knows
        that nobody else is writing there. A local disk has none.
        """
