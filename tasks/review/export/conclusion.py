"""What the report of a slide or a patient concludes, in words: remarks that must be read first, then the answer."""

from __future__ import annotations

import numpy as np

from leukoflow.tasks.review.cautions import scale_caution
from leukoflow.tasks.review.lines import PatientLine, SlideLine, Summary
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.timeline import slide_labels
from leukoflow.tasks.review.wording import (
    BENIGN_BUT,
    CLASS_CAUTION,
    MEAN_MALIGNANT,
    RESEARCH_USE,
    SHADOW,
    UNFINISHED,
    mean_words,
    probability,
)
from leukoflow.tasks.store.slides import disagreement

CLASS_WORDS = {
    "Benign": "Benign (haematogones)",
    "Early": "Malignant, early pre-B",
    "Pre": "Malignant, pre-B",
    "Pro": "Malignant, pro-B",
}


def conclude(table: RunTable, line: SlideLine | PatientLine, name: str) -> str:
    """Write the conclusion on a slide or a patient; `name` is what it is called in there."""
    s = line.summary
    if s.label is None or s.mean_malignant_probability is None:
        found = f"{name}: no answer on any of {s.counts.fields:,} fields."
    else:
        but = outweighed(s)
        label = CLASS_WORDS[s.label] + (f", which {but}" if but else "")
        found = (
            f"{name}: likeliest class {label}; {MEAN_MALIGNANT.lower()} "
            f"{mean_words(s.mean_malignant_probability)} ({s.counts.predicted:,} answered fields, "
            f"{s.answered_cells:,} cells; {interval_words(s)}; no differential count); {s.malignant_fields:,} of the "
            f"answered fields have a malignant probability above one half; {s.counts.abstained:,} abstained, "
            f"{s.counts.rejected:,} rejected, {s.counts.quarantined:,} quarantined; {_reviewed(s)}. {CLASS_CAUTION}"
        )
    said = [
        SHADOW if table.shadow_of is not None else "",
        _mixed(table, line),
        _unfinished(table, line),
        found,
        _contradiction(table, line),
        scale_caution(table, line),
    ]
    if isinstance(line, SlideLine) and line.standing.decision is not None and line.standing.decision.said:
        said.append(f"A reviewer has labelled the slide: {CLASS_WORDS[line.standing.decision.said]}.")
    return f"{clean(' '.join(filter(None, said)))} {RESEARCH_USE}"


def clean(text: str) -> str:
    """Return a text as FHIR strings must be: without control characters, and never blank."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text).strip() or "-"


def outweighed(summary: Summary) -> str:
    """Say what stands behind Benign where malignancy as a whole is as probable or more; empty elsewhere."""
    if not summary.outweighed or summary.mean_malignant_probability is None:
        return ""
    return f"{BENIGN_BUT} {mean_words(summary.mean_malignant_probability)}"


def interval_words(summary: Summary) -> str:
    """Say the 95 % interval of the mean malignant probability, or why there is none."""
    if summary.interval is None:
        return "too few fields for an interval" if summary.counts.predicted else "no field was predicted"
    low, high = (probability(v) for v in summary.interval)
    return (
        f"95 % interval {low} to {high}, as if fields were independent; those of one slide are not, so it is too narrow"
    )


def _contradiction(table: RunTable, line: SlideLine | PatientLine) -> str:
    """Remark where the slides of a patient were given different labels."""
    if isinstance(line, SlideLine):
        return ""
    said = disagreement(slide_labels(table, table.rows_of(patient_key=line.patient_key)))
    return f"The slides do not agree: {said}" if said else ""


def _mixed(table: RunTable, line: SlideLine | PatientLine) -> str:
    """Remark where fields of several patients are on a slide."""
    if isinstance(line, SlideLine):
        if line.patients < 2:
            return ""
        return (
            f"Fields of {line.patients:,} patients are on this slide, so no patient is named: resolve this before "
            "reading."
        )
    frame, mine = table.frame, table.rows_of(patient_key=line.patient_key)
    others = (frame.patient >= 0) & (frame.patient != frame.patient[mine[0]])
    shared = len(np.intersect1d(frame.slide[mine], frame.slide[others]))
    if not shared:
        return ""
    are = "slide of this patient also holds" if shared == 1 else "slides of this patient also hold"
    return f"{shared:,} {are} fields of other patients: resolve this before reading."


def _unfinished(table: RunTable, line: SlideLine | PatientLine) -> str:
    """Remark where more images are to come, or have never arrived."""
    remarks = [] if table.finished else [UNFINISHED]
    if line.missing:
        were = "listed image was" if line.missing == 1 else "listed images were"
        remarks.append(f"{line.missing:,} {were} not received.")
    if table.reconciliation().truncated:
        remarks.append("The source of the run was incomplete: images may be absent.")
    return " ".join(remarks)


def _reviewed(s: Summary) -> str:
    """Say what reviewers have decided on the fields, which changes no figure."""
    if not s.reviewed:
        return f"no reviewer has decided on any of the {s.diagnosed:,} answered or abstained fields"
    return (
        f"reviewers decided on {s.reviewed:,} of the {s.diagnosed:,} answered or abstained fields, and gave "
        f"{s.corrected:,} of the answered ones another label"
        + ("; the figures are the model's, without these corrections" if s.corrected else "")
    )
