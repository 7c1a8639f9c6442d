"""Pages that span runs: a patient's course, and the agreement of reviewers with the model."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from leukoflow.apps.web.drawing import plots
from leukoflow.apps.web.gate.principals import Viewer
from leukoflow.apps.web.gate.request import saw
from leukoflow.apps.web.pages.rendering import render, results_of, translate_errors
from leukoflow.tasks.review import agreement, timeline

router = APIRouter()


@router.get("/patients/{patient_key}")
def patient_page(request: Request, patient_key: str, who: Viewer) -> Response:
    """Show a patient's course over runs."""
    with translate_errors():
        course = timeline.timeline(results_of(request), patient_key)
    saw(request, "patient", patient_key)
    plot = plots.timeline_svg(course.points)
    return render(request, "patient.html", "runs", course=course, plot=plot, patient_key=patient_key)


@router.get("/agreement")
def agreement_page(request: Request, who: Viewer) -> Response:
    """Show how verdicts agree with predictions."""
    with translate_errors():
        found = agreement.agreement(results_of(request))
    saw(request, "agreement")
    return render(request, "agreement.html", "agreement", found=found, plot=plots.weeks_svg(found.weeks))
