"""Fields as HTML for notebooks: the picture with its cells outlined, and the probabilities as bars. No script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pyarrow as pa

from leukoflow.apps.web.drawing.layers import Tile, png
from leukoflow.runs.records import CLASS_NAMES
from leukoflow.tasks.report.overlay import outline
from leukoflow.tasks.report.palette import COLOURS, attention_colour
from leukoflow.tasks.review.wording import probability

SHOWN_PX = 420
"""Width of a field's picture in a notebook."""


def attention_of(cells: pa.Table | None) -> dict[int, float]:
    """Return each cell's attention relative to the field's highest, by `cell_id`."""
    if cells is None or not len(cells):
        return {}
    weights = np.asarray(cells["attention"], np.float64)
    top = float(weights.max()) or 1.0
    return {int(i): float(w / top) for i, w in zip(cells["cell_id"].to_pylist(), weights, strict=True)}


def field_html(
    tiles: Sequence[Tile],
    cells: pa.Table | None,
    headline: str,
    sentences: Sequence[str],
    probabilities: Mapping[str, float],
) -> str:
    """Return a field as HTML: each tile with its cells outlined by attention, the words, and bars of probabilities."""
    attention = attention_of(cells)
    words = "".join(f'<p style="margin:.2em 0">{escape(s)}</p>' for s in sentences if s)
    pictures = "".join(_tile_svg(tile, attention) for tile in tiles)
    return (
        '<div style="font:14px/1.4 system-ui,sans-serif;display:flex;gap:1.2em;flex-wrap:wrap;align-items:flex-start">'
        f"<div>{pictures}</div>"
        f'<div style="max-width:34em"><p style="font-weight:600;font-size:1.15em;margin:.2em 0">{escape(headline)}</p>'
        f"{words}{_bars(probabilities)}</div></div>"
    )


def _tile_svg(tile: Tile, attention: Mapping[int, float]) -> str:
    height, width = tile.original.shape[:2]
    picture = base64.b64encode(png(tile.original)).decode()
    paths = "".join(
        f'<path d="{outline(tile.cells == cell_id)}" fill="none" stroke="{attention_colour(weight)}" '
        f'stroke-width="{1.5 + 2 * weight:.1f}" vector-effect="non-scaling-stroke"/>'
        for cell_id in sorted(np.unique(tile.cells).tolist(), key=lambda c: attention.get(c, 0.0))
        if cell_id and (weight := attention.get(cell_id, 0.0)) is not None
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{min(SHOWN_PX, 2 * width)}" role="img" '
        f'aria-label="field with {len(attention)} outlined cells" style="display:block;margin-bottom:.4em">'
        f'<image href="data:image/png;base64,{picture}" width="{width}" height="{height}"/>{paths}</svg>'
    )


def _bars(probabilities: Mapping[str, float]) -> str:
    rows = "".join(
        f'<tr><td style="padding:.1em .6em .1em 0">{escape(CLASS_NAMES.get(name, name))}</td>'
        f'<td style="width:14em"><span style="display:block;height:.8em;width:{100 * value:.1f}%;'
        f'background:{COLOURS.get(name.lower(), COLOURS["quiet"])[0]}"></span></td>'
        f'<td style="padding-left:.6em;font-variant-numeric:tabular-nums">{escape(probability(value))}</td></tr>'
        for name, value in probabilities.items()
    )
    return f'<table style="border-collapse:collapse;margin:.4em 0">{rows}</table>' if rows else ""
