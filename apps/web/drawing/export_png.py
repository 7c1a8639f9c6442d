"""Export of a field as one picture: its layers drawn in, above a caption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from leukoflow.apps.web.drawing.captions import headline, probabilities, provenance, statements
from leukoflow.apps.web.drawing.layers import CYTOPLASM, NUCLEUS, Tile, rgb_of, shapes
from leukoflow.apps.web.words import Cell, Subject
from leukoflow.tasks.report.numbers import shown
from leukoflow.tasks.review.wording import ATTENTION_NOTE, RESEARCH_USE

ENLARGED = 900  # pixels of the longer side of an exported picture, at least
_DRAWN = {0xD7: "x", 0xB5: "u", 0x2013: "-", 0x2026: "..."}  # letters that the built-in font of pictures lacks


def annotated(tile: Tile, cells: Sequence[Cell], layers: Sequence[str] = ("original", "attention")) -> Image.Image:
    """Draw layers into a picture, enlarged so that outlines are fine. `layers` as the pages name them."""
    base = tile.normalized if "normalized" in layers else tile.original
    height, width = base.shape[:2]
    factor = max(1, math.ceil(ENLARGED / max(height, width)))
    big = np.asarray(cv2.resize(base, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC), np.uint8)
    for name, mask, colour in (
        ("cytoplasm", tile.semantic > 0, CYTOPLASM),
        ("nucleus", tile.semantic == 2, NUCLEUS),
    ):
        if name in layers:
            _stroke(big, mask, factor, colour, 2)
    if "attention" in layers:
        for shape in shapes(tile, cells):
            _stroke(big, tile.cells == shape.cell.cell_id, factor, shape.colour, 3)
    image = Image.fromarray(big)
    if "attention" in layers:
        pen = ImageDraw.Draw(image)
        font = ImageFont.load_default(21)
        for cell in cells:
            if cell.rank <= 3:
                ys, xs = np.nonzero(tile.cells == cell.cell_id)
                if not len(xs):
                    continue
                x, y = (xs.min() + xs.max()) / 2 * factor - 5, max(2.0, ys.min() * factor - 26.0)
                pen.text((x, y), str(cell.rank), font=font, fill="#ffffff", stroke_width=2, stroke_fill="#111111")
    return image


def _stroke(image: NDArray[np.uint8], mask: NDArray[np.bool_], factor: int, colour: str, width: int) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    scaled = [((c.astype(np.float64) + 0.5) * factor).round().astype(np.int32) for c in contours]
    cv2.polylines(image, scaled, True, rgb_of(colour), width, cv2.LINE_AA)


def export_png(subject: Subject, tile: Tile | None, cells: Sequence[Cell], layers: Sequence[str]) -> bytes:
    """Return a PNG of the annotated field above a caption: label, confidence, bundle and notice."""
    picture = annotated(tile, cells, layers) if tile is not None else Image.new("RGB", (ENLARGED, 60), "#e9e5dd")
    lines = [
        (shown(subject.title, 90), 22, "#1f2228"),
        (headline(subject), 26, "#1f2228"),
        *((text, 18, "#1f2228") for text in statements(subject)),
        (probabilities(subject), 18, "#1f2228"),
        (provenance(subject), 15, "#5c616b"),
        (f"Outlines: cells, coloured by attention. {ATTENTION_NOTE}"
         if "attention" in layers else "", 15, "#5c616b"),
        (RESEARCH_USE, 15, "#9b241c"),
    ]  # fmt: skip
    wrapped = [
        (piece, size, ink)
        for text, size, ink in lines
        if text
        for piece in _wrap(text.translate(_DRAWN), size, picture.width - 48)
    ]
    tall = sum(size + 9 for _, size, _ in wrapped) + 36
    sheet = Image.new("RGB", (picture.width, picture.height + tall), "#fffefb")
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    y = picture.height + 16
    for text, size, ink in wrapped:
        pen.text((24, y), text, font=ImageFont.load_default(size), fill=ink)
        y += size + 9
    sink = BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _wrap(text: str, size: int, width: int) -> list[str]:
    font = ImageFont.load_default(size)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
