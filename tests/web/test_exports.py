"""Exports of a field: what is printed of names in other alphabets."""

from __future__ import annotations

import re

from leukoflow.apps.web.drawing.export_pdf import export_pdf
from leukoflow.apps.web.words import Subject


def letters_of(pdf: bytes) -> set[str]:
    """The letters that a PDF's fonts map to text."""
    codes = [
        code
        for part in pdf.split(b"begincmap")[1:]
        for code in re.findall(rb"> <([0-9A-F]{4})>", part.split(b"endcmap")[0])
    ]
    return {chr(int(c, 16)) for c in codes}


def test_names_in_other_alphabets_are_printed_in_reports() -> None:
    subject = Subject(
        "Žofie Łukasz Жанна Nguyễn – µm 日本", "rejected", "empty: 0 < 1", None, (), (), None, 64, 64, None, 0, (), (),
        "pocket", "ab" * 32, None, facts=(("File", "1\u202f234 bytes"),),
    )  # fmt: skip
    printed = letters_of(export_pdf(subject, None, (), "anna"))
    assert set("ŽŁЖễ–µ") <= printed
    assert "日" not in printed
    assert "?" in printed  # in its place
