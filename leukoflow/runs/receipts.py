"""Count what became of a run's images, and add up what its shards have reported.

`Counts` is the one shape of such numbers, `RunTotals.of` the one way to get them from receipts: publishing a run,
verifying it, and every report of its progress use it. Receipts and manifest store the same numbers as fields of their
own, since their JSON is flat; their property `counts` gives them in this shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from leukoflow.runs.records import ShardReceipt

REASONS: Final = 50
"""Kinds of reasons that a manifest and a report list, the most frequent first."""

SLOWEST: Final = 10
"""Shards that a manifest and a report list, the slowest first."""


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Wall seconds of one stage over one shard, and how many images it served."""

    stage: str
    seconds: float
    images: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of images: the four statuses, those that never arrived, cells, and labels of the predicted ones.

    Adding two adds every number:

    >>> Counts(predicted=3, cells=70, labels=(1, 2, 0, 0)) + Counts(predicted=1, rejected=2, labels=(0, 0, 0, 1))
    Counts(predicted=4, abstained=0, rejected=2, quarantined=0, missing=0, cells=70, labels=(1, 2, 0, 1))
    """

    predicted: int = 0
    abstained: int = 0
    rejected: int = 0
    quarantined: int = 0
    missing: int = 0  # listed in the source's manifest, and not there: no images of the run
    cells: int = 0
    labels: tuple[int, int, int, int] = (0, 0, 0, 0)  # in the order of CLASSES

    @property
    def accounted(self) -> int:
        """Images that have a row: the four statuses together."""
        return self.predicted + self.abstained + self.rejected + self.quarantined

    def __add__(self, other: Counts) -> Counts:
        a, b = self.labels, other.labels
        return Counts(
            predicted=self.predicted + other.predicted,
            abstained=self.abstained + other.abstained,
            rejected=self.rejected + other.rejected,
            quarantined=self.quarantined + other.quarantined,
            missing=self.missing + other.missing,
            cells=self.cells + other.cells,
            labels=(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]),
        )


@dataclass(slots=True)
class RunTotals:
    """Sums over the receipts of shards, in the order in which they were added."""

    counts: Counts = field(default_factory=Counts)
    reasons: Counter[str] = field(default_factory=Counter)  # kind of reason -> images without a prediction
    shards: list[tuple[str, float]] = field(default_factory=list)  # (shard, seconds)
    _stages: dict[str, StageTiming] = field(default_factory=dict)

    @classmethod
    def of(cls, receipts: Iterable[ShardReceipt]) -> RunTotals:
        """Add up receipts. Seconds are floats, so their order counts for the last digit: give them in plan order."""
        totals = cls()
        for receipt in receipts:
            totals.add(receipt)
        return totals

    def add(self, receipt: ShardReceipt) -> None:
        """Add one more shard."""
        self.counts += receipt.counts
        self.reasons.update(dict(receipt.reasons))
        self.shards.append((receipt.shard.name, receipt.seconds))
        for t in receipt.timings:
            old = self._stages.get(t.stage, StageTiming(t.stage, 0.0, 0))
            self._stages[t.stage] = StageTiming(t.stage, old.seconds + t.seconds, old.images + t.images)

    @property
    def timings(self) -> tuple[StageTiming, ...]:
        """Seconds and images of each stage, summed over the shards."""
        return tuple(self._stages.values())

    @property
    def slowest(self) -> tuple[tuple[str, float], ...]:
        """The slowest shards with their seconds."""
        return tuple(sorted(self.shards, key=lambda shard: -shard[1])[:SLOWEST])

    @property
    def frequent_reasons(self) -> tuple[tuple[str, int], ...]:
        """The most frequent kinds of reasons with the number of their images."""
        return tuple(self.reasons.most_common(REASONS))
