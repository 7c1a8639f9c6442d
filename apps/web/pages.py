"""Pages for people: thin handlers between the gate, what reads runs, the engine, and templates.

Nothing of a patient stands in an address: runs, slides and patients have opaque keys, fields the ordinal of the plan,
and what somebody searches for is kept here, under a key that only they can use.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends, Form, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from leukoflow.apps.web import drawing, scenes, words
from leukoflow.apps.web.accounts import MIN_PASSWORD, AccountError
from leukoflow.apps.web.guard import (
    Principal,
    Refused,
    admin,
    diagnoser,
    exporter,
    gate_of,
    limit,
    may_set_up,
    path_of,
    principal,
    reviewer,
    safe_next,
    saw,
    set_up,
    sign_in,
    sign_out,
    viewer,
)
from leukoflow.apps.web.jobs import Item, Job, Jobs
from leukoflow.apps.web.settings import ROLES, SCOPES
from leukoflow.apps.web.uploads import read_form
from leukoflow.core.errors import LeukoflowError, NotFoundError, RequestError, RunBusyError
from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.runs.records import CLASSES, Status
from leukoflow.tasks.imaging import cytoplasm
from leukoflow.tasks.inference.single import STAGES, Finding
from leukoflow.tasks.review import cautions, verdict_record, verdicts, wording, worklist
from leukoflow.tasks.review.export import stream
from leukoflow.tasks.review.verdicts import Action
from leukoflow.tasks.review.worklist import FieldLine, Query, Review, RunTable, Sort

router = APIRouter()

Viewer = Annotated[Principal, Depends(viewer)]
Reviewer = Annotated[Principal, Depends(reviewer)]
Diagnoser = Annotated[Principal, Depends(diagnoser)]
Exporter = Annotated[Principal, Depends(exporter)]
Admin = Annotated[Principal, Depends(admin)]

PAGE = 50
TABS = ("slides", "patients", "fields")
KINDS = (("png", "Picture with outlines (PNG)"), ("pdf", "Report (PDF)"), ("json", "All figures (JSON)"))
STAGE_WORDS = {
    "waiting": "Waiting",
    "decode": "Reading the image",
    "normalize": "Normalising the stain",
    "segment": "Finding cells",
    "extract": "Measuring features",
    "classify": "Classifying",
    "done": "Done",
}
_SEARCHES = 2000
_DECISIONS = (Action.ACCEPT, Action.CORRECT)
_NO_PIXELS = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 96 96"><path d="M30 30h36v36H30zM30 66l36-36" fill="none" '
    b'stroke="#8a8f98" stroke-width="2"/></svg>'
)
_STATES = {"finished": "good", "running": "live", "failed": "bad", "killed": "bad", "damaged": "bad"}


# --- what all pages share --------------------------------------------------------------------------------------------


def render(request: Request, template: str, here: str = "", /, status: int = 200, **context: Any) -> Response:
    """A page or fragment. `here` names the entry of the navigation that it belongs to."""
    shared = {
        "here": here,
        "root": path_of(request, ""),
        "classes": CLASSES,
        "class_name": wording.class_name,
        "class_notes": words.CLASS_NOTES,
        "status_words": words.STATUS_WORDS,
        "stage_words": STAGE_WORDS,
        "stages": STAGES,
        "stage_at": _stage_at,
        "reason_words": words.reason_words,
        "set_words": wording.set_words,
        "set_note": wording.SET_NOTE,
        "leaning": wording.LEANING,
        "mean_malignant": wording.MEAN_MALIGNANT,
        "mean_malignant_note": wording.MEAN_MALIGNANT_NOTE,
        "interval_note": wording.INTERVAL_NOTE,
        "attention_note": wording.ATTENTION_NOTE,
        "scale_caution": wording.SCALE_CAUTION,
        "mean_words": wording.mean_words,
        "measured": cytoplasm.measured,
        "ratio_words": cytoplasm.ratio_words,
        "told_of": scenes.told_of,
        "uncertain_of": words.uncertain_of,
        "class_caution": wording.CLASS_CAUTION,
        "caution_of": scenes.caution_of,
        "shown": words.shown,
        "bundle_name": words.bundle_name,
        "shares": drawing.shares,
        "hundred": drawing.hundred,
        "number": words.number,
        "percent": words.percent,
        "prob": words.prob,
        "sentence": words.sentence,
        "upload_words": words.upload_words,
        "why_of": scenes.why_of,
        "day": words.day,
        "moment": words.moment,
        "state_kind": lambda state: _STATES.get(state, "warn"),
    }
    templates = request.app.state.templates
    answer: Response = templates.TemplateResponse(request, template, shared | context, status)
    answer.headers.setdefault("Cache-Control", "no-store")
    return answer


def _stage_at(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else (len(STAGES) if stage == "done" else -1)


def _go(request: Request, path: str) -> Response:
    return RedirectResponse(path_of(request, path), 303)


def _partial(request: Request) -> bool:
    """Whether a script asks for a fragment."""
    return "hx-request" in request.headers


@contextmanager
def told() -> Iterator[None]:
    """Turns what tasks raise into answers for people. Raises Refused."""
    try:
        yield
    except NotFoundError as error:
        raise Refused(404, _sentence(error)) from None
    except RequestError as error:
        raise Refused(400, _sentence(error)) from None
    except RunBusyError as error:
        raise Refused(503, _sentence(error), 5) from None
    except LeukoflowError as error:
        raise Refused(503, _sentence(error), 30) from None


def _sentence(error: Exception) -> str:
    return words.sentence(error, 400)


def _out(request: Request) -> str:
    return str(request.app.state.settings.out)


def _table(request: Request, run_key: str) -> RunTable:
    with told():
        return worklist.open_run_table(_out(request), run_key)


# --- coming in -------------------------------------------------------------------------------------------------------


@router.get("/login")
async def login_page(request: Request, next: str = "/") -> Response:
    """Where people sign in."""
    if principal(request) is not None:
        return _go(request, safe_next(next))
    return render(request, "login.html", next=safe_next(next), error="")


@router.post("/login")
async def login(
    request: Request,
    name: Annotated[str, Form(max_length=200)] = "",
    password: Annotated[str, Form(max_length=1000)] = "",
    next: Annotated[str, Form(max_length=500)] = "/",
) -> Response:
    """Checks name and password."""
    try:
        await sign_in(request, name.strip(), password)
    except Refused as refused:
        if refused.status_code not in (401, 429):
            raise
        answer = render(request, "login.html", next=safe_next(next), error=refused.detail, status=refused.status_code)
        answer.headers.update(refused.headers or {})
        return answer
    return _go(request, safe_next(next))


@router.post("/logout")
async def logout(request: Request) -> Response:
    """Ends the session."""
    sign_out(request)
    return _go(request, "/login")


@router.get("/setup")
async def setup_page(request: Request, key: str = "") -> Response:
    """The first administrator."""
    may_set_up(request, key)
    return render(request, "setup.html", key=key, name="", error="", min_password=MIN_PASSWORD)


@router.post("/setup")
async def setup(
    request: Request,
    key: Annotated[str, Form(max_length=200)] = "",
    name: Annotated[str, Form(max_length=200)] = "",
    password: Annotated[str, Form(max_length=1000)] = "",
    again: Annotated[str, Form(max_length=1000)] = "",
) -> Response:
    """Makes the first administrator."""
    error = "The two passwords differ; type them again." if password != again else ""
    if not error:
        try:
            await set_up(request, key, name.strip(), password)
        except Refused as refused:
            if refused.status_code != 422:
                raise
            error = str(refused.detail)
    if error:
        return render(request, "setup.html", key=key, name=name, error=error, min_password=MIN_PASSWORD, status=422)
    return _go(request, "/")


# --- runs and lists --------------------------------------------------------------------------------------------------


@router.get("/")
def runs_page(request: Request, who: Viewer) -> Response:
    """All runs, the newest first."""
    with told():
        found = worklist.list_runs(_out(request))
    saw(request, "runs")
    return render(request, "runs.html", "runs", runs=found, out_is_empty=not found)


@router.get("/runs/{run_key}/line")
def run_line(request: Request, run_key: str, who: Viewer) -> Response:
    """One entry of the list of runs, for one that is in progress."""
    with told():
        found = [r for r in worklist.list_runs(_out(request)) if r.run_key == run_key]
    if not found:
        raise Refused(404, "This run no longer exists.")
    return render(request, "_run_line.html", run=found[0])


@dataclass(slots=True)
class _Searches:
    """What people search for, which may be a patient's pseudonym, kept out of addresses and logs."""

    kept: OrderedDict[str, tuple[str, str]]

    def put(self, who: str, text: str) -> str:
        key = secrets.token_urlsafe(12)
        self.kept[key] = (who, text)
        while len(self.kept) > _SEARCHES:
            self.kept.popitem(last=False)
        return key

    def get(self, who: str, key: str) -> str:
        owner, text = self.kept.get(key, ("", ""))
        return text if owner == who else ""


