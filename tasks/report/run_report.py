"""`report.html`: what became of a run, on one page that needs nothing else. Works on unfinished runs too."""

from __future__ import annotations

from contextlib import ExitStack

from leukoflow.core.errors import StorageError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import ProgressReader
from leukoflow.runs.records import CLASSES, RunManifest
from leukoflow.tasks.report import charts
from leukoflow.tasks.report.figures import Painter
from leukoflow.tasks.report.page import render
from leukoflow.tasks.report.palette import AGAINST, FOR, attention_colour, colour_of
from leukoflow.tasks.report.survey import (
    KEYS_SHOWN,
    LOWEST,
    SLIDES_SHOWN,
    Survey,
    most_suspicious,
    part_keys,
    read_disagreements,
    read_slides,
    survey_predictions,
)
from leukoflow.tasks.report.totals import committed_shards, read_receipts, totals_of_manifest, totals_of_receipts
from leukoflow.tasks.review.bundle_settings import segment_settings
from leukoflow.tasks.review.wording import (
    BENIGN_BUT,
    MEAN_MALIGNANT,
    MEAN_MALIGNANT_NOTE,
    NO_ANSWER,
    RESEARCH_USE,
    answered_scale_note,
    scale_note,
)

SLIDES_OPEN = 15
"""Slides that are shown without unfolding the others."""

_SECTIONS = (
    ("slides", "Slides by urgency"),
    ("suspicious", "Most suspicious field of each slide, then others"),
    ("uncertain", "Least certain fields, answered or not"),
    ("distributions", "Distributions"),
    ("unpredicted", "Members without a prediction"),
    ("timings", "Timings"),
    ("provenance", "Provenance"),
)
_STATUS_MEANING = {
    "predicted": "answered: a label with its confidence",
    "abstained": "no answer: the model does not know",
    "rejected": "quality too poor to classify",
    "quarantined": "could not be read",
}


def build_report(root: str, manifest: RunManifest | None) -> str:
    """Build the page for the run at `root` (a storage URI); without a manifest it is labelled as of an unfinished run.

    Shows the pixels of about two dozen fields, read again from the source through the disposable decoder; where a
    field cannot be read any more, its mask is shown alone. Raises StorageError when there is no run at `root`, or none
    that has got as far as a plan.
    """
    reader = ProgressReader(root)
    storage = reader.storage
    progress = reader.read()
    if not reader.binding().is_planned:
        raise StorageError(
            f"run {progress.run_id} ended, or waits, before its source was planned, so there is nothing to report; "
            "`leukoflow status OUT RUN_ID` says why, and which command takes it up again"
        )
    receipts = list(read_receipts(storage, committed_shards(storage)))
    totals = totals_of_manifest(manifest) if manifest else totals_of_receipts(storage, progress, receipts)
    shards = [r.shard.name for r in receipts]
    keys = part_keys(manifest, "predictions", shards).values()
    survey = survey_predictions(storage, keys, segment_settings(totals.bundle))
    ranking = RunKey.SLIDES if manifest else RunKey.PARTIAL_SLIDES
    slides, disagreements = read_slides(storage, ranking), read_disagreements(storage, ranking)
    with ExitStack() as stack:
        painter = Painter(storage, totals.bundle, part_keys(manifest, "cells", shards), stack)
        suspicious = [painter.figure(row) for row in most_suspicious(survey, slides)]
        uncertain = [painter.figure(row) for row in survey.least_certain]
        notes = painter.notes
    counts = dict(totals.counts)
    return render(
        "run.html",
        sections=_SECTIONS,
        totals=totals,
        counts=counts,
        status_meaning=_STATUS_MEANING,
        finished=manifest is not None,
        progress=progress,
        answered_note=answered_scale_note(survey.guessed["predicted"], counts["predicted"], survey.settings),
        abstained_note=scale_note(survey.guessed["abstained"], counts["abstained"]),
        without=survey.without,
        slides=slides,
        slides_open=SLIDES_OPEN,
        slides_shown=SLIDES_SHOWN,
        disagreements=list(disagreements.items()),
        keys_shown=KEYS_SHOWN,
        suspicious=suspicious,
        uncertain=uncertain,
        notes=notes,
        labels=[(name, survey.labels[name]) for name in CLASSES],
        histogram=_histogram(survey),
        attention=[(attention_colour(weight), name) for weight, name in ((0.0, "low"), (0.5, "middle"), (1.0, "high"))],
        evidence={"for": FOR, "against": AGAINST},
        no_answer=NO_ANSWER,
        benign_but=BENIGN_BUT,
        mean_malignant=MEAN_MALIGNANT,
        mean_malignant_note=MEAN_MALIGNANT_NOTE[:1].lower() + MEAN_MALIGNANT_NOTE[1:],
        research_use=RESEARCH_USE,
    )


def _histogram(survey: Survey) -> str:
    """Draw fields by their highest probability, which is a confidence only where there is an answer."""
    if not survey.histogram.any():
        return ""
    return charts.histogram(
        [
            charts.Series(name, colour_of(name), column)
            for name, column in zip(("predicted", "abstained"), survey.histogram.T.tolist(), strict=True)
        ],
        charts.Axis("highest probability", LOWEST, 1.0),
        (0.25, 0.5, 0.75, 1.0),
        "Fields by their highest probability",
    )
