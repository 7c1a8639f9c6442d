"""Words that several formats share, for what is cut off or odd."""

from __future__ import annotations

NO_LENGTHS = "odd but complete: the TIFF does not say how long its strips are"


def ends_early(data: bytes) -> str:
    """Return the reason of a file that is cut off."""
    return f"truncated: the image's data ends early ({len(data):,} bytes)"


def trailing(count: int) -> str:
    """Return the remark on bytes behind a picture that is complete."""
    return f"odd but complete: {count:,} bytes follow the picture's end"
