"""Fields summed up over the slides or patients that they belong to."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from scipy.special import betaincinv

from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.frame import ABSTAINED, Floats, Frame, Ints, Mask, finite_or_none
from leukoflow.tasks.review.lines import FieldCounts, Summary
from leukoflow.tasks.store.slides import MALIGNANT, mean_malignant_probability, urgency_of

LEVEL = 0.95
MIN_INTERVAL_FIELDS = 5
"""Answered fields from which an interval is given: with fewer, it says more of the even odds it starts from."""


def beta_interval(malignant: Floats, predicted: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Return the interval of the mean malignant probability after so many fields, from even odds: [n] and [n]."""
    a, b = 1.0 + malignant, 1.0 + predicted - malignant
    edge = (1.0 - level) / 2
    return betaincinv(a, b, edge), betaincinv(a, b, 1.0 - edge)


class Groups:
    """Sums over groups of fields: `codes` [n] names each field's group, -1 for none; k groups."""

    def __init__(self, frame: Frame, codes: Ints, k: int) -> None:
        self.frame, self.codes, self.k = frame, codes, k
        inside = codes >= 0
        self._predicted = inside & frame.predicted
        self.counts = np.stack([self._count(inside & (frame.status == s)) for s in range(4)], 1)
        self.predicted = self._count(self._predicted)
        self.sums = np.stack([self._sum(frame.p[:, c], self._predicted) for c in range(4)], 1)
        self.malignant: Floats = self.sums[:, MALIGNANT].sum(1)
        self.urgency = np.asarray(urgency_of(self.malignant, self.predicted), np.float64)
        self.malignant_fields = self._count(self._predicted & (frame.malignant > 0.5))
        self.cells = self._sum(frame.cells.astype(np.float64), inside).astype(np.int64)
        self.diagnosed = self._count(inside & frame.diagnosed)

    def _count(self, mask: Mask) -> Ints:
        return np.bincount(self.codes[mask], minlength=self.k).astype(np.int64)

    def _sum(self, values: Floats, mask: Mask) -> Floats:
        return np.asarray(np.bincount(self.codes[mask], weights=values[mask], minlength=self.k), np.float64)

    def _share(self, part: Floats | Ints, whole: Floats | Ints) -> Floats:
        """Divide; NaN where there is nothing to be a share of."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(np.asarray(whole) > 0, part / np.maximum(whole, 1e-300), np.nan), np.float64)

    @cached_property
    def mean_malignant(self) -> Floats:
        """Mean malignant probability of the predicted fields [k], NaN where there is none."""
        means = np.asarray(mean_malignant_probability(self.sums, np.maximum(self.predicted, 1)), np.float64)
        return np.where(self.predicted > 0, means, np.nan)

    @cached_property
    def answered_cells(self) -> Ints:
        """Cells of the predicted fields [k]."""
        return self._sum(self.frame.cells.astype(np.float64), self._predicted).astype(np.int64)

    @cached_property
    def uncertainty(self) -> Floats:
        """Share of diagnosed fields that are ambiguous or abstained from [k]."""
        return self._share(self._count((self.codes >= 0) & self.frame.ambiguous), self.diagnosed)

    @cached_property
    def entropy(self) -> Floats:
        """Mean entropy of the predicted fields [k]."""
        return self._share(self._sum(self.frame.entropy, self._predicted), self.predicted)

    @cached_property
    def label(self) -> Ints:
        """Likeliest class of the mean probabilities [k], -1 where nothing was predicted."""
        return np.where(self.predicted > 0, self.sums.argmax(1), -1) if self.k else np.zeros(0, np.int64)

    @cached_property
    def confidence(self) -> Floats:
        """Highest of the mean probabilities [k], 0 where nothing was predicted."""
        return self.sums.max(1) / np.maximum(self.predicted, 1) if self.k else np.zeros(0)

    @cached_property
    def first(self) -> Ints:
        """Row of each group's first field [k]."""
        out = np.zeros(self.k, np.int64)
        rows = np.flatnonzero(self.codes >= 0)[::-1]
        out[self.codes[rows]] = rows
        return out

    @cached_property
    def worst(self) -> Ints:
        """Row of each group's most malignant predicted field [k]; without one, of an abstained one, or the first."""
        rank = np.where(self.frame.predicted, 2.0 + np.nan_to_num(self.frame.malignant), 0.0)
        rank[self.frame.status == ABSTAINED] = 1.0
        rows = np.flatnonzero(self.codes >= 0)
        order = rows[np.lexsort((-rows, rank[rows]))]  # the best of each group comes last
        out = np.zeros(self.k, np.int64)
        out[self.codes[order]] = order
        return out

    def count(self, mask: Mask) -> Ints:
        """Count the fields of each group for which the mask holds [k]."""
        return self._count((self.codes >= 0) & mask)

    def summary(self, i: int, reviewed: int, corrected: int, flagged: int, urgency: float | None = None) -> Summary:
        """Sum up one group; `urgency` replaces that of all its fields together."""
        n = int(self.predicted[i])
        low, high = beta_interval(self.malignant[i : i + 1], self.predicted[i : i + 1].astype(np.float64))
        return Summary(
            counts=FieldCounts(*(int(c) for c in self.counts[i])),
            label=CLASSES[int(self.label[i])] if n else None,
            probabilities=tuple(float(v) / n for v in self.sums[i]) if n else (),
            urgency=float(self.urgency[i]) if urgency is None else urgency,
            mean_malignant_probability=finite_or_none(self.mean_malignant[i]),
            interval=(float(low[0]), float(high[0])) if n >= MIN_INTERVAL_FIELDS else None,
            malignant_fields=int(self.malignant_fields[i]),
            uncertainty=finite_or_none(self.uncertainty[i]),
            entropy=finite_or_none(self.entropy[i]),
            cells=int(self.cells[i]),
            answered_cells=int(self.answered_cells[i]),
            reviewed=reviewed,
            corrected=corrected,
            diagnosed=int(self.diagnosed[i]),
            flagged=flagged,
            worst=int(self.frame.ordinals[self.worst[i]]),
        )
