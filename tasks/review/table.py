"""A run, opened for people: its lists, its lines one by one, what is stored of a field, and verdicts on it.

Keys that go into addresses are opaque: neither slides nor patients can be read off them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leukoflow.core.errors import NotFoundError, RequestError, StorageError
from leukoflow.runs.progress import ProgressReader
from leukoflow.runs.receipts import Counts
from leukoflow.runs.records import CLASSES, Status, read_reason
from leukoflow.runs.schema import CELLS, PREDICTIONS, as_cells
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.review.columns import translate_read_errors
from leukoflow.tasks.review.frame import Ints, finite_or_none
from leukoflow.tasks.review.keys import patient_key_of, run_key_of
from leukoflow.tasks.review.lines import FieldDetails, FieldLine, Page, PatientLine, Reconciliation, SlideLine
from leukoflow.tasks.review.query import EVERYTHING, Query
from leukoflow.tasks.review.selection import Selection
from leukoflow.tasks.review.snapshot import Snapshot
from leukoflow.tasks.review.verdict_record import Action, Standing, Verdict, Verdicts, moment
from leukoflow.tasks.store.tables import shard_name

T = TypeVar("T")
SHOWN = (
    "image_key", "patient_id", "site", "scanner", "status", "reason", "prediction_set", "ood_score",
)  # fmt: skip
"""Columns that the line of a field shows as they are."""


class RunTable:
    """A run as it was when it was opened. Of a run in progress: what was committed by then."""

    def __init__(self, out: str, run_id: str, snapshot: Snapshot, verdicts: Verdicts) -> None:
        self.out, self.run_id = out, run_id
        self.run_key = run_key_of(run_id)
        self.storage = open_storage(out).child(run_id)
        self.manifest, self.progress = snapshot.manifest, snapshot.progress
        self.frame = snapshot.frame
        self.reviews = snapshot.reviews(verdicts)
        self._snapshot = snapshot
        self._selection = Selection(snapshot, self.reviews)

    # What it is

    @property
    def stamp(self) -> str:
        """Differs when the run's predictions do."""
        return self._snapshot.stamp

    @property
    def shard_size(self) -> int:
        """Members of a shard."""
        return self._snapshot.shard_size

    @property
    def finished(self) -> bool:
        """Whether the run is."""
        return self.manifest is not None

    @property
    def shadow_of(self) -> str | None:
        """The run that this one only accompanies, for a trial of another bundle; None for any other."""
        source = self.manifest if self.manifest is not None else self.progress
        return None if source is None else source.shadow_of

    @property
    def bundle(self) -> tuple[str, str]:
        """Where the bundle is, and its digest."""
        if self.manifest is not None:
            return self.manifest.bundle, self.manifest.bundle_digest
        binding = ProgressReader(self.storage.root).binding()
        return binding.bundle, binding.bundle_digest

    @property
    def started_at(self) -> str:
        """When the run began, ISO 8601."""
        if self.manifest is not None:
            return self.manifest.started_at
        assert self.progress is not None
        return self.progress.started_at

    def sites(self) -> tuple[str, ...]:
        """Return the sites that lists can be filtered by, sorted."""
        return tuple(sorted(self.frame.sites))

    def scanners(self) -> tuple[str, ...]:
        """Return the scanners that lists can be filtered by, sorted."""
        return tuple(sorted(self.frame.scanners))

    def reconciliation(self) -> Reconciliation:
        """Return where every image is."""
        m, p, snapshot = self.manifest, self.progress, self._snapshot
        source: Any = m if m is not None else p
        counts: Counts = source.counts
        return Reconciliation(
            received=source.members,
            predicted=counts.predicted,
            abstained=counts.abstained,
            rejected=counts.rejected,
            quarantined=counts.quarantined,
            waiting=source.members - counts.accounted,
            missing=snapshot.missing,
            ignored=snapshot.ignored,
            truncated=snapshot.truncated,
            conflicts=m.conflicts if m is not None else 0,
            finished=m is not None,
            state="finished" if m is not None else source.state,
            balanced=m is not None and counts.accounted == m.members == len(self.frame),
            failed_shards=p.failed_shards if p is not None and m is None else (),
        )

    # Lists

    def slides(self, query: Query = EVERYTHING) -> Page[SlideLine]:
        """Return the page of slides that the query asks for."""
        return self._page(self._selection.slides(query), query, self._slide_line)

    def patients(self, query: Query = EVERYTHING) -> Page[PatientLine]:
        """Return the page of patients that the query asks for; fields without a patient are in none."""
        return self._page(self._selection.patients(query), query, self._patient_line)

    def fields(self, query: Query = EVERYTHING) -> Page[FieldLine]:
        """Return the page of fields that the query asks for."""
        return self._page(self._selection.fields(query), query, self._field_line)

    def neighbours(self, query: Query, ordinal: int) -> tuple[int | None, int | None]:
        """Return the ordinals of the fields before and after one in the list; None at its ends."""
        return self._selection.neighbours(query, ordinal)

    def undecided(self, query: Query, ordinal: int) -> int | None:
        """Return the next field of the list that needs a decision (`Selection.undecided`)."""
        return self._selection.undecided(query, ordinal)

    def rows_of(self, slide_key: str | None = None, patient_key: str | None = None) -> Ints:
        """Return the rows of the frame that belong to a slide, to a patient, or all of them. Raises NotFoundError."""
        inside = np.ones(len(self.frame), np.bool_)
        if slide_key is not None:
            inside &= self.frame.slide == self._snapshot.slide_code(slide_key)
        if patient_key is not None:
            inside &= self.frame.patient == self._snapshot.patient_code(patient_key)
        return np.flatnonzero(inside)

    def _page(self, order: Ints, query: Query, line: Callable[[int], T]) -> Page[T]:
        chosen = order[query.offset : query.offset + query.limit]
        return Page(tuple(line(int(i)) for i in chosen), len(order), query.offset, query.limit)

    # One line

    def slide(self, slide_key: str) -> SlideLine:
        """Return one slide. Raises NotFoundError."""
        return self._slide_line(self._snapshot.slide_code(slide_key))

    def patient(self, patient_key: str) -> PatientLine:
        """Return one patient. Raises NotFoundError."""
        return self._patient_line(self._snapshot.patient_code(patient_key))

    def field(self, ordinal: int) -> FieldLine:
        """Return one field with everything that is known of it. Raises NotFoundError."""
        line = self._field_line(self._snapshot.row_of(ordinal))
        full = self.stored_row(ordinal)
        details = FieldDetails(
            member_sha256=full["member_sha256"],
            bundle_digest=full["bundle_digest"],
            um_per_px=full["um_per_px"],
            um_per_px_source=full["um_per_px_source"],
            um_per_px_sd=full["um_per_px_sd"],
            um_per_px_stated=full["um_per_px_stated"],
            width_px=full["width_px"],
            height_px=full["height_px"],
            focus=full["focus"],
            exposure=full["exposure"],
            quality_flags=tuple(full["quality_flags"] or ()),
            shard=full["shard"],
            zarr_index=full["zarr_index"],
            n_tiles=full["n_tiles"],
            verdicts=self.reviews.verdicts.of(("image", line.image_key)),
        )
        return replace(line, details=details)

    def _slide_line(self, code: int) -> SlideLine:
        frame, snapshot, counts = self.frame, self._snapshot, self.reviews.by_slide
        grouping, _, name = frame.slides[code].partition(":")
        row = int(snapshot.slides.first[code])  # as `slides.parquet`: the first field names the site,
        own: Ints = frame.patient[(frame.slide == code) & (frame.patient >= 0)]  # the first that names one the patient
        patient = frame.patients[own[0]] if len(own) else None
        return SlideLine(
            slide_key=snapshot.slide_key(code),
            name=name,
            grouping=grouping,
            patient_key=None if patient is None else patient_key_of(patient),
            patient=patient,
            site=_name_of(frame.site[row], frame.sites),
            scanner=_name_of(frame.scanner[row], frame.scanners),
            summary=snapshot.slides.summary(
                code, int(counts.reviewed[code]), int(counts.corrected[code]), int(counts.flagged[code])
            ),
            standing=self.reviews.slide_standings.get(code, Standing()),
            rank=int(snapshot.slide_ranks[code]),
            missing=snapshot.missing_images.by_slide[frame.slides[code]],
            patients=len(np.unique(own)),
        )

    def _patient_line(self, code: int) -> PatientLine:
        frame, snapshot, counts = self.frame, self._snapshot, self.reviews.by_patient
        patients, slides, urgency = snapshot.patient_slides
        own = np.flatnonzero(patients == code)
        worst = own[int(np.argmax(urgency[own]))]
        return PatientLine(
            patient_key=patient_key_of(frame.patients[code]),
            patient=frame.patients[code],
            site=_name_of(frame.site[int(snapshot.patients.first[code])], frame.sites),
            slides=len(own),
            summary=snapshot.patients.summary(
                code, int(counts.reviewed[code]), int(counts.corrected[code]), int(counts.flagged[code]),
                float(urgency[worst]),
            ),
            worst_slide=snapshot.slide_key(int(slides[worst])),
            missing=snapshot.missing_images.by_patient[frame.patients[code]],
        )  # fmt: skip

    def _field_line(self, row: int) -> FieldLine:
        frame = self.frame
        stored = {name: frame.column(name)[row].as_py() for name in SHOWN}
        probabilities = tuple(float(v) for v in frame.p[row]) if np.isfinite(frame.p[row]).all() else ()
        patient, answered = stored["patient_id"], frame.answer[row] >= 0
        return FieldLine(
            ordinal=int(frame.ordinals[row]),
            image_key=stored["image_key"],
            slide_key=self._snapshot.slide_key(int(frame.slide[row])),
            slide=frame.slides[frame.slide[row]].partition(":")[2],
            patient_key=None if patient is None else patient_key_of(patient),
            patient=patient,
            site=stored["site"],
            scanner=stored["scanner"],
            status=Status(stored["status"]),
            reason=read_reason(stored["reason"]),
            label=CLASSES[frame.answer[row]] if answered else None,
            confidence=max(probabilities) if answered else None,
            probabilities=probabilities,
            prediction_set=tuple(stored["prediction_set"] or ()) if answered else (),
            ood=stored["ood_score"],
            n_cells=int(frame.cells[row]),
            urgency=float(frame.urgency[row]),
            uncertainty=finite_or_none(frame.entropy[row]),
            standing=self.reviews.standings.get(("image", stored["image_key"]), Standing()),
        )

    # What is stored of a field

    def cells(self, ordinal: int) -> pa.Table:
        """Read the cells of a field (`runs.schema.CELLS`), in the order of their ids. Raises NotFoundError."""
        row = self._snapshot.row_of(ordinal)
        key = self._snapshot.files.get(shard_name(ordinal // self.shard_size), "").replace("predictions/", "cells/", 1)
        if not key or not self.frame.diagnosed[row]:
            return CELLS.empty_table()
        return as_cells(self._read(key, row), self.run_id).sort_by("cell_id")

    def ordinal_of(self, image_key: str) -> int:
        """Return the place in the plan of an image. Raises NotFoundError where the run has none of that name."""
        row = pc.index(self.frame.keys, image_key).as_py()
        if row < 0:
            raise NotFoundError(f"run {self.run_id} has no image {image_key!r}")
        return int(self.frame.ordinals[row])

    def stored_row(self, ordinal: int) -> dict[str, Any]:
        """Read a field's whole row of `predictions/`, columns that its run lacks being None. Raises NotFoundError."""
        row = self._snapshot.row_of(ordinal)
        found = self._read(self._snapshot.files[shard_name(ordinal // self.shard_size)], row).to_pylist()
        if len(found) != 1:
            raise StorageError(f"run {self.run_id}: field {ordinal} is not in its part; `leukoflow verify` tells more")
        return {**dict.fromkeys(PREDICTIONS.names), **found[0], "reason": read_reason(found[0]["reason"])}

    def _read(self, key: str, row: int) -> pa.Table:
        """Read what a file holds of a field."""
        name = self.frame.keys[row].as_py()
        with translate_read_errors(self.run_id), self.storage.open(key) as file:
            return pq.read_table(file, filters=[("image_key", "=", name)])

    # Verdicts

    def verdict_on_field(
        self, ordinal: int, action: Action, who: str, label: str | None = None, comment: str | None = None
    ) -> Verdict:
        """Return a verdict on a field, with the prediction that it sees; for `tasks.review.verdicts.add`.

        A `withdraw` takes back the decision that stands; with `label`, only if that is its label. Raises NotFoundError,
        and RequestError where there is no (such) decision.
        """
        line = self._field_line(self._snapshot.row_of(ordinal))
        if action is Action.WITHDRAW:
            label = _withdrawn(line.standing, label)
        return Verdict(
            run_id=self.run_id,
            action=action,
            who=who,
            at=moment(),
            image_key=line.image_key,
            label=label,
            comment=comment,
            seen_status=str(line.status),
            seen_label=line.label,
            seen_confidence=line.confidence,
            seen_bundle_digest=self.bundle[1],
        )

    def verdict_on_slide(
        self, slide_key: str, action: Action, who: str, label: str | None = None, comment: str | None = None
    ) -> Verdict:
        """Return a verdict on a slide as a whole, with what its fields say together; else like `verdict_on_field`."""
        line = self.slide(slide_key)
        if line.in_no_folder and action in (Action.ACCEPT, Action.CORRECT):
            raise RequestError("these fields are in no folder and are no slide: label each of them on its own page")
        if action is Action.WITHDRAW:
            label = _withdrawn(line.standing, label)
        probabilities = line.summary.probabilities
        return Verdict(
            run_id=self.run_id,
            action=action,
            who=who,
            at=moment(),
            slide_id=line.name,
            grouping=line.grouping,
            label=label,
            comment=comment,
            seen_status=None,
            seen_label=line.summary.label,
            seen_confidence=max(probabilities) if probabilities else None,
            seen_bundle_digest=self.bundle[1],
        )


def _name_of(code: Any, names: Sequence[str]) -> str | None:
    return names[int(code)] if code >= 0 else None


def _withdrawn(standing: Standing, label: str | None) -> str:
    """Return the label of the decision that a withdrawal takes back. Raises RequestError."""
    stands = standing.decision.said if standing.decision is not None else None
    if stands is None:
        raise RequestError("there is no decision to withdraw here")
    if label is not None and label != stands:
        raise RequestError("another decision has been made in the meantime: load the page again to see it")
    return stands
