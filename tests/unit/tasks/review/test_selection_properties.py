"""Lists of any run for any query: what is asked for, in the order asked for, page by page and group by group."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from leukoflow.runs.records import CLASSES, Status
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.review.columns import PROBABILITIES
from leukoflow.tasks.review.frame import Frame
from leukoflow.tasks.review.keys import patient_key_of
from leukoflow.tasks.review.lines import FieldLine
from leukoflow.tasks.review.query import Query, Review, Sort
from leukoflow.tasks.review.snapshot import Snapshot
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.verdict_record import Action, Verdict, Verdicts

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("image_key", "slide_id", "patient_id", "site", "scanner", "status", "reason")]
    + [(name, pa.float64()) for name in (*PROBABILITIES, "ood_score")]
    + [("prediction_set", pa.list_(pa.string())), ("n_cells", pa.int32())]
)
EIGHTHS = st.lists(st.sampled_from(range(4)), min_size=8, max_size=8)
"""Which class each eighth of the probability goes to: exact numbers, so that equals are equal."""


@st.composite
def row(draw: st.DrawFn, number: int) -> dict[str, Any]:
    status = draw(st.sampled_from(Status))
    diagnosed = status in (Status.PREDICTED, Status.ABSTAINED)
    eighths = draw(EIGHTHS) if diagnosed else []
    slide = draw(st.sampled_from((None, "S1", "S2")))
    return {
        "image_key": f"ward-{draw(st.integers(0, 2))}/{number:02d}.jpg",
        "slide_id": slide,
        "patient_id": draw(st.sampled_from((None, "mary", "jane"))),
        "site": draw(st.sampled_from((None, "north", "south"))),
        "scanner": draw(st.sampled_from((None, "X-1"))),
        "status": str(status),
        "reason": None if status is Status.PREDICTED else "ambiguous",
        **{name: eighths.count(i) / 8 if diagnosed else None for i, name in enumerate(PROBABILITIES)},
        "ood_score": 0.5 if diagnosed else None,
        "prediction_set": [CLASSES[i] for i in sorted(set(eighths))] if diagnosed else None,
        "n_cells": draw(st.integers(0, 5)) if diagnosed else None,
    }


@st.composite
def tables(draw: st.DrawFn) -> RunTable:
    """A run in memory, with decisions and flags on some of its fields."""
    rows = [draw(row(number)) for number in range(draw(st.integers(0, 14)))]
    ordinals = 2 * np.arange(len(rows), dtype=np.int64)  # the shards between are not done yet
    frame = Frame(pa.Table.from_pylist(rows, SCHEMA), ordinals, lambda name: pa.nulls(len(rows), pa.string()))
    snapshot = Snapshot(
        run=open_storage("/nowhere/night"), run_id="night", stamp="", frame=frame, manifest=None, progress=None,
        fingerprint="f", shard_size=16, files={}, missing=None, ignored=0, truncated=None,
    )  # fmt: skip
    given_ = []
    for i in draw(st.lists(st.integers(0, max(0, len(rows) - 1)), max_size=5)) if rows else ():
        action = draw(st.sampled_from((Action.CORRECT, Action.FLAG)))
        given_.append(Verdict(
            "night", action, "dr. grey", "2026-11-25T08:00:00+00:00", rows[i]["image_key"],
            label="Pro" if action is Action.CORRECT else None, seen_label="Pre", seen_status=rows[i]["status"],
        ))  # fmt: skip
    return RunTable("/nowhere", "night", snapshot, Verdicts(tuple(given_), head=str(given_)))


def optional(*values: Any) -> st.SearchStrategy[Any]:
    return st.none() | st.sampled_from(values)


QUERIES = st.builds(
    Query, text=st.sampled_from(("", "", "", "ward-1", "S2", "MAR", "0", "%")), label=optional(*CLASSES),
    status=optional(*Status), site=optional("north", "south", "west"), scanner=optional("X-1"),
    review=optional(*Review), patient=st.none(), sort=st.sampled_from(Sort), descending=st.booleans(),
    limit=st.just(500),
)  # fmt: skip


def wanted(field: FieldLine, query: Query) -> bool:
    """Whether a query asks for a field, in plain words."""
    standing = field.standing
    words = (field.image_key, field.slide, field.patient or "")
    return (
        (query.label is None or field.label == query.label)
        and (query.status is None or field.status == query.status)
        and (query.site is None or field.site == query.site)
        and (query.scanner is None or field.scanner == query.scanner)
        and (query.patient is None or field.patient_key == query.patient)
        and {
            None: True,
            Review.REVIEWED: standing.decision is not None,
            Review.UNREVIEWED: standing.decision is None,
            Review.FLAGGED: standing.flagged,
            Review.CORRECTED: standing.decision is not None and standing.decision.corrects,
        }[query.review]
        and any(query.text.lower() in word.lower() for word in words)
    )


def value(field: FieldLine, sort: Sort) -> Any:
    """What a list of fields is sorted by; None where it is not known."""
    malignant = sum(field.probabilities[1:]) if field.probabilities else None
    return {
        Sort.URGENCY: malignant if field.status is Status.PREDICTED else 0.5,
        Sort.NAME: field.image_key,
        Sort.ORDER: field.ordinal,
        Sort.LABEL: -1 if field.label is None else CLASSES.index(field.label),
        Sort.MALIGNANT: malignant,
        Sort.UNCERTAINTY: None if field.uncertainty is None else round(field.uncertainty, 12),
        Sort.CONFIDENCE: field.confidence,
        Sort.FIELDS: 1,
        Sort.CELLS: field.n_cells,
        Sort.REVIEWED: field.standing.decision is not None,
    }[sort]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(tables(), QUERIES)
def test_a_query_returns_what_it_asks_for_in_the_order_asked_for(table: RunTable, query: Query) -> None:
    whole = table.fields(Query(sort=Sort.ORDER, descending=False, limit=500)).items
    assert len(whole) == len(table.frame)
    found = table.fields(query)
    assert sorted(f.ordinal for f in found.items) == [f.ordinal for f in whole if wanted(f, query)]
    assert found.total == len(found.items)
    values = [value(f, query.sort) for f in found.items]
    known = [v for v in values if v is not None]
    assert values[len(known) :] == [None] * (len(values) - len(known))  # what is not known comes last
    assert known == sorted(known, reverse=query.descending)
    if query.sort is not Sort.UNCERTAINTY:  # its last bit depends on the order of the classes
        for before, after in zip(found.items, found.items[1:], strict=False):
            if value(before, query.sort) == value(after, query.sort):
                assert before.ordinal < after.ordinal


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(tables(), QUERIES, st.integers(1, 6), st.sampled_from(("fields", "slides", "patients")))
def test_pages_partition_the_whole(table: RunTable, query: Query, limit: int, what: str) -> None:
    ask = getattr(table, what)
    whole = ask(query)
    pages = [ask(replace(query, offset=at, limit=limit)) for at in range(0, whole.total + limit, limit)]
    assert tuple(line for page in pages for line in page.items) == whole.items
    assert {page.total for page in pages} == {whole.total} == {len(whole.items)}
    assert pages[-1].items == ()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(tables(), QUERIES)
def test_counts_add_up(table: RunTable, query: Query) -> None:
    def total(**more: Any) -> int:
        return table.fields(replace(query, **more)).total

    assert sum(total(status=status) for status in Status) == total(status=None)
    assert total(review=Review.REVIEWED) + total(review=Review.UNREVIEWED) == total(review=None)
    everybody, fields = Query(limit=500), table.fields(Query(limit=500)).items
    for lines, inside in (
        (table.slides(everybody).items, fields),
        (table.patients(everybody).items, [f for f in fields if f.patient is not None]),
    ):
        for status in Status:
            counted = sum(getattr(line.summary.counts, str(status)) for line in lines)
            assert counted == sum(f.status is status for f in inside)
        assert sum(line.summary.cells for line in lines) == sum(f.n_cells for f in inside)
        assert sum(line.summary.flagged for line in lines) == sum(f.standing.flagged for f in inside)
    for patient in {f.patient for f in fields if f.patient is not None}:
        own = [f for f in fields if f.patient == patient]
        assert table.fields(Query(patient=patient_key_of(patient))).total == len(own)
        (line,) = (p for p in table.patients(everybody).items if p.patient == patient)
        answers = [sum(f.probabilities[1:]) for f in own if f.status is Status.PREDICTED]
        mean = line.summary.mean_malignant_probability
        assert (mean is None) == (not answers)
        assert mean is None or math.isclose(mean, sum(answers) / len(answers), abs_tol=1e-9)
