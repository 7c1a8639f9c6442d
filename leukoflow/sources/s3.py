"""Objects and prefixes under `s3://` as sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_S3_BLOCK = 4 << 20
_S3_PAGE = 1000


def s3_client() -> Any:
    """Import the module of the S3 client, slowly: local sources do without it."""
    from leukoflow.storage import s3_client as client

    return client


def filesystem() -> Any:
    """Return the file system of this process: never made before a fork, never with cached listings."""
    client = s3_client()
    return client.filesystem(client.environment())


def object_identity(info: dict[str, Any]) -> str:
    """Return size and ETag: an object of another content has another identity."""
    return f"{info['size']}-{str(info.get('ETag', '')).strip(chr(34))}"


def open_object(filesystem: Any, uri: str) -> Any:
    """Open a reader that fails when the object is replaced while it is read."""
    return s3_client().guarded(
        filesystem.open(uri, "rb", block_size=_S3_BLOCK, cache_type="readahead"), uri
    )  # fmt: skip


def list_versions(uri: str) -> Iterator[tuple[str, int, str]]:
    """Yield (key below the prefix, size, ETag) page by page, in the store's order.

    The client's own listing would keep all of it.
    """
    for key, item in list_objects(uri):
        yield key, int(item["Size"]), item["ETag"].strip('"')


def list_objects(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key below the prefix and what the store says of the object."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix + "/" if prefix else ""
    with s3_client().store_errors(uri):
        for page in s3_client().pages(filesystem(), bucket, prefix, size=_S3_PAGE):
            for item in page.get("Contents", ()):
                yield item["Key"][len(prefix) :], item
