"""The server itself: its health, its models, and who is asking."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from leukoflow.apps.web.api.models import COMMON, Model
from leukoflow.apps.web.api.problems import documented
from leukoflow.apps.web.gate.errors import SignInNeeded
from leukoflow.apps.web.gate.principals import Principal, Viewer, principal
from leukoflow.apps.web.settings import SCOPES

router = APIRouter(prefix="/api/v1")


class Health(Model):
    """The state of the server."""

    status: Literal["ok"]
    version: str = Field(examples=["0.1.0"])
    diagnoses: bool = Field(description="whether single images can be diagnosed")


class Me(Model):
    """The user or program that asks."""

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
    """Say that the server answers. Needs no token."""
    return Health(status="ok", version=software_version(), diagnoses=request.app.state.engine is not None)


@router.get("/me", tags=["server"], responses=COMMON)
async def me(request: Request) -> Me:
    """Say whose token or session it is, and what it may do."""
    who = principal(request)
    if who is None:
        raise SignInNeeded
    return Me(name=who.name, role=who.role, scopes=[s for s in SCOPES if s in who.scopes], via=_via(who))


@router.get("/bundles", tags=["diagnosis"], responses=COMMON)
async def bundles(request: Request, who: Viewer) -> list[BundleOut]:
    """List the bundles that are loaded."""
    engine = request.app.state.engine
    return [] if engine is None else [_bundle(card) for card in engine.bundles]


def _bundle(card: Any) -> BundleOut:
    metrics = card.metrics
    words = [metrics] if isinstance(metrics, str) else [str(m) for m in metrics]
    return BundleOut(name=card.name, digest=card.digest, classes=list(card.classes), metrics=[w for w in words if w])


def _via(who: Principal) -> Literal["session", "proxy", "token"]:
    return "token" if who.via == "token" else "proxy" if who.via == "proxy" else "session"


def software_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version("leukoflow")
    except PackageNotFoundError:
        return "unknown"
