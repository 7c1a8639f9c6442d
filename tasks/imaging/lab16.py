"""Convert between sRGB and Lab in 16 bits, 256 steps per unit of OpenCV's 8-bit Lab.

There L is 0..255, a and b are offset by 128. Rounding to 8 bits before the contrast is stretched would show. In cube
roots of X, Y and Z both Lab and Reinhard's transfer are affine, so a field crosses to Lab and back with tables and
matrix products, in strips, never as floats.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError

STRIP_PX = 2**18  # an image is converted in strips of about so many pixels

LAB_STEPS = 256.0  # per unit of 8-bit Lab
ROOT_STEPS = 40000.0  # per unit of a cube root; roots stay below 1.6
LINEAR_STEPS = 65535.0
BACK_STEPS = 30000.0  # per unit of X, Y, Z on the way back, where they may reach 2.1


def check_rgb(rgb: NDArray[np.uint8]) -> None:
    """Raise LeukoflowError unless the array is an RGB image, uint8 [H, W, 3], with pixels in it."""
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or 0 in rgb.shape:
        raise LeukoflowError(f"expected an RGB image uint8 [H, W, 3], got {rgb.dtype} {rgb.shape}: convert it first")


def to_lab(rgb: NDArray[np.uint8]) -> cv2.typing.MatLike:
    """Convert sRGB, uint8 [H, W, 3], to Lab (CIE 1976, D65), uint16 [H, W, 3] in `LAB_STEPS`."""
    xyz = cv2.transform(cv2.LUT(rgb, _EXPAND), _RGB_TO_XYZ)
    return cv2.transform(cv2.LUT(xyz, _ROOT), _ROOTS_TO_LAB)


def from_lab(lab: cv2.typing.MatLike, out: NDArray[np.uint8]) -> None:
    """Convert Lab, uint16 [H, W, 3] in `LAB_STEPS`, to sRGB in `out`, uint8 [H, W, 3], clipped to its gamut."""
    roots = cv2.transform(lab, _LAB_TO_ROOTS)
    linear = cv2.transform(cv2.LUT(roots, _CUBE), _XYZ_TO_RGB)
    cv2.LUT(linear, _COMPRESS, dst=out)


def read_lightness(lab: cv2.typing.MatLike, out: NDArray[np.uint8]) -> None:
    """Round the lightness of Lab, uint16 [H, W, 3], to 8 bits into `out`, uint8 [H, W]."""
    cv2.LUT(cv2.extractChannel(lab, 0), _TO_8_BITS, dst=out)


def write_lightness(lightness: NDArray[np.uint8], lab: cv2.typing.MatLike) -> None:
    """Replace the lightness of Lab, uint16 [H, W, 3], in place by one of 8 bits, uint8 [H, W]."""
    cv2.insertChannel(cv2.LUT(lightness, _FROM_8_BITS), lab, 0)


def strips(rgb: NDArray[np.uint8]) -> list[slice]:
    """Cut an image into strips of whole rows, about `STRIP_PX` pixels each."""
    rows = max(1, STRIP_PX // rgb.shape[1])
    return [slice(start, start + rows) for start in range(0, rgb.shape[0], rows)]


def _tables() -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint8]]:
    """Tabulate sRGB to linear [256]; XYZ to cube root, the root back, linear to sRGB [65536]; with CIE's toes."""
    v = np.arange(256) / 255
    expand = np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
    u = np.arange(65536.0)
    t = u / LINEAR_STEPS
    root = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    f = u / ROOT_STEPS
    cube = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2)
    compress = np.where(t > 0.0031308, 1.055 * t ** (1 / 2.4) - 0.055, t * 12.92)

    def words(values: NDArray[np.float64], steps: float) -> NDArray[np.uint16]:
        return np.rint(values * steps).clip(0, 65535).astype(np.uint16)

    return (
        words(expand, LINEAR_STEPS),
        words(root, ROOT_STEPS),
        words(cube, BACK_STEPS),
        np.rint(compress * 255).astype(np.uint8),
    )


_EXPAND, _ROOT, _CUBE, _COMPRESS = _tables()
_TO_8_BITS = np.minimum(np.rint(np.arange(65536) / LAB_STEPS), 255).astype(np.uint8)
_FROM_8_BITS = (np.arange(256) * int(LAB_STEPS)).astype(np.uint16)
_PRIMARIES = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_RGB_TO_XYZ = _PRIMARIES / _PRIMARIES.sum(axis=1, keepdims=True)  # relative to the white point
_XYZ_TO_RGB = np.linalg.inv(_RGB_TO_XYZ) * (LINEAR_STEPS / BACK_STEPS)
_LAB_OF_ROOTS = np.array([[0.0, 116 * 2.55, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
_LAB_OFFSET = np.array([-16 * 2.55, 128.0, 128.0])
_ROOTS_TO_LAB = np.column_stack([_LAB_OF_ROOTS * (LAB_STEPS / ROOT_STEPS), _LAB_OFFSET * LAB_STEPS])
_LAB_TO_ROOTS = np.column_stack(
    [
        np.linalg.inv(_LAB_OF_ROOTS) * (ROOT_STEPS / LAB_STEPS),
        -np.linalg.inv(_LAB_OF_ROOTS) @ _LAB_OFFSET * ROOT_STEPS,
    ]
)
