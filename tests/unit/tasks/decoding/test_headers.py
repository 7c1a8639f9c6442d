"""What headers say: kinds that are not read are named, pages are distinguished from previews, slides and labels."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import tifffile

from leukoflow.tasks.decoding.headers.jpeg import jpeg_frame
from leukoflow.tasks.decoding.headers.kinds import refusal_of
from leukoflow.tasks.decoding.headers.png import png_depth, without_long_texts
from leukoflow.tasks.decoding.headers.tiff import read_tiff
from leukoflow.tasks.decoding.headers.tiff_pages import tiff_choice


def boxed(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + bytes(400)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (boxed(b"heic"), "an HEIC picture"),
        (boxed(b"heix"), "an HEIC picture"),
        (boxed(b"mif1"), "an HEIF picture"),
        (boxed(b"avif"), "an AVIF picture"),
        (boxed(b"crx "), "a camera's raw picture"),
        (boxed(b"isom"), "a video"),
        (bytes(128) + b"DICM" + bytes(300), "a DICOM file"),
        (b"\x08\0\x05\0\x0a\0\0\0ISO_IR 100" + bytes(300), "a DICOM file"),
        (b"GIF89a" + bytes(90), "a GIF picture"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(90), "a WebP picture"),
        (b"8BPS\0\1" + bytes(90), "a Photoshop document"),
        (b"\xff\x0a" + bytes(range(90)), "a JPEG XL picture"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90), "a JPEG XL picture"),
        (b"II\xbc\1" + bytes(90), "a JPEG XR picture"),
        (b"%PDF-1.7" + bytes(90), "a PDF document"),
        (b"FUJIFILMCCD-RAW " + bytes(90), "a camera's raw picture"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(90), "a camera's raw picture"),
        (b"IIU\0\x08" + bytes(90), "a camera's raw picture"),
        (b"p\0\0\0\x20\0\0\0*" + bytes(90), "an LIF file of Leica"),
        (b"\xda\xce\xbe\n" + bytes(90), "an ND2 picture of Nikon"),
        (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file, as Imaris writes it"),
        (b"P5 64 64 255\n" + bytes(90), "a PNM picture"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'></svg>", "an SVG drawing"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(90), "a compound file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_pictures_are_named_with_what_to_do(data: bytes, name: str) -> None:
    words = refusal_of(data) or ""
    assert words.startswith(f"not supported: {name}")
    assert words.endswith("; export it as JPEG, PNG or TIFF")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"ZISRAWFILE" + bytes(90), "a CZI file of Zeiss"),
        (b'<DataObject ObjectType="DPUfsImport">', "an iSyntax slide of Philips"),
    ],
)
def test_slides_are_named(data: bytes, name: str) -> None:
    expected = f"not supported: {name}; slides are not read yet: export its fields as JPEG, PNG or TIFF"
    assert refusal_of(data) == expected


def test_what_is_read_is_not_refused_by_its_first_bytes() -> None:
    for magic in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0+", b"BM", b"\xff\x4f\xff\x51"):
        assert refusal_of(magic + bytes(90)) is None


# ---------------------------------------------------------------- JPEG and PNG


def test_a_jpegs_frame_is_found_behind_a_thumbnail_with_a_frame_of_its_own() -> None:
    thumbnail = b"\xff\xd8\xff\xc0\0\x0b\x08\0\x10\0\x10\1\1\x11\0\xff\xd9"
    data = b"\xff\xd8\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    data += b"\xff\xff\xc1\0\x0b\x0c\0\x40\0\x40\1\1\x11\0" + bytes(20)
    frame = jpeg_frame(data)
    assert frame is not None
    assert (frame.process, frame.precision, data[frame.precision_at]) == (0xC1, 12, 12)
    assert jpeg_frame(b"\xff\xd8\xff\xda\0\x08" + bytes(20)) is None
    assert jpeg_frame(b"\xff\xd8\xff") is None


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png(*chunks: bytes, bits: int = 16) -> bytes:
    head = chunk(b"IHDR", struct.pack(">2L5B", 64, 64, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


def test_a_pngs_depth() -> None:
    assert png_depth(png()) == (16, None)
    assert png_depth(png(chunk(b"sBIT", bytes([12, 10, 12])))) == (16, 12)
    assert png_depth(png(chunk(b"sBIT", bytes([12, 16])))) == (16, 12)  # grey with transparency
    assert png_depth(png(chunk(b"sBIT", bytes([16] * 3)))) == (16, None)
    assert png_depth(png(bits=8)) == (8, None)


def test_long_texts_and_profiles_are_cut_out_of_a_png_and_short_ones_stay() -> None:
    short = chunk(b"tEXt", b"Software\0scope") + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 1000))
    assert without_long_texts(png(short)) == png(short)
    long = zlib.compress(bytes(2 << 20))
    for spare in (
        chunk(b"tEXt", b"a\0" + bytes(2 << 20)),
        chunk(b"zTXt", b"a\0\0" + long),
        chunk(b"iTXt", b"a\0\1\0\0\0" + long),
        chunk(b"iTXt", b"a\0\0\0\0\0" + bytes(2 << 20)),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(17 << 20))),
    ):
        assert without_long_texts(png(short, spare)) == png(short)
    many = [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 40
    assert without_long_texts(png(*many)) == png(*many[:16])
    assert without_long_texts(png(short)[:50]) == png(short)[:50]


# ---------------------------------------------------------------- TIFF


FIELD = np.full((64, 64, 3), 200, np.uint8)


def tiff(*pages: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **options) as writer:
        for page in pages:
            writer.write(page.pop("image", FIELD), photometric="rgb", metadata=None, **page)
    return buffer.getvalue()


def choice(data: bytes) -> tuple[tuple[int, ...], str | None]:
    found = read_tiff(data)
    assert found is not None
    page, remark = tiff_choice(found)
    return page.place, remark


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}, {"bigtiff": True, "byteorder": ">"}])
def test_directories_of_every_kind_are_read_as_tifffile_reads_them(options: dict[str, Any]) -> None:
    data = tiff({"rowsperstrip": 10, "compression": "zlib", "description": "a field"}, {"subfiletype": 1}, **options)
    found = read_tiff(data)
    assert found is not None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert (found.order, found.big, len(found.pages)) == (file.byteorder, file.is_bigtiff, 2)
        for ours, theirs in zip(found.pages, file.pages, strict=True):
            assert (ours.height, ours.width, ours.samples) == theirs.shape
            assert ours.bits == (8, 8, 8)
            assert ours.compression == theirs.compression
            assert ours.reduced == theirs.is_reduced
            assert ours.description == theirs.description
            assert ours.segments == tuple(zip(theirs.dataoffsets, theirs.databytecounts, strict=True))
            assert ours.whole(len(data))
    assert not found.pages[0].whole(found.pages[0].segments[-1][0])


def test_the_page_at_full_size_is_used_and_previews_are_not() -> None:
    assert choice(tiff({})) == ((0,), None)
    assert choice(tiff({}, {})) == ((0,), "first of 2 pages")
    assert choice(tiff({}, {"subfiletype": 1})) == ((0,), "page 1 of 2, the only one at full size")
    assert choice(tiff({"subfiletype": 1}, {})) == ((1,), "page 2 of 2, the only one at full size")
    assert choice(tiff({"subfiletype": 1}, {}, {})) == ((1,), "page 2 of 3, the first at full size")
    behind = tiff({"subfiletype": 1, "subifds": 1}, {"subfiletype": 0})
    assert choice(behind) == ((0, 0), "page 2 of 2, the only one at full size")
    pyramid = tiff({"subifds": 2}, {"subfiletype": 1}, {"subfiletype": 1})
    assert choice(pyramid) == ((0,), "page 1 of 3, the only one at full size")


DNG = (50706, "B", 4, (1, 4, 0, 0), True)


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        ([{"subfiletype": 1}], "not a field: a reduced copy (preview)"),
        ([{"description": "Aperio Image Library v11\nlabel 387x463", "subfiletype": 1}], "not a field: the label"),
        ([{"description": "Label_Image"}], "not a field: the label"),
        ([{"description": "Macro image"}], "not a field: the label"),
        ([{"subfiletype": 1, "extratags": [DNG]}], "not supported: a camera's raw picture (DNG or its like)"),
        (
            [{"description": "Aperio Image Library", "tile": (32, 32)}, {}],
            "not supported: an Aperio slide (SVS); slides",
        ),
        ([{"extratags": [(65420, "I", 1, 1, True)]}], "not supported: a Hamamatsu slide (NDPI); slides"),
        ([{"description": "<scn xmlns='http://www.leica-microsystems.com/scn/2010/10/01'>"}, {}], "a Leica slide"),
        ([{"software": "Philips DP v1.0"}, {}], "not supported: a Philips slide"),
        ([{"tile": (32, 32)}, {"description": "label 40x40"}], "not supported: a slide with its label or overview"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_field_is_refused(pages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=r"^not ") as error:
        choice(tiff(*(dict(page) for page in pages)))
    assert words in str(error.value)


def test_a_field_that_was_cut_out_of_a_slide_is_a_field() -> None:
    assert choice(tiff({"description": "Aperio Image Library v11\n46000x32914 [42,55 2220x2967]"})) == ((0,), None)
    assert choice(tiff({"description": "the labels are on the back"})) == ((0,), None)


def test_a_raw_picture_is_recognised_behind_its_preview() -> None:
    raw = {"image": np.zeros((64, 64), np.uint16), "subfiletype": 0}
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(FIELD, photometric="rgb", subfiletype=1, subifds=1, metadata=None)
        writer.write(raw["image"], photometric="cfa", subfiletype=0, metadata=None)
    with pytest.raises(ValueError, match="a camera's raw picture"):
        choice(buffer.getvalue())


def test_stated_depth() -> None:
    def stated(*tags: tuple[Any, ...], **options: Any) -> int | None:
        wide = {"image": FIELD.astype(np.uint16), "extratags": list(tags), **options}
        found = read_tiff(tiff(wide))
        assert found is not None
        return found.pages[0].stated_bits

    assert stated() is None
    assert stated((281, "H", 3, (4095,) * 3, True)) == 12
    assert stated((281, "H", 3, (3871,) * 3, True)) == 12  # the highest value there, not the highest possible
    assert stated((341, "H", 3, (16383,) * 3, True)) == 14
    assert stated((281, "H", 3, (65535,) * 3, True)) is None
    assert stated(description='<OME><Pixels ID="a" SignificantBits="12" Type="uint16"/></OME>') == 12


def test_a_hostile_directory_ends_the_reading() -> None:
    assert read_tiff(b"II*\0") is None
    assert read_tiff(b"II*\0\xff\xff\xff\xff") is None
    loop = bytearray(tiff({}))
    at = struct.unpack_from("<L", loop, 4)[0]
    entries = struct.unpack_from("<H", loop, at)[0]
    struct.pack_into("<L", loop, at + 2 + 12 * entries, at)  # the next directory is this one
    found = read_tiff(bytes(loop))
    assert found is not None
    assert len(found.pages) == 1
    generator = np.random.default_rng(5)
    pristine = np.frombuffer(tiff({"subifds": 1}, {"subfiletype": 1}), np.uint8)
    for _ in range(300):
        damaged = pristine.copy()
        damaged[generator.integers(0, 400, 4)] = generator.integers(0, 256, 4)
        found = read_tiff(damaged.tobytes())
        if found is not None:
            assert all(isinstance(page.whole(len(damaged)), bool) for page in found.pages)
