"""A zarr store on S3 whose errors are StorageError in words."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from zarr.storage import FsspecStore

from leukoflow.storage.s3_errors import store_errors


class ZarrStore(FsspecStore):
    """A zarr store whose errors come as StorageError, and never as a chunk that seems absent."""

    def __init__(self, fs: Any, read_only: bool = False, path: str = "/", allowed_exceptions: Any = ()) -> None:
        super().__init__(fs, read_only, path, allowed_exceptions=())  # a bucket that is gone is no absent chunk

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Get a value, as from any Zarr store."""
        try:
            with store_errors(self._uri(key)):
                return await super().get(key, prototype, byte_range)
        except FileNotFoundError:
            return None

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
        """Get parts of values, as from any Zarr store."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def set(self, key: str, value: Any, byte_range: Any = None) -> None:
        """Set a value, as in any Zarr store."""
        with store_errors(self._uri(key)):
            await super().set(key, value, byte_range)

    async def delete(self, key: str) -> None:
        """Delete a value, as in any Zarr store."""
        with store_errors(self._uri(key)):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """Delete a prefix, as in any Zarr store; nothing happens where nothing is."""
        with suppress(FileNotFoundError), store_errors(self._uri(prefix)):
            await super().delete_dir(prefix)

    async def exists(self, key: str) -> bool:
        """Tell whether a key exists, as in any Zarr store."""
        with store_errors(self._uri(key)):
            return await super().exists(key)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List a prefix, as in any Zarr store."""
        with store_errors(self._uri(prefix)):
            async for name in super().list_dir(prefix):
                yield name

    def _uri(self, key: str) -> str:
        return f"s3://{self.path}/{key}".rstrip("/")
