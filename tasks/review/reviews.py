"""What people have said of a run, as arrays over its fields, slides and patients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.tasks.review.frame import Frame, Ints, Mask
from leukoflow.tasks.review.groups import Groups
from leukoflow.tasks.review.query import Review
from leukoflow.tasks.review.verdict_record import Standing, Verdicts


@dataclass(frozen=True, slots=True, eq=False)
class ReviewCounts:
    """Fields of k groups that people have said something of, each [k]."""

    reviewed: Ints  # diagnosed fields with a decision
    corrected: Ints
    flagged: Ints


class Reviews:
    """One state of a run's verdicts: the masks `reviewed`, `flagged` and `corrected` over its fields [n], and more."""

    def __init__(self, verdicts: Verdicts, frame: Frame, slides: Groups, patients: Groups) -> None:
        self.verdicts = verdicts
        self.standings = verdicts.standings()
        self._frame, self._slides, self._patients = frame, slides, patients
        self.reviewed, self.flagged, self.corrected = (np.zeros(len(frame), np.bool_) for _ in range(3))
        named = [name for kind, name in self.standings if kind == "image"]
        if not named or not len(frame):
            return
        places = pc.index_in(pa.array(named, pa.string()), frame.keys.combine_chunks()).to_pylist()
        for name, row in zip(named, places, strict=True):
            if row is None:  # of a field that is not committed (yet)
                continue
            standing = self.standings[("image", name)]
            self.reviewed[row] = standing.decision is not None
            self.flagged[row] = standing.flagged
            self.corrected[row] = standing.decision is not None and standing.decision.corrects

    @cached_property
    def slide_standings(self) -> dict[int, Standing]:
        """What was said of slides as wholes, by the code of the slide."""
        wanted = {name: standing for (kind, name), standing in self.standings.items() if kind == "slide"}
        if not wanted:
            return {}
        return {i: wanted[name] for i, name in enumerate(self._frame.slides) if name in wanted}

    @cached_property
    def by_slide(self) -> ReviewCounts:
        """Counts of each slide's fields."""
        return self._count(self._slides)

    @cached_property
    def by_patient(self) -> ReviewCounts:
        """Counts of each patient's fields."""
        return self._count(self._patients)

    def _count(self, groups: Groups) -> ReviewCounts:
        return ReviewCounts(
            groups.count(self.reviewed & self._frame.diagnosed),
            groups.count(self.corrected),
            groups.count(self.flagged),
        )

    def select_fields(self, review: Review) -> Mask:
        """Return which fields are in a state of review [n]."""
        return _select(review, self.reviewed, self.flagged, self.corrected)

    def select_slides(self, review: Review) -> Mask:
        """Return which slides are: by all of their fields, or by what was said of them as wholes [k]."""
        counts = self.by_slide
        done, flagged, corrected = _all_done(counts, self._slides), counts.flagged > 0, counts.corrected > 0
        for i, standing in self.slide_standings.items():
            done[i] |= standing.decision is not None
            flagged[i] |= standing.flagged
            corrected[i] |= standing.decision is not None and standing.decision.corrects
        return _select(review, done, flagged, corrected)

    def select_patients(self, review: Review) -> Mask:
        """Return which patients are, by all of their fields [k]."""
        counts = self.by_patient
        return _select(review, _all_done(counts, self._patients), counts.flagged > 0, counts.corrected > 0)


def _all_done(counts: ReviewCounts, groups: Groups) -> Mask:
    return np.asarray((counts.reviewed >= groups.diagnosed) & (groups.diagnosed > 0), np.bool_)


def _select(review: Review, reviewed: Mask, flagged: Mask, corrected: Mask) -> Mask:
    return {
        Review.REVIEWED: reviewed,
        Review.UNREVIEWED: ~reviewed,
        Review.FLAGGED: flagged,
        Review.CORRECTED: corrected,
    }[review]
