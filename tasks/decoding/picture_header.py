"""What a file says of itself: its kind, how its pixels are stored, and whether it shows a field at all.

Pure functions over bytes that nobody vouches for. They read headers only, never pixels, follow no offset out of the
file, and import nothing of an image library. What they do not understand they leave to the decoder.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

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


# ---------------------------------------------------------------- JPEG


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """What a JPEG's frame header says. `precision_at` is where in the file the byte with its bits a colour lies."""

    process: int  # the marker's second byte: C0 to CF, F7 of JPEG-LS
    precision: int
    precision_at: int


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """Read the frame header of a JPEG; None where there is none (ITU-T T.81, annex B)."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return JpegFrame(marker, data[at + 4], at + 4)
        elif marker == 0xDA:
            return None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def jpeg_refusal(frame: JpegFrame | None) -> str | None:
    """Say what kind of JPEG this is where it is one that is not decoded."""
    if frame is None:
        return None
    if frame.process == 0xF7:
        return f"not supported: a JPEG-LS picture; {EXPORT}"
    if frame.process in (0xC3, 0xC7, 0xCB, 0xCF):
        return f"not supported: a lossless JPEG, as DICOM files hold it; {EXPORT}"
    if frame.process in (0xC5, 0xC6, 0xCD, 0xCE):
        return f"not supported: a hierarchical JPEG; {EXPORT}"
    return None


# ---------------------------------------------------------------- JPEG 2000


def jpeg2000_precision(data: bytes) -> int:
    """Bits a colour of a JPEG 2000 picture, the most of all its components; 8 where it cannot be read."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 1 << 20)
    if at < 0 or len(data) < at + 42:
        return 8
    count = int.from_bytes(data[at + 40 : at + 42], "big")
    bits = [(value & 0x7F) + 1 for value in data[at + 42 : at + 42 + 3 * min(count, 16) : 3]]
    return max(bits, default=8)


def jpeg2000_profile(data: bytes) -> bytes | None:
    """Return the ICC profile of a JPEG 2000 file; None where it has none (ISO 15444-1, annex I)."""
    for kind, begin, end in _boxes(data, 0, len(data)):
        if kind == b"jp2h":
            for inner, start, stop in _boxes(data, begin, end):
                if inner == b"colr" and data[start : start + 1] == b"\2":
                    return data[start + 3 : stop]
        elif kind == b"jp2c":
            break
    return None


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while at + 8 <= end:
        length, begin = int.from_bytes(data[at : at + 4], "big"), at + 8
        if length == 1:
            length, begin = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        stop = end if length == 0 else at + length
        if stop < begin or stop > end:
            return
        yield data[at + 4 : at + 8], begin, stop
        at = stop


# ---------------------------------------------------------------- PNG

_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_TEXT_BYTES, _TEXTS_BYTES, PROFILE_BYTES = 1 << 20, 1 << 24, 1 << 24


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, begin and end of what each chunk of a PNG holds, as far as they are whole."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            return
        yield data[at + 4 : at + 8], at + 8, end
        at = end + 4


def png_depth(data: bytes) -> tuple[int, int | None]:
    """Bits a colour of a PNG as stored, and as its sBIT chunk states them (None where it states nothing less)."""
    stored, stated = 8, None
    for kind, begin, end in png_chunks(data):
        if kind == b"IHDR" and end - begin == 13:
            stored = data[begin + 8]
        elif kind == b"sBIT" and 1 <= end - begin <= 4:
            bits = max(data[begin : begin + 3] if end - begin >= 3 else data[begin : begin + 1])
            stated = bits if 0 < bits < stored else None
        elif kind == b"IDAT":
            break
    return stored, stated


def without_long_texts(data: bytes) -> bytes:
    """Return a PNG without the texts and the colour profile that are longer than a decoder would take.

    Nothing of its pixels is in them. A PNG without such chunks is returned as it is.
    """
    spare, texts = [], 0
    for kind, begin, end in png_chunks(data):
        if kind in _PNG_TEXTS:
            length = _inflated(data[begin:end], kind, _TEXT_BYTES)
            texts += length
            if length > _TEXT_BYTES or texts > _TEXTS_BYTES:
                spare.append((begin - 8, end + 4))
        elif kind == b"iCCP" and _inflated(data[begin:end], kind, PROFILE_BYTES) > PROFILE_BYTES:
            spare.append((begin - 8, end + 4))
    if not spare:
        return data
    parts, at = [], 0
    for begin, end in spare:
        parts.append(data[at:begin])
        at = end
    return b"".join([*parts, data[at:]])


