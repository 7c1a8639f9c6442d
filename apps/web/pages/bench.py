"""The bench, where single images are diagnosed.

An upload and its results live in memory, for minutes, and only for the person who sent it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from leukoflow.apps.web import words
from leukoflow.apps.web.drawing import layers, scenes, subjects
from leukoflow.apps.web.engine.jobs import Item, Job, jobs_of
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.principals import Diagnoser, Principal
from leukoflow.apps.web.gate.request import limit_uploads, path_of, saw
from leukoflow.apps.web.gate.uploads import read_form
from leukoflow.apps.web.pages.pictures import KINDS, export_response, picture_response
from leukoflow.apps.web.pages.rendering import not_saved, redirect, render, results_of, translate_errors, wants_fragment
from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.tasks.inference.single import Examination

router = APIRouter()


def _job(request: Request, job_id: str, who: Principal) -> Job:
    job = jobs_of(request).get(job_id, who.name)
    if job is None:
        raise Refused(
            404,
            "This result is no longer available: the bench keeps results for minutes, and only for you.",
        )
    return job


def _warming(request: Request) -> bool:
    """Return whether no worker has loaded its model yet."""
    engine = request.app.state.engine
    return engine is not None and engine.load().ready == 0


def _item(request: Request, job_id: str, number: int, who: Principal) -> tuple[Job, Item, Examination]:
    job = _job(request, job_id, who)
    if not 0 <= number < len(job.items) or job.items[number].diagnosis is None:
        raise Refused(404, "There is no such result, or not yet.")
    return job, job.items[number], job.items[number].diagnosis


@router.get("/bench")
async def bench_page(request: Request, who: Diagnoser) -> Response:
    """Show the form for images, and the uploads that are still kept."""
    engine, limits = request.app.state.engine, request.app.state.settings.uploads
    return render(
        request, "bench.html", "bench", bundles=() if engine is None else engine.bundles,
        jobs=jobs_of(request).of(who.name), max_files=limits.files, max_mb=limits.total_mb, file_mb=limits.file_mb,
        minutes=round(limits.job_minutes), warming=_warming(request),
    )  # fmt: skip


@router.post("/bench")
async def bench(request: Request, who: Diagnoser) -> Response:
    """Accept images and start to diagnose them."""
    try:
        engine, settings = request.app.state.engine, request.app.state.settings
        if engine is None:
            raise Refused(503, "This server was started without a model, so it cannot diagnose single images.", 3600)
        limit_uploads(request)
        form = await read_form(request, settings.uploads)
        if not form.uploads:
            raise Refused(422, "No image was chosen.")
        limit_uploads(request, len(form.uploads) - 1)
        known = {card.name for card in engine.bundles}
        chosen = [b for b in (form.get("bundle"), form.get("other")) if b in known]
        job = jobs_of(request).start(
            who.name,
            form.uploads,
            engine,
            bundles=tuple(dict.fromkeys(chosen)) or ("",),
            um_per_px=_scale(form.get("um_per_px")),
        )
    except Refused as refused:
        return not_saved(request, refused)
    saw(request, "diagnosis asked for", job.id, images=str(len(form.uploads)))
    if not wants_fragment(request):
        return redirect(request, f"/bench/{job.id}")
    return render(request, "_job.html", job=job, warming=_warming(request))


def _scale(text: str) -> float | None:
    """Parse micrometres per pixel as typed; None if empty. Raises Refused (422)."""
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
    """Show cells of each class, from runs."""
    with translate_errors():
        found = subjects.references(results_of(request))
    return render(request, "_references.html", references=found, some=any(cells for _, cells in found))


@router.get("/bench/references/{label}/{number}.webp")
def reference_picture(request: Request, label: str, number: int, who: Diagnoser) -> Response:
    """Return the picture of a reference cell."""
    with translate_errors():
        cells = dict(subjects.references(results_of(request))).get(label, ())
    if not 0 <= number < len(cells):
        raise Refused(404, "There is no such reference cell.")
    headers = {"Cache-Control": "private, max-age=300"}
    return Response(layers.webp(cells[number].picture), media_type="image/webp", headers=headers)


@router.get("/bench/{job_id}")
async def job_page(request: Request, job_id: str, who: Diagnoser) -> Response:
    """Show one upload."""
    return render(request, "job.html", "bench", job=_job(request, job_id, who), warming=_warming(request))


@router.get("/bench/{job_id}/progress")
async def job_progress(request: Request, job_id: str, who: Diagnoser) -> Response:
    """Show the progress of an upload; answer when something has changed, or after two seconds."""
    job = _job(request, job_id, who)
    async for _ in _first_change(job):
        break
    return render(request, "_job.html", job=job, warming=_warming(request))


async def _first_change(job: Job) -> Any:
    """Wait for a change, at most two seconds; a finished job does not change."""
    seen = 0
    async for version in job.changes(2.0):
        seen += 1
        if seen == 2 or job.done:
            yield version
            return


@router.post("/bench/{job_id}/forget")
async def job_forget(request: Request, job_id: str, who: Diagnoser) -> Response:
    """Delete an upload immediately."""
    jobs_of(request).drop(job_id, who.name)
    return redirect(request, "/bench")


@router.get("/bench/{job_id}/{number}")
async def bench_field(request: Request, job_id: str, number: int, who: Diagnoser, tile: int = 0) -> Response:
    """Show one answer with its picture."""
    job, item, diagnosis = _item(request, job_id, number, who)
    base = path_of(request, f"/bench/{job_id}/{number}")
    scene = await asyncio.to_thread(scenes.of_diagnosis, diagnosis, tile, base)
    done = [n for n, i in enumerate(job.items) if i.diagnosis is not None]
    at = done.index(number)
    same = [(n, i) for n, i in enumerate(job.items) if i.name == item.name and i.data is item.data]
    others = []
    for n, i in same:
        name = words.bundle_name(i.diagnosis.bundle if i.diagnosis else i.bundle)
        others.append((name, path_of(request, f"/bench/{job_id}/{n}"), i.diagnosis, n == number))
    subject = subjects.of_item(item)
    return render(
        request, "bench_field.html", "bench", job=job, subject=subject, scene=scene, seconds=diagnosis.seconds,
        earlier=done[at - 1] if at else None, later=done[at + 1] if at + 1 < len(done) else None,
        exports=KINDS, here_path=base, others=others if len(others) > 1 else (),
        versus_words=words.versus([i.diagnosis for _, i in same]),
    )  # fmt: skip


@router.get("/bench/{job_id}/{number}/{picture}")
def bench_picture(request: Request, job_id: str, number: int, picture: str, who: Diagnoser, tile: int = 0) -> Response:
    """Return the picture with its layers, one layer, or an export."""
    _, item, diagnosis = _item(request, job_id, number, who)
    if picture == "view":
        scene = scenes.of_diagnosis(diagnosis, tile, path_of(request, f"/bench/{job_id}/{number}"))
        return render(request, "_view.html", scene=scene)
    cells = scenes.cells_of(diagnosis.cells, diagnosis.tiles)
    if picture.startswith("export."):
        kind = picture.removeprefix("export.")
        saw(request, "export", f"{job_id}/{number}", format=kind)
        return export_response(
            kind, f"leukoflow-{diagnosis.sha256[:12]}", subjects.of_item(item), diagnosis.tiles, cells, tile, who
        )
    return picture_response(picture, diagnosis.tiles, cells, tile)
