"""Read the micrometres per pixel that an image file states, where the software that wrote it is known to mean them.

Plain resolution tags are not asked: most programs leave the resolution of screens or printers there.
"""

from __future__ import annotations

import math
import re

from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.tasks.decoding.headers.tiff import TiffPage, read_tiff

_APERIO = re.compile(r"\bMPP\s*=\s*([0-9.]+)")
_OME_SIZE = re.compile(r"<Pixels\b[^>]*\bPhysicalSizeX=\"([0-9.eE+-]+)\"")
_OME_UNIT = re.compile(r"<Pixels\b[^>]*\bPhysicalSizeXUnit=\"([^\"]*)\"")
_IMAGEJ_UNIT = re.compile(r"^unit=(.*)$", re.MULTILINE)
_MICROMETRES = {"micron": 1.0, "microns": 1.0, "um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "\\u00B5m": 1.0}


def stated_um_per_px(data: bytes) -> float | None:
    """Return the micrometres per pixel that a TIFF of Aperio, OME or ImageJ states; None for all else."""
    if data[:2] not in (b"II", b"MM") or (tiff := read_tiff(data)) is None:
        return None
    page = tiff.pages[0]
    found = _stated(page, page.description)
    return found if found is not None and MIN_UM_PER_PX <= found <= MAX_UM_PER_PX else None


def _stated(page: TiffPage, text: str) -> float | None:
    if (aperio := _APERIO.search(text)) is not None:
        return _number(aperio[1])
    if (size := _OME_SIZE.search(text)) is not None:
        unit = _OME_UNIT.search(text)
        factor = _MICROMETRES.get(unit[1] if unit else "um")  # OME's default is micrometres
        return _number(size[1], factor)
    if text.startswith("ImageJ") and (unit := _IMAGEJ_UNIT.search(text)) is not None:
        factor = _MICROMETRES.get(unit[1].strip())
        return factor / page.x_resolution if factor is not None and page.x_resolution > 0 else None
    return None


def _number(text: str, factor: float | None = 1.0) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value * factor if factor is not None and math.isfinite(value) else None
