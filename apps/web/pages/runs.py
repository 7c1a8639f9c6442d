"""Runs, with their worklists, slides and export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Form, Request
from starlette.responses import Response, StreamingResponse

from leukoflow.apps.web import words
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.principals import Exporter, Viewer
from leukoflow.apps.web.gate.request import saw
from leukoflow.apps.web.pages.lists import list_request, searches
from leukoflow.apps.web.pages.rendering import redirect, render, results_of, table_of, translate_errors, wants_fragment
from leukoflow.core.errors import RequestError
from leukoflow.tasks.review import cautions, runs, verdict_record
from leukoflow.tasks.review.export import stream
from leukoflow.tasks.review.query import Query, Review

router = APIRouter()

TABS = ("slides", "patients", "fields")


@router.get("/")
def runs_page(request: Request, who: Viewer) -> Response:
    """Show all runs, newest first."""
    with translate_errors():
        found = runs.list_runs(results_of(request))
    saw(request, "runs")
    return render(request, "runs.html", "runs", runs=found, out_is_empty=not found)


@router.get("/runs/{run_key}/line")
def run_line(request: Request, run_key: str, who: Viewer) -> Response:
    """Show one entry of the list of runs; a run in progress asks for it again."""
    with translate_errors():
        found = [r for r in runs.list_runs(results_of(request)) if r.run_key == run_key]
    if not found:
        raise Refused(404, "This run no longer exists.")
    return render(request, "_run_line.html", run=found[0])


@router.get("/runs/{run_key}")
def run_page(request: Request, run_key: str, who: Viewer, tab: str = "slides") -> Response:
    """Show the worklist of a run."""
    table = table_of(request, run_key)
    tab = tab if tab in TABS else "slides"
    asked = list_request(request, who, tab)
    with translate_errors():
        totals = {name: getattr(table, name)(Query(limit=1)).total for name in TABS}
        page = getattr(table, tab)(asked.query)
    if not wants_fragment(request):
        saw(request, "worklist", run_key, tab=tab)
    context: dict[str, Any] = {
        "run": table, "run_key": run_key, "tab": tab, "tabs": TABS, "totals": totals, "page": page, "asked": asked,
        "reviews": tuple(Review), "statuses": words.STATUSES, "recon": table.reconciliation(),
        "guessed": cautions.guessed_fields(table, page.items) if tab == "fields" else frozenset(),
    }  # fmt: skip
    return render(request, "_list.html" if wants_fragment(request) else "run.html", "runs", **context)


@router.post("/runs/{run_key}/find")
def find(
    request: Request,
    run_key: str,
    who: Viewer,
    tab: Annotated[str, Form(max_length=20)] = "slides",
    text: Annotated[str, Form(max_length=200)] = "",
    was: Annotated[str, Form(max_length=2000)] = "",
) -> Response:
    """Start a search: the term stays on the server, and the address has a key for it."""
    parameters = {
        k: v for k, v in parse_qsl(was) if k in ("label", "status", "site", "scanner", "review", "sort", "order")
    }
    if text.strip():
        parameters["find"] = searches.put(who.name, text.strip())
    tab = tab if tab in TABS else "slides"
    key = run_key if run_key.isalnum() else ""
    return redirect(request, f"/runs/{key}?{urlencode({'tab': tab} | parameters)}")


@router.get("/runs/{run_key}/reconciliation")
def reconciliation(request: Request, run_key: str, who: Viewer) -> Response:
    """Show the totals of a run in progress; once it has finished, have the whole page reloaded."""
    table = table_of(request, run_key)
    recon = table.reconciliation()
    answer = render(request, "_recon.html", run=table, run_key=run_key, recon=recon)
    if recon.finished:
        answer.headers["HX-Refresh"] = "true"
    return answer


@router.get("/runs/{run_key}/slides/{slide_key}")
def slide_page(request: Request, run_key: str, slide_key: str, who: Viewer) -> Response:
    """Show one slide: its summary, and each of its fields."""
    table = table_of(request, run_key)
    asked = list_request(request, who, "fields", slide=slide_key)
    with translate_errors():
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
    """Export a run, one of its slides or one of its patients."""
    table = table_of(request, run_key)
    with translate_errors():
        try:
            form = stream.Format(kind)
        except ValueError:
            raise RequestError(f"there is no export of this kind; there are {', '.join(stream.Format)}") from None
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
