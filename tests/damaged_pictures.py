"""Pictures of every kind that is checked for damage, and ways to damage them."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from leukoflow.core.method import SegmentSettings
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.decoding.decode import Field, decode_image
from leukoflow.tasks.decoding.errors import RefusedError
from leukoflow.tasks.imaging.synthetic import render_field, slide_style

SETTINGS = SegmentSettings()

WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "jpeg": ("JPEG", {"quality": 92}),
    "optimised": ("JPEG", {"quality": 92, "optimize": True}),
    "progressive": ("JPEG", {"quality": 92, "progressive": True}),
    "restarts": ("JPEG", {"quality": 92, "restart_marker_rows": 2}),
    "grey jpeg": ("JPEG", {"quality": 92}),
    "cmyk jpeg": ("JPEG", {"quality": 92}),
    "png": ("PNG", {}),
    "palette": ("PNG", {}),
    "black and white": ("PNG", {}),
    "tiff": ("TIFF", {}),
    "lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "packbits": ("TIFF", {"compression": "packbits"}),
    "jpeg in tiff": ("TIFF", {"compression": "jpeg"}),
    "bmp": ("BMP", {}),
    "grey bmp": ("BMP", {}),
}


@cache
def drawn(seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    style = slide_style(rng)
    # Red cells as they were drawn when it was measured what damage is seen: another picture is other bytes.
    same = np.random.default_rng(seed)
    same.normal(0, 1, 3), same.uniform(0, 1, 1 + 3 * 3)
    style = replace(style, red_cells=int(same.integers(45, 120)), red_radius=same.uniform(7.6, 9.2))
    return render_field(rng, CLASSES[seed % 4], style=style).rgb


@cache
def stored(way: str, seed: int = 0) -> bytes:
    image = Image.fromarray(drawn(seed))
    if "grey" in way:
        image = image.convert("L")
    elif "cmyk" in way:
        image = image.convert("CMYK")
    elif way == "palette":
        image = image.quantize(64)
    elif way == "black and white":
        image = image.convert("1")
    form, options = WAYS[way]
    sink = io.BytesIO()
    image.save(sink, form, **options)  # type: ignore[arg-type]
    return sink.getvalue()


def decode(data: bytes) -> Field:
    return decode_image(data, None, SETTINGS, 10**8, 32)


def refused(data: bytes) -> str:
    with pytest.raises(RefusedError) as refusal:
        decode(data)
    return str(refusal.value)


def caught(data: bytes) -> bool:
    try:
        decode(data)
    except RefusedError:
        return True
    return False


def zeroed(data: bytes, size: int, at: int) -> bytes:
    return data[: at * size] + bytes(len(data[at * size : (at + 1) * size])) + data[(at + 1) * size :]


def chunk(kind: bytes, data: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data) ^ wrong)


def with_chunk(data: bytes, added: bytes) -> bytes:
    """Behind the header of a PNG."""
    return data[:33] + added + data[33:]


def tagged(data: bytes, tag: int, **changed: int) -> bytes:
    """Change the name, count or value of an entry in a little-endian TIFF's first directory."""
    out = bytearray(data)
    at = struct.unpack_from("<L", data, 4)[0]
    for place in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        if struct.unpack_from("<H", data, place)[0] == tag:
            for key, value in changed.items():
                form, offset = {"name": ("<H", 0), "count": ("<L", 4), "value": ("<L", 8)}[key]
                struct.pack_into(form, out, place + offset, value)
            return bytes(out)
    raise AssertionError(f"no tag {tag}")


def tiff(values: NDArray[np.uint8] | NDArray[np.uint16], **options: object) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, values, metadata=None, photometric="rgb", **options)  # type: ignore[arg-type]
    return sink.getvalue()
