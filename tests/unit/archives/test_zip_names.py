"""Names in zip archives: what is certain is decoded, what is not stays in the text byte by byte."""

from __future__ import annotations

import pytest

from leukoflow.archives.zip_names import Separators, decode_name

FAT, UNIX = 0, 3


@pytest.mark.parametrize(
    ("raw", "host", "name"),
    [
        ("Größe/骨.jpg".encode(), UNIX, "Größe/骨.jpg"),
        ("Größe/a.jpg".encode("cp437"), FAT, "Größe/a.jpg"),
        (b"M\x81ller.jpg", UNIX, "M\udc81ller.jpg"),
        ("表.jpg".encode("cp932"), FAT, "\udc95\udc5c.jpg"),
        (b"a\\b.jpg", FAT, "a/b.jpg"),
        (b"a\\b.jpg", UNIX, "a\\b.jpg"),
    ],
)
def test_bytes_that_are_no_text_are_surrogates(raw: bytes, host: int, name: str) -> None:
    assert decode_name(raw, 0, b"", host, Separators()) == name
