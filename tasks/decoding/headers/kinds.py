"""Kinds of files by their first bytes: which are read, and what the others are."""

from __future__ import annotations

import re

EXPORT = "export it as JPEG, PNG or TIFF"
SLIDES = "slides are not read yet: export its fields as JPEG, PNG or TIFF"

JPEG2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_READ = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", *JPEG2000)

_PICTURES = (
    (b"GIF8", "a GIF picture"),
    (b"8BPS", "a Photoshop document"),
    (b"II\xbc", "a JPEG XR picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    (b"\0\0\1\0", "an icon"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Imaris writes it"),
    (b"SIMPLE  =", "a FITS picture"),
    (b"v/1\x01", "an OpenEXR picture"),
    (b"\xda\xce\xbe\n", "an ND2 picture of Nikon"),
    (b"OLYMPUSRAWFORMAT", "an OIR picture of Olympus"),
    (b"FUJIFILMCCD-RAW", "a camera's raw picture"),
    (b"IIRO", "a camera's raw picture"),
    (b"IIRS", "a camera's raw picture"),
    (b"IIU\0", "a camera's raw picture"),
    (b"MMOR", "a camera's raw picture"),
    (b"FOVb", "a camera's raw picture"),
    (b"\0MRM", "a camera's raw picture"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a compound file, as ZVI, OIB and old Office documents are"),
    (b"\x1aE\xdf\xa3", "a video"),
)
_SLIDES = (
    (b"ZISRAWFILE", "a CZI file of Zeiss"),
    (b"ZISRAW", "a CZI file of Zeiss"),
)
_NO_PICTURES = (
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"SQLite format 3\0", "a database"),
)
_BRANDS = (
    (b"avi", "an AVIF picture"),
    (b"hei", "an HEIC picture"),
    (b"hev", "an HEIC picture"),
    (b"mif1", "an HEIF picture"),
    (b"msf1", "an HEIF picture"),
    (b"crx ", "a camera's raw picture"),
)
_RIFF = ((b"WEBP", "a WebP picture"), (b"AVI ", "a video"))


def refusal_of(data: bytes) -> str | None:
    """Say what the bytes are where no decoder is to be asked: with what to do, in words for people; else None."""
    if not data:
        return "empty: 0 bytes"
    if data[:2] in (b"II", b"MM") and data[8:10] == b"CR":  # CR2: a TIFF whose first page is a preview
        return f"not supported: a camera's raw picture; {EXPORT}"
    if data.startswith(_READ):
        return None
    for magic, name in _NO_PICTURES:
        if data.startswith(magic):
            return f"not an image that is read: {name}; JPEG, PNG, TIFF and BMP are"
    if (slide := _slide_name(data)) is not None:
        return f"not supported: {slide}; {SLIDES}"
    if (picture := _picture_name(data)) is not None:
        return f"not supported: {picture}; {EXPORT}"
    if not data.strip(b"\0"):
        return f"damaged: {len(data):,} bytes, all zero"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in data[:1024]):
        return "not an image: text"
    return "not an image: its first bytes are those of no JPEG, PNG, TIFF or BMP"


def _slide_name(data: bytes) -> str | None:
    if b"DPUfsImport" in data[:4096]:
        return "an iSyntax slide of Philips"
    return next((name for magic, name in _SLIDES if data.startswith(magic)), None)


def _picture_name(data: bytes) -> str | None:
    if data[128:132] == b"DICM" or data.startswith((b"\x08\0\x05\0", b"\x08\0\0\0\x04\0\0\0", b"\x02\0\0\0UL")):
        return "a DICOM file"
    if data[4:8] == b"ftyp":
        return next((name for brand, name in _BRANDS if data[8:12].startswith(brand)), "a video")
    if data[:4] == b"RIFF":
        return next((name for kind, name in _RIFF if data[8:12] == kind), None)
    if data[:4] == b"p\0\0\0" and data[8:9] == b"*":
        return "an LIF file of Leica"
    if re.match(rb"P[1-7]\s", data):
        return "a PNM picture"
    if re.match(
        rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*|<!DOCTYPE svg[^>]*>\s*)*<svg\b", data[:2048], re.S
    ):
        return "an SVG drawing"
    return next((name for magic, name in _PICTURES if data.startswith(magic)), None)
