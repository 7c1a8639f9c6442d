"""Which page of a TIFF shows the field, and which TIFFs are slides, camera pictures or of an unsupported kind."""

from __future__ import annotations

import re

from leukoflow.tasks.decoding.headers.kinds import EXPORT, SLIDES
from leukoflow.tasks.decoding.headers.tiff import Tiff, TiffPage

_RAW = (32803, 34892)
_COMPRESSIONS = {
    1: "none", 2: "fax", 3: "fax", 4: "fax", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate",
    6: "old JPEG", 7: "JPEG", 22610: "JPEG XR", 33003: "JPEG 2000 of Aperio", 33004: "JPEG 2000", 33005: "JPEG 2000",
    33007: "JPEG", 34661: "JBIG", 34676: "SGI log", 34677: "SGI log", 34712: "JPEG 2000", 34715: "JBIG2", 34887: "LERC",
    34892: "JPEG", 34925: "LZMA", 34933: "PNG", 34934: "JPEG XR", 48124: "Jetraw", 50000: "Zstandard", 50001: "WebP",
    50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_LABEL = re.compile(r"^\W*(label|macro)([\s_]+image)?(\s+\d+\s*x\s*\d+)?\W*$", re.IGNORECASE | re.MULTILINE)
_VENDORS = (
    ("an Aperio slide (SVS)", re.compile(r"\AAperio")),
    ("a Leica slide (SCN)", re.compile(r"leica-microsystems\.com/scn")),
    ("a Philips slide", re.compile(r"DPUfsImport")),
)
_MAKERS = (("Philips DP", "a Philips slide"), ("MedScan", "a Trestle slide"))
_NDPI_TAG, _DNG_TAG = 65420, 50706


def tiff_choice(tiff: Tiff) -> tuple[TiffPage, str | None]:
    """Choose the page of a TIFF that shows the field; with a remark where there was a choice.

    That is the first page at full size: previews and masks are none. Raises ValueError, in words for people, where the
    file is a slide, a camera's raw picture, or has nothing but a preview or the label of a slide.
    """
    first = tiff.pages[0]
    if _DNG_TAG in first.tags or any(page.photometric in _RAW for page in tiff.pages):
        raise ValueError(f"not supported: a camera's raw picture (DNG or its like); {EXPORT}")
    if (vendor := _slide(tiff)) is not None:
        raise ValueError(f"not supported: {vendor}; {SLIDES}")
    full = [page for page in tiff.pages if not page.reduced and not page.mask and not _LABEL.search(page.description)]
    if not full:
        if any(_LABEL.search(page.description) for page in tiff.pages):
            raise ValueError("not a field: the label or an overview of a slide; hand over its fields")
        raise ValueError("not a field: a reduced copy (preview) of a picture; hand over the picture itself")
    chosen, count = full[0], len(tiff.pages)
    if count == 1:
        return chosen, None
    if len(full) == 1:
        return chosen, f"page {_number(chosen, tiff)} of {count}, the only one at full size"
    return (
        chosen,
        f"first of {count} pages"
        if chosen is first
        else f"page {_number(chosen, tiff)} of {count}, the first at full size",
    )


def _number(page: TiffPage, tiff: Tiff) -> int:
    return tiff.pages.index(page) + 1


def _slide(tiff: Tiff) -> str | None:
    first = tiff.pages[0]
    if _NDPI_TAG in first.tags:
        return "a Hamamatsu slide (NDPI)"
    if len(tiff.pages) == 1:
        return None  # a field that was cut out of a slide; a label is recognised as such
    for start, name in _MAKERS:
        if first.software.startswith(start):
            return name
    for name, mark in _VENDORS:
        if mark.search(first.description):
            return name
    if any(_LABEL.search(page.description) for page in tiff.pages):
        return "a slide with its label or overview"
    return None


def tiff_refusal(page: TiffPage) -> str | None:
    """Say why the pixels of a page are not supported, with what to do; None where they may be."""
    if page.sample_format == 2:
        return "signed values are not supported: save it with unsigned values of 8 or 16 bits"
    if page.sample_format == 3:
        return "floating-point pixels are not supported: save it with 8 or 16 bits"
    if page.sample_format in (5, 6):
        return "complex values are not supported: save it with 8 or 16 bits"
    if max(page.bits) > 32 or (max(page.bits) > 16 and page.samples > 1):
        return f"pixels of {max(page.bits)} bits are not supported: save it with 8 or 16 bits"
    if len(set(page.bits)) > 1:
        return "colours of unequal depth are not supported: save it with 8 or 16 bits a colour"
    if page.photometric in (8, 9, 10):
        return "CIELAB colours are not supported: save it in RGB"
    if page.photometric in (32844, 32845):
        return "logarithmic luminance is not supported: save it in RGB with 8 or 16 bits"
    if page.photometric in (0, 1) and page.samples > 2:
        return f"{page.samples} channels without colours are not supported: save it in RGB"
    return None


def describe(page: TiffPage) -> str:
    """Say how a page's pixels are stored, for a person who has to save it otherwise."""
    return (
        f"a TIFF of {page.samples} x {max(page.bits)} bits, photometric {page.photometric}, compression "
        f"{compression_name(page)}"
    )


def compression_name(page: TiffPage) -> str:
    """Name the compression of a page."""
    return _COMPRESSIONS.get(page.compression, f"number {page.compression}")
