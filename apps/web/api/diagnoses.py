"""Diagnoses of single images."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import pyarrow as pa
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field
from starlette.responses import StreamingResponse

from leukoflow.apps.web.api.live import STREAM, event, live
from leukoflow.apps.web.api.models import COMMON, FOUND, Model
from leukoflow.apps.web.api.problems import documented, finite
from leukoflow.apps.web.engine.jobs import Item, Job, jobs_of
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.principals import Diagnoser, Principal
from leukoflow.apps.web.gate.request import limit_uploads, path_of, saw
from leukoflow.apps.web.gate.uploads import read_form
from leukoflow.apps.web.settings import WebSettings
from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.runs.records import CLASSES, Status
from leukoflow.tasks.imaging import cytoplasm
from leukoflow.tasks.review.wording import RESEARCH_USE, SET_DESCRIPTION

router = APIRouter(prefix="/api/v1")

JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{22}$", examples=["pY0GJbUqk4yTQv1wq9Zk3A"])]


class QualityOut(Model):
    """Measures of image quality, at the model's scale."""

    focus: float
    exposure: float
    saturated: float
    foreground: float
    stain: float
    flags: list[str]
    reasons: list[str]


class CellOut(Model):
    """One cell; boxes and centroids in pixels of the source image, areas in pixels of the model's scale."""

    cell_id: int
    bbox_xmin_px: float
    bbox_ymin_px: float
    bbox_xmax_px: float
    bbox_ymax_px: float
    centroid_x_px: float
    centroid_y_px: float
    nucleus_area_px: float
    cell_area_px: float
    nucleus_area_um2: float | None = Field(None, description="in square micrometres; null without a scale")
    cell_area_um2: float | None = None
    nc_ratio: float | None = Field(description=cytoplasm.DESCRIPTION)
    eccentricity: float | None
    touches_border: bool
    attention: float | None = Field(
        description="weight that the cell had in the result, for or against any class; sums to 1 over an image"
    )


class Diagnosis(Model):
    """The result of one bundle for one image."""

    name: str = Field(description="file name as it was sent", examples=["field-017.png"])
    stage: Literal["waiting", "decode", "normalize", "segment", "extract", "classify", "done"]
    error: str | None = Field(description="why there is no result at all")
    sha256: str | None = None
    bundle: str | None = None
    bundle_digest: str | None = None
    status: Literal["predicted", "abstained", "rejected", "quarantined"] | None = None
    reason: str | None = Field(None, description="why there is no prediction, as in a run")
    label: str | None = Field(None, examples=["Early"], description="of an answer; null where the model abstained")
    confidence: float | None = Field(None, description="calibrated probability of the label; null without an answer")
    probabilities: dict[str, float] | None = Field(
        None, description="by class; where the model abstained they are no answer, and their calibration does not hold"
    )
    prediction_set: list[str] = Field([], description=SET_DESCRIPTION)
    ood_score: float | None = Field(None, description="distance from the training fields, 1 is typical")
    width_px: int | None = None
    height_px: int | None = None
    um_per_px: float | None = Field(None, description="micrometres per pixel in use; null: not decoded")
    um_per_px_source: Literal["manifest", "metadata", "ruler", "assumed"] | None = Field(
        None,
        description="how the scale is known: stated with the request, by the file, measured on red cells, or an "
        "assumption, with which nothing is answered",
    )
    um_per_px_sd: float | None = Field(None, description="standard deviation of a measured scale, µm per pixel")
    quality: QualityOut | None = None
    remarks: list[str] = Field([])
    cells: list[CellOut] | None = None
    seconds: dict[str, float] = Field({}, description="wall seconds by stage")


class Diagnoses(Model):
    """The results of one upload, kept in memory for some minutes, for the person who sent it."""

    id: str
    done: bool
    notice: str = RESEARCH_USE
    items: list[Diagnosis]


_form = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "minItems": 1,
                            "description": "images, or zip archives of images",
                        }
                    },
                }
            }
        },
    }
}
_sends = COMMON | documented(408, 413, 415, 429, 503)


