"""Smooth pictures, encoded in any format, and decoded in this process."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leukoflow.core.method import SegmentSettings
from leukoflow.tasks.decoding.decode import decode_image

SETTINGS = SegmentSettings()


def picture(width: int = 224, height: int = 224, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth, so that JPEG keeps it nearly; no symmetry, so that a rotation shows."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (7, 7, 3), np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def jpeg(seed: int = 0, **options: object) -> bytes:
    return encoded(Image.fromarray(picture(seed=seed)), "JPEG", quality=95, **options)


def decode(data: bytes, um_per_px: float | None = None, pixels: int = 120_000_000) -> NDArray[np.uint8]:
    return decode_image(data, um_per_px, SETTINGS, pixels, 32).rgb


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    body = chunk(b"IHDR", struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(bytes(10**6))
    )
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
