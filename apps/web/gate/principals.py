"""Principals (who is asking) and their permissions, as dependencies of handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from leukoflow.apps.web.gate.accounts import User
from leukoflow.apps.web.gate.errors import Refused, SignInNeeded
from leukoflow.apps.web.gate.gate import gate_of
from leukoflow.apps.web.settings import SCOPES_OF


@dataclass(frozen=True, slots=True)
class Principal:
    """The user or program that asks. `via` is `session`, `proxy` or `token`."""

    name: str
    role: str
    scopes: frozenset[str]
    via: str

    def may(self, scope: str) -> bool:
        """Return whether the scope is granted."""
        return scope in self.scopes


def principal_of(user: User, via: str) -> Principal:
    """Return the principal of a user, with all scopes of the user's role."""
    return Principal(user.name, user.role, SCOPES_OF[user.role], via)


def principal(request: Request) -> Principal | None:
    """Return who is asking; None if nobody is signed in."""
    found = request.scope["state"].get("principal")
    return found if isinstance(found, Principal) else None


def allowed(scope: str) -> Callable[[Request], Awaitable[Principal]]:
    """Return a dependency that admits principals with this scope. It raises SignInNeeded or Refused (403)."""

    async def check(request: Request) -> Principal:
        who = principal(request)
        if who is None:
            raise SignInNeeded
        if not who.may(scope):
            gate_of(request).trail.add(who.name, "refused", details={"scope": scope})
            raise Refused(403, f"Your role or token does not allow you to {_WORDS[scope]}; ask an administrator.")
        return who

    return check


_WORDS = {
    "read": "view runs",
    "diagnose": "diagnose images",
    "review": "record verdicts",
    "export": "export",
    "admin": "open Admin",
}
viewer = allowed("read")
diagnoser = allowed("diagnose")
reviewer = allowed("review")
exporter = allowed("export")
admin = allowed("admin")

Viewer = Annotated[Principal, Depends(viewer)]
Diagnoser = Annotated[Principal, Depends(diagnoser)]
Reviewer = Annotated[Principal, Depends(reviewer)]
Exporter = Annotated[Principal, Depends(exporter)]
Admin = Annotated[Principal, Depends(admin)]
