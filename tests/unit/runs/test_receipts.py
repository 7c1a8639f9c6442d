"""Counts and totals: the same sums as adding up by hand, whatever the order of the shards."""

from __future__ import annotations

from dataclasses import replace

from leukoflow.runs.receipts import REASONS, SLOWEST, Counts, RunTotals, StageTiming
from leukoflow.runs.records import Shard, ShardReceipt

FIRST = ShardReceipt(
    shard=Shard(0, 0, 16),
    predicted=10,
    abstained=3,
    rejected=2,
    quarantined=1,
    cells=90,
    labels=(4, 3, 2, 1),
    reasons=(("ambiguous", 3), ("out of focus", 2), ("truncated", 1)),
    seconds=4.5,
    timings=(StageTiming("prepare", 1.5, 16), StageTiming("classify", 3.0, 16)),
)
SECOND = replace(
    FIRST,
    shard=Shard(1, 16, 8),
    predicted=6,
    abstained=2,
    rejected=0,
    quarantined=0,
    cells=40,
    labels=(0, 6, 0, 0),
    reasons=(("ambiguous", 1), ("empty", 4)),
    seconds=0.25,
    timings=(StageTiming("classify", 0.25, 8),),
)


def test_counts_add_up() -> None:
    both = FIRST.counts + SECOND.counts
    assert both == Counts(16, 5, 2, 1, 0, 130, (4, 9, 2, 1))
    assert both.accounted == 24
    assert FIRST.counts.accounted == FIRST.rows == 16
    assert Counts() + both == both


def test_totals_of_two_shards() -> None:
    totals = RunTotals.of([FIRST, SECOND])
    assert totals.counts == FIRST.counts + SECOND.counts
    assert totals.frequent_reasons == (("ambiguous", 4), ("empty", 4), ("out of focus", 2), ("truncated", 1))
    assert totals.timings == (StageTiming("prepare", 1.5, 16), StageTiming("classify", 3.25, 24))
    assert totals.slowest == (("00000", 4.5), ("00001", 0.25))


def test_totals_of_nothing() -> None:
    totals = RunTotals.of([])
    assert (totals.counts, totals.frequent_reasons, totals.timings, totals.slowest) == (Counts(), (), (), ())


def test_lists_are_cut_and_the_first_of_equals_stays_first() -> None:
    receipts = [
        replace(SECOND, shard=Shard(i, 0, 8), seconds=float(i // 2), reasons=((f"kind {i}", 1 + i % 2),))
        for i in range(REASONS + 10)
    ]
    totals = RunTotals.of(receipts)
    last = len(receipts) - 2
    assert totals.slowest[:2] == ((f"{last:05d}", float(last // 2)), (f"{last + 1:05d}", float(last // 2)))
    assert len(totals.slowest) == SLOWEST
    assert len(totals.frequent_reasons) == REASONS
    assert totals.frequent_reasons[0] == ("kind 1", 2)
    assert len(totals.reasons) == REASONS + 10