def _inflated(chunk: bytes, kind: bytes, most: int) -> int:
    """Length of what a chunk of text or profile says, `most + 1` at most."""
    _, _, rest = chunk.partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return min(len(chunk), most + 1)
    packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2] if kind == b"iTXt" else rest[1:]
    try:
        return len(zlib.decompressobj().decompress(packed, most + 1))
    except zlib.error:
        return len(chunk)


# ---------------------------------------------------------------- TIFF

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_CODES = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 11: "f", 12: "d", 13: "L", 16: "Q", 17: "q", 18: "Q"}
_MOST_PAGES, _MOST_ENTRIES, _MOST_VALUES = 1024, 4096, 1 << 20
_RAW, _PROFILE_TAG, _SUB_IFDS = (32803, 34892), 34675, 330
_COMPRESSIONS = {
    1: "none", 2: "fax", 3: "fax", 4: "fax", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate",
    6: "old JPEG", 7: "JPEG", 22610: "JPEG XR", 33003: "JPEG 2000 of Aperio", 33004: "JPEG 2000", 33005: "JPEG 2000",
    33007: "JPEG", 34661: "JBIG", 34676: "SGI log", 34677: "SGI log", 34712: "JPEG 2000", 34715: "JBIG2", 34887: "LERC",
    34892: "JPEG", 34925: "LZMA", 34933: "PNG", 34934: "JPEG XR", 48124: "Jetraw", 50000: "Zstandard", 50001: "WebP",
    50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TiffPage:
    """What the directory of a page says (TIFF 6.0). `place` is its number in the chain, then among its sub-pages."""

    place: tuple[int, ...]
    width: int
    height: int
    bits: tuple[int, ...] = (1,)
    sample_format: int = 1
    samples: int = 1
    compression: int = 1
    photometric: int = 1
    planar: int = 1
    tiled: bool = False
    reduced: bool = False
    mask: bool = False
    orientation: int = 1
    stated_bits: int | None = None
    extra: tuple[int, ...] = ()
    description: str = ""
    software: str = ""
    tags: frozenset[int] = field(default=frozenset(), repr=False)
    profile: bytes = field(default=b"", repr=False)
    segments: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    segments_expected: int = 1
    without_lengths: bool = False
    strips_of_no_rows: bool = False

    def whole(self, length: int) -> bool:
        """Whether all parts of the picture lie within a file of `length` bytes."""
        if len(self.segments) < self.segments_expected or any(
            offset <= 0 or count <= 0 or offset + count > length for offset, count in self.segments
        ):
            return False
        row = -(-self.width * self.samples * max(self.bits) // 8)
        return self.compression != 1 or sum(count for _, count in self.segments) >= row * self.height

    def in_one_piece(self) -> bool:
        """Whether each part of the picture begins where the one before it ends."""
        return all(a + n == b for (a, n), (b, _) in pairwise(self.segments))


@dataclass(frozen=True, slots=True)
class Tiff:
    """A TIFF's pages, those of its sub-directories behind the page that has them."""

    big: bool
    order: str  # "<" or ">"
    pages: tuple[TiffPage, ...]


def read_tiff(data: bytes) -> Tiff | None:
    """Read the directories of a TIFF or BigTIFF; None where the first cannot be read."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    pages: list[TiffPage] = []
    try:
        big = struct.unpack_from(order + "H", data, 2)[0] == 43
        at = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)[0]
        seen: set[int] = set()
        while at and at not in seen and len(pages) < _MOST_PAGES:
            seen.add(at)
            tags, following = _directory(data, at, order, big)
            pages.append(_page(tags, (len(seen) - 1,)))
            for number, sub in enumerate(_whole_numbers(tags.get(_SUB_IFDS, ()))):
                if sub in seen or len(pages) >= _MOST_PAGES:
                    break
                seen_sub = _directory(data, sub, order, big)[0]
                pages.append(_page(seen_sub, (len(seen) - 1, number)))
            at = following
    except (struct.error, ValueError, OverflowError, IndexError):
        pass  # what came before may be whole; if it is not, the decoder says so
    return Tiff(big, order, tuple(pages)) if pages else None


def _directory(data: bytes, at: int, order: str, big: bool) -> tuple[dict[int, tuple[float | bytes, ...]], int]:
    head, entry_size, pointer, inline = ("Q", 20, "Q", 8) if big else ("H", 12, "L", 4)
    count = struct.unpack_from(order + head, data, at)[0]
    at += struct.calcsize(order + head)
    if count > _MOST_ENTRIES:
        raise ValueError("more entries than a directory has")
    tags: dict[int, tuple[float | bytes, ...]] = {}
    for number in range(count):
        begin = at + entry_size * number
        tag, kind, values = struct.unpack_from(order + "HH" + pointer, data, begin)
        size = _SIZES.get(kind, 0) * values
        place = begin + entry_size - inline
        if size > inline:
            place = struct.unpack_from(order + pointer, data, place)[0]
        if size and place + size <= len(data):
            if kind in (2, 7):
                tags[tag] = (data[place : place + min(size, 1 << 24)],)
            elif kind in _CODES and values <= _MOST_VALUES:
                tags[tag] = struct.unpack_from(f"{order}{values}{_CODES[kind]}", data, place)
    following = struct.unpack_from(order + pointer, data, at + entry_size * count)[0]
    return tags, following


def _page(tags: dict[int, tuple[float | bytes, ...]], place: tuple[int, ...]) -> TiffPage:
    def number(tag: int, default: int) -> int:
        return next(iter(_whole_numbers(tags.get(tag, ()))), default)

    def text(tag: int) -> str:
        value = tags.get(tag, (b"",))[0]
        return value.rstrip(b"\0").decode("utf-8", "replace") if isinstance(value, bytes) else ""

    samples = number(277, 1)
    bits = _whole_numbers(tags.get(258, (1,))) or (1,)
    width, height, planar = number(256, 0), number(257, 0), number(284, 1)
    tiled = 322 in tags
    if tiled:
        across, down = max(1, number(322, 1)), max(1, number(323, 1))
        expected = -(-width // across) * -(-height // down)
    else:
        across, down = width, max(1, min(number(278, height) or height, max(height, 1)))
        expected = -(-height // down)
    offsets, lengths = (_whole_numbers(tags.get(tag, ())) for tag in ((324, 325) if tiled else (273, 279)))
    without_lengths = number(259, 1) == 1 and not any(lengths)
    if without_lengths:
        row = -(-across * (1 if planar == 2 else samples) * max(bits) // 8)
        # The last strip has the rows that are left.
        lengths = tuple(
            row * (down if tiled else max(min(down, height - down * (i % expected)), 0)) if expected else 0
            for i in range(len(offsets))
        )
    profile = tags.get(_PROFILE_TAG, (b"",))[0]
    return TiffPage(
        place=place,
        width=width,
        height=height,
        bits=bits,
        sample_format=max(_whole_numbers(tags.get(339, (1,))) or (1,)),
        samples=samples,
        compression=number(259, 1),
        photometric=number(262, 1),
        planar=planar,
        tiled=tiled,
        reduced=bool(number(254, 0) & 1) or number(255, 1) == 2,
        mask=bool(number(254, 0) & 4),
        orientation=number(274, 1),
        stated_bits=_stated_bits(tags, max(bits), text(270)),
        extra=_whole_numbers(tags.get(338, ())),
        description=text(270),
        software=text(305),
        tags=frozenset(tags),
        profile=profile if isinstance(profile, bytes) else b"",
        segments=tuple(zip(offsets, lengths, strict=False)),
        segments_expected=expected * (samples if planar == 2 else 1),
        without_lengths=without_lengths,
        strips_of_no_rows=not tiled and number(278, height) == 0,
    )


def _whole_numbers(values: tuple[float | bytes, ...]) -> tuple[int, ...]:
    return tuple(
        int(value) for value in values if not isinstance(value, bytes) and value == value and abs(value) < 2**63
    )


def _stated_bits(tags: dict[int, tuple[float | bytes, ...]], stored: int, description: str) -> int | None:
    """Bits a colour that a page says it uses, where they are fewer than are stored.

    MaxSampleValue and SMaxSampleValue may be the highest value that happens to be there, so they count as the next
    power of two; OME-XML says it in so many words.
    """
    most = max((*_whole_numbers(tags.get(281, ())), *_whole_numbers(tags.get(341, ()))), default=0)
    bits = most.bit_length() if most > 0 else stored
    if (found := re.search(r'<Pixels\b[^>]*\bSignificantBits="(\d{1,2})"', description)) is not None:
        bits = int(found[1])
    return bits if 8 <= bits < stored else None


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
