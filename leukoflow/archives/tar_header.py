"""Headers of tar archives: what is one, and what its fields say (POSIX.1-2017 `pax`, GNU tar manual)."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK = 512
ZEROS = bytes(BLOCK)
_MAGIC_AT = 257  # of `ustar` in a header
_ASCII = bytes(range(128))


def is_header(block: bytes) -> bool:
    """Tell whether a 512-byte block is a tar header: its checksum holds (unsigned, or signed as old tars wrote it)."""
    if len(block) < BLOCK or block == ZEROS:
        return False
    stated = number_of(block[148:156])
    if not -(128 * BLOCK) < stated < 256 * BLOCK or stated == -1:
        return False
    others = block[:148] + b"        " + block[156:]
    unsigned = sum(others)
    return stated == unsigned or stated == unsigned - 256 * len(others.translate(None, _ASCII))


def header_within(blocks: bytes) -> int:
    """Find a header that begins within the first of two blocks, not with one of them; 0 where there is none."""
    at = blocks.find(b"ustar", _MAGIC_AT + 1)
    while 0 <= at < BLOCK + _MAGIC_AT:
        start = at - _MAGIC_AT
        if is_header(blocks[start : start + BLOCK]):
            return start
        at = blocks.find(b"ustar", at + 1)
    return 0


def number_of(field: bytes) -> int:
    """Read a number field: octal digits, or base 256 where the first bit is set; -1 where it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return -1


def name_of(header: bytes) -> bytes:
    """Read the name in a header, with the prefix that only POSIX headers have."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def padded_length(length: int) -> int:
    """Round a length up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the records "LENGTH KEY=VALUE\\n"; ends at the first that is none."""
    at = 0
    while at < len(data):
        digits, _, _ = data[at : at + 21].partition(b" ")
        if not digits.isdigit() or (length := int(digits)) <= len(digits) + 1:
            return
        key, equals, value = data[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not equals:
            return
        yield key, value
        at += length
