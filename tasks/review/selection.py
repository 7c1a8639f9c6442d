"""Which lines a query asks for, and in which order: filtering, searching and sorting over a run's arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.frame import STATUSES, Floats, Ints, Mask
from leukoflow.tasks.review.groups import Groups
from leukoflow.tasks.review.query import Query, Sort
from leukoflow.tasks.review.reviews import Reviews
from leukoflow.tasks.review.snapshot import Snapshot

HELD_SELECTIONS = 64


class Selection:
    """Order of a run's fields, slides and patients as queries ask for them, given what people have said."""

    def __init__(self, run: Snapshot, reviews: Reviews) -> None:
        self._run, self._frame, self._reviews = run, run.frame, reviews

    def fields(self, query: Query) -> Ints:
        """Return the rows of the whole list of fields."""
        return self._kept("fields", query, self._order_fields)

    def slides(self, query: Query) -> Ints:
        """Return the codes of the whole list of slides."""
        return self._kept("slides", query, self._order_slides)

    def patients(self, query: Query) -> Ints:
        """Return the codes of the whole list of patients."""
        return self._kept("patients", query, self._order_patients)

    def neighbours(self, query: Query, ordinal: int) -> tuple[int | None, int | None]:
        """Return the ordinals of the fields before and after one in the list; None at its ends."""
        ordinals = self._frame.ordinals[self.fields(query)]
        places = np.flatnonzero(ordinals == ordinal)
        if not len(places):
            return None, (int(ordinals[0]) if len(ordinals) else None)
        at = int(places[0])
        before = int(ordinals[at - 1]) if at else None
        after = int(ordinals[at + 1]) if at + 1 < len(ordinals) else None
        return before, after

    def undecided(self, query: Query, ordinal: int) -> int | None:
        """Return the next field of the list that needs a decision, from its beginning again after the end.

        Only diagnosed fields need one. `ordinal` itself is never the answer. None without one.
        """
        whole = self._order_fields(replace(query, review=None))  # what was just decided may have left the list
        ordinals = self._frame.ordinals[whole]
        wanted = (self._frame.diagnosed & ~self._reviews.reviewed)[whole] & np.isin(whole, self.fields(query))
        found = np.flatnonzero(wanted & (ordinals != ordinal))
        if not len(found):
            return None
        at = np.flatnonzero(ordinals == ordinal)
        after = found[found > at[0]] if len(at) else found
        return int(ordinals[after[0] if len(after) else found[0]])

    def _kept(self, kind: str, query: Query, order: Callable[[Query], Ints]) -> Ints:
        """Return the order of the whole list, kept so that turning a page costs nothing."""
        about = (kind, replace(query, offset=0, limit=1), self._reviews.verdicts.head)
        kept, lock = self._run.selections, self._run.lock
        with lock:
            found = kept.get(about)
        if found is None:
            found = order(query)
            with lock:
                kept[about] = found
                while len(kept) > HELD_SELECTIONS:
                    kept.popitem(last=False)
        return found

    # Filters

    def _inside(self, query: Query) -> Mask:
        """Return which fields are at the site and scanner, of the slide and patient that are asked for [n]."""
        frame = self._frame
        keep = np.ones(len(frame), np.bool_)
        for value, codes, names in (
            (query.site, frame.site, frame.sites),
            (query.scanner, frame.scanner, frame.scanners),
        ):
            if value is not None:
                keep &= codes == (names.index(value) if value in names else -2)
        if query.slide is not None:
            keep &= frame.slide == self._run.slide_code(query.slide)
        if query.patient is not None:
            keep &= frame.patient == self._run.patient_code(query.patient)
        return keep

    def _in_slides(self, text: str) -> Mask:
        """Return which fields are on a slide whose grouping and name hold the text [n]."""
        return _at(_holding(self._frame.slides, text), self._frame.slide)

    def _of_patients(self, text: str) -> Mask:
        """Return which fields are of a patient whose pseudonym holds the text [n]."""
        return _at(_holding(self._frame.patients, text), self._frame.patient)

    # Orders

    def _order_fields(self, query: Query) -> Ints:
        frame, reviews = self._frame, self._reviews
        keep = self._inside(query)
        if query.label is not None:
            keep &= frame.answer == CLASSES.index(query.label)
        if query.status is not None:
            keep &= frame.status == STATUSES.index(str(query.status))
        if query.review is not None:
            keep &= reviews.select_fields(query.review)
        if query.text:
            keep &= _holding(frame.keys, query.text) | self._in_slides(query.text) | self._of_patients(query.text)
        rows = np.flatnonzero(keep)
        values: dict[Sort, Callable[[], Any]] = {
            Sort.URGENCY: lambda: frame.urgency,
            Sort.MALIGNANT: lambda: frame.malignant,
            Sort.LABEL: lambda: frame.answer.astype(np.float64),
            Sort.UNCERTAINTY: lambda: frame.entropy,
            Sort.CONFIDENCE: lambda: np.where(frame.answer >= 0, frame.p.max(1, initial=0.0), np.nan),
            Sort.CELLS: lambda: frame.cells.astype(np.float64),
            Sort.FIELDS: lambda: np.ones(len(frame)),
            Sort.REVIEWED: lambda: reviews.reviewed.astype(np.float64),
            Sort.ORDER: lambda: frame.ordinals.astype(np.float64),
            Sort.NAME: lambda: _alphabetical(frame.keys),
        }
        return rows[_order(values[query.sort]()[rows], query.descending)]

    def _order_slides(self, query: Query) -> Ints:
        slides, names = self._run.slides, [slide.partition(":")[2] for slide in self._frame.slides]
        keep = np.ones(slides.k, np.bool_)
        if query.review is not None:
            keep &= self._reviews.select_slides(query.review)
        if query.text:
            keep &= _holding(names, query.text) | (slides.count(self._of_patients(query.text)) > 0)
        return self._order_groups(
            query, slides, keep, names, lambda: slides.urgency, lambda: self._reviews.by_slide.reviewed
        )

    def _order_patients(self, query: Query) -> Ints:
        patients, names = self._run.patients, self._frame.patients
        keep = np.ones(patients.k, np.bool_)
        if query.review is not None:
            keep &= self._reviews.select_patients(query.review)
        if query.text:
            keep &= _holding(names, query.text) | (patients.count(self._in_slides(query.text)) > 0)
        return self._order_groups(
            query, patients, keep, names, lambda: self._run.patient_urgency, lambda: self._reviews.by_patient.reviewed
        )

    def _order_groups(
        self, query: Query, groups: Groups, keep: Mask, names: Sequence[str], urgency: Callable[[], Floats],
        reviewed: Callable[[], Ints],
    ) -> Ints:  # fmt: skip
        if query.site is not None or query.scanner is not None or query.slide is not None or query.patient is not None:
            keep &= groups.count(self._inside(query)) > 0
        if query.label is not None:
            keep &= groups.label == CLASSES.index(query.label)
        if query.status is not None:
            keep &= groups.counts[:, STATUSES.index(str(query.status))] > 0
        codes = np.flatnonzero(keep)
        values: dict[Sort, Callable[[], Any]] = {
            Sort.URGENCY: urgency,
            Sort.MALIGNANT: lambda: groups.mean_malignant,
            Sort.LABEL: lambda: groups.label.astype(np.float64),
            Sort.UNCERTAINTY: lambda: groups.uncertainty,
            Sort.CONFIDENCE: lambda: groups.confidence,
            Sort.CELLS: lambda: groups.cells.astype(np.float64),
            Sort.FIELDS: lambda: groups.counts.sum(1).astype(np.float64),
            Sort.REVIEWED: lambda: reviewed() / np.maximum(groups.diagnosed, 1),
            Sort.ORDER: lambda: groups.first.astype(np.float64),
            Sort.NAME: lambda: _alphabetical(pa.array(names, pa.string())),
        }
        return codes[_order(values[query.sort]()[codes], query.descending)]


def _holding(values: Sequence[str] | pa.ChunkedArray, text: str) -> Mask:
    """Return which values hold the text, whatever its case [n]."""
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(values, pa.string())
    if not len(values):
        return np.zeros(0, np.bool_)
    found = pc.fill_null(pc.match_substring(values, text, ignore_case=True), False)
    return np.asarray(
        found.to_numpy(zero_copy_only=False) if isinstance(found, pa.Array) else found.to_numpy(), np.bool_
    )


def _at(mask: Mask, codes: Ints) -> Mask:
    """Return the mask of what the codes stand for at each code; False for -1."""
    return np.append(mask, False)[codes]


def _alphabetical(values: pa.Array | pa.ChunkedArray) -> Floats:
    """Return the place of each value in the alphabetical order of all [n]."""
    out = np.zeros(len(values))
    out[np.asarray(pc.sort_indices(values))] = np.arange(len(values))
    return out


def _order(values: Floats, descending: bool) -> Ints:
    """Return the order of the values; what is not known comes last either way, and ties stay in the plan's order."""
    known = np.isfinite(values)
    keyed = np.where(known, -values if descending else values, np.inf)
    return np.argsort(keyed, kind="stable")
