"""Micrometres per pixel that image files state: only where their software means them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from leukoflow.tasks.decoding.headers.pixel_size import stated_um_per_px

PIXELS = np.zeros((24, 24, 3), np.uint8)


def tiff(**options: object) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, PIXELS, photometric="rgb", **options)  # type: ignore[arg-type]
    return sink.getvalue()


def ome(attributes: str) -> bytes:
    text = f'<?xml version="1.0"?><OME><Image><Pixels ID="0" {attributes} SizeX="24"/></Image></OME>'
    return tiff(description=text.encode(), metadata=None)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(description="Aperio Image Library v11\n|AppMag = 40|MPP = 0.2520|Left = 1", metadata=None), 0.252),
        (ome('PhysicalSizeX="0.19" PhysicalSizeXUnit="µm"'), 0.19),
        (ome('PhysicalSizeX="0.19"'), 0.19),  # micrometres unless said otherwise
        (tiff(imagej=True, resolution=(5.0, 5.0), metadata={"unit": "um"}), 0.2),
        (tiff(imagej=True, resolution=(5.0, 5.0), metadata={"unit": "micron"}), 0.2),
    ],
)
def test_software_that_means_it(data: bytes, expected: float) -> None:
    assert stated_um_per_px(data) == pytest.approx(expected)


@pytest.mark.parametrize(
    "data",
    [
        tiff(resolution=(300, 300), resolutionunit="INCH"),
        ome('PhysicalSizeX="0.19" PhysicalSizeXUnit="pixel"'),
        ome('PhysicalSizeX="ten"'),
        ome('PhysicalSizeX="4200"'),  # nobody sees cells at that
        tiff(imagej=True, resolution=(5.0, 5.0), metadata={"unit": "inch"}),
        tiff(description="MPP = .", metadata=None),
        b"II*\0\xff\xff\xff\xff",
        b"\x89PNG nothing",
        b"",
    ],
)
def test_nothing_else_counts(data: bytes) -> None:
    assert stated_um_per_px(data) is None


def test_resolution_tags_of_other_pictures_are_not_asked() -> None:
    for name, options in (("JPEG", {"dpi": (300, 300)}), ("PNG", {"dpi": (60000, 60000)})):
        sink = io.BytesIO()
        Image.fromarray(PIXELS).save(sink, name, **options)
        assert stated_um_per_px(sink.getvalue()) is None
