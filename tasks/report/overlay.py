"""The drawing of a field: its pixels, the outlines of its cells, and the activation maps of those that weigh most."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from leukoflow.tasks.imaging.cytoplasm import ratio_words
from leukoflow.tasks.report.palette import AGAINST, FOR, attention_colour

BOXED = 3
"""Cells of a field that are boxed and may show their activation maps: those of highest attention."""


@dataclass(frozen=True, slots=True)
class Heat:
    """A cell's activation map of the field's label, times the cell's attention: what each position adds to the logit.

    `values` float64 [g, g] covers a square window of the mask, `side` pixels wide, with its corner at `x`, `y`.
    """

    x: float
    y: float
    side: int
    values: NDArray[np.float64]


def heaviest_cells(cells: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells of highest attention, the first one first."""
    return sorted(cells.values(), key=lambda c: (-c["attention"], c["cell_id"]))[:BOXED]


def draw_field(
    photo: NDArray[np.uint8] | None,
    labels: NDArray[np.uint16],
    cells: Mapping[int, dict[str, Any]],
    heats: Sequence[Heat] = (),
) -> Markup:
    """Return an SVG: the field, each cell's outline in the colour of its attention, and boxes at the heaviest three.

    `photo` uint8 [H, W, 3] in RGB, or None where the mask is to be shown alone; `labels` uint16 [H, W]; `cells` by
    their id. Activation maps lie between photo and outlines, hidden until the page's switch shows them.
    """
    height, width = labels.shape
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" preserveAspectRatio="xMidYMid meet">']
    if photo is not None:
        ok, data = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
        assert ok
        encoded = base64.b64encode(data.tobytes()).decode()
        parts.append(f'<image width="{width}" height="{height}" href="data:image/jpeg;base64,{encoded}"/>')
    else:
        parts.append(f'<rect class="nophoto" width="{width}" height="{height}"/>')
    parts += _heat_layers(heats)
    top = max((c["attention"] for c in cells.values()), default=0.0) or 1.0
    for cell_id in [int(i) for i in np.unique(labels) if i]:
        cell = cells.get(cell_id)
        weight = cell["attention"] / top if cell else 0.0
        title = f"cell {cell_id}"
        if cell:
            title += f": attention {cell['attention']:.3f}, nucleus / cell area {ratio_words(cell['nc_ratio'])}"
        colour = attention_colour(weight)
        fill = "none" if photo is not None else f"{colour}55"
        parts.append(
            f'<path d="{outline(labels == cell_id)}" fill="{fill}" stroke="{colour}" '
            f'stroke-width="{1.0 + 1.2 * weight:.1f}"><title>{title}</title></path>'
        )
    parts += _boxes(labels, heaviest_cells(cells))
    return Markup("".join(parts) + "</svg>")


def _boxes(labels: NDArray[np.uint16], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw numbered boxes around cells; the number stands below where there is no room above."""
    height, width = labels.shape
    parts = []
    for rank, cell in enumerate(cells, 1):
        ys, xs = np.nonzero(labels == cell["cell_id"])
        if not len(xs):
            continue
        x0, y0, x1, y1 = int(xs.min()) - 2, int(ys.min()) - 2, int(xs.max()) + 3, int(ys.max()) + 3
        above = y0 >= 12
        parts.append(
            f'<rect class="box" x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}"/>'
            f'<text x="{max(1, min(x0, width - 10))}" y="{y0 - 2 if above else min(height - 2, y1 + 9)}">{rank}</text>'
        )
    return parts


def _heat_layers(heats: Sequence[Heat]) -> list[str]:
    """Draw translucent images, one per cell; their strength is relative to the field's strongest position."""
    top = max((float(np.abs(h.values).max()) for h in heats), default=0.0)
    if not top:
        return []
    layers = []
    for heat in heats:
        encoded = base64.b64encode(_heat_png(heat.values / top)).decode()
        layers.append(
            f'<image class="heat" x="{heat.x:.2f}" y="{heat.y:.2f}" width="{heat.side}" height="{heat.side}" '
            f'href="data:image/png;base64,{encoded}"/>'
        )
    return layers


def _heat_png(values: NDArray[np.float64]) -> bytes:
    """Encode a PNG of one pixel per position; the browser smooths it.

    `values` [g, g] lie in -1..1; their size becomes opacity.
    """
    colours = [[int(c[i : i + 2], 16) for i in (5, 3, 1)] for c in (AGAINST, FOR)]  # OpenCV wants blue first
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.asarray(colours, np.uint8)[(values > 0).astype(np.intp)]
    pixels[..., 3] = np.round(np.abs(values) * 217)  # at most 85 %: the cell must be seen through it
    ok, data = cv2.imencode(".png", pixels)
    assert ok
    return data.tobytes()


def outline(mask: NDArray[np.bool_], holes: bool = False) -> str:
    """Return the SVG path of a mask's contours, bool [H, W], in pixel coordinates; empty for an empty mask.

    `holes` asks for the inner contours as well.
    """
    mode = cv2.RETR_CCOMP if holes else cv2.RETR_EXTERNAL
    contours, _ = cv2.findContours(mask.astype(np.uint8), mode, cv2.CHAIN_APPROX_NONE)
    path = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 0.6, True).reshape(-1, 2) + 0.5
        path.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z")
    return "".join(path)
