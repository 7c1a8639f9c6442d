"""A binary file whose read failures come as our own errors, so that they are not mistaken for damage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self, cast


class GuardedReader:
    """Reads like the file that it wraps; `guard` makes the context that every read is done in."""

    def __init__(self, file: Any, guard: Callable[[], AbstractContextManager[None]]) -> None:
        self._file = file
        self._guard = guard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, count: int = -1) -> bytes:
        """Read up to `count` bytes; fewer only at the end."""
        with self._guard():
            return cast(bytes, self._file.read(count))

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, as from any binary file."""
        view = memoryview(buffer).cast("B")
        data = self.read(view.nbytes)
        view[: len(data)] = data
        return len(data)
