"""Totals of any receipts: their order does not matter to what is counted, and halves add up to the whole."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from leukoflow.runs.receipts import Counts, RunTotals, StageTiming
from leukoflow.runs.records import Shard, ShardReceipt

NUMBERS = st.integers(0, 10_000)
SECONDS = st.integers(0, 4000).map(lambda quarters: quarters / 4)  # exact, so that sums do not depend on their order
KINDS = ("ambiguous", "out of focus", "truncated", "too few cells")
STAGES = ("prepare", "segment", "extract", "classify")


@st.composite
def receipts(draw: st.DrawFn) -> list[ShardReceipt]:
    made = []
    for ordinal in range(draw(st.integers(0, 8))):
        predicted, abstained, rejected, quarantined, cells = draw(st.tuples(*[NUMBERS] * 5))
        reasons = draw(st.dictionaries(st.sampled_from(KINDS), NUMBERS))
        timings = draw(st.dictionaries(st.sampled_from(STAGES), st.tuples(SECONDS, NUMBERS)))
        made.append(ShardReceipt(
            Shard(ordinal, 16 * ordinal, 16), predicted, abstained, rejected, quarantined, cells,
            draw(st.tuples(*[NUMBERS] * 4)), tuple(reasons.items()), draw(SECONDS),
            tuple(StageTiming(stage, *numbers) for stage, numbers in timings.items()),
        ))  # fmt: skip
    return made


def stages(totals: RunTotals) -> dict[str, tuple[float, int]]:
    return {t.stage: (t.seconds, t.images) for t in totals.timings}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data(), receipts())
def test_the_order_of_receipts_does_not_change_what_is_counted(data: st.DataObject, given_: list[ShardReceipt]) -> None:
    plain, mixed = RunTotals.of(given_), RunTotals.of(data.draw(st.permutations(given_)))
    assert mixed.counts == plain.counts
    assert mixed.reasons == plain.reasons
    assert stages(mixed) == stages(plain)
    assert sorted(mixed.shards) == sorted(plain.shards)
    assert [seconds for _, seconds in mixed.slowest] == [seconds for _, seconds in plain.slowest]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(receipts(), st.integers(0, 8))
def test_two_halves_add_up_to_the_whole(given_: list[ShardReceipt], at: int) -> None:
    first, second, whole = RunTotals.of(given_[:at]), RunTotals.of(given_[at:]), RunTotals.of(given_)
    assert first.counts + second.counts == whole.counts == sum((r.counts for r in given_), Counts())
    assert whole.counts.accounted == sum(r.rows for r in given_)
    assert first.reasons + second.reasons == +whole.reasons
    assert first.shards + second.shards == whole.shards
    one, other = stages(first), stages(second)
    assert stages(whole) == {
        stage: tuple(a + b for a, b in zip(one.get(stage, (0.0, 0)), other.get(stage, (0.0, 0)), strict=True))
        for stage in one | other
    }
