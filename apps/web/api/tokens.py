"""API tokens, without their secrets."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Request

from leukoflow.apps.web.api.models import COMMON, FOUND, Model
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.gate import gate_of
from leukoflow.apps.web.gate.principals import Admin
from leukoflow.apps.web.gate.request import saw

router = APIRouter(prefix="/api/v1")


class TokenOut(Model):
    """A token without its secret."""

    id: str
    owner: str
    label: str
    scopes: list[str]
    created: str
    expires: str


@router.get("/tokens", tags=["server"], responses=COMMON)
async def tokens(request: Request, who: Admin) -> list[TokenOut]:
    """List all API tokens, without their secrets."""
    return [TokenOut.model_validate(t) for t in gate_of(request).accounts.book().tokens]


@router.delete("/tokens/{token}", tags=["server"], status_code=204, responses=FOUND)
async def revoke(
    request: Request,
    token: Annotated[str, Path(pattern=r"^[0-9a-f]{12}$")],
    who: Admin,
) -> None:
    """Revoke a token immediately."""
    accounts = gate_of(request).accounts
    if not any(t.id == token for t in accounts.book().tokens):
        raise Refused(404, "There is no token with that id.")
    await asyncio.to_thread(accounts.revoke_token, token)
    saw(request, "token revoked", token)
