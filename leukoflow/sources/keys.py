"""Keys: the text by which an image of a source is known, whatever the bytes of its name are.

A key is data, never a path: an archive may hold `/etc/x.jpg` or `../x.jpg`, and keeps it as its key.
"""

from __future__ import annotations

import re

_NO_TEXT = re.compile("[\udc00-\udcff]")


def image_key(name: bytes | str) -> str:
    r"""Return the `image_key` of a name inside a source: UTF-8, with every byte that is none as `%XX`.

    In a name that is text already, such bytes are the surrogates U+DC00 + byte, as `archives.zip_names` leaves them.

    >>> image_key(b"caf\xe9/1.jpg")
    'caf%E9/1.jpg'
    """
    text = name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
    return text if text.isascii() else _NO_TEXT.sub(lambda match: f"%{ord(match[0]) - 0xDC00:02X}", text)


def locator_of(path: bytes) -> str:
    """Return reversible text for a path of any bytes; unlike a key it also escapes the percent sign."""
    return image_key(path.replace(b"%", b"%25"))


class UniqueKeys:
    """Gives a repeated name the smallest unused suffix `#2`, `#3` ... in order of appearance."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._last: dict[str, int] = {}

    def add(self, name: str) -> str:
        """Return the key for one more appearance of `name`."""
        if name not in self._used:
            self._used.add(name)
            return name
        number = self._last.get(name, 1) + 1
        while (key := f"{name}#{number}") in self._used:
            number += 1
        self._last[name] = number
        self._used.add(key)
        return key
