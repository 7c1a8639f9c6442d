"""What all pages share: rendering, redirects, and errors in words for people.

Nothing of a patient stands in an address: runs, slides and patients have opaque keys, fields the ordinal of the plan,
and what somebody searches for is kept on the server (`apps.web.pages.lists`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from starlette.responses import RedirectResponse, Response

from leukoflow.apps.web import words
from leukoflow.apps.web.drawing import plots, subjects
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.request import path_of
from leukoflow.core.errors import LeukoflowError, NotFoundError, RequestError, RunBusyError
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.imaging import cytoplasm
from leukoflow.tasks.inference.single import STAGES
from leukoflow.tasks.report import numbers
from leukoflow.tasks.review import runs, wording
from leukoflow.tasks.review.table import RunTable

STAGE_WORDS = {
    "waiting": "Waiting",
    "decode": "Reading the image",
    "normalize": "Normalising the stain",
    "segment": "Finding cells",
    "extract": "Measuring features",
    "classify": "Classifying",
    "done": "Done",
}
_STATES = {"finished": "good", "running": "live", "failed": "bad", "killed": "bad", "damaged": "bad"}


def render(request: Request, template: str, here: str = "", /, status: int = 200, **context: Any) -> Response:
    """Render a page or fragment. `here` names the entry of the navigation that it belongs to."""
    shared = {
        "here": here,
        "root": path_of(request, ""),
        "classes": CLASSES,
        "class_name": wording.class_name,
        "class_notes": words.CLASS_NOTES,
        "status_words": words.STATUS_WORDS,
        "stage_words": STAGE_WORDS,
        "stages": STAGES,
        "stage_at": _stage_at,
        "reason_words": words.reason_words,
        "set_words": wording.set_words,
        "set_note": wording.SET_NOTE,
        "leaning": wording.LEANING,
        "mean_malignant": wording.MEAN_MALIGNANT,
        "mean_malignant_note": wording.MEAN_MALIGNANT_NOTE,
        "interval_note": wording.INTERVAL_NOTE,
        "attention_note": wording.ATTENTION_NOTE,
        "scale_caution": wording.SCALE_CAUTION,
        "mean_words": wording.mean_words,
        "measured": cytoplasm.measured,
        "ratio_words": cytoplasm.ratio_words,
        "frequency_of": subjects.frequency_of,
        "uncertain_of": words.uncertain_of,
        "class_caution": wording.CLASS_CAUTION,
        "caution_of": subjects.caution_of,
        "shown": numbers.shown,
        "bundle_name": words.bundle_name,
        "shares": plots.shares,
        "hundred": plots.hundred,
        "number": words.number,
        "percent": words.percent,
        "prob": words.prob,
        "sentence": words.sentence,
        "upload_words": words.upload_words,
        "why_of": subjects.why_of,
        "day": words.day,
        "moment": words.moment,
        "state_kind": lambda state: _STATES.get(state, "warn"),
    }
    templates = request.app.state.templates
    answer: Response = templates.TemplateResponse(request, template, shared | context, status)
    answer.headers.setdefault("Cache-Control", "no-store")
    return answer


def _stage_at(stage: str) -> int:
    """Return the number of a stage; -1 before the first."""
    return STAGES.index(stage) if stage in STAGES else (len(STAGES) if stage == "done" else -1)


def redirect(request: Request, path: str) -> Response:
    """Redirect (303) to a path of this application."""
    return RedirectResponse(path_of(request, path), 303)


def wants_fragment(request: Request) -> bool:
    """Return whether a script asks for a fragment instead of a page."""
    return "hx-request" in request.headers


def not_saved(request: Request, refused: Refused) -> Response:
    """Answer a refused change: a script gets the reason in a header, a form the error page (Refused is raised)."""
    if not wants_fragment(request):
        raise refused
    message = str(refused.detail).encode("ascii", "replace").decode()
    return Response(status_code=refused.status_code, headers={"X-Message": message, **(refused.headers or {})})


@contextmanager
def translate_errors() -> Iterator[None]:
    """Translate errors of tasks into refusals for people. Raises Refused."""
    try:
        yield
    except NotFoundError as error:
        raise Refused(404, error_sentence(error)) from None
    except RequestError as error:
        raise Refused(400, error_sentence(error)) from None
    except RunBusyError as error:
        raise Refused(503, error_sentence(error), 5) from None
    except LeukoflowError as error:
        raise Refused(503, error_sentence(error), 30) from None


def error_sentence(error: Exception) -> str:
    """Return an error's words as a sentence."""
    return words.sentence(error, 400)


def results_of(request: Request) -> str:
    """Return where the results of runs lie."""
    return str(request.app.state.settings.out)


def table_of(request: Request, run_key: str) -> RunTable:
    """Open a run. Raises Refused."""
    with translate_errors():
        return runs.open_run_table(results_of(request), run_key)
