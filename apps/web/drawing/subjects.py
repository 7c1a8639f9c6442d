"""Subjects: what is reported about one field, from a run or from the bench."""

from __future__ import annotations

from leukoflow.apps.web import words
from leukoflow.apps.web.engine.jobs import Item
from leukoflow.apps.web.words import Subject
from leukoflow.core.errors import LeukoflowError
from leukoflow.runs.records import CLASSES, ScaleSource, Status
from leukoflow.tasks.inference.single import Examination
from leukoflow.tasks.report import numbers
from leukoflow.tasks.review import bundle_settings, reference_cells, runs, wording
from leukoflow.tasks.review import confidence as review_confidence
from leukoflow.tasks.review.confidence import Frequency
from leukoflow.tasks.review.lines import FieldLine
from leukoflow.tasks.review.reference_cells import ReferenceCell
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.wording import SHADOW, Scale

REFERENCES = 6
"""Cells of each class that are shown for comparison."""


def of_line(table: RunTable, line: FieldLine) -> Subject:
    """Return what is reported about a field of a run."""
    d, bundle = line.details, table.bundle[0]
    assert d is not None
    quality = []
    if d.focus is not None:
        quality.append(("Focus", f"{d.focus:.1f}"))
    if d.exposure is not None:
        quality.append(("Mean lightness", f"{d.exposure:.2f}"))
    facts = [("Slide", line.slide_title), ("Patient", line.patient), ("Site", line.site), ("Scanner", line.scanner)]
    return Subject(
        title=numbers.shown(line.image_key),
        status=str(line.status),
        reason=line.reason,
        label=line.label,
        probabilities=line.probabilities,
        prediction_set=line.prediction_set,
        ood=line.ood,
        width_px=d.width_px,
        height_px=d.height_px,
        um_per_px=None if d.um_per_px_source == ScaleSource.ASSUMED else d.um_per_px,
        source=d.um_per_px_source,
        scale=wording.scale_words(d.um_per_px, d.um_per_px_source, d.um_per_px_sd),
        n_cells=line.n_cells,
        quality=tuple(quality),
        remarks=tuple(numbers.shown(flag, 200) for flag in d.quality_flags),
        bundle=words.bundle_name(bundle),
        bundle_digest=d.bundle_digest,
        sha256=d.member_sha256,
        facts=tuple((k, numbers.shown(v, 120)) for k, v in facts if v),
        settings=bundle_settings.segment_settings(bundle),
        alpha=bundle_settings.alpha_of(bundle),
        max_ood=bundle_settings.max_ood_of(bundle),
        frequency=frequency_in(bundle, line.label, line.confidence, line.status),
        shadow=SHADOW if table.shadow_of is not None else "",
    )


def frequency_in(bundle: str, label: str | None, confidence: float | None, status: str) -> Frequency | None:
    """Return what the confidence of an answer means; None without an answer."""
    if label is None or confidence is None or status != Status.PREDICTED:
        return None
    document = bundle_settings.bundle_document(bundle) or {}
    return review_confidence.frequency(document.get("metrics") or {}, label, confidence)


def frequency_of(item: Item) -> Frequency | None:
    """Return what the confidence of an answer on the bench means; None without an answer."""
    found: Examination = item.diagnosis
    if found.label is None or not found.probabilities:
        return None
    return frequency_in(found.bundle, found.label, float(found.probabilities[CLASSES.index(found.label)]), found.status)


def caution_of(item: Item) -> str:
    """Return the caution for an answer on the bench that may rest on a wrong size; empty otherwise."""
    return _scale(item.diagnosis).caution


def why_of(item: Item) -> tuple[str, str, str]:
    """Return why an image has no answer: what, the likeliest cause with the remedy, and what was measured."""
    found: Examination = item.diagnosis
    return words.reason_words(found.reason, _scale(found), "bench", found.remarks)


def _scale(found: Examination) -> Scale:
    settings = bundle_settings.segment_settings(found.bundle)
    return Scale(found.width_px, found.height_px, found.scale.known, settings, str(found.scale.source))


def of_item(item: Item) -> Subject:
    """Return what is reported about an image on the bench."""
    found: Examination = item.diagnosis
    answered = found.status == Status.PREDICTED
    return Subject(
        title=numbers.shown(item.name),
        status=str(found.status),
        reason=found.reason,
        label=found.label if answered else None,
        probabilities=tuple(float(p) for p in found.probabilities),
        prediction_set=found.prediction_set if answered else (),
        ood=found.ood,
        width_px=found.width_px or None,
        height_px=found.height_px or None,
        um_per_px=found.scale.known,
        source=str(found.scale.source),
        scale=wording.scale_words(found.scale.um_per_px, str(found.scale.source), found.scale.sd),
        n_cells=0 if found.cells is None else len(found.cells),
        quality=words.quality_words(found.quality),
        remarks=tuple(numbers.shown(r, 200) for r in found.remarks),
        bundle=words.bundle_name(found.bundle),
        bundle_digest=found.bundle_digest,
        sha256=found.sha256,
        facts=(("File", f"{words.number(item.size)} bytes"),),
        settings=bundle_settings.segment_settings(found.bundle),
        alpha=bundle_settings.alpha_of(found.bundle),
        max_ood=bundle_settings.max_ood_of(found.bundle),
        frequency=frequency_of(item),
        where="bench",
    )


def references(out: str) -> tuple[tuple[str, tuple[ReferenceCell, ...]], ...]:
    """Return cells of each class from the newest finished run; empty without one."""
    latest = next((r for r in runs.list_runs(out) if r.state == "finished" and r.shadow_of is None), None)
    if latest is None:
        return ()
    found = []
    for label in CLASSES:
        try:
            found.append((label, reference_cells.reference_cells(out, latest.run_key, label, REFERENCES)))
        except LeukoflowError:
            found.append((label, ()))
    return tuple(found)
