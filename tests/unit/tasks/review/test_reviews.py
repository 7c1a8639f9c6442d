"""What people said shows at once, everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from review_world import NIGHT, everything

from leukoflow.core.errors import RequestError
from leukoflow.runs.progress import read_manifest
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.review.agreement import agreement
from leukoflow.tasks.review.query import Query, Review, Sort
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.timeline import timeline
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add


def test_a_decision_for_the_answer_accepts_it_by_whichever_key(copy: Path) -> None:
    out = str(copy.parent)
    table = open_run_table(out, NIGHT)
    field = next(f for f in everything(table.fields) if f.label)
    same = table.verdict_on_field(field.ordinal, Action.CORRECT, "dr. grey", field.label)
    other = replace(same, label="Pro" if field.label != "Pro" else "Pre")
    assert [(v.agrees, v.corrects) for v in (same, other)] == [(True, False), (False, True)]
    unseen = replace(other, seen_status="abstained")
    assert (unseen.agrees, unseen.corrects) == (False, False)
    slide = next(s for s in everything(table.slides) if s.summary.label)
    add(out, table.verdict_on_slide(slide.slide_key, Action.CORRECT, "dr. grey", slide.summary.label))
    found = open_run_table(out, NIGHT)
    assert found.slide(slide.slide_key).standing.decision is not None
    assert found.slides(Query(review=Review.CORRECTED)).total == 0
    assert found.slides(Query(review=Review.REVIEWED)).total == 1


def test_verdicts_show_at_once(copy: Path) -> None:
    out = str(copy.parent)
    table = open_run_table(out, NIGHT)
    first, second = (f for f in table.fields(Query(sort=Sort.ORDER, descending=False, limit=2)).items)
    add(out, table.verdict_on_field(first.ordinal, Action.ACCEPT, "dr. grey"))
    add(out, table.verdict_on_field(second.ordinal, Action.CORRECT, "dr. grey", "Pro", "look at the rim"))
    add(out, table.verdict_on_field(second.ordinal, Action.FLAG, "dr. grey"))
    slide = table.slide(first.slide_key)
    add(out, table.verdict_on_slide(slide.slide_key, Action.COMMENT, "dr. grey", comment="thick smear"))
    table = open_run_table(out, NIGHT)

    def keys(review: Review) -> set[str]:
        return {f.image_key for f in table.fields(Query(review=review, limit=500)).items}

    assert keys(Review.REVIEWED) == {first.image_key, second.image_key}
    assert keys(Review.FLAGGED) == keys(Review.CORRECTED) == {second.image_key}
    assert len(keys(Review.UNREVIEWED)) == 36
    line = table.field(second.ordinal)
    assert line.standing.decision is not None
    assert (line.standing.decision.said, line.standing.decision.seen_label) == ("Pro", second.label)
    assert line.standing.decision.seen_bundle_digest == read_manifest(open_storage(str(copy))).bundle_digest  # type: ignore[union-attr]
    assert line.standing.comment == "look at the rim"
    assert line.details is not None
    assert [v.action for v in line.details.verdicts] == [Action.CORRECT, Action.FLAG]
    slide = table.slide(first.slide_key)
    assert (slide.summary.reviewed, slide.standing.comment) == (1, "thick smear")
    assert {s.name for s in table.slides(Query(review=Review.FLAGGED)).items} == {table.slide(second.slide_key).name}
    assert table.slides(Query(review=Review.REVIEWED)).total == 0
    add(out, table.verdict_on_slide(slide.slide_key, Action.ACCEPT, "dr. grey"))
    table = open_run_table(out, NIGHT)
    assert [s.name for s in table.slides(Query(review=Review.REVIEWED)).items] == [slide.name]
    with pytest.raises(RequestError, match="no prediction to accept"):
        add(out, table.verdict_on_field(36, Action.ACCEPT, "dr. grey"))


def test_a_withdrawn_decision_counts_nowhere(copy: Path) -> None:
    out = str(copy.parent)

    def table() -> RunTable:
        return open_run_table(out, NIGHT)

    first = table().fields(Query(sort=Sort.ORDER, descending=False, limit=1)).items[0]
    assert first.patient_key is not None
    other = "Pro" if first.label != "Pro" else "Pre"
    add(out, table().verdict_on_field(first.ordinal, Action.CORRECT, "dr. grey", other))
    add(out, table().verdict_on_slide(first.slide_key, Action.CORRECT, "dr. grey", other))
    before = timeline(out, first.patient_key).points[-1]
    assert (agreement(out).n, before.corrected, before.summary.reviewed) == (1, 1, 1)
    with pytest.raises(RequestError, match="another decision"):
        table().verdict_on_field(first.ordinal, Action.WITHDRAW, "dr. grey", first.label)
    add(out, table().verdict_on_field(first.ordinal, Action.WITHDRAW, "dr. webber"))
    add(out, table().verdict_on_slide(first.slide_key, Action.WITHDRAW, "dr. webber", other))
    opened = table()
    line, slide = opened.field(first.ordinal), opened.slide(first.slide_key)
    assert line.details is not None
    assert [(v.action, v.who, v.label) for v in line.details.verdicts] == [
        (Action.CORRECT, "dr. grey", other),
        (Action.WITHDRAW, "dr. webber", other),
    ]
    assert (line.standing.decision, slide.standing.decision, slide.summary.reviewed) == (None, None, 0)
    for review in (Review.REVIEWED, Review.CORRECTED):
        assert opened.fields(Query(review=review)).total == opened.slides(Query(review=review)).total == 0
    assert first.ordinal in {f.ordinal for f in opened.fields(Query(review=Review.UNREVIEWED, limit=500)).items}
    after = timeline(out, first.patient_key).points[-1]
    assert (agreement(out).n, after.corrected, after.summary.reviewed) == (0, 0, 0)
    for verdict_on in (
        lambda: opened.verdict_on_field(first.ordinal, Action.WITHDRAW, "dr. grey"),
        lambda: opened.verdict_on_slide(first.slide_key, Action.WITHDRAW, "dr. grey"),
    ):
        with pytest.raises(RequestError, match="no decision to withdraw"):
            verdict_on()
