"""The JSON API, version 1: what the pages show, for programs.

Its models are its own, so that it can stay as it is when the code behind it changes. Everything that is read here has
the opaque keys of the URLs beside the names.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

import pyarrow as pa
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, StreamingResponse

from leukoflow.apps.web import guard
from leukoflow.apps.web.guard import Principal, Refused, admin, diagnoser, saw, viewer
from leukoflow.apps.web.jobs import Item, Job, Jobs
from leukoflow.apps.web.live import STREAM, event, live
from leukoflow.apps.web.problems import add_problem_schema, documented, finite
from leukoflow.apps.web.settings import SCOPES, WebSettings
from leukoflow.apps.web.uploads import read_form
from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.runs.records import CLASSES, Status
from leukoflow.tasks.imaging import cytoplasm
from leukoflow.tasks.review.wording import RESEARCH_USE, SET_DESCRIPTION

router = APIRouter(prefix="/api/v1")
_common = documented(400, 401, 403, 422)
_found = _common | documented(404)
JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{22}$", examples=["pY0GJbUqk4yTQv1wq9Zk3A"])]


class Model(BaseModel):
    """Everything that the API returns."""

    model_config = ConfigDict(from_attributes=True)


# --- the server itself -----------------------------------------------------------------------------------------------


class Health(Model):
    """Whether the server is up."""

    status: Literal["ok"]
    version: str = Field(examples=["0.1.0"])
    diagnoses: bool = Field(description="whether single images can be diagnosed")


class Me(Model):
    """Who is asking."""

    name: str
    role: str
    scopes: list[str]
    via: Literal["session", "proxy", "token"]


class BundleOut(Model):
    """A model bundle that single images can be diagnosed with; the first is used unless another is named."""

    name: str
    digest: str
    classes: list[str]
    metrics: list[str] = Field(description="what was measured, in words")


@router.get("/health", tags=["server"], responses=documented(400))
async def health(request: Request) -> Health:
    """Whether the server answers. Needs no token."""
    return Health(status="ok", version=software_version(), diagnoses=request.app.state.engine is not None)


@router.get("/me", tags=["server"], responses=_common)
async def me(request: Request) -> Me:
    """Whose token or session it is, and what it may do."""
    who = guard.principal(request)
    if who is None:
        raise guard.SignInNeeded
    return Me(name=who.name, role=who.role, scopes=[s for s in SCOPES if s in who.scopes], via=_via(who))


@router.get("/bundles", tags=["diagnosis"], responses=_common)
async def bundles(request: Request, who: Annotated[Principal, Depends(viewer)]) -> list[BundleOut]:
    """The bundles that are loaded."""
    engine = request.app.state.engine
    return [] if engine is None else [_bundle(card) for card in engine.bundles]


def _bundle(card: Any) -> BundleOut:
    metrics = card.metrics
    words = [metrics] if isinstance(metrics, str) else [str(m) for m in metrics]
    return BundleOut(name=card.name, digest=card.digest, classes=list(card.classes), metrics=[w for w in words if w])


def _via(who: Principal) -> Literal["session", "proxy", "token"]:
    return "token" if who.via == "token" else "proxy" if who.via == "proxy" else "session"


def software_version() -> str:
    """Of the installed distribution."""
    try:
        return version("leukoflow")
    except PackageNotFoundError:
        return "unknown"


# --- single images ---------------------------------------------------------------------------------------------------


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
    quality: QualityOut | None = None
    remarks: list[str] = []
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
_sends = _common | documented(408, 413, 415, 429, 503)


@router.post("/diagnoses", tags=["diagnosis"], responses=_sends, openapi_extra=_form)
async def diagnose(
    request: Request,
    response: Response,
    who: Annotated[Principal, Depends(diagnoser)],
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
        raise Refused(503, "This server was started without the diagnosis of single images.", 3600)
    known = {card.name for card in engine.bundles}
    if unknown := [name for name in bundle or () if name not in known]:
        raise Refused(422, f"There is no bundle of that name here ({len(unknown)} unknown); GET /api/v1/bundles.")
    guard.limit(request)
    form = await read_form(request, settings.uploads)
    if not form.uploads:
        raise Refused(422, "The form has no file.")
    guard.limit(request, len(form.uploads) - 1)
    names = tuple(dict.fromkeys(bundle or ("",)))
    job = jobs_of(request).start(who.name, form.uploads, engine, bundles=names, um_per_px=um_per_px)
    saw(request, "diagnosis asked for", job.id, images=str(len(form.uploads)))
    if wait:
        await job.wait()
        if all(item.busy and item.finding is None for item in job.items):
            raise Refused(503, "Many images are waiting to be diagnosed; try again in a moment.", 5)
    response.headers["Location"] = guard.path_of(request, f"/api/v1/diagnoses/{job.id}")
    return _diagnoses(job, cells)


@router.get("/diagnoses/{job}", tags=["diagnosis"], responses=_found)
async def diagnoses(
    request: Request,
    job: JobId,
    who: Annotated[Principal, Depends(diagnoser)],
    cells: Annotated[bool, Query(description="whether to list the cells")] = True,
) -> Diagnoses:
    """Progress and results of an upload."""
    return _diagnoses(_job(request, job, who), cells)


@router.delete("/diagnoses/{job}", tags=["diagnosis"], status_code=204, responses=_found)
async def forget(request: Request, job: JobId, who: Annotated[Principal, Depends(diagnoser)]) -> None:
    """Delete an upload and its results immediately."""
    if not jobs_of(request).drop(job, who.name):
        raise _gone()


@router.get(
    "/diagnoses/{job}/events",
    tags=["diagnosis"],
    response_class=StreamingResponse,
    responses=_found | documented(429) | STREAM,
)
async def diagnosis_events(
    request: Request, job: JobId, who: Annotated[Principal, Depends(diagnoser)]
) -> StreamingResponse:
    """Server-sent events: `progress` with the stage of every image, `done` at the end."""
    found = _job(request, job, who)

    async def told() -> AsyncIterator[str]:
        async for version_ in found.changes():
            stages = [{"name": i.name, "stage": i.stage, "error": i.error or None} for i in found.items]
            yield event("done" if found.done else "progress", {"version": version_, "items": stages})

    return live(request, who, told())


def jobs_of(request: Request) -> Jobs:
    """The application's jobs."""
    jobs = request.app.state.jobs
    assert isinstance(jobs, Jobs)
    return jobs


