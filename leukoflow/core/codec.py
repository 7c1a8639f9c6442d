"""Frozen dataclasses to JSON and back: markers, receipts and the manifest are these records, nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from leukoflow.core.errors import StorageError

T = TypeVar("T")


def dumps(record: object) -> bytes:
    """Encode a frozen dataclass as UTF-8 JSON, stable in key order, ending with a line feed."""
    return (json.dumps(asdict(record), ensure_ascii=False, sort_keys=True, indent=1) + "\n").encode()  # type: ignore[call-overload]


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Return what checks a kind of record; building it costs more than using it."""
    return TypeAdapter(kind)


def loads(kind: type[T], data: bytes, what: str) -> T:
    """Decode the record of `kind` in `data`. Raises StorageError naming `what` when the bytes are no such record."""
    try:
        found: T = _adapter(cast(Any, kind)).validate_json(data)
    except ValidationError as error:
        raise StorageError(
            f"{what} is damaged ({error.error_count()} fields do not fit); delete it and rerun"
        ) from None
    return found