_searches = _Searches(OrderedDict())


@dataclass(frozen=True, slots=True)
class Asked:
    """What a list was asked for: the query, and the parameters that lead to it again."""

    query: Query
    parameters: tuple[tuple[str, str], ...]

    def link(self, **changes: object) -> str:
        """Parameters for an address, some of them changed; None and empty ones are left out."""
        merged: dict[str, object] = dict(self.parameters) | changes
        return urlencode({k: v for k, v in merged.items() if v not in (None, "")})


def _asked(request: Request, who: Principal, tab: str, limit_: int = PAGE, **fixed: str) -> Asked:
    """Raises Refused (400) for what there is not."""
    given = request.query_params
    known = ("label", "status", "site", "scanner", "review", "sort", "order", "find", "page")
    chosen = {name: given[name][:200] for name in known if given.get(name)}
    page = int(chosen["page"]) if chosen.get("page", "").isdecimal() and len(chosen["page"]) < 9 else 1
    sort = chosen.get("sort", Sort.URGENCY)
    order = chosen.get("order") or ("up" if sort in (Sort.NAME, Sort.ORDER) else "down")
    with told():
        query = Query(
            text=_searches.get(who.name, chosen.get("find", "")),
            label=chosen.get("label"),
            status=chosen.get("status"),  # type: ignore[arg-type]
            site=chosen.get("site"),
            scanner=chosen.get("scanner"),
            review=chosen.get("review"),  # type: ignore[arg-type]
            slide=fixed.get("slide") or (given.get("slide") if tab == "fields" else None),
            patient=fixed.get("patient") or (given.get("patient") if tab == "fields" else None),
            sort=sort,  # type: ignore[arg-type]
            descending=order != "up",
            offset=(max(1, page) - 1) * limit_,
            limit=limit_,
        )
    for name in ("slide", "patient"):
        if value := getattr(query, name):
            chosen[name] = value
    return Asked(query, tuple(chosen.items()))