def _job(request: Request, job_id: str, who: Principal) -> Job:
    job = jobs_of(request).get(job_id, who.name)
    if job is None:
        raise _gone()
    return job


def _gone() -> Refused:
    return Refused(404, "There is no such diagnosis (any more); results are kept for some minutes.")


def _diagnoses(job: Job, cells: bool) -> Diagnoses:
    return Diagnoses(id=job.id, done=job.done, items=[diagnosis(i, cells) for i in job.items])


def diagnosis(item: Item, cells: bool = True) -> Diagnosis:
    """An item of a job as the API shows it."""
    found = item.finding
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
        quality=QualityOut.model_validate(found.quality) if found.quality else None,
        remarks=list(found.remarks),
        cells=_cells(found.cells) if cells and found.cells is not None else None,
        seconds=dict(found.seconds),
    )


def _cells(table: pa.Table) -> list[CellOut]:
    return [CellOut(**finite(row | {"nc_ratio": cytoplasm.measured(row["nc_ratio"])})) for row in table.to_pylist()]


# --- tokens ----------------------------------------------------------------------------------------------------------


class TokenOut(Model):
    """A token without its secret."""

    id: str
    owner: str
    label: str
    scopes: list[str]
    created: str
    expires: str


@router.get("/tokens", tags=["server"], responses=_common)
async def tokens(request: Request, who: Annotated[Principal, Depends(admin)]) -> list[TokenOut]:
    """All API tokens, without their secrets."""
    return [TokenOut.model_validate(t) for t in guard.gate_of(request).accounts.book().tokens]


@router.delete("/tokens/{token}", tags=["server"], status_code=204, responses=_found)
async def revoke(
    request: Request,
    token: Annotated[str, Path(pattern=r"^[0-9a-f]{12}$")],
    who: Annotated[Principal, Depends(admin)],
) -> None:
    """Revoke a token immediately."""
    accounts = guard.gate_of(request).accounts
    if not any(t.id == token for t in accounts.book().tokens):
        raise Refused(404, "There is no token with that id.")
    await asyncio.to_thread(accounts.revoke_token, token)
    saw(request, "token revoked", token)


# --- the document ----------------------------------------------------------------------------------------------------


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    """The OpenAPI document. Needs no token, since it holds nothing of this house."""
    return JSONResponse(document(request.app))


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The OpenAPI document as a page."""
    found = document(request.app)
    schemas = found["components"]["schemas"]
    operations = [
        (method.upper(), path, operation, operation["tags"][0])
        for path, methods in found["paths"].items()
        for method, operation in methods.items()
    ]
    context = {"operations": operations, "schemas": schemas, "notice": RESEARCH_USE, "shown": _shown}
    answer: Response = request.app.state.templates.TemplateResponse(request, "api.html", context)
    return answer


def _shown(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_shown(part) for part in schema[key])
    if "enum" in schema or "const" in schema:
        return " ".join(str(v) for v in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_shown(schema.get('items', {}))}"
    bounds = [f"{word} {schema[key]}" for key, word in _BOUNDS if key in schema]
    return ", ".join([kind, *bounds])


_BOUNDS = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("pattern", "like"))


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the API."""
    cached = getattr(app.state, "openapi", None)
    if isinstance(cached, dict):
        return cached
    found = get_openapi(
        title="leukoflow", version="1", routes=app.routes,
        description=f"{RESEARCH_USE}\n\nErrors are RFC 9457 problems. Send an API token as `Authorization: Bearer`.",
        servers=[{"url": app.state.settings.root_path or "/"}],
    )  # fmt: skip
    add_problem_schema(found)
    found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path.endswith("/health") else [{"token": []}]
    app.state.openapi = found
    return found
