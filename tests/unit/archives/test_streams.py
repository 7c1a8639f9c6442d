"""Compressed data as one stream."""

from __future__ import annotations

import gzip
import io

from made_up_archives import COMPRESSORS, TAR, noise

from leukoflow.archives.streams import CompressedStream


def test_gzip_headers_with_all_that_they_may_hold() -> None:
    body = gzip.compress(TAR)[10:]
    head = b"\x1f\x8b\x08\x1e" + bytes(6) + b"\x03\x00abc" + b"name\0" + b"comment\0" + b"\0\0"
    assert CompressedStream(io.BytesIO(head + body), "gz").read(1 << 20) == TAR


def test_compressed_frames_in_a_row_are_one_stream() -> None:
    whole = noise(1, 200_000) + bytes(200_000)
    for compress in COMPRESSORS.values():
        name = next(n for n, c in COMPRESSORS.items() if c is compress)
        packed = compress(whole[:150_000]) + compress(whole[150_000:])
        stream = CompressedStream(io.BytesIO(packed), name)
        assert stream.read(1000) == whole[:1000]
        assert stream.skip(200_000) == 200_000
        assert stream.read(10**6) == whole[201_000:]
        assert stream.damage is None