@router.get("/runs/{run_key}")
def run_page(request: Request, run_key: str, who: Viewer, tab: str = "slides") -> Response:
    """The worklist of a run."""
    table = _table(request, run_key)
    tab = tab if tab in TABS else "slides"
    asked = _asked(request, who, tab)
    with told():
        totals = {name: getattr(table, name)(Query(limit=1)).total for name in TABS}
        page = getattr(table, tab)(asked.query)
    if not _partial(request):
        saw(request, "worklist", run_key, tab=tab)
    context: dict[str, Any] = {
        "run": table, "run_key": run_key, "tab": tab, "tabs": TABS, "totals": totals, "page": page, "asked": asked,
        "reviews": tuple(Review), "statuses": words.STATUSES, "recon": table.reconciliation(),
        "guessed": cautions.guessed_fields(table, page.items) if tab == "fields" else frozenset(),
    }  # fmt: skip
    return render(request, "_list.html" if _partial(request) else "run.html", "runs", **context)


@router.post("/runs/{run_key}/find")
def find(
    request: Request,
    run_key: str,
    who: Viewer,
    tab: Annotated[str, Form(max_length=20)] = "slides",
    text: Annotated[str, Form(max_length=200)] = "",
    was: Annotated[str, Form(max_length=2000)] = "",
) -> Response:
    """Begins a search: what is searched for stays here, and the address has a key for it."""
    parameters = {
        k: v for k, v in parse_qsl(was) if k in ("label", "status", "site", "scanner", "review", "sort", "order")
    }
    if text.strip():
        parameters["find"] = _searches.put(who.name, text.strip())
    tab = tab if tab in TABS else "slides"
    key = run_key if run_key.isalnum() else ""
    return _go(request, f"/runs/{key}?{urlencode({'tab': tab} | parameters)}")


@router.get("/runs/{run_key}/reconciliation")
def reconciliation(request: Request, run_key: str, who: Viewer) -> Response:
    """The head of a run in progress; once it has finished, the whole page is loaded anew."""
    table = _table(request, run_key)
    recon = table.reconciliation()
    answer = render(request, "_recon.html", run=table, run_key=run_key, recon=recon)
    if recon.finished:
        answer.headers["HX-Refresh"] = "true"
    return answer


