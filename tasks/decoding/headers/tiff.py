"""Directories of a TIFF or BigTIFF (TIFF 6.0): how the pixels of each page are stored, and where."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from itertools import pairwise

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_CODES = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 11: "f", 12: "d", 13: "L", 16: "Q", 17: "q", 18: "Q"}
_MOST_PAGES, _MOST_ENTRIES, _MOST_VALUES = 1024, 4096, 1 << 20
_PROFILE_TAG, _SUB_IFDS = 34675, 330
_RATIONAL = 5


@dataclass(frozen=True, slots=True)
class TiffPage:
    """What the directory of a page says (TIFF 6.0). `place` is its number in the chain, then among its sub-pages."""

    place: tuple[int, ...]
    width: int
    height: int
    bits: tuple[int, ...] = (1,)
    sample_format: int = 1
    samples: int = 1
    compression: int = 1
    photometric: int = 1
    planar: int = 1
    tiled: bool = False
    reduced: bool = False
    mask: bool = False
    orientation: int = 1
    stated_bits: int | None = None
    extra: tuple[int, ...] = ()
    description: str = ""
    software: str = ""
    x_resolution: float = 0.0
    tags: frozenset[int] = field(default=frozenset(), repr=False)
    profile: bytes = field(default=b"", repr=False)
    segments: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    segments_expected: int = 1
    without_lengths: bool = False
    strips_of_no_rows: bool = False

    def whole(self, length: int) -> bool:
        """Tell whether all parts of the picture lie within a file of `length` bytes."""
        if len(self.segments) < self.segments_expected or any(
            offset <= 0 or count <= 0 or offset + count > length for offset, count in self.segments
        ):
            return False
        row = -(-self.width * self.samples * max(self.bits) // 8)
        return self.compression != 1 or sum(count for _, count in self.segments) >= row * self.height

    def in_one_piece(self) -> bool:
        """Tell whether each part of the picture begins where the one before it ends."""
        return all(a + n == b for (a, n), (b, _) in pairwise(self.segments))


@dataclass(frozen=True, slots=True)
class Tiff:
    """A TIFF's pages, those of its sub-directories behind the page that has them."""

    big: bool
    order: str  # "<" or ">"
    pages: tuple[TiffPage, ...]


