"""How a record that the JSON API serves as it is says what programs read of it, without naming the web framework.

FastAPI reads the metadata of a dataclass's fields; nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

INTERNAL: Mapping[str, Any] = MappingProxyType({"exclude": True})
"""Metadata of a field that is no part of the JSON."""

ALWAYS_PRESENT = {"json_schema_serialization_defaults_required": True}
"""`__pydantic_config__` of a record that has defaults: its answers hold every field all the same."""


def described(description: str) -> Mapping[str, Any]:
    """Return the metadata of a field that the API's document describes so."""
    return {"description": description}