@router.get("/runs/{run_key}/slides/{slide_key}")
def slide_page(request: Request, run_key: str, slide_key: str, who: Viewer) -> Response:
    """One slide: what its fields say together, and each of them."""
    table = _table(request, run_key)
    asked = _asked(request, who, "fields", slide=slide_key)
    with told():
        slide = table.slide(slide_key)
        page = table.fields(asked.query)
        said = table.reviews.verdicts.of(verdict_record.slide_target(slide.grouping, slide.name))
        caution, guessed = cautions.scale_caution(table, slide), cautions.guessed_fields(table, page.items)
    saw(request, "slide", f"{run_key}/{slide_key}")
    return render(
        request, "slide.html", "runs", run=table, run_key=run_key, slide=slide, page=page, asked=asked, tab="fields",
        said=said, statuses=words.STATUSES, reviews=tuple(Review), caution=caution, guessed=guessed,
    )  # fmt: skip


@router.get("/runs/{run_key}/export.{kind}")
def export_run(
    request: Request, run_key: str, kind: str, who: Exporter, slide: str = "", patient: str = ""
) -> Response:
    """A run, one of its slides or one of its patients, for other programs."""
    table = _table(request, run_key)
    with told():
        try:
            form = stream.Format(kind)
        except ValueError:
            raise RequestError(f"there is no export of that kind; there are {', '.join(stream.Format)}") from None
        pieces = iter(stream.export(table, stream.Scope(slide=slide or None, patient=patient or None), form))
        first = next(pieces, b"")
    saw(request, "export", "/".join(filter(None, (run_key, slide, patient))), format=kind)

    def whole() -> Iterator[bytes]:
        yield first
        yield from pieces

    headers = {
        "Content-Disposition": f'attachment; filename="leukoflow-{run_key}{form.suffix}"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(whole(), media_type=form.media_type, headers=headers)


# --- one field -------------------------------------------------------------------------------------------------------


@router.get("/runs/{run_key}/fields/{ordinal}")
def field_page(
    request: Request, run_key: str, ordinal: int, who: Viewer, tile: int | None = None, decided: int | None = None
) -> Response:
    """One field for review; `decided` is the field whose decision led here.

    Its picture comes after the page, since the source has to be read again for it.
    """
    table = _table(request, run_key)
    asked = _asked(request, who, "fields")
    with told():
        line = table.field(ordinal)
        earlier, later = table.neighbours(asked.query, ordinal)
        subject = scenes.of_line(table, line)
        remarks = scenes.field_of(table, ordinal).remarks if line.status is Status.QUARANTINED else None
    saw(request, "field", f"{run_key}/{ordinal}")
    return render(
        request, "field.html", "runs", run=table, run_key=run_key, line=line, subject=subject, earlier=earlier,
        later=later, asked=asked, tile=tile, exports=KINDS, seen=_seen(line), decided=_decided(table, decided),
        no_view=remarks,
    )  # fmt: skip


def _decided(table: RunTable, ordinal: int | None) -> FieldLine | None:
    """The field whose decision led here; None where there is none (any more)."""
    if ordinal is None:
        return None
    try:
        line = table.field(ordinal)
    except NotFoundError:
        return None
    return line if line.standing.decision is not None else None


@router.get("/runs/{run_key}/fields/{ordinal}/view")
def field_view_fragment(request: Request, run_key: str, ordinal: int, who: Viewer, tile: int | None = None) -> Response:
    """The picture with its layers, and the cells."""
    table = _table(request, run_key)
    base = path_of(request, f"/runs/{run_key}/fields/{ordinal}")
    with told():
        scene = scenes.of_field(table, ordinal, tile, base)
        if scene is None:
            remarks = [words.shown(r, 300) for r in scenes.field_of(table, ordinal).remarks]
            return render(request, "_no_view.html", remarks=remarks)
    return render(request, "_view.html", scene=scene)


@router.get("/runs/{run_key}/fields/{ordinal}/{picture}")
def field_picture(request: Request, run_key: str, ordinal: int, picture: str, who: Viewer, tile: int = 0) -> Response:
    """A layer of a field, or an export."""
    table = _table(request, run_key)
    if picture.startswith("export."):
        return _export_field(request, table, ordinal, picture.removeprefix("export."), who, tile)
    with told():
        tiles, cells, view = scenes.field_tiles(table, ordinal)
    if not view.pixels and picture == "thumb.webp":  # lists ask for it without knowing
        return Response(_NO_PIXELS, media_type="image/svg+xml", headers={"Cache-Control": "no-store"})
    if not view.pixels and not picture.startswith("map-"):
        raise Refused(404, "The image of this field is no longer available.")
    return _picture(picture, tiles, cells, tile)


def _export_field(request: Request, table: RunTable, ordinal: int, kind: str, who: Principal, tile: int) -> Response:
    if not who.may("export"):
        raise Refused(403, "Your role does not allow you to export; ask an administrator.")
    with told():
        line = table.field(ordinal)
        subject = scenes.of_line(table, line)
        tiles, cells, view = scenes.field_tiles(table, ordinal)
        tiles = tiles if view.pixels else ()
    saw(request, "export", f"{table.run_key}/{ordinal}", format=kind)
    return _export(kind, f"leukoflow-{table.run_key}-{ordinal}", subject, tiles, cells, tile, who)


def _picture(picture: str, tiles: Sequence[drawing.Tile], cells: Sequence[words.Cell], tile: int) -> Response:
    """Raises Refused (404) for a picture that there is not."""
    if not 0 <= tile < len(tiles):
        raise Refused(404, "There is no such picture.")
    view = tiles[tile]
    name, _, suffix = picture.rpartition(".")
    if name in ("original", "normalized") and suffix == "webp":
        pixels = view.original if name == "original" else view.normalized
        if not pixels.size:
            raise Refused(404, "The image of this field is no longer available.")
        data, media = drawing.webp(pixels), "image/webp"
    elif picture == "thumb.webp" and view.original.size:
        data, media = drawing.thumbnail(view.original), "image/webp"
    elif name.startswith("map-") and name[4:] in CLASSES and suffix == "png" and drawing.has_maps(view):
        weights = {c.cell_id: c.attention for c in cells}
        data, media = drawing.activation_png(view, name[4:], weights), "image/png"
    elif name.startswith("cell-") and name[5:].isdecimal() and suffix == "webp":
        cell = next((c for c in cells if c.cell_id == int(name[5:])), None)
        if cell is None or not tiles[cell.tile].original.size:
            raise Refused(404, "There is no picture of such a cell.")
        data, media = drawing.webp(drawing.crop(tiles[cell.tile].original, cell.box)), "image/webp"
    else:
        raise Refused(404, "There is no such picture.")
    # Only for this browser and not for long: what is erased must be gone.
    return Response(data, media_type=media, headers={"Cache-Control": "private, max-age=300"})


def _export(
    kind: str,
    name: str,
    subject: words.Subject,
    tiles: Sequence[drawing.Tile],
    cells: Sequence[words.Cell],
    tile: int,
    who: Principal,
) -> Response:
    view = tiles[tile] if 0 <= tile < len(tiles) and tiles[tile].original.size else None
    if kind == "png":
        data, media = drawing.export_png(subject, view, cells, ("original", "attention")), "image/png"
    elif kind == "pdf":
        data, media = drawing.export_pdf(subject, view, cells, who.name), "application/pdf"
    elif kind == "json":
        data, media = drawing.export_json(subject, cells, who.name), "application/json"
    else:
        raise Refused(404, "There is no export of that kind.")
    headers = {"Content-Disposition": f'attachment; filename="{name}.{kind}"', "Cache-Control": "no-store"}
    return Response(data, media_type=media, headers=headers)


# --- verdicts --------------------------------------------------------------------------------------------------------


@router.post("/runs/{run_key}/fields/{ordinal}/verdicts")
def field_verdict(
    request: Request,
    run_key: str,
    ordinal: int,
    who: Reviewer,
    act: Annotated[str, Form(max_length=40)],
    seen: Annotated[str, Form(max_length=64)] = "",
    comment: Annotated[str, Form(max_length=4000)] = "",
) -> Response:
    """Adds a verdict on a field. A decision leads on to the next field of the list that needs one."""
    following: int | None = None
    try:
        table = _table(request, run_key)
        with told():
            line = table.field(ordinal)
            if seen != _seen(line):
                raise Refused(409, "The prediction has changed since you opened this page. Load the page again.")
            action, label = _act(act)
            verdicts.add(
                _out(request), table.verdict_on_field(ordinal, action, who.name, label, comment.strip() or None)
            )
            table = _table(request, run_key)
            line = table.field(ordinal)
            asked = _asked(request, who, "fields")
            if action in _DECISIONS:
                following = table.undecided(asked.query, ordinal)
    except Refused as refused:
        return _not_kept(request, refused)
    saw(request, "verdict", f"{run_key}/{ordinal}", action=str(action))
    target = f"/runs/{run_key}/fields/{ordinal}?{asked.link(page=None)}"
    if following is not None:
        target = f"/runs/{run_key}/fields/{following}?{asked.link(page=None, decided=ordinal)}"
    if not _partial(request):
        return _go(request, target)
    assert line.details is not None
    answer = render(
        request, "_standing.html", standing=line.standing, said=line.details.verdicts, saved=True, swap=True
    )
    if following is not None:
        answer.headers["X-Next"] = path_of(request, target)
    elif action in _DECISIONS:
        answer.headers["X-Message"] = "No other field of this list needs a decision."
    return answer


@router.post("/runs/{run_key}/slides/{slide_key}/verdicts")
def slide_verdict(
    request: Request,
    run_key: str,
    slide_key: str,
    who: Reviewer,
    act: Annotated[str, Form(max_length=40)],
    comment: Annotated[str, Form(max_length=4000)] = "",
) -> Response:
    """Adds a verdict on a slide as a whole."""
    try:
        table = _table(request, run_key)
        with told():
            action, label = _act(act)
            verdicts.add(
                _out(request), table.verdict_on_slide(slide_key, action, who.name, label, comment.strip() or None)
            )
            table = _table(request, run_key)
            slide = table.slide(slide_key)
            said = table.reviews.verdicts.of(verdict_record.slide_target(slide.grouping, slide.name))
    except Refused as refused:
        return _not_kept(request, refused)
    saw(request, "verdict", f"{run_key}/{slide_key}", action=str(action))
    if not _partial(request):
        return _go(request, f"/runs/{run_key}/slides/{slide_key}")
    return render(request, "_standing.html", standing=slide.standing, said=said, saved=True, swap=True)


def _act(act: str) -> tuple[Action, str | None]:
    """`accept`, `correct:Pre`, `withdraw:Pre`, `flag`, `unflag` or `comment`. Raises RequestError."""
    name, _, label = act.partition(":")
    try:
        return Action(name), label or None
    except ValueError:
        raise RequestError("there is no such verdict") from None


def _seen(line: FieldLine) -> str:
    """Tells one prediction from another: a verdict is about the one that was on the screen."""
    digest = line.details.bundle_digest if line.details else ""
    return hashlib.sha256(repr((digest, line.status, line.label, line.probabilities)).encode()).hexdigest()[:32]


def _not_kept(request: Request, refused: Refused) -> Response:
    """A script gets the reason in a header; a form gets the page that explains errors."""
    if not _partial(request):
        raise refused
    message = str(refused.detail).encode("ascii", "replace").decode()
    return Response(status_code=refused.status_code, headers={"X-Message": message, **(refused.headers or {})})


# --- patients, agreement ---------------------------------------------------------------------------------------------


@router.get("/patients/{patient_key}")
def patient_page(request: Request, patient_key: str, who: Viewer) -> Response:
    """A patient's course over runs."""
    with told():
        course = worklist.timeline(_out(request), patient_key)
    saw(request, "patient", patient_key)
    plot = drawing.timeline_svg(course.points)
    return render(request, "patient.html", "runs", course=course, plot=plot, patient_key=patient_key)


@router.get("/agreement")
def agreement_page(request: Request, who: Viewer) -> Response:
    """Verdicts against predictions."""
    with told():
        found = worklist.agreement(_out(request))
    saw(request, "agreement")
    return render(request, "agreement.html", "agreement", found=found, plot=drawing.weeks_svg(found.weeks))


# --- the bench -------------------------------------------------------------------------------------------------------


def _jobs(request: Request) -> Jobs:
    jobs = request.app.state.jobs
    assert isinstance(jobs, Jobs)
    return jobs


def _job(request: Request, job_id: str, who: Principal) -> Job:
    job = _jobs(request).get(job_id, who.name)
    if job is None:
        raise Refused(404, "This result is gone: results on the bench are kept for some minutes, and only for you.")
    return job


def _warming(request: Request) -> bool:
    """Whether no worker has its model loaded yet."""
    engine = request.app.state.engine
    return engine is not None and engine.load().ready == 0


def _item(request: Request, job_id: str, number: int, who: Principal) -> tuple[Job, Item, Finding]:
    job = _job(request, job_id, who)
    if not 0 <= number < len(job.items) or job.items[number].finding is None:
        raise Refused(404, "There is no such result (yet).")
    return job, job.items[number], job.items[number].finding


@router.get("/bench")
async def bench_page(request: Request, who: Diagnoser) -> Response:
    """Where single images are diagnosed."""
    engine, limits = request.app.state.engine, request.app.state.settings.uploads
    return render(
        request, "bench.html", "bench", bundles=() if engine is None else engine.bundles,
        jobs=_jobs(request).of(who.name), max_files=limits.files, max_mb=limits.total_mb, file_mb=limits.file_mb,
        minutes=round(limits.job_minutes), warming=_warming(request),
    )  # fmt: skip


@router.post("/bench")
async def bench(request: Request, who: Diagnoser) -> Response:
    """Takes images and begins to diagnose them."""
    try:
        engine, settings = request.app.state.engine, request.app.state.settings
        if engine is None:
            raise Refused(503, "This server was started without a model for single images.", 3600)
        limit(request)
        form = await read_form(request, settings.uploads)
        if not form.uploads:
            raise Refused(422, "No image was chosen.")
        limit(request, len(form.uploads) - 1)
        known = {card.name for card in engine.bundles}
        chosen = [b for b in (form.get("bundle"), form.get("other")) if b in known]
        job = _jobs(request).start(
            who.name,
            form.uploads,
            engine,
            bundles=tuple(dict.fromkeys(chosen)) or ("",),
            um_per_px=_scale(form.get("um_per_px")),
        )
    except Refused as refused:
        return _not_kept(request, refused)
    saw(request, "diagnosis asked for", job.id, images=str(len(form.uploads)))
    if not _partial(request):
        return _go(request, f"/bench/{job.id}")
    return render(request, "_job.html", job=job, warming=_warming(request))


def _scale(text: str) -> float | None:
    """Micrometres per pixel as typed. Raises Refused (422)."""
    if not text.strip():
        return None
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = 0.0
    if not MIN_UM_PER_PX <= value <= MAX_UM_PER_PX:
        raise Refused(422, "The scale is a number of micrometres per pixel, such as 0.25.")
    return value


@router.get("/bench/references")
def references(request: Request, who: Diagnoser) -> Response:
    """Cells of each class, from runs."""
    with told():
        found = scenes.references(_out(request))
    return render(request, "_references.html", references=found, some=any(cells for _, cells in found))


@router.get("/bench/references/{label}/{number}.webp")
def reference_picture(request: Request, label: str, number: int, who: Diagnoser) -> Response:
    """A reference cell."""
    with told():
        cells = dict(scenes.references(_out(request))).get(label, ())
    if not 0 <= number < len(cells):
        raise Refused(404, "There is no such reference.")
    headers = {"Cache-Control": "private, max-age=300"}
    return Response(drawing.webp(cells[number].picture), media_type="image/webp", headers=headers)


@router.get("/bench/{job_id}")
async def job_page(request: Request, job_id: str, who: Diagnoser) -> Response:
    """One upload."""
    return render(request, "job.html", "bench", job=_job(request, job_id, who), warming=_warming(request))


@router.get("/bench/{job_id}/progress")
async def job_progress(request: Request, job_id: str, who: Diagnoser) -> Response:
    """How far an upload is; answers when something has changed, or after a few seconds."""
    job = _job(request, job_id, who)
    async for _ in _first_change(job):
        break
    return render(request, "_job.html", job=job, warming=_warming(request))


async def _first_change(job: Job) -> Any:
    """Waits for a change, at most two seconds; a finished job does not change."""
    seen = 0
    async for version in job.changes(2.0):
        seen += 1
        if seen == 2 or job.done:
            yield version
            return


@router.post("/bench/{job_id}/forget")
async def job_forget(request: Request, job_id: str, who: Diagnoser) -> Response:
    """Forgets an upload at once."""
    _jobs(request).drop(job_id, who.name)
    return _go(request, "/bench")


@router.get("/bench/{job_id}/{number}")
async def bench_field(request: Request, job_id: str, number: int, who: Diagnoser, tile: int = 0) -> Response:
    """One answer with its picture."""
    job, item, finding = _item(request, job_id, number, who)
    base = path_of(request, f"/bench/{job_id}/{number}")
    scene = await asyncio.to_thread(scenes.of_finding, finding, tile, base, item.um_per_px)
    done = [n for n, i in enumerate(job.items) if i.finding is not None]
    at = done.index(number)
    same = [(n, i) for n, i in enumerate(job.items) if i.name == item.name and i.data is item.data]
    others = []
    for n, i in same:
        name = words.bundle_name(i.finding.bundle if i.finding else i.bundle)
        others.append((name, path_of(request, f"/bench/{job_id}/{n}"), i.finding, n == number))
    subject = scenes.of_item(item)
    return render(
        request, "bench_field.html", "bench", job=job, subject=subject, scene=scene, seconds=finding.seconds,
        earlier=done[at - 1] if at else None, later=done[at + 1] if at + 1 < len(done) else None,
        exports=KINDS, here_path=base, others=others if len(others) > 1 else (),
        versus_words=words.versus([i.finding for _, i in same]),
    )  # fmt: skip


@router.get("/bench/{job_id}/{number}/{picture}")
def bench_picture(request: Request, job_id: str, number: int, picture: str, who: Diagnoser, tile: int = 0) -> Response:
    """The picture with its layers, a layer of it, or an export."""
    _, item, finding = _item(request, job_id, number, who)
    if picture == "view":
        scene = scenes.of_finding(finding, tile, path_of(request, f"/bench/{job_id}/{number}"), item.um_per_px)
        return render(request, "_view.html", scene=scene)
    cells = scenes.cells_of(finding.cells, finding.tiles)
    if picture.startswith("export."):
        kind = picture.removeprefix("export.")
        saw(request, "export", f"{job_id}/{number}", format=kind)
        return _export(kind, f"leukoflow-{finding.sha256[:12]}", scenes.of_item(item), finding.tiles, cells, tile, who)
    return _picture(picture, finding.tiles, cells, tile)


# --- about, administration -------------------------------------------------------------------------------------------


@router.get("/about")
def about_page(request: Request, who: Viewer) -> Response:
    """What the numbers mean, the models and their limits."""
    engine = request.app.state.engine
    bundles = () if engine is None else engine.bundles
    return render(request, "about.html", "about", bundles=bundles, card=words.model_card())


@router.get("/admin")
def admin_page(request: Request, who: Admin) -> Response:
    """Users, tokens and the log."""
    return _admin(request)


def _admin(request: Request, error: str = "", done: str = "", secret: str = "", status: int = 200) -> Response:
    gate = gate_of(request)
    book = gate.accounts.book()
    checked = gate.trail.check()
    return render(
        request, "admin.html", "admin", status=status, error=error, done=done, secret=secret, users=book.users,
        tokens=book.tokens, roles=ROLES, scopes=SCOPES, min_password=MIN_PASSWORD, proxied=gate.settings.proxy.sign_in,
        audit=gate.trail.last(100), audit_count=checked.entries, audit_bad="; ".join(checked.problems[:3]),
    )  # fmt: skip


@router.post("/admin/{what}")
async def admin_change(
    request: Request,
    what: str,
    who: Admin,
    name: Annotated[str, Form(max_length=200)] = "",
    role: Annotated[str, Form(max_length=20)] = "",
    password: Annotated[str, Form(max_length=1000)] = "",
    token: Annotated[str, Form(max_length=40)] = "",
    owner: Annotated[str, Form(max_length=200)] = "",
    label: Annotated[str, Form(max_length=200)] = "",
    days: Annotated[str, Form(max_length=10)] = "90",
    scope: Annotated[list[str] | None, Form()] = None,
) -> Response:
    """A change to users or tokens."""
    gate, secret = gate_of(request), ""
    accounts = gate.accounts
    name = name.strip()
    try:
        match what:
            case "users":
                async with gate.hashing:
                    await asyncio.to_thread(accounts.add, name, role, password)
                done = f"{name} can now sign in."
            case "password":
                async with gate.hashing:
                    await asyncio.to_thread(accounts.set_password, name, password)
                done = f"{name} has a new password and is signed out everywhere."
            case "role":
                await asyncio.to_thread(accounts.set_role, name, role)
                done = f"{name} is now {role}."
            case "disable" | "enable":
                await asyncio.to_thread(accounts.set_disabled, name, what == "disable")
                done = f"{name} is disabled." if what == "disable" else f"{name} is enabled again."
            case "signout":
                await asyncio.to_thread(accounts.end_sessions, name)
                done = f"{name} is signed out everywhere."
            case "tokens":
                valid = float(days) if days.replace(".", "", 1).isdecimal() else 0.0
                made, secret = await asyncio.to_thread(accounts.add_token, owner, label, tuple(scope or ()), valid)
                name, done = made.owner, "The token has been created."
            case "revoke":
                await asyncio.to_thread(accounts.revoke_token, token)
                done = "The token has been revoked."
            case _:
                raise Refused(404, "There is no such change.")
    except AccountError as error:
        return await asyncio.to_thread(_admin, request, _sentence(error), status=422)
    details = {"user": name} if accounts.user(name) else {}
    saw(request, f"admin {what}", token if what == "revoke" else "", **details)
    if principal(request) is None:  # pragma: no cover - own sessions ended
        return _go(request, "/login")
    return await asyncio.to_thread(_admin, request, done=done, secret=secret)
