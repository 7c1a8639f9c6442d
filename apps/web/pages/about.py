"""What the numbers mean, the models and their limits."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from leukoflow.apps.web import words
from leukoflow.apps.web.gate.principals import Viewer
from leukoflow.apps.web.pages.rendering import render

router = APIRouter()


@router.get("/about")
def about_page(request: Request, who: Viewer) -> Response:
    """Explain what the numbers mean, the models and their limits."""
    engine = request.app.state.engine
    bundles = () if engine is None else engine.bundles
    return render(request, "about.html", "about", bundles=bundles, card=words.model_card())
