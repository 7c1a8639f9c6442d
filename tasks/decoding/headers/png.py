"""Chunks of a PNG: how deep its colours are, and what beside the picture is longer than a decoder takes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_TEXT_BYTES, _TEXTS_BYTES, PROFILE_BYTES = 1 << 20, 1 << 24, 1 << 24


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, begin and end of what each chunk of a PNG holds, as far as they are whole."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            return
        yield data[at + 4 : at + 8], at + 8, end
        at = end + 4


def png_depth(data: bytes) -> tuple[int, int | None]:
    """Return the bits a colour of a PNG as stored, and as its sBIT chunk states them (None unless they are fewer)."""
    stored, stated = 8, None
    for kind, begin, end in png_chunks(data):
        if kind == b"IHDR" and end - begin == 13:
            stored = data[begin + 8]
        elif kind == b"sBIT" and 1 <= end - begin <= 4:
            bits = max(data[begin : begin + 3] if end - begin >= 3 else data[begin : begin + 1])
            stated = bits if 0 < bits < stored else None
        elif kind == b"IDAT":
            break
    return stored, stated


def without_long_texts(data: bytes) -> bytes:
    """Return a PNG without the texts and the colour profile that are longer than a decoder would take.

    Nothing of its pixels is in them. A PNG without such chunks is returned as it is.
    """
    spare, texts = [], 0
    for kind, begin, end in png_chunks(data):
        if kind in _PNG_TEXTS:
            length = _inflated(data[begin:end], kind, _TEXT_BYTES)
            texts += length
            if length > _TEXT_BYTES or texts > _TEXTS_BYTES:
                spare.append((begin - 8, end + 4))
        elif kind == b"iCCP" and _inflated(data[begin:end], kind, PROFILE_BYTES) > PROFILE_BYTES:
            spare.append((begin - 8, end + 4))
    if not spare:
        return data
    parts, at = [], 0
    for begin, end in spare:
        parts.append(data[at:begin])
        at = end
    return b"".join([*parts, data[at:]])


def _inflated(chunk: bytes, kind: bytes, most: int) -> int:
    """Measure what a chunk of text or profile says, `most + 1` at most."""
    _, _, rest = chunk.partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return min(len(chunk), most + 1)
    packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2] if kind == b"iTXt" else rest[1:]
    try:
        return len(zlib.decompressobj().decompress(packed, most + 1))
    except zlib.error:
        return len(chunk)
