"""The records that zip archives are made of (PKWARE APPNOTE 6.3.10): their layout, and what their fields mean."""

from __future__ import annotations

import stat
import struct
from typing import BinaryIO

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64, LOCATOR64, DESCRIPTOR = b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
CENTRAL_HEADER = struct.Struct("<4s2B5H3L5H2L")
END_RECORD = struct.Struct("<4s4H2LH")
END64_RECORD = struct.Struct("<4sQ2H2L4Q")
LOCATOR64_RECORD = struct.Struct("<4sLQL")
FOLLOWERS = (LOCAL, CENTRAL, END64, END)
DESCRIPTOR32, DESCRIPTOR64 = struct.Struct("<4s3L"), struct.Struct("<4sL2Q")
FULL32 = 0xFFFFFFFF
CHUNK = 1 << 20
ENCRYPTED = 0x2041  # bits 0 (traditional), 6 (strong) and 13 (masked header)
HAS_DESCRIPTOR = 0x8
_METHODS = {0: "stored", 8: "deflate", 12: "bzip2", 14: "LZMA", 93: "zstd"}
_UNSUPPORTED = {1: "shrink", 6: "implode", 9: "Deflate64", 20: "zstd (old)", 95: "xz", 98: "PPMd", 99: "AES"}


def refusal_of(flags: int, method: int, unix_mode: int) -> str | None:
    """Say why a member of these flags, method and mode is not read, with what to do; None where it is."""
    if flags & ENCRYPTED or method == 99:
        return "encrypted: hand it over without a password"
    if unix_mode and stat.S_IFMT(unix_mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        link = stat.S_ISLNK(unix_mode)
        return "symbolic link: links are not followed" if link else "special file: not a regular file"
    if method not in _METHODS:
        name = f" ({_UNSUPPORTED[method]})" if method in _UNSUPPORTED else ""
        return f"compression method {method}{name} is not supported: repack it with deflate"
    return None


def wide_numbers(extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
    """Return size, stored size and offset, those that were full taken from the zip64 field of `extra`."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            wide = iter(int.from_bytes(extra[i : i + 8], "little") for i in range(at, at + length - 7, 8))
            size = next(wide, size) if size == FULL32 else size
            stored = next(wide, stored) if stored == FULL32 else stored
            offset = next(wide, offset) if offset == FULL32 else offset
            break
        at += length
    return size, stored, offset


def descriptor_length(file: BinaryIO, position: int, stored: int) -> int:
    """Measure the data descriptor at `position`: with or without signature, with sizes of four or eight bytes."""
    file.seek(position)
    block = file.read(28)
    signed = 4 if block[:4] == DESCRIPTOR else 0
    if not signed and block[:4] in FOLLOWERS:
        return 0
    fitting = []
    for width in (8, 4):
        length = signed + 4 + 2 * width
        if int.from_bytes(block[signed + 4 : signed + 4 + width], "little") == stored:
            if block[length : length + 4] in FOLLOWERS:  # of an empty member the short form reads as the long one, too
                return length
            fitting.append(length)
    if fitting and stored:
        return fitting[0]
    return signed + 12 if signed else 0
