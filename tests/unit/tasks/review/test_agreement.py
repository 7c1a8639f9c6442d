"""Agreement of people and model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from review_world import NIGHT

from leukoflow.runs.records import Status
from leukoflow.tasks.review.agreement import agreement, agreement_of
from leukoflow.tasks.review.keys import run_key_of
from leukoflow.tasks.review.query import Query
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.verdict_record import Action, Verdict
from leukoflow.tasks.review.verdicts import add


def _decided(
    seen: str | None, said: str, at: str = "2026-11-25T08:00:00+00:00", who: str = "dr. grey", status: str = "predicted"
) -> Verdict:
    action = Action.ACCEPT if seen == said else Action.CORRECT
    label = None if action is Action.ACCEPT else said
    return Verdict("night", action, who, at, image_key="x", label=label, seen_status=status, seen_label=seen)


def test_agreement_by_hand() -> None:
    decided = (
        [_decided("Pre", "Pre")] * 20 + [_decided("Pre", "Pro")] * 5 + [_decided("Pro", "Pre", who="dr. webber")] * 10
        + [_decided("Pro", "Pro", "2026-11-30T00:00:00+00:00")] * 15 + [_decided(None, "Early", status="rejected")]
    )  # fmt: skip
    found = agreement_of(decided)
    assert (found.n, found.accepted, found.corrected, found.without_prediction) == (50, 35, 15, 1)
    assert found.confusion[2] == (0, 0, 20, 5)
    assert found.confusion[3] == (0, 0, 10, 15)
    assert found.kappa == pytest.approx(0.4)  # Cohen's own kind of example: 0.7 seen, 0.5 by chance
    assert [(w.week, w.n, w.accepted, w.corrected) for w in found.weeks] == [
        ("2026-W48", 35, 20, 15),
        ("2026-W49", 15, 15, 0),
    ]
    assert found.weeks[1].kappa is None  # one class alone says nothing beyond chance
    assert found.reviewers == (("dr. grey", 40, 5), ("dr. webber", 10, 10))
    assert agreement_of([]).kappa is None


def test_kappa_is_not_given_of_a_few_decisions() -> None:
    one = agreement_of([_decided("Pre", "Early")])
    assert (one.n, one.kappa, one.kappa_interval) == (1, None, None)
    assert one.no_kappa == "too few decisions (1 of at least 10)"
    ten = agreement_of([_decided("Pre", "Pre")] * 5 + [_decided("Pro", "Pro")] * 4 + [_decided("Pro", "Pre")])
    assert (ten.n, ten.no_kappa) == (10, "")
    assert ten.kappa == pytest.approx(0.8)  # 0.9 seen, 0.5 by chance
    assert ten.kappa_interval is not None
    assert agreement_of([_decided("Pre", "Early")] * 5 + [_decided("Pre", "Pre")] * 5).no_kappa == (
        "all predictions are of one class"
    )
    assert agreement_of([_decided("Pre", "Pro")] * 5 + [_decided("Pro", "Pro")] * 5).no_kappa == (
        "all decisions are of one class"
    )


def test_perfect_agreement_has_no_interval() -> None:
    """The formula's width would be zero, however few decisions there are."""
    found = agreement_of([_decided("Pre", "Pre")] * 6 + [_decided("Pro", "Pro")] * 6)
    assert (found.kappa, found.kappa_interval, found.no_kappa) == (1.0, None, "")


def test_a_label_on_an_abstained_field_is_no_prediction() -> None:
    found = agreement_of([_decided("Pre", "Pro", status="abstained"), _decided("Pre", "Pre", status="abstained")])
    assert (found.n, found.corrected, found.without_prediction) == (0, 0, 2)


def test_a_label_for_an_abstained_field_corrects_nothing() -> None:
    old = Verdict(
        NIGHT, Action.CORRECT, "anna", "2026-03-01T08:00:00+00:00", "a.png", label="Pro", seen_status="abstained",
        seen_label="Early", seen_confidence=0.4,
    )  # fmt: skip
    found = agreement_of([old, replace(old, seen_status="predicted")])
    assert (found.n, found.corrected, found.without_prediction) == (1, 1, 1)


def test_agreement_counts_the_last_decision_on_each_field_of_each_run(weeks: Path) -> None:
    out = str(weeks)
    for run_id in ("night", "second", "shade"):
        table = open_run_table(out, run_key_of(run_id))
        ordinals = [f.ordinal for f in table.fields(Query(status=Status.PREDICTED, limit=3)).items]
        for ordinal in ordinals:
            seen = table.field(ordinal).label
            add(out, table.verdict_on_field(ordinal, Action.CORRECT, "dr. grey", "Pro" if seen != "Pro" else "Pre"))
        add(out, table.verdict_on_field(ordinals[0], Action.ACCEPT, "dr. webber"))
        add(out, table.verdict_on_field(ordinals[1], Action.COMMENT, "dr. webber", comment="hm"))
    found = agreement(out)
    assert (found.n, found.accepted, found.corrected) == (6, 2, 4)
    assert sum(map(sum, found.confusion)) == 6
    assert found.unread == ()
