"""Names in zip archives: what their bytes mean.

Most zip archives do not say in which code page their names are. What is certain is decoded, what is not stays in the
text as the surrogate U+DC00 + byte, as PEP 383 has it, and no byte of a character is ever taken for a separator.
Layout: PKWARE APPNOTE 6.3.10, 4.4.4 (bit 11), 4.6.9 (field 0x7075) and appendix D.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

_UTF8 = 0x800  # bit 11
_UNICODE_PATH = 0x7075
_OEM_HOSTS = (0, 6, 10, 11, 14)  # MS-DOS, OS/2, NTFS (two numbers of it), VFAT: no file name there has a backslash
_DOUBLE_BYTE = ("cp932", "gbk", "big5", "cp949")
_HIGH = [bytes([byte]) for byte in range(128, 256)]
_EUROPEAN = frozenset(b[0] for b in _HIGH if b.decode("cp437") == b.decode("cp850") and b.decode("cp437").isalpha())
"""Letters that are the same in the code pages 437 and 850, so it does not matter which of them a program meant."""
_RUN = re.compile(rb"[\x80-\xff]+")
_CLEAR = re.compile(rb"(?<![\x80-\xff])\\")


class Separators(NamedTuple):
    """What the names of a whole archive say of how it separates folders."""

    slashes: bool = True  # some name has a `/`
    backslashes: bool = False  # some name has a `\\` that cannot be the second byte of a character

    def joined(self, raw: bytes) -> Separators:
        """Add what one more name says."""
        slashes = self.slashes or b"/" in raw
        clear = self.backslashes or (b"\\" in raw and _CLEAR.search(raw) is not None)
        return self if (slashes, clear) == self else Separators(slashes, clear)


def decode_name(raw: bytes, flags: int, extra: bytes, host: int, separators: Separators) -> str:
    """Decode the name of a zip member.

    Declared names (bit 11, or a Unicode path that belongs to these bytes) and UTF-8 are taken as they are. Of others
    each part of the path is decoded by itself, so that a folder has one name whatever lies in it.
    """
    if b"up" in extra and (declared := _unicode_path(raw, extra)) is not None:
        raw, flags = declared, flags | _UTF8
    backslashes = b"\\" in raw and b"/" not in raw and (host in _OEM_HOSTS or not separators.slashes)
    if flags & _UTF8 or _is_utf8(raw):
        return _text(raw.replace(b"\\", b"/") if backslashes else raw)
    by_backslash = separators.backslashes and not separators.slashes
    parts = _split(raw, by_backslash) if backslashes else raw.split(b"/")
    return "/".join(_part(part, host) for part in parts)


def _unicode_path(raw: bytes, extra: bytes) -> bytes | None:
    """Return the name that the field 0x7075 gives, if it was made for this name: the member may have been renamed."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        value = extra[at + 4 : at + 4 + length]
        if kind == _UNICODE_PATH and len(value) > 5 and value[0] == 1:
            good = int.from_bytes(value[1:5], "little") == zlib.crc32(raw) and _is_utf8(value[5:])
            return value[5:] if good else None
        at += 4 + length
    return None


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(raw: bytes, by_backslash: bool) -> list[bytes]:
    """Split at backslashes, but for those that are the second byte of a character.

    A high byte begins a character of two bytes; only in an archive that is known to separate `by_backslash`, one
    behind a Latin letter is a letter itself: `Café\\1.jpg`.
    """
    parts: list[bytes] = []
    begin, at, latin = 0, 0, False
    while at < len(raw):
        if raw[at] >= 0x81 and raw[at + 1 : at + 2] >= b"@" and not (latin and by_backslash):
            at, latin = at + 2, False
            continue
        if raw[at] == 0x5C:
            parts.append(raw[begin:at])
            begin = at + 1
        latin = raw[at : at + 1].isalpha()
        at += 1
    return [*parts, raw[begin:]]


def _part(raw: bytes, host: int) -> str:
    if host in _OEM_HOSTS and _is_european(raw):
        return raw.decode("cp437")
    if _is_utf8(raw):
        return raw.decode()
    return _text(raw).replace("\\", "\udc5c")  # the second byte of a character


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _is_european(raw: bytes) -> bool:
    """Tell whether this can only be a word of Latin letters: `Größe`, and not two bytes of a Japanese character."""
    runs = list(_RUN.finditer(raw))
    if not runs or b"\\" in raw:
        return False
    for run in runs:
        beside = raw[max(0, run.start() - 1) : run.start()], raw[run.end() : run.end() + 1]
        if len(run[0]) > 2 or not _EUROPEAN.issuperset(run[0]) or not any(b.isalpha() for b in beside):
            return False
    return not any(_reads_as(raw, encoding) for encoding in _DOUBLE_BYTE)


def _reads_as(raw: bytes, encoding: str) -> bool:
    """Tell whether a name makes sense in a code page of two bytes: no character stands within a Latin word."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return not any(
        ord(c) > 127 and text[max(0, i - 1) : i].isalpha() and text[max(0, i - 1) : i].isascii()
        and text[i + 1 : i + 2].isalpha() and text[i + 1 : i + 2].isascii()
        for i, c in enumerate(text)
    )  # fmt: skip
