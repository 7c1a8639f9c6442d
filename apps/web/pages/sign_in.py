"""Signing in and out, and the first start."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import Response

from leukoflow.apps.web.gate.accounts import MIN_PASSWORD
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.principals import principal
from leukoflow.apps.web.gate.request import safe_next
from leukoflow.apps.web.gate.sign_in import check_set_up, set_up, sign_in, sign_out
from leukoflow.apps.web.pages.rendering import redirect, render

router = APIRouter()


@router.get("/login")
async def login_page(request: Request, next: str = "/") -> Response:
    """Show the form to sign in."""
    if principal(request) is not None:
        return redirect(request, safe_next(next))
    return render(request, "login.html", next=safe_next(next), error="")


@router.post("/login")
async def login(
    request: Request,
    name: Annotated[str, Form(max_length=200)] = "",
    password: Annotated[str, Form(max_length=1000)] = "",
    next: Annotated[str, Form(max_length=500)] = "/",
) -> Response:
    """Sign in with name and password."""
    try:
        await sign_in(request, name.strip(), password)
    except Refused as refused:
        if refused.status_code not in (401, 429):
            raise
        answer = render(request, "login.html", next=safe_next(next), error=refused.detail, status=refused.status_code)
        answer.headers.update(refused.headers or {})
        return answer
    return redirect(request, safe_next(next))


@router.post("/logout")
async def logout(request: Request) -> Response:
    """End the session."""
    sign_out(request)
    return redirect(request, "/login")


@router.get("/setup")
async def setup_page(request: Request, key: str = "") -> Response:
    """Show the form that creates the first administrator."""
    check_set_up(request, key)
    return render(request, "setup.html", key=key, name="", error="", min_password=MIN_PASSWORD)


@router.post("/setup")
async def setup(
    request: Request,
    key: Annotated[str, Form(max_length=200)] = "",
    name: Annotated[str, Form(max_length=200)] = "",
    password: Annotated[str, Form(max_length=1000)] = "",
    again: Annotated[str, Form(max_length=1000)] = "",
) -> Response:
    """Create the first administrator."""
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
    return redirect(request, "/")