def read_tiff(data: bytes) -> Tiff | None:
    """Read the directories of a TIFF or BigTIFF; None where the first cannot be read."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    pages: list[TiffPage] = []
    try:
        big = struct.unpack_from(order + "H", data, 2)[0] == 43
        at = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)[0]
        seen: set[int] = set()
        while at and at not in seen and len(pages) < _MOST_PAGES:
            seen.add(at)
            tags, following = _directory(data, at, order, big)
            pages.append(_page(tags, (len(seen) - 1,)))
            for number, sub in enumerate(_whole_numbers(tags.get(_SUB_IFDS, ()))):
                if sub in seen or len(pages) >= _MOST_PAGES:
                    break
                seen_sub = _directory(data, sub, order, big)[0]
                pages.append(_page(seen_sub, (len(seen) - 1, number)))
            at = following
    except (struct.error, ValueError, OverflowError, IndexError):
        pass  # what came before may be whole; if it is not, the decoder says so
    return Tiff(big, order, tuple(pages)) if pages else None


def _directory(data: bytes, at: int, order: str, big: bool) -> tuple[dict[int, tuple[float | bytes, ...]], int]:
    """Read the tags of the directory at an offset, and the offset of the next one; 0 behind the last."""
    head, entry_size, pointer, inline = ("Q", 20, "Q", 8) if big else ("H", 12, "L", 4)
    count = struct.unpack_from(order + head, data, at)[0]
    at += struct.calcsize(order + head)
    if count > _MOST_ENTRIES:
        raise ValueError("more entries than a directory has")
    tags: dict[int, tuple[float | bytes, ...]] = {}
    for number in range(count):
        begin = at + entry_size * number
        tag, kind, values = struct.unpack_from(order + "HH" + pointer, data, begin)
        size = _SIZES.get(kind, 0) * values
        place = begin + entry_size - inline
        if size > inline:
            place = struct.unpack_from(order + pointer, data, place)[0]
        if size and place + size <= len(data):
            if kind in (2, 7):
                tags[tag] = (data[place : place + min(size, 1 << 24)],)
            elif kind == _RATIONAL and values == 1:
                above, below = struct.unpack_from(f"{order}2L", data, place)
                tags[tag] = (above / below if below else 0.0,)
            elif kind in _CODES and values <= _MOST_VALUES:
                tags[tag] = struct.unpack_from(f"{order}{values}{_CODES[kind]}", data, place)
    following = struct.unpack_from(order + pointer, data, at + entry_size * count)[0]
    return tags, following


def _page(tags: dict[int, tuple[float | bytes, ...]], place: tuple[int, ...]) -> TiffPage:
    """Make a page of the tags of its directory, with the defaults of TIFF 6.0."""

    def number(tag: int, default: int) -> int:
        return next(iter(_whole_numbers(tags.get(tag, ()))), default)

    def text(tag: int) -> str:
        value = tags.get(tag, (b"",))[0]
        return value.rstrip(b"\0").decode("utf-8", "replace") if isinstance(value, bytes) else ""

    samples = number(277, 1)
    bits = _whole_numbers(tags.get(258, (1,))) or (1,)
    width, height, planar = number(256, 0), number(257, 0), number(284, 1)
    tiled = 322 in tags
    if tiled:
        across, down = max(1, number(322, 1)), max(1, number(323, 1))
        expected = -(-width // across) * -(-height // down)
    else:
        across, down = width, max(1, min(number(278, height) or height, max(height, 1)))
        expected = -(-height // down)
    offsets, lengths = (_whole_numbers(tags.get(tag, ())) for tag in ((324, 325) if tiled else (273, 279)))
    without_lengths = number(259, 1) == 1 and not any(lengths)
    if without_lengths:
        row = -(-across * (1 if planar == 2 else samples) * max(bits) // 8)
        # The last strip has the rows that are left.
        lengths = tuple(
            row * (down if tiled else max(min(down, height - down * (i % expected)), 0)) if expected else 0
            for i in range(len(offsets))
        )
    profile = tags.get(_PROFILE_TAG, (b"",))[0]
    return TiffPage(
        place=place,
        width=width,
        height=height,
        bits=bits,
        sample_format=max(_whole_numbers(tags.get(339, (1,))) or (1,)),
        samples=samples,
        compression=number(259, 1),
        photometric=number(262, 1),
        planar=planar,
        tiled=tiled,
        reduced=bool(number(254, 0) & 1) or number(255, 1) == 2,
        mask=bool(number(254, 0) & 4),
        orientation=number(274, 1),
        stated_bits=_stated_bits(tags, max(bits), text(270)),
        extra=_whole_numbers(tags.get(338, ())),
        description=text(270),
        software=text(305),
        x_resolution=next((float(v) for v in tags.get(282, ()) if not isinstance(v, bytes)), 0.0),
        tags=frozenset(tags),
        profile=profile if isinstance(profile, bytes) else b"",
        segments=tuple(zip(offsets, lengths, strict=False)),
        segments_expected=expected * (samples if planar == 2 else 1),
        without_lengths=without_lengths,
        strips_of_no_rows=not tiled and number(278, height) == 0,
    )


def _whole_numbers(values: tuple[float | bytes, ...]) -> tuple[int, ...]:
    return tuple(
        int(value) for value in values if not isinstance(value, bytes) and value == value and abs(value) < 2**63
    )


def _stated_bits(tags: dict[int, tuple[float | bytes, ...]], stored: int, description: str) -> int | None:
    """Return the bits a colour that a page says it uses, where they are fewer than are stored.

    MaxSampleValue and SMaxSampleValue may be the highest value that happens to be there, so they count as the next
    power of two; OME-XML says it in so many words.
    """
    most = max((*_whole_numbers(tags.get(281, ())), *_whole_numbers(tags.get(341, ()))), default=0)
    bits = most.bit_length() if most > 0 else stored
    if (found := re.search(r'<Pixels\b[^>]*\bSignificantBits="(\d{1,2})"', description)) is not None:
        bits = int(found[1])
    return bits if 8 <= bits < stored else None
