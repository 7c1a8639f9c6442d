"""Verdicts of reviewers on fields and slides."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import Response

from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.principals import Reviewer
from leukoflow.apps.web.gate.request import path_of, saw
from leukoflow.apps.web.pages.fields import prediction_digest
from leukoflow.apps.web.pages.lists import list_request
from leukoflow.apps.web.pages.rendering import (
    not_saved,
    redirect,
    render,
    results_of,
    table_of,
    translate_errors,
    wants_fragment,
)
from leukoflow.core.errors import RequestError
from leukoflow.tasks.review import verdict_record, verdicts
from leukoflow.tasks.review.verdict_record import Action

router = APIRouter()

_DECISIONS = (Action.ACCEPT, Action.CORRECT)


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
    """Add a verdict on a field. A decision leads on to the next field of the list that needs one."""
    following: int | None = None
    try:
        table = table_of(request, run_key)
        with translate_errors():
            line = table.field(ordinal)
            if seen != prediction_digest(line):
                raise Refused(409, "The prediction has changed since you opened this page. Load the page again.")
            action, label = _parse_act(act)
            verdicts.add(
                results_of(request), table.verdict_on_field(ordinal, action, who.name, label, comment.strip() or None)
            )
            table = table_of(request, run_key)
            line = table.field(ordinal)
            asked = list_request(request, who, "fields")
            if action in _DECISIONS:
                following = table.undecided(asked.query, ordinal)
    except Refused as refused:
        return not_saved(request, refused)
    saw(request, "verdict", f"{run_key}/{ordinal}", action=str(action))
    target = f"/runs/{run_key}/fields/{ordinal}?{asked.link(page=None)}"
    if following is not None:
        target = f"/runs/{run_key}/fields/{following}?{asked.link(page=None, decided=ordinal)}"
    if not wants_fragment(request):
        return redirect(request, target)
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
    """Add a verdict on a slide as a whole."""
    try:
        table = table_of(request, run_key)
        with translate_errors():
            action, label = _parse_act(act)
            verdicts.add(
                results_of(request), table.verdict_on_slide(slide_key, action, who.name, label, comment.strip() or None)
            )
            table = table_of(request, run_key)
            slide = table.slide(slide_key)
            said = table.reviews.verdicts.of(verdict_record.slide_target(slide.grouping, slide.name))
    except Refused as refused:
        return not_saved(request, refused)
    saw(request, "verdict", f"{run_key}/{slide_key}", action=str(action))
    if not wants_fragment(request):
        return redirect(request, f"/runs/{run_key}/slides/{slide_key}")
    return render(request, "_standing.html", standing=slide.standing, said=said, saved=True, swap=True)


def _parse_act(act: str) -> tuple[Action, str | None]:
    """Parse `accept`, `correct:Pre`, `withdraw:Pre`, `flag`, `unflag` or `comment`. Raises RequestError."""
    name, _, label = act.partition(":")
    try:
        return Action(name), label or None
    except ValueError:
        raise RequestError("there is no such verdict") from None
