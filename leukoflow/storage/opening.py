"""From an address to its storage."""

from __future__ import annotations

import re

from leukoflow.core.errors import StorageError
from leukoflow.storage.base import Storage
from leukoflow.storage.local import LocalStorage


def open_storage(root: str) -> Storage:
    """Return the storage of a local folder or an `s3://` prefix; nothing is read or made yet.

    Raises:
        StorageError: the address is of neither kind.
    """
    if root.startswith("s3:") and not re.match(r"s3://[^/]", root):
        raise StorageError(f"{root}: an object store is written s3://BUCKET/PREFIX")
    if "://" not in root:
        return LocalStorage(root)
    if not root.startswith("s3://"):
        raise StorageError(f"{root}: only local folders and s3:// prefixes are supported")
    from leukoflow.storage.s3 import S3Storage

    return S3Storage(root)
