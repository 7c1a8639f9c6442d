"""Administration: users, API tokens and the audit log."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import Response

from leukoflow.apps.web.gate.accounts import MIN_PASSWORD, AccountError
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.gate import gate_of
from leukoflow.apps.web.gate.principals import Admin, principal
from leukoflow.apps.web.gate.request import saw
from leukoflow.apps.web.pages.rendering import error_sentence, redirect, render
from leukoflow.apps.web.settings import ROLES, SCOPES

router = APIRouter()


@router.get("/admin")
def admin_page(request: Request, who: Admin) -> Response:
    """Show users, tokens and the log."""
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
    """Change users or tokens."""
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
                done = f"{name} now has the role {role}."
            case "disable" | "enable":
                await asyncio.to_thread(accounts.set_disabled, name, what == "disable")
                done = f"{name} has been disabled." if what == "disable" else f"{name} has been enabled again."
            case "signout":
                await asyncio.to_thread(accounts.end_sessions, name)
                done = f"{name} has been signed out everywhere."
            case "tokens":
                valid = float(days) if days.replace(".", "", 1).isdecimal() else 0.0
                made, secret = await asyncio.to_thread(accounts.add_token, owner, label, tuple(scope or ()), valid)
                name, done = made.owner, "The token has been created."
            case "revoke":
                await asyncio.to_thread(accounts.revoke_token, token)
                done = "The token has been revoked."
            case _:
                raise Refused(404, "There is no such action.")
    except AccountError as error:
        return await asyncio.to_thread(_admin, request, error_sentence(error), status=422)
    details = {"user": name} if accounts.user(name) else {}
    saw(request, f"admin {what}", token if what == "revoke" else "", **details)
    if principal(request) is None:  # pragma: no cover - own sessions ended
        return redirect(request, "/login")
    return await asyncio.to_thread(_admin, request, done=done, secret=secret)
