"""One field of a run."""

from __future__ import annotations

import hashlib

from fastapi import APIRouter, Request
from starlette.responses import Response

from leukoflow.apps.web.drawing import scenes, subjects
from leukoflow.apps.web.drawing.view_cache import field_of
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.principals import Principal, Viewer
from leukoflow.apps.web.gate.request import path_of, saw
from leukoflow.apps.web.pages.lists import list_request
from leukoflow.apps.web.pages.pictures import KINDS, export_response, picture_response
from leukoflow.apps.web.pages.rendering import render, table_of, translate_errors
from leukoflow.core.errors import NotFoundError
from leukoflow.runs.records import Status
from leukoflow.tasks.report import numbers
from leukoflow.tasks.review.lines import FieldLine
from leukoflow.tasks.review.table import RunTable

router = APIRouter()

_NO_PIXELS = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 96 96"><path d="M30 30h36v36H30zM30 66l36-36" fill="none" '
    b'stroke="#8a8f98" stroke-width="2"/></svg>'
)


@router.get("/runs/{run_key}/fields/{ordinal}")
def field_page(
    request: Request, run_key: str, ordinal: int, who: Viewer, tile: int | None = None, decided: int | None = None
) -> Response:
    """Show one field for review; `decided` is the field whose decision led here.

    Its picture is loaded after the page, since the source has to be read again for it.
    """
    table = table_of(request, run_key)
    asked = list_request(request, who, "fields")
    with translate_errors():
        line = table.field(ordinal)
        earlier, later = table.neighbours(asked.query, ordinal)
        subject = subjects.of_line(table, line)
        remarks = field_of(table, ordinal).remarks if line.status is Status.QUARANTINED else None
    saw(request, "field", f"{run_key}/{ordinal}")
    return render(
        request, "field.html", "runs", run=table, run_key=run_key, line=line, subject=subject, earlier=earlier,
        later=later, asked=asked, tile=tile, exports=KINDS, seen=prediction_digest(line),
        decided=_decided(table, decided), no_view=remarks,
    )  # fmt: skip


def prediction_digest(line: FieldLine) -> str:
    """Return a digest of a prediction: a verdict is about the prediction that was on the screen."""
    digest = line.details.bundle_digest if line.details else ""
    return hashlib.sha256(repr((digest, line.status, line.label, line.probabilities)).encode()).hexdigest()[:32]


def _decided(table: RunTable, ordinal: int | None) -> FieldLine | None:
    """Return the field whose decision led here; None if there is none any more."""
    if ordinal is None:
        return None
    try:
        line = table.field(ordinal)
    except NotFoundError:
        return None
    return line if line.standing.decision is not None else None


@router.get("/runs/{run_key}/fields/{ordinal}/view")
def field_view_fragment(request: Request, run_key: str, ordinal: int, who: Viewer, tile: int | None = None) -> Response:
    """Show the picture with its layers, and the cells."""
    table = table_of(request, run_key)
    base = path_of(request, f"/runs/{run_key}/fields/{ordinal}")
    with translate_errors():
        scene = scenes.of_field(table, ordinal, tile, base)
        if scene is None:
            remarks = [numbers.shown(r, 300) for r in field_of(table, ordinal).remarks]
            return render(request, "_no_view.html", remarks=remarks)
    return render(request, "_view.html", scene=scene)


@router.get("/runs/{run_key}/fields/{ordinal}/{picture}")
def field_picture(request: Request, run_key: str, ordinal: int, picture: str, who: Viewer, tile: int = 0) -> Response:
    """Return a layer of a field, or an export."""
    table = table_of(request, run_key)
    if picture.startswith("export."):
        return _export_field(request, table, ordinal, picture.removeprefix("export."), who, tile)
    with translate_errors():
        tiles, cells, view = scenes.field_tiles(table, ordinal)
    if not view.pixels and picture == "thumb.webp":  # lists ask for it without knowing
        return Response(_NO_PIXELS, media_type="image/svg+xml", headers={"Cache-Control": "no-store"})
    if not view.pixels and not picture.startswith("map-"):
        raise Refused(404, "The image of this field is no longer available.")
    return picture_response(picture, tiles, cells, tile)


def _export_field(request: Request, table: RunTable, ordinal: int, kind: str, who: Principal, tile: int) -> Response:
    if not who.may("export"):
        raise Refused(403, "Your role does not allow you to export; ask an administrator.")
    with translate_errors():
        line = table.field(ordinal)
        subject = subjects.of_line(table, line)
        tiles, cells, view = scenes.field_tiles(table, ordinal)
        tiles = tiles if view.pixels else ()
    saw(request, "export", f"{table.run_key}/{ordinal}", format=kind)
    return export_response(kind, f"leukoflow-{table.run_key}-{ordinal}", subject, tiles, cells, tile, who)
