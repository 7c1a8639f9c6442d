"""Responses with a layer of a field, or an export of it."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response

from leukoflow.apps.web import words
from leukoflow.apps.web.drawing import layers
from leukoflow.apps.web.drawing.export_json import export_json
from leukoflow.apps.web.drawing.export_pdf import export_pdf
from leukoflow.apps.web.drawing.export_png import export_png
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.principals import Principal
from leukoflow.runs.records import CLASSES

KINDS = (("png", "Picture with outlines (PNG)"), ("pdf", "Report (PDF)"), ("json", "All figures (JSON)"))


def picture_response(picture: str, tiles: Sequence[layers.Tile], cells: Sequence[words.Cell], tile: int) -> Response:
    """Return a layer, thumbnail, activation map or cell. Raises Refused (404) if there is no such picture."""
    if not 0 <= tile < len(tiles):
        raise Refused(404, "There is no such picture.")
    view = tiles[tile]
    name, _, suffix = picture.rpartition(".")
    if name in ("original", "normalized") and suffix == "webp":
        pixels = view.original if name == "original" else view.normalized
        if not pixels.size:
            raise Refused(404, "The image of this field is no longer available.")
        data, media = layers.webp(pixels), "image/webp"
    elif picture == "thumb.webp" and view.original.size:
        data, media = layers.thumbnail(view.original), "image/webp"
    elif name.startswith("map-") and name[4:] in CLASSES and suffix == "png" and layers.has_maps(view):
        weights = {c.cell_id: c.attention for c in cells}
        data, media = layers.activation_png(view, name[4:], weights), "image/png"
    elif name.startswith("cell-") and name[5:].isdecimal() and suffix == "webp":
        cell = next((c for c in cells if c.cell_id == int(name[5:])), None)
        if cell is None or not tiles[cell.tile].original.size:
            raise Refused(404, "There is no picture of this cell.")
        data, media = layers.webp(layers.crop(tiles[cell.tile].original, cell.box)), "image/webp"
    else:
        raise Refused(404, "There is no such picture.")
    # Only for this browser and not for long: what is erased must be gone.
    return Response(data, media_type=media, headers={"Cache-Control": "private, max-age=300"})


def export_response(
    kind: str,
    name: str,
    subject: words.Subject,
    tiles: Sequence[layers.Tile],
    cells: Sequence[words.Cell],
    tile: int,
    who: Principal,
) -> Response:
    """Return an export of a field as an attachment. Raises Refused (404) for an unknown kind."""
    view = tiles[tile] if 0 <= tile < len(tiles) and tiles[tile].original.size else None
    if kind == "png":
        data, media = export_png(subject, view, cells, ("original", "attention")), "image/png"
    elif kind == "pdf":
        data, media = export_pdf(subject, view, cells, who.name), "application/pdf"
    elif kind == "json":
        data, media = export_json(subject, cells, who.name), "application/json"
    else:
        raise Refused(404, "There is no export of that kind.")
    headers = {"Content-Disposition": f'attachment; filename="{name}.{kind}"', "Cache-Control": "no-store"}
    return Response(data, media_type=media, headers=headers)
