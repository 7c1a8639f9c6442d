"""A patient's course over the runs of an output folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.core.errors import LeukoflowError, NotFoundError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.columns import read_plan_column, translate_read_errors
from leukoflow.tasks.review.frame import Ints
from leukoflow.tasks.review.keys import patient_key_of
from leukoflow.tasks.review.lines import RunLine, Summary
from leukoflow.tasks.review.loading import load_finished
from leukoflow.tasks.review.public import INTERNAL, described
from leukoflow.tasks.review.run_cache import RunCache, cache_of
from leukoflow.tasks.review.runs import list_runs, open_run
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.store.slides import disagreement


@dataclass(frozen=True, slots=True)
class TimelinePoint:
    """A patient in one run. `at` is when the run began: the data format knows no date of the blood."""

    run_key: str
    run_id: str
    at: str
    finished: bool
    slides: int
    summary: Summary
    corrected: int = field(metadata=described("answered fields that reviewers have labelled otherwise"))
    bundle_digest: str
    same_bundle: bool = field(metadata=described("as the point before: only then are the two made by the same measure"))
    same_images: bool = field(metadata=described("as the point before: then the two are no course"))
    missing: int = field(metadata=INTERNAL)  # images that the manifest lists for the patient and were not received
    patient: str = field(metadata=INTERNAL)  # the pseudonym
    # Slide, its label and how many of its fields were predicted, over the patient's fields alone:
    slide_labels: tuple[tuple[str, str | None, int], ...] = field(metadata=INTERNAL)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A patient's course over runs, the oldest first; shadow runs are left out."""

    patient_key: str
    patient: str
    points: tuple[TimelinePoint, ...]
    unread: tuple[str, ...] = field(metadata=described("runs that could not be read"))
    remarks: tuple[str, ...] = field(
        metadata=described("where runs, or the slides of a run, do not agree on the class")
    )


def timeline(out: str, patient_key: str) -> Timeline:
    """Read a patient's course over the runs of an output folder. Raises NotFoundError where no run has the patient."""
    cache = cache_of(out)
    points: list[TimelinePoint] = []
    unread: list[str] = []
    name = ""
    earlier_digests: Callable[[], list[str]] = list  # of the point before
    for line in reversed(list_runs(out)):
        if line.shadow_of is not None or line.state == "damaged":
            unread += [line.run_id] if line.state == "damaged" else []
            continue
        try:
            name = _patients_of(cache, line.run_id).get(patient_key, "")
            if not name:
                continue
            table = _open_patient(cache, line.run_id, name)
            rows = table.rows_of(patient_key=patient_key)
            digests = partial(_digests, table, rows)
            before = points[-1] if points else None
            # Digests are read only where they can be the same.
            same = (
                before is not None
                and before.summary.counts.fields == len(rows)
                and digests() == earlier_digests() != []
            )
            point = _point(line, table, patient_key, rows, before, same)
        except NotFoundError:
            continue  # not done yet, or deleted meanwhile
        except LeukoflowError:
            unread.append(line.run_id)
            continue
        earlier_digests = digests
        points.append(point)
    if not points:
        raise NotFoundError("no run here knows this patient (any more)")
    return Timeline(patient_key, points[-1].patient, tuple(points), tuple(unread), course_remarks(points))


def _point(
    line: RunLine, table: RunTable, patient_key: str, rows: Ints, before: TimelinePoint | None, same_images: bool
) -> TimelinePoint:
    patient = table.patient(patient_key)
    return TimelinePoint(
        run_key=line.run_key,
        run_id=line.run_id,
        at=line.started_at,
        finished=table.finished,
        slides=patient.slides,
        summary=patient.summary,
        corrected=patient.summary.corrected,
        bundle_digest=line.bundle_digest,
        same_bundle=before is None or before.bundle_digest == line.bundle_digest,
        same_images=same_images,
        missing=patient.missing,
        patient=patient.patient,
        slide_labels=slide_labels(table, rows),
    )


def _digests(table: RunTable, rows: Ints) -> list[str]:
    """Return the digests of the images of some rows, sorted; none where one is not known."""
    found = table.frame.column("member_sha256").take(pa.array(rows)).to_pylist()
    return [] if None in found else sorted(found)


def slide_labels(table: RunTable, rows: Ints) -> tuple[tuple[str, str | None, int], ...]:
    """Return the slides that some rows are on, in order: name, label of these rows, how many of them were predicted."""
    frame = table.frame
    found: list[tuple[str, str | None, int]] = []
    for code in np.unique(frame.slide[rows]).tolist():
        own = rows[frame.slide[rows] == code]
        predicted = own[frame.predicted[own]]
        label = CLASSES[int(frame.p[predicted].sum(0).argmax())] if len(predicted) else None
        found.append((frame.slides[code].partition(":")[2], label, len(predicted)))
    return tuple(found)


def course_remarks(points: Sequence[TimelinePoint]) -> tuple[str, ...]:
    """Say in sentences where a patient's runs, or the slides of one run, were given different labels."""
    remarks = []
    if said := disagreement((p.run_id, p.summary.label, p.summary.counts.predicted) for p in points):
        bundles = len({p.bundle_digest for p in points if p.summary.label})
        models = " Not all of these runs used the same model." if bundles > 1 else ""
        remarks.append(f"Runs do not agree on this patient: {said}{models}")
    for point in points:
        if said := disagreement(point.slide_labels):
            remarks.append(f"Slides of run {point.run_id} do not agree: {said}")
    return tuple(remarks)


def _open_patient(cache: RunCache, run_id: str, patient: str) -> RunTable:
    """Open a run of which nothing but a patient's rows need be there; such a one is not held."""
    run = cache.storage.child(run_id)
    with translate_read_errors(run_id):
        try:
            stamp = run.stamp(RunKey.MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return open_run(cache, run_id)
        held = cache.snapshots.get(run_id)
        if (held is not None and held.stamp == stamp) or run.exists(RunKey.INTENT):
            return open_run(cache, run_id)
        snapshot = load_finished(run, run_id, stamp, patient)
        return RunTable(cache.out, run_id, snapshot, cache.verdict_reader(run_id).read())


def _patients_of(cache: RunCache, run_id: str) -> Mapping[str, str]:
    """Return keys and pseudonyms of a run's patients, from its plan alone."""
    run = cache.storage.child(run_id)
    with translate_read_errors(run_id):
        stamp = run.stamp(RunKey.PLAN)
        kept = cache.patients.get(run_id)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        column = read_plan_column(run, "patient_id")
    found = {patient_key_of(p): p for p in pc.unique(column).to_pylist() if p is not None}
    cache.patients[run_id] = (stamp, found)
    return found
