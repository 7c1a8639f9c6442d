"""Names as people and spreadsheets write them: what of their spelling carries no meaning, and how lines are quoted."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))
LINES_SHOWN = 10


def tidied(text: str) -> str:
    """Return a value without blanks around it or invisible characters, composed (NFC); blanks inside are plain."""
    if text.isascii():
        return text.strip()
    return unicodedata.normalize("NFC", text.translate(_INVISIBLE)).replace("\u00a0", " ").strip()


def spelled(key: str) -> str:
    """Return a path as any system would write it: `/` between its parts, no `./` in front, and each part tidied."""
    if "\\" in key or not key.isascii() or " " in key or "./" in key or "//" in key:
        parts = (tidied(part) for part in key.replace("\\", "/").split("/"))
        key = "/".join(part for part in parts if part not in ("", "."))
    return key.strip().strip("/")


def folded(key: str) -> str:
    """Return a path as `spelled` does, the same for upper and lower case."""
    return spelled(key).casefold()


def counted(unit: str, numbers: Sequence[int]) -> str:
    """Say where something is: `line 3`, `lines 2, 3`, `lines 2, 3, ... and 40 more`."""
    shown = ", ".join(f"{number:,}" for number in numbers[:LINES_SHOWN])
    more = f" and {len(numbers) - LINES_SHOWN:,} more" if len(numbers) > LINES_SHOWN else ""
    return f"{unit}{'s' if len(numbers) != 1 else ''} {shown}{more}"
