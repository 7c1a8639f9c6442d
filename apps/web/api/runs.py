"""The JSON API about runs: lists of slides, patients and fields, verdicts, exports, courses and agreement.

The records of `tasks.review` are served as they are; what is declared here is asked for, or served nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from leukoflow.apps.web.api.live import STREAM, event, live
from leukoflow.apps.web.api.problems import documented, finite
from leukoflow.apps.web.gate.principals import Principal, exporter, reviewer, viewer
from leukoflow.apps.web.gate.request import saw
from leukoflow.runs.records import Status
from leukoflow.tasks.imaging import cytoplasm
from leukoflow.tasks.review import timeline as timelines
from leukoflow.tasks.review import verdicts
from leukoflow.tasks.review.agreement import Agreement
from leukoflow.tasks.review.agreement import agreement as measure_agreement
from leukoflow.tasks.review.export.stream import Format, Scope
from leukoflow.tasks.review.export.stream import export as export_pieces
from leukoflow.tasks.review.lines import FieldLine, Page, PatientLine, Reconciliation, RunLine, SlideLine
from leukoflow.tasks.review.query import MAX_PAGE, Review, Sort
from leukoflow.tasks.review.query import Query as ListQuery
from leukoflow.tasks.review.runs import list_runs, open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.timeline import Timeline
from leukoflow.tasks.review.verdict_record import Action, Standing

router = APIRouter(prefix="/api/v1", tags=["runs"])

_common = documented(400, 401, 403, 422, 503)
_found = _common | documented(404)
_HEX16 = r"^[0-9a-f]{16}$"
RunKey = Annotated[str, Path(pattern=_HEX16, description="opaque key of a run", examples=["0f4bd2a1c9e87766"])]
PatientKey = Annotated[str, Path(pattern=_HEX16, description="opaque key of a patient")]
SlideKey = Annotated[str, Path(pattern=_HEX16, description="opaque key of a slide")]
Ordinal = Annotated[int, Path(ge=0, le=1 << 40, description="place of the field in the run's plan")]
Viewer = Annotated[Principal, Depends(viewer)]
Label = Literal["Benign", "Early", "Pre", "Pro"]
SlidePage = Page[SlideLine]
PatientPage = Page[PatientLine]
FieldPage = Page[FieldLine]


class RunDetails(BaseModel):
    """A run, and where every image of it is."""

    run_key: str
    run_id: str
    bundle_digest: str
    reconciliation: Reconciliation


class Listing(BaseModel):
    """Filters, order and page of a list. Free text is no part of an address: POST it to `search`."""

    model_config = ConfigDict(extra="forbid")

    label: Label | None = None
    status: Status | None = None
    site: str | None = Field(None, max_length=200)
    scanner: str | None = Field(None, max_length=200)
    review: Review | None = None
    slide: str | None = Field(None, pattern=_HEX16, description="only fields of this slide")
    patient: str | None = Field(None, pattern=_HEX16, description="only slides or fields of this patient")
    sort: Sort = Sort.URGENCY
    descending: bool = True
    offset: int = Field(0, ge=0, le=1 << 40)
    limit: int = Field(50, ge=1, le=MAX_PAGE)

    def query(self) -> ListQuery:
        """Return the page of a list that is asked for."""
        return ListQuery(**self.model_dump())


class Search(Listing):
    """A search for slides, patients or fields by name."""

    kind: Literal["slides", "patients", "fields"] = "fields"
    text: str = Field("", max_length=200)

    def query(self) -> ListQuery:
        """Return the page of a list that is asked for."""
        return ListQuery(**self.model_dump(exclude={"kind"}))


class VerdictIn(BaseModel):
    """A verdict on a field or a slide."""

    model_config = ConfigDict(extra="forbid")

    action: Action
    label: Label | None = Field(
        None, description="of a correction; of a withdrawal the label that it takes back, optional"
    )
    comment: str | None = Field(None, max_length=2000)


class CellRow(BaseModel):
    """One cell, in pixels of the source image."""

    model_config = ConfigDict(extra="allow")
    cell_id: int
    attention: float | None = None
    nc_ratio: float | None = Field(None, description=cytoplasm.DESCRIPTION)


# --- lists -----------------------------------------------------------------------------------------------------------


def _out(request: Request) -> str:
    return str(request.app.state.settings.out)


def _table(request: Request, run_key: str) -> RunTable:
    return open_run_table(_out(request), run_key)


@router.get("/runs", responses=_common)
def runs(request: Request, who: Viewer) -> list[RunLine]:
    """List all runs, the newest first."""
    found = list_runs(_out(request))
    saw(request, "runs")
    return found


@router.get("/runs/{run_key}", responses=_found)
def run(request: Request, run_key: RunKey, who: Viewer) -> RunDetails:
    """Return a run, and where every image of it is."""
    found = _details(_table(request, run_key), run_key)
    saw(request, "run", run_key)
    return found


def _details(table: RunTable, run_key: str) -> RunDetails:
    return RunDetails(
        run_key=run_key, run_id=table.run_id, bundle_digest=table.bundle[1], reconciliation=table.reconciliation()
    )


@router.get("/runs/{run_key}/slides", responses=_found)
def slides(request: Request, run_key: RunKey, who: Viewer, listing: Annotated[Listing, Query()]) -> SlidePage:
    """List the slides of a run, the most urgent first."""
    found = _table(request, run_key).slides(listing.query())
    saw(request, "slides", run_key)
    return found


@router.get("/runs/{run_key}/patients", responses=_found)
def patients(request: Request, run_key: RunKey, who: Viewer, listing: Annotated[Listing, Query()]) -> PatientPage:
    """List the patients of a run by their pseudonyms, the most urgent first."""
    found = _table(request, run_key).patients(listing.query())
    saw(request, "patients", run_key)
    return found


@router.get("/runs/{run_key}/fields", responses=_found)
def fields(request: Request, run_key: RunKey, who: Viewer, listing: Annotated[Listing, Query()]) -> FieldPage:
    """List the fields of a run, the most urgent first."""
    found = _table(request, run_key).fields(listing.query())
    saw(request, "fields", run_key)
    return found


@router.post("/runs/{run_key}/search", responses=_found)
def search(request: Request, run_key: RunKey, who: Viewer, asked: Search) -> SlidePage | PatientPage | FieldPage:
    """Find slides, patients or fields by name. A POST, because a name must not appear in an address."""
    table, query = _table(request, run_key), asked.query()
    saw(request, asked.kind, run_key)
    match asked.kind:
        case "slides":
            return table.slides(query)
        case "patients":
            return table.patients(query)
    return table.fields(query)


@router.get("/runs/{run_key}/fields/{ordinal}", responses=_found)
def field(request: Request, run_key: RunKey, ordinal: Ordinal, who: Viewer) -> FieldLine:
    """Return one field with all its verdicts."""
    found = _table(request, run_key).field(ordinal)
    saw(request, "field", f"{run_key}/{ordinal}")
    return found


@router.get("/runs/{run_key}/fields/{ordinal}/cells", responses=_found)
def cells(request: Request, run_key: RunKey, ordinal: Ordinal, who: Viewer) -> list[CellRow]:
    """List the cells of a field with their measurements and attention."""
    rows = _table(request, run_key).cells(ordinal).to_pylist()
    saw(request, "cells", f"{run_key}/{ordinal}")
    kept = ({k: v for k, v in row.items() if k not in ("run_id", "image_key")} for row in rows)
    return [CellRow(**finite(row | {"nc_ratio": cytoplasm.measured(row["nc_ratio"])})) for row in kept]


@router.get(
    "/runs/{run_key}/events",
    response_class=StreamingResponse,
    responses=_found | documented(429) | STREAM,
)
async def run_events(request: Request, run_key: RunKey, who: Viewer) -> StreamingResponse:
    """Send events about a run in progress: `progress` whenever something changed, `done` at the end."""

    def where_images_are() -> dict[str, Any]:
        found: dict[str, Any] = _details(_table(request, run_key), run_key).model_dump()["reconciliation"]
        return found

    first = await asyncio.to_thread(where_images_are)

    async def progress() -> AsyncIterator[str]:
        sent = first
        yield event("done" if sent["finished"] else "progress", sent)
        quiet = 0
        while not sent["finished"]:
            await asyncio.sleep(2.0)
            now = await asyncio.to_thread(where_images_are)
            quiet += 1
            if now != sent or quiet >= 8:  # a sign of life, too, or a proxy between might hang up
                sent, quiet = now, 0
                yield event("done" if sent["finished"] else "progress", sent)

    return live(request, who, progress())


# --- verdicts --------------------------------------------------------------------------------------------------------

Reviewer = Annotated[Principal, Depends(reviewer)]
_writes = _found | documented(409)


class Kept(BaseModel):
    """The verdict was saved; the current state of review."""

    standing: Standing


@router.post("/runs/{run_key}/fields/{ordinal}/verdicts", status_code=201, responses=_writes)
def field_verdict(request: Request, run_key: RunKey, ordinal: Ordinal, who: Reviewer, verdict: VerdictIn) -> Kept:
    """Record a verdict on a field. Predictions stay as they are; verdicts are only ever added.

    `accept` and `correct` are decisions; `withdraw` takes the last one back."""
    table = _table(request, run_key)
    said = table.verdict_on_field(ordinal, verdict.action, who.name, verdict.label, verdict.comment)
    verdicts.add(_out(request), said)
    saw(request, "verdict", f"{run_key}/{ordinal}", action=str(verdict.action))
    return Kept(standing=_table(request, run_key).field(ordinal).standing)


@router.post("/runs/{run_key}/slides/{slide_key}/verdicts", status_code=201, responses=_writes)
def slide_verdict(request: Request, run_key: RunKey, slide_key: SlideKey, who: Reviewer, verdict: VerdictIn) -> Kept:
    """Record a verdict on a slide as a whole."""
    table = _table(request, run_key)
    said = table.verdict_on_slide(slide_key, verdict.action, who.name, verdict.label, verdict.comment)
    verdicts.add(_out(request), said)
    saw(request, "verdict", f"{run_key}/{slide_key}", action=str(verdict.action))
    return Kept(standing=_table(request, run_key).slide(slide_key).standing)


# --- exports ---------------------------------------------------------------------------------------------------------

_file: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "content": {
            "text/csv": {"schema": {"type": "string"}},
            "application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}},
            "application/fhir+json": {"schema": {"type": "object"}},
        },
    }
}


@router.get("/runs/{run_key}/exports", response_class=StreamingResponse, responses=_found | _file)
def export(
    request: Request,
    run_key: RunKey,
    who: Annotated[Principal, Depends(exporter)],
    format: Annotated[Literal["csv", "parquet", "fhir"], Query()] = "csv",
    slide: Annotated[str | None, Query(pattern=_HEX16, description="this slide only")] = None,
    patient: Annotated[str | None, Query(pattern=_HEX16, description="this patient only")] = None,
) -> StreamingResponse:
    """Export a run, one of its slides or one of its patients as CSV, Parquet or FHIR."""
    table = _table(request, run_key)
    pieces = iter(export_pieces(table, Scope(slide=slide, patient=patient), format))
    first = next(pieces, b"")  # what cannot be exported is said before the answer begins
    saw(request, "export", "/".join(filter(None, (run_key, slide, patient))), format=format)

    def whole() -> Iterator[bytes]:
        yield first
        yield from pieces

    suffix = "json" if format == "fhir" else format
    headers = {"Content-Disposition": f'attachment; filename="leukoflow-{run_key}.{suffix}"'}
    return StreamingResponse(whole(), media_type=Format(format).media_type, headers=headers)


# --- over all runs ---------------------------------------------------------------------------------------------------


@router.get("/patients/{patient_key}/timeline", responses=_found)
def timeline(request: Request, patient_key: PatientKey, who: Viewer) -> Timeline:
    """Return a patient's course over runs."""
    found = timelines.timeline(_out(request), patient_key)
    saw(request, "patient", patient_key)
    return found


@router.get("/agreement", responses=_common)
def agreement(request: Request, who: Viewer) -> Agreement:
    """Measure how far reviewers and predictions agree."""
    found = measure_agreement(_out(request))
    saw(request, "agreement")
    return found
