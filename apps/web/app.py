"""The application: assembles gate, pages, JSON API, templates and engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.templating import Jinja2Templates

from leukoflow.apps.web.api import router as api
from leukoflow.apps.web.api import runs as api_runs
from leukoflow.apps.web.api.problems import TITLES, problem
from leukoflow.apps.web.engine.engine import Engine
from leukoflow.apps.web.engine.errors import BusyError
from leukoflow.apps.web.engine.jobs import EngineLike, Jobs
from leukoflow.apps.web.gate.accounts import AccountError
from leukoflow.apps.web.gate.errors import Refused, SignInNeeded
from leukoflow.apps.web.gate.gate import Gate, gate_of
from leukoflow.apps.web.gate.guard import Guard, log
from leukoflow.apps.web.gate.principals import principal
from leukoflow.apps.web.gate.request import API, csrf_token, login_path, path_of
from leukoflow.apps.web.pages import router as pages
from leukoflow.apps.web.settings import WebSettings
from leukoflow.core.errors import LeukoflowError, NotFoundError, RequestError, RunBusyError, place_of
from leukoflow.runs.progress import now
from leukoflow.tasks.review import wording
from leukoflow.tasks.review.runs import warm

HERE = Path(__file__).parent
UPLOADS = frozenset({"/api/v1/diagnoses", "/bench"})
"""Paths that take large bodies."""


def create_app(settings: WebSettings, engine: EngineLike | None = None) -> FastAPI:
    """Create the web application. Without `engine` it starts and finally closes one with the settings' bundles."""
    app = FastAPI(
        title="leukoflow", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_life, root_path_in_servers=False,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.settings = settings
    app.state.gate = Gate(settings)
    app.state.jobs = Jobs(settings.uploads)
    app.state.engine = engine
    app.state.templates = _templates()
    app.include_router(pages.router, include_in_schema=False)
    app.include_router(api.router)
    app.include_router(api_runs.router)
    app.mount("/static", _Static(directory=HERE / "static", check_dir=False), name="static")
    for kind in (HTTPException, RequestValidationError, LeukoflowError):
        app.add_exception_handler(kind, failed)
    app.add_middleware(Guard, gate=app.state.gate, failed=failed, uploads=UPLOADS)
    return app


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    settings: WebSettings = app.state.settings
    ahead = asyncio.create_task(asyncio.to_thread(_read_ahead, settings.out))
    mine = None
    if app.state.engine is None and settings.bundles:
        mine = Engine(settings.bundles, settings.limits, workers=settings.workers)
        await mine.start()
        app.state.engine = mine
    try:
        yield
    finally:
        ahead.cancel()
        await app.state.jobs.close()
        if mine is not None:
            await mine.close()


def _read_ahead(out: str) -> None:
    """Open the newest run, so that the first reader in the morning does not wait for it."""
    with suppress(LeukoflowError, OSError):  # reported to the person who opens it
        warm(out)


def _templates() -> Jinja2Templates:
    """Return templates with autoescape, in which unknown names are errors; all have `path`, `csrf`, `who`, `as_of`."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return Jinja2Templates(env=environment, context_processors=[_context])


def _context(request: Request) -> dict[str, Any]:
    return {
        "path": lambda path: path_of(request, path),
        "csrf": lambda: csrf_token(request),
        "who": principal(request),
        "as_of": now(),
        "research_use": wording.RESEARCH_USE,
    }


async def failed(request: Request, error: Exception) -> Response:
    """Answer an exception: problem JSON for programs, a page for people."""
    status, detail, headers, errors = _explained(error)
    if not isinstance(error, HTTPException | RequestValidationError):
        if status >= 500:
            log.error("%s", place_of(error))
        if principal(request) is None:  # strangers learn nothing about this machine
            detail = "The server cannot answer at the moment; its log says why."
    here = request.scope["path"].removeprefix(gate_of(request).settings.root_path)
    if here.startswith(API):
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return problem(status, detail, headers, errors)
    if isinstance(error, SignInNeeded):
        target = login_path(request)
        if request.headers.get("hx-request"):
            return Response(status_code=401, headers={"HX-Redirect": target})
        return RedirectResponse(target, 303)
    context = {"status": status, "title": TITLES.get(status, TITLES[500]), "detail": detail}
    templates: Jinja2Templates = request.app.state.templates
    return templates.TemplateResponse(request, "error.html", context, status, headers)


def _explained(error: Exception) -> tuple[int, str, dict[str, str], Any]:
    match error:
        case RequestValidationError():
            # What was sent is not repeated: it may name a patient.
            errors = [{"at": ".".join(str(p) for p in e["loc"]), "message": e["msg"]} for e in error.errors()]
            return 422, "; ".join(f"{e['at']}: {e['message']}" for e in errors), {}, errors
        case HTTPException():
            detail = error.detail if isinstance(error, Refused) else TITLES.get(error.status_code, "") + "."
            return error.status_code, detail, dict(error.headers or {}), None
        case NotFoundError():
            return 404, _sentence(error), {}, None
        case RequestError() | AccountError():
            return 422, _sentence(error), {}, None
        case BusyError():
            return 503, _sentence(error), {"Retry-After": str(max(1, error.retry_after))}, None
        case RunBusyError():
            return 503, _sentence(error), {"Retry-After": "5"}, None
        case LeukoflowError():
            return 503, _sentence(error), {"Retry-After": "30"}, None
    return 500, "This is a bug in the program; the server's log says where. Nothing was changed.", {}, None


def _sentence(error: Exception) -> str:
    words = str(error)
    return f"{words[:1].upper()}{words[1:]}."


class _Static(StaticFiles):
    """Files of the application itself, the only ones that browsers may keep."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "public, max-age=3600"
        return response
