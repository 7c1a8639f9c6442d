"""Numbers of things as people write them."""

from __future__ import annotations


def count_of(number: int, noun: str) -> str:
    """Say how many there are of something whose plural ends with an s.

    >>> count_of(1, "image"), count_of(1200, "image")
    ('1 image', '1,200 images')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
