"""Which code computes: one digest of the package, so that a worker with other code is seen before it computes."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import leukoflow


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return the digest (16 hex digits) of the package's Python files as this process imports them.

    In a checkout some of its folders are links, in an installation none is: both give the same digest.
    """
    digest = hashlib.sha256()
    root = Path(leukoflow.__file__).parent
    files = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    for path in sorted(path for path in files if path.suffix == ".py"):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
