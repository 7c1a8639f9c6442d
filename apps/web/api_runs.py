"""The JSON API about runs: worklists, verdicts, exports, courses, agreement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from leukoflow.apps.web.guard import Principal, exporter, reviewer, saw, viewer
from leukoflow.apps.web.live import STREAM, event, live
from leukoflow.apps.web.problems import documented, finite
from leukoflow.runs.records import Status
from leukoflow.tasks.imaging import cytoplasm
from leukoflow.tasks.review import verdicts, worklist
from leukoflow.tasks.review.export import stream
from leukoflow.tasks.review.verdicts import Action
from leukoflow.tasks.review.wording import MEAN_MALIGNANT_NOTE, SET_DESCRIPTION
from leukoflow.tasks.review.worklist import MAX_PAGE, Review, RunTable, Sort

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


class Model(BaseModel):
    """Everything that is returned here."""

    model_config = ConfigDict(from_attributes=True)


class RunOut(Model):
    """A run."""

    run_key: str
    run_id: str
    state: str
    started_at: str
    finished_at: str | None
    source_kind: str
    members: int
    done: int
    predicted: int
    abstained: int
    rejected: int
    quarantined: int
    missing: int
    bundle: str
    bundle_digest: str
    shadow_of: str | None
    message: str
    phase: str = Field(description="what a running run does or waits for; else empty")


class ReconciliationOut(Model):
    """Where every image is: received = predicted + abstained + rejected + quarantined + waiting."""

    received: int
    predicted: int
    abstained: int
    rejected: int
    quarantined: int
    waiting: int
    missing: int | None = Field(description="listed, but not handed over; null where there was no manifest to list it")
    ignored: int
    truncated: str | None
    conflicts: int
    finished: bool
    state: str
    balanced: bool


class RunDetails(Model):
    """A run, and where every image of it is."""

    run_key: str
    run_id: str
    bundle_digest: str
    reconciliation: ReconciliationOut


class CountsOut(Model):
    """Fields by status."""

    predicted: int
    abstained: int
    rejected: int
    quarantined: int


class SummaryOut(Model):
    """Summary of the fields of a slide or a patient. `worst` is the ordinal of the field to look at first."""

    counts: CountsOut
    label: str | None
    probabilities: list[float] = Field(description="means over the answered fields, Benign Early Pre Pro")
    urgency: float
    mean_malignant_probability: float | None = Field(description=f"{MEAN_MALIGNANT_NOTE} Null without answered fields.")
    interval: tuple[float, float] | None = Field(
        description="95 % interval of the mean, as if fields were independent; null for fewer than 5 answered fields"
    )
    malignant_fields: int = Field(description="answered fields with a malignant probability above one half")
    uncertainty: float | None
    entropy: float | None
    cells: int
    answered_cells: int = Field(description="cells of the answered fields")
    reviewed: int
    diagnosed: int
    flagged: int
    worst: int


class VerdictOut(Model):
    """A verdict, and the prediction it was made on."""

    action: str
    who: str
    at: str
    label: str | None
    comment: str | None
    seen_status: str | None
    seen_label: str | None
    seen_confidence: float | None
    seen_bundle_digest: str | None


class StandingOut(Model):
    """The current state of review: the decision that counts, if any, the flag and the last comment."""

    decision: VerdictOut | None
    flagged: bool
    comment: str | None
    verdicts: int


class SlideOut(Model):
    """A slide."""

    slide_key: str
    name: str
    grouping: str
    patient_key: str | None
    patient: str | None
    site: str | None
    scanner: str | None
    summary: SummaryOut
    standing: StandingOut
    rank: int
    missing: int = Field(description="images that the manifest lists for it and that were not received")
    patients: int = Field(description="patients whose fields are on it; with several, resolve that before reading")


class PatientOut(Model):
    """A patient, by the pseudonym."""

    patient_key: str
    patient: str
    site: str | None
    slides: int
    summary: SummaryOut
    worst_slide: str
    missing: int = Field(description="images that the manifest lists for the patient and that were not received")


class FieldDetailsOut(Model):
    """Details of a single field."""

    member_sha256: str | None
    bundle_digest: str
    um_per_px: float | None
    width_px: int | None
    height_px: int | None
    focus: float | None
    exposure: float | None
    quality_flags: list[str]
    shard: str
    zarr_index: int | None
    n_tiles: int
    verdicts: list[VerdictOut]


class FieldOut(Model):
    """A field."""

    ordinal: int
    image_key: str
    slide_key: str
    slide: str
    patient_key: str | None
    patient: str | None
    site: str | None
    scanner: str | None
    status: str
    reason: str | None
    label: str | None = Field(description="of an answer; null where the model abstained")
    confidence: float | None = Field(description="calibrated probability of the label; null without an answer")
    probabilities: list[float] = Field(
        description="Benign Early Pre Pro; no answer where the model abstained, nor calibrated for it"
    )
    prediction_set: list[str] = Field(description=SET_DESCRIPTION)
    ood: float | None
    n_cells: int
    urgency: float
    uncertainty: float | None
    standing: StandingOut
    details: FieldDetailsOut | None = None


class SlidePage(Model):
    """A page of slides."""

    items: list[SlideOut]
    total: int
    offset: int
    limit: int


class PatientPage(Model):
    """A page of patients."""

    items: list[PatientOut]
    total: int
    offset: int
    limit: int


class FieldPage(Model):
    """A page of fields."""

    items: list[FieldOut]
    total: int
    offset: int
    limit: int


class Listing(BaseModel):
    """What a list shall show. Free text is no part of an address: POST it to `search`."""

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

    def query(self, text: str = "") -> worklist.Query:
        """As the worklist understands it."""
        return worklist.Query(text=text, **self.model_dump())


class Search(Listing):
    """A search for slides, patients or fields by name."""

    kind: Literal["slides", "patients", "fields"] = "fields"
    text: str = Field("", max_length=200)

    def query(self, text: str = "") -> worklist.Query:
        """As the worklist understands it."""
        return worklist.Query(text=self.text, **self.model_dump(exclude={"kind", "text"}))


class VerdictIn(BaseModel):
    """A verdict on a field or a slide."""

    model_config = ConfigDict(extra="forbid")

    action: Action
    label: Label | None = Field(
        None, description="of a correction; of a withdrawal the label that it takes back, optional"
    )
    comment: str | None = Field(None, max_length=2000)


class CellRow(Model):
    """One cell, in pixels of the source image."""

    model_config = ConfigDict(extra="allow", from_attributes=True)
    cell_id: int
    attention: float | None = None
    nc_ratio: float | None = Field(None, description=cytoplasm.DESCRIPTION)


# --- lists -----------------------------------------------------------------------------------------------------------


def _out(request: Request) -> str:
    return str(request.app.state.settings.out)


def _table(request: Request, run_key: str) -> RunTable:
    return worklist.open_run_table(_out(request), run_key)


@router.get("/runs", responses=_common)
def runs(request: Request, who: Viewer) -> list[RunOut]:
    """All runs, the newest first."""
    found = [RunOut.model_validate(line) for line in worklist.list_runs(_out(request))]
    saw(request, "runs")
    return found


@router.get("/runs/{run_key}", responses=_found)
def run(request: Request, run_key: RunKey, who: Viewer) -> RunDetails:
    """A run, and where every image of it is."""
    found = _details(_table(request, run_key), run_key)
    saw(request, "run", run_key)
    return found


def _details(table: RunTable, run_key: str) -> RunDetails:
    reconciliation = ReconciliationOut.model_validate(table.reconciliation())
    digest = table.bundle[1]
    return RunDetails(run_key=run_key, run_id=table.run_id, bundle_digest=digest, reconciliation=reconciliation)


@router.get("/runs/{run_key}/slides", responses=_found)
def slides(request: Request, run_key: RunKey, who: Viewer, listing: Annotated[Listing, Query()]) -> SlidePage:
    """Slides of a run, the most urgent first."""
    found = SlidePage.model_validate(_table(request, run_key).slides(listing.query()))
    saw(request, "slides", run_key)
    return found


@router.get("/runs/{run_key}/patients", responses=_found)
def patients(request: Request, run_key: RunKey, who: Viewer, listing: Annotated[Listing, Query()]) -> PatientPage:
    """Patients of a run by their pseudonyms, the most urgent first."""
    found = PatientPage.model_validate(_table(request, run_key).patients(listing.query()))
    saw(request, "patients", run_key)
    return found


@router.get("/runs/{run_key}/fields", responses=_found)
def fields(request: Request, run_key: RunKey, who: Viewer, listing: Annotated[Listing, Query()]) -> FieldPage:
    """Fields of a run, the most urgent first."""
    found = FieldPage.model_validate(_table(request, run_key).fields(listing.query()))
    saw(request, "fields", run_key)
    return found


@router.post("/runs/{run_key}/search", responses=_found)
def search(request: Request, run_key: RunKey, who: Viewer, asked: Search) -> SlidePage | PatientPage | FieldPage:
    """Slides, patients or fields by name. A POST, since a name must not stand in an address."""
    table, query = _table(request, run_key), asked.query()
    saw(request, asked.kind, run_key)
    match asked.kind:
        case "slides":
            return SlidePage.model_validate(table.slides(query))
        case "patients":
            return PatientPage.model_validate(table.patients(query))
    return FieldPage.model_validate(table.fields(query))


@router.get("/runs/{run_key}/fields/{ordinal}", responses=_found)
def field(request: Request, run_key: RunKey, ordinal: Ordinal, who: Viewer) -> FieldOut:
    """One field with all its verdicts."""
    found = FieldOut.model_validate(_table(request, run_key).field(ordinal))
    saw(request, "field", f"{run_key}/{ordinal}")
    return found


@router.get("/runs/{run_key}/fields/{ordinal}/cells", responses=_found)
def cells(request: Request, run_key: RunKey, ordinal: Ordinal, who: Viewer) -> list[CellRow]:
    """The cells of a field with their measurements and attention."""
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
    """Server-sent events about a run in progress: `progress` whenever something changed, `done` at the end."""
    last = (await asyncio.to_thread(lambda: _details(_table(request, run_key), run_key))).reconciliation

    async def told() -> AsyncIterator[str]:
        seen = last
        yield event("done" if seen.finished else "progress", seen.model_dump())
        quiet = 0
        while not seen.finished:
            await asyncio.sleep(2.0)
            now = (await asyncio.to_thread(lambda: _details(_table(request, run_key), run_key))).reconciliation
            quiet += 1
            if now != seen or quiet >= 8:  # a sign of life, too, or a proxy between might hang up
                seen, quiet = now, 0
                yield event("done" if seen.finished else "progress", seen.model_dump())

    return live(request, who, told())


# --- verdicts --------------------------------------------------------------------------------------------------------

Reviewer = Annotated[Principal, Depends(reviewer)]
_writes = _found | documented(409)


class Kept(Model):
    """The verdict was saved; the current state of review."""

    standing: StandingOut


@router.post("/runs/{run_key}/fields/{ordinal}/verdicts", status_code=201, responses=_writes)
def field_verdict(request: Request, run_key: RunKey, ordinal: Ordinal, who: Reviewer, verdict: VerdictIn) -> Kept:
    """Record a verdict on a field. Predictions stay as they are; verdicts are only ever added.

    `accept` and `correct` are decisions; `withdraw` takes the last one back."""
    table = _table(request, run_key)
    said = table.verdict_on_field(ordinal, verdict.action, who.name, verdict.label, verdict.comment)
    verdicts.add(_out(request), said)
    saw(request, "verdict", f"{run_key}/{ordinal}", action=str(verdict.action))
    standing = StandingOut.model_validate(_table(request, run_key).field(ordinal).standing)
    return Kept(standing=standing)


@router.post("/runs/{run_key}/slides/{slide_key}/verdicts", status_code=201, responses=_writes)
def slide_verdict(request: Request, run_key: RunKey, slide_key: SlideKey, who: Reviewer, verdict: VerdictIn) -> Kept:
    """Record a verdict on a slide as a whole."""
    table = _table(request, run_key)
    said = table.verdict_on_slide(slide_key, verdict.action, who.name, verdict.label, verdict.comment)
    verdicts.add(_out(request), said)
    saw(request, "verdict", f"{run_key}/{slide_key}", action=str(verdict.action))
    return Kept(standing=StandingOut.model_validate(_table(request, run_key).slide(slide_key).standing))


# --- hand-off --------------------------------------------------------------------------------------------------------

MEDIA = {
    "csv": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
    "fhir": "application/fhir+json",
}
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
    """A run, one of its slides or one of its patients as CSV, Parquet or FHIR."""
    table = _table(request, run_key)
    pieces = iter(stream.export(table, stream.Scope(slide=slide, patient=patient), format))
    first = next(pieces, b"")  # what cannot be exported is said before the answer begins
    saw(request, "export", "/".join(filter(None, (run_key, slide, patient))), format=format)

    def whole() -> Iterator[bytes]:
        yield first
        yield from pieces

    suffix = "json" if format == "fhir" else format
    headers = {"Content-Disposition": f'attachment; filename="leukoflow-{run_key}.{suffix}"'}
    return StreamingResponse(whole(), media_type=MEDIA[format], headers=headers)


# --- over all runs ---------------------------------------------------------------------------------------------------


class PointOut(Model):
    """A patient in one run."""

    run_key: str
    run_id: str
    at: str
    finished: bool
    slides: int
    summary: SummaryOut
    corrected: int
    bundle_digest: str
    same_bundle: bool
    same_images: bool = Field(description="as the point before: then the two are no course")


class TimelineOut(Model):
    """A patient's course over runs, the oldest first."""

    patient_key: str
    patient: str
    points: list[PointOut]
    unread: list[str]
    remarks: list[str] = Field(description="where runs, or the slides of a run, do not agree on the class")


class WeekOut(Model):
    """Decisions of one week."""

    week: str
    n: int
    accepted: int
    corrected: int
    kappa: float | None


class AgreementOut(Model):
    """Decisions against the predictions that reviewers saw: neither an independent reading nor accuracy."""

    n: int
    accepted: int
    corrected: int
    without_prediction: int
    confusion: list[list[int]] = Field(
        description="rows: predicted, columns: the reviewer's label; Benign, Early, Pre, Pro"
    )
    kappa: float | None
    kappa_interval: tuple[float, float] | None
    no_kappa: str = Field(description="why there is no kappa, empty where there is one")
    weeks: list[WeekOut]
    unread: list[str]


@router.get("/patients/{patient_key}/timeline", responses=_found)
def timeline(request: Request, patient_key: PatientKey, who: Viewer) -> TimelineOut:
    """A patient's course over runs."""
    found = TimelineOut.model_validate(worklist.timeline(_out(request), patient_key))
    saw(request, "patient", patient_key)
    return found


@router.get("/agreement", responses=_common)
def agreement(request: Request, who: Viewer) -> AgreementOut:
    """How far reviewers and predictions agree."""
    found = AgreementOut.model_validate(worklist.agreement(_out(request)))
    saw(request, "agreement")
    return found