@router.post("/diagnoses", tags=["diagnosis"], responses=_sends, openapi_extra=_form)
async def diagnose(
    request: Request,
    response: Response,
    who: Diagnoser,
    bundle: Annotated[
        list[str] | None, Query(max_length=4, description="bundles by name; the first one unless given")
    ] = None,
    um_per_px: Annotated[
        float | None, Query(ge=MIN_UM_PER_PX, le=MAX_UM_PER_PX, description="micrometres per pixel, if known")
    ] = None,
    cells: Annotated[bool, Query(description="whether to list the cells")] = True,
    wait: Annotated[bool, Query(description="false: answer immediately; fetch the result later")] = True,
) -> Diagnoses:
    """Classify images. They are never stored; results stay in memory for some minutes."""
    settings: WebSettings = request.app.state.settings
    engine = request.app.state.engine
    if engine is None:
        raise Refused(503, "This server was started without a model, so it cannot diagnose single images.", 3600)
    known = {card.name for card in engine.bundles}
    if unknown := [name for name in bundle or () if name not in known]:
        raise Refused(422, f"Unknown bundles: {len(unknown)}; GET /api/v1/bundles lists those of this server.")
    limit_uploads(request)
    form = await read_form(request, settings.uploads)
    if not form.uploads:
        raise Refused(422, "The form has no file.")
    limit_uploads(request, len(form.uploads) - 1)
    names = tuple(dict.fromkeys(bundle or ("",)))
    job = jobs_of(request).start(who.name, form.uploads, engine, bundles=names, um_per_px=um_per_px)
    saw(request, "diagnosis asked for", job.id, images=str(len(form.uploads)))
    if wait:
        await job.wait()
        if all(item.busy and item.diagnosis is None for item in job.items):
            raise Refused(503, "Many images are waiting to be diagnosed; try again in a moment.", 5)
    response.headers["Location"] = path_of(request, f"/api/v1/diagnoses/{job.id}")
    return _diagnoses(job, cells)


@router.get("/diagnoses/{job}", tags=["diagnosis"], responses=FOUND)
async def diagnoses(
    request: Request,
    job: JobId,
    who: Diagnoser,
    cells: Annotated[bool, Query(description="whether to list the cells")] = True,
) -> Diagnoses:
    """Return progress and results of an upload."""
    return _diagnoses(_job(request, job, who), cells)


@router.delete("/diagnoses/{job}", tags=["diagnosis"], status_code=204, responses=FOUND)
async def forget(request: Request, job: JobId, who: Diagnoser) -> None:
    """Delete an upload and its results immediately."""
    if not jobs_of(request).drop(job, who.name):
        raise _gone()


@router.get(
    "/diagnoses/{job}/events",
    tags=["diagnosis"],
    response_class=StreamingResponse,
    responses=FOUND | documented(429) | STREAM,
)
async def diagnosis_events(request: Request, job: JobId, who: Diagnoser) -> StreamingResponse:
    """Send events: `progress` with the stage of every image, `done` at the end."""
    found = _job(request, job, who)

    async def progress() -> AsyncIterator[str]:
        async for version_ in found.changes():
            stages = [{"name": i.name, "stage": i.stage, "error": i.error or None} for i in found.items]
            yield event("done" if found.done else "progress", {"version": version_, "items": stages})

    return live(request, who, progress())


def _job(request: Request, job_id: str, who: Principal) -> Job:
    job = jobs_of(request).get(job_id, who.name)
    if job is None:
        raise _gone()
    return job


def _gone() -> Refused:
    return Refused(404, "There is no such diagnosis, or no longer; results are kept for a few minutes.")


def _diagnoses(job: Job, cells: bool) -> Diagnoses:
    return Diagnoses(id=job.id, done=job.done, items=[diagnosis(i, cells) for i in job.items])


def diagnosis(item: Item, cells: bool = True) -> Diagnosis:
    """Return an item of a job as the API shows it."""
    found = item.diagnosis
    stage: Any = item.stage
    if found is None:
        return Diagnosis(name=item.name, stage=stage, error=item.error or None, bundle=item.bundle or None)
    probabilities = dict(zip(CLASSES, (float(p) for p in found.probabilities), strict=False))
    answered = found.status == Status.PREDICTED
    return Diagnosis(
        name=item.name,
        stage=stage,
        error=item.error or None,
        sha256=found.sha256,
        bundle=found.bundle,
        bundle_digest=found.bundle_digest,
        status=found.status.value,
        reason=found.reason,
        label=found.label if answered else None,
        confidence=probabilities.get(found.label) if answered else None,
        probabilities=probabilities or None,
        prediction_set=list(found.prediction_set) if answered else [],
        ood_score=found.ood,
        width_px=found.width_px,
        height_px=found.height_px,
        um_per_px=found.scale.um_per_px,
        um_per_px_source=None if found.scale.um_per_px is None else str(found.scale.source),
        um_per_px_sd=found.scale.sd,
        quality=QualityOut.model_validate(found.quality) if found.quality else None,
        remarks=list(found.remarks),
        cells=_cells(found.cells) if cells and found.cells is not None else None,
        seconds=dict(found.seconds),
    )


def _cells(table: pa.Table) -> list[CellOut]:
    return [CellOut(**finite(row | {"nc_ratio": cytoplasm.measured(row["nc_ratio"])})) for row in table.to_pylist()]
