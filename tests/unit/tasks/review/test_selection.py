"""Every way to filter, search and sort, and the way through a list."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from review_world import JANE, MARY, NIGHT, everything, rows_of

from leukoflow.runs.records import Status
from leukoflow.tasks.review.keys import patient_key_of
from leukoflow.tasks.review.query import Query, Review, Sort
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add


def test_every_filter_by_hand(spread: Path) -> None:
    table = open_run_table(str(spread.parent), NIGHT)
    rows = rows_of(spread)

    def keys(**given: Any) -> list[str]:
        page = table.fields(Query(sort=Sort.ORDER, descending=False, limit=500, **given))
        assert page.total == len(page.items)
        return [f.image_key for f in page.items]

    def wanted(test: Any) -> list[str]:
        return [r["image_key"] for r in rows if test(r)]

    assert keys() == wanted(lambda r: True)
    assert keys(label="Pro") == wanted(lambda r: (r["status"], r["label"]) == ("predicted", "Pro"))
    for status in Status:
        assert keys(status=status) == wanted(lambda r: r["status"] == status)  # noqa: B023 - called at once
    assert any((r["status"], r["label"]) == ("abstained", "Early") for r in rows)
    assert keys(status="abstained", label="Early") == []  # what it leaned to is no answer
    assert keys(site="north") == wanted(lambda r: True)
    assert keys(site="south") == keys(scanner="X-1") == []
    assert keys(text="WARD-1/0") == wanted(lambda r: "ward-1/0" in r["image_key"])
    assert keys(text=MARY[:9]) == wanted(lambda r: r["patient_id"] == MARY)
    assert keys(text="S1") == wanted(lambda r: r["slide_id"] == "S1")
    assert keys(text="%") == keys(text="a.b*") == []
    assert keys(patient=patient_key_of(JANE)) == wanted(lambda r: r["patient_id"] == JANE)
    slide = next(s for s in everything(table.slides) if s.name == "S0")
    assert keys(slide=slide.slide_key) == wanted(lambda r: r["slide_id"] == "S0")
    assert {s.name for s in table.slides(Query(patient=patient_key_of(MARY))).items} == {"S0"}
    assert {s.name for s in table.slides(Query(status=Status.REJECTED)).items} == {"S1"}
    assert [s.name for s in table.slides(Query(text="s0")).items] == ["S0"]
    assert [p.patient for p in table.patients(Query(text="S0")).items] == [MARY]


@pytest.mark.parametrize("sort", list(Sort))
@pytest.mark.parametrize("what", ["fields", "slides", "patients"])
def test_every_order_is_whole_and_can_be_turned(opened: RunTable, what: str, sort: Sort) -> None:
    ask = getattr(opened, what)
    down = ask(Query(sort=sort, limit=500)).items
    up = ask(Query(sort=sort, limit=500, descending=False)).items

    def key(line: Any) -> str:
        return str(getattr(line, "image_key", None) or getattr(line, "slide_key", None) or line.patient_key)

    assert sorted(map(key, down)) == sorted(map(key, up))
    assert len({key(line) for line in down}) == len(down) == ask(Query(limit=1)).total
    if what == "fields" and sort in (Sort.CONFIDENCE, Sort.MALIGNANT, Sort.UNCERTAINTY):
        assert [f.confidence is None for f in down[-3:]] == [f.confidence is None for f in up[-3:]] == [True] * 3


def test_names_are_ordered_and_pages_fit_together(opened: RunTable) -> None:
    def page(query: Query) -> Any:
        return opened.fields(replace(query, sort=Sort.NAME, descending=False))

    names = [f.image_key for f in everything(page)]
    assert names == sorted(names)
    assert len(names) == 38
    beyond = opened.fields(Query(offset=500))
    assert (beyond.items, beyond.total) == ((), 38)


def test_neighbours_follow_the_list(opened: RunTable) -> None:
    query = Query(sort=Sort.CONFIDENCE, label="Benign")
    order = [f.ordinal for f in opened.fields(Query(sort=Sort.CONFIDENCE, label="Benign", limit=500)).items]
    assert opened.neighbours(query, order[0]) == (None, order[1])
    assert opened.neighbours(query, order[3]) == (order[2], order[4])
    assert opened.neighbours(query, order[-1]) == (order[-2], None)
    assert opened.neighbours(query, 36) == (None, order[0])  # the text that is no image has no label


def test_the_next_field_that_needs_a_decision(copy: Path) -> None:
    out = str(copy.parent)
    query = Query(sort=Sort.ORDER, descending=False)
    table = open_run_table(out, NIGHT)
    diagnosed = (Status.PREDICTED, Status.ABSTAINED)  # needs a decision
    wanted = [f.ordinal for f in table.fields(replace(query, limit=500)).items if f.status in diagnosed]
    assert len(wanted) > 4
    first, second, third, last = *wanted[:3], wanted[-1]
    assert table.undecided(query, first) == second
    assert table.undecided(query, last) == first  # from the beginning again
    for ordinal in (first, second):
        add(out, table.verdict_on_field(ordinal, Action.CORRECT, "dr. grey", "Pro"))
    table = open_run_table(out, NIGHT)
    for review in (None, Review.UNREVIEWED):  # a list of what is undecided has lost the field itself
        assert table.undecided(replace(query, review=review), first) == third
        assert table.undecided(replace(query, review=review), last) == third
    assert table.undecided(replace(query, review=Review.REVIEWED), first) is None
    slide = table.field(third).slide_key
    rest = [o for o in wanted if o not in (first, second, third) and table.field(o).slide_key == slide]
    assert table.undecided(replace(query, slide=slide), third) == rest[0]
    add(out, table.verdict_on_field(second, Action.WITHDRAW, "dr. grey"))
    assert open_run_table(out, NIGHT).undecided(query, first) == second
