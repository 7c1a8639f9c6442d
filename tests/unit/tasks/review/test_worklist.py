"""The worklist: the same numbers as the run's own tables, every way to filter and sort, runs in all conditions."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import table as table_of

from leukoflow.apps.web.drawing import timeline_svg
from leukoflow.core.codec import dumps
from leukoflow.core.errors import NotFoundError, RequestError, RunBusyError, RunNotFoundError, StorageError
from leukoflow.runs.progress import Heartbeat, now, read_manifest
from leukoflow.runs.records import CLASSES, Status
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.open_run import Run
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.publish.publish import rank_slides
from leukoflow.tasks.review import worklist
from leukoflow.tasks.review.verdicts import Action, Verdict, add
from leukoflow.tasks.review.worklist import (
    Page,
    Query,
    Review,
    RunTable,
    Sort,
    _missing,
    agreement,
    agreement_of,
    beta_interval,
    entropy,
    frequency,
    kappa_of,
    list_runs,
    open_run_table,
    patient_key_of,
    run_key_of,
    timeline,
)
from leukoflow.tasks.store.compact import compact_run
from leukoflow.tasks.upkeep.erase import erase_patient

KEY = b"a key that only these tests have"
MARY, JANE = pseudonym("mary", KEY), pseudonym("jane", KEY)
NIGHT = run_key_of("night")
PROBABILITIES = ("prob_benign", "prob_early", "prob_pre", "prob_pro")


@pytest.fixture(scope="module")
def opened(night: Run) -> RunTable:
    return open_run_table(str(Path(night.root).parent), NIGHT)


@pytest.fixture
def spread(copy: Path) -> Path:
    """The run with predictions that differ from field to field, as a trained model's do; the manifest is let be."""
    rng = np.random.default_rng(3)
    for path in sorted((copy / "predictions").iterdir()):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if row["label"] is None:
                continue
            p = rng.dirichlet([0.4] * 4)
            row |= dict(zip(PROBABILITIES, p.tolist(), strict=True)) | {"confidence": float(p.max())}
            row["label"] = CLASSES[int(p.argmax())]
            row["prediction_set"] = [c for c, v in zip(CLASSES, p, strict=True) if v > 0.2]
            row["status"] = "abstained" if p.max() < 0.5 else "predicted"
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    return copy


def rows_of(root: Path) -> list[dict[str, Any]]:
    return list(table_of(root, "predictions", ()).to_pylist())


def everything(page: Any) -> list[Any]:
    """All items of a list, page by page."""
    found: list[Any] = []
    while True:
        got = page(Query(offset=len(found), limit=7))
        found += got.items
        if len(found) >= got.total:
            return found


def test_reconciliation_is_the_manifests(night: Run, opened: RunTable) -> None:
    m = read_manifest(Storage(night.root))
    assert m is not None
    found = opened.reconciliation()
    assert (found.received, found.predicted, found.abstained) == (m.members, m.predicted, m.abstained)
    assert (found.rejected, found.quarantined, found.missing) == (1, 2, 1)
    assert (found.conflicts, found.waiting, found.balanced, found.finished) == (m.conflicts, 0, True, True)


def test_slides_are_those_of_the_runs_own_ranking(spread: Path) -> None:
    expected = rank_slides(rows_of(spread)).to_pylist()
    lines = everything(open_run_table(str(spread.parent), NIGHT).slides)
    assert [(s.rank, s.name, s.grouping) for s in lines] == [
        (s["rank"], s["slide_id"], s["grouping"]) for s in expected
    ]
    for line, row in zip(lines, expected, strict=True):
        s = line.summary
        assert s.urgency == pytest.approx(row["urgency"], abs=1e-12)
        assert (s.label, s.malignant_fields, s.cells) == (row["label"], row["n_malignant"], row["n_cells"])
        assert s.mean_malignant_probability == row["malignant_score"]  # to the last bit: one definition
        assert (line.patient, line.site) == (row["patient_id"], row["site"])
        c = s.counts
        assert (c.predicted, c.abstained, c.rejected, c.quarantined) == (
            row["n_predicted"], row["n_abstained"], row["n_rejected"], row["n_quarantined"],
        )  # fmt: skip
        assert c.fields == row["n_images"]


def test_mean_malignant_probability_uncertainty_and_entropy_by_hand(spread: Path) -> None:
    table = open_run_table(str(spread.parent), NIGHT)
    rows = rows_of(spread)
    for line in everything(table.slides):
        mine = [r for r in rows if (r["slide_id"] or r["image_key"].rpartition("/")[0]) == line.name]
        said = [r for r in mine if r["status"] == "predicted"]
        diagnosed = [r for r in mine if r["label"] is not None]
        malignant = [1 - r["prob_benign"] for r in said]
        assert line.summary.mean_malignant_probability == pytest.approx(sum(malignant) / len(said))  # not by cells
        assert line.summary.answered_cells == sum(r["n_cells"] for r in said)
        unsure = [r for r in diagnosed if r["status"] == "abstained" or len(r["prediction_set"]) > 1]
        assert line.summary.uncertainty == pytest.approx(len(unsure) / len(diagnosed))
        h = [-sum(r[p] * math.log(r[p]) for p in PROBABILITIES) / math.log(4) for r in said]
        assert line.summary.entropy == pytest.approx(sum(h) / len(h), abs=1e-9)
        if len(said) < 5:
            assert line.summary.interval is None  # too few for an interval
        else:
            low, high = line.summary.interval
            assert 0 <= low < (sum(malignant) + 1) / (len(said) + 2) < high <= 1
        worst = table.field(line.summary.worst)
        assert 1 - worst.probabilities[0] == pytest.approx(max(malignant))


def test_patients_are_over_all_their_fields_and_as_urgent_as_their_worst_slide(spread: Path) -> None:
    table = open_run_table(str(spread.parent), NIGHT)
    rows = rows_of(spread)
    lines = everything(table.patients)
    assert {line.patient for line in lines} == {MARY, JANE}
    for line in lines:
        mine = [r for r in rows if r["patient_id"] == line.patient]
        ranked = rank_slides(mine).to_pylist()
        assert (line.slides, line.summary.counts.fields) == (len(ranked), len(mine))
        assert line.summary.urgency == pytest.approx(ranked[0]["urgency"])
        assert table.slide(line.worst_slide).name == ranked[0]["slide_id"]
        said = [1 - r["prob_benign"] for r in mine if r["status"] == "predicted"]
        assert line.summary.mean_malignant_probability == pytest.approx(sum(said) / len(said))
    assert [p.summary.urgency for p in lines] == sorted((p.summary.urgency for p in lines), reverse=True)
    assert table.patient(patient_key_of(MARY)).patient == MARY


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


def test_a_field_that_was_abstained_from_has_no_answer(spread: Path) -> None:
    table = open_run_table(str(spread.parent), NIGHT)
    stored = {r["image_key"]: r for r in rows_of(spread)}
    abstained = table.fields(Query(status=Status.ABSTAINED, limit=500)).items
    assert abstained
    for line in abstained:
        assert stored[line.image_key]["label"] is not None
        assert (line.label, line.confidence, line.prediction_set) == (None, None, ())
        assert len(line.probabilities) == 4
    by_confidence = table.fields(Query(sort=Sort.CONFIDENCE, limit=500)).items
    assert None not in [line.confidence for line in by_confidence if line.status == Status.PREDICTED]
    answered = [line.status == Status.PREDICTED for line in by_confidence]
    assert answered == sorted(answered, reverse=True)  # those without a confidence come last
    given = table.verdict_on_field(abstained[0].ordinal, Action.CORRECT, "anna", "Pro")
    assert (given.seen_status, given.seen_label, given.seen_confidence) == ("abstained", None, None)


def test_nobody_can_accept_what_was_not_answered(spread: Path) -> None:
    out = str(spread.parent)
    table = open_run_table(out, NIGHT)
    line = table.fields(Query(status=Status.ABSTAINED)).items[0]
    accepting = table.verdict_on_field(line.ordinal, Action.ACCEPT, "anna")
    for verdict in (accepting, replace(accepting, seen_label="Early", seen_confidence=0.4)):
        with pytest.raises(RequestError, match="abstained from this field, so there is no answer to accept"):
            add(out, verdict)
    assert open_run_table(out, NIGHT).field(line.ordinal).standing.verdicts == 0


def test_benign_is_outweighed_by_the_malignant_classes_together(copy: Path) -> None:
    part = sorted((copy / "predictions").iterdir())[0]
    rows = pq.read_table(part).to_pylist()
    given = [r for r in rows if r["label"]][:2]
    for row, benign in zip(given, (0.4, 0.6), strict=True):
        row |= {"status": "predicted", "reason": None, "label": "Benign", "confidence": benign}
        row |= dict.fromkeys(PROBABILITIES, (1 - benign) / 3) | {"prob_benign": benign}
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(part)), part, use_dictionary=False)
    lines = {f.image_key: f for f in everything(open_run_table(str(copy.parent), NIGHT).fields)}
    assert [lines[r["image_key"]].outweighed for r in given] == [True, False]
    assert [worklist.is_outweighed(label, 0.9) for label in ("Benign", "Pre", None)] == [True, False, False]
    assert not worklist.is_outweighed("Benign", None)


def test_a_slide_tells_how_many_patients_are_on_it(copy: Path) -> None:
    part = sorted((copy / "predictions").iterdir())[0]
    rows = pq.read_table(part).to_pylist()
    next(r for r in rows if r["patient_id"] == MARY)["patient_id"] = JANE
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(part)), part, use_dictionary=False)
    table = open_run_table(str(copy.parent), NIGHT)
    on: dict[str, set[str]] = {}
    for line in everything(table.fields):
        on.setdefault(line.slide_key, set()).update({line.patient} - {None})
    assert {s.slide_key: s.patients for s in everything(table.slides)} == {key: len(who) for key, who in on.items()}
    assert max(map(len, on.values())) == 2


def test_missing_images_are_told_of_their_slide_and_patient(copy: Path) -> None:
    def told() -> tuple[dict[tuple[str, str], int], dict[str, int]]:
        table = open_run_table(str(copy.parent), NIGHT)
        slides, patients = everything(table.slides), everything(table.patients)
        return {(s.grouping, s.name): s.missing for s in slides if s.missing}, {
            p.patient: p.missing for p in patients if p.missing
        }

    lost = pq.read_table(copy / "missing.parquet")
    (row,) = lost.to_pylist()
    named = row["slide_id"] is not None
    slide = ("manifest", row["slide_id"]) if named else ("folder", row["image_key"].rpartition("/")[0])
    assert told() == ({slide: 1}, {row["patient_id"]: 1} if row["patient_id"] else {})
    given = next(s for s in everything(open_run_table(str(copy.parent), NIGHT).slides) if s.patient)
    rows = [row, row | {"slide_id": given.name, "patient_id": given.patient}]
    pq.write_table(pa.Table.from_pylist(rows, lost.schema), copy / "missing.parquet")
    worklist._shelf(str(copy.parent)).forget("night")
    assert told()[0][(given.grouping, given.name)] == 1 + (slide == (given.grouping, given.name))
    assert told()[1][given.patient] == 1 + (row["patient_id"] == given.patient)


def test_what_lies_in_no_folder_is_no_slide(opened: RunTable) -> None:
    line = everything(opened.slides)[0]
    loose = replace(line, grouping="folder", name=".")
    assert (loose.title, loose.in_no_folder) == ("(no folder)", True)
    assert not replace(loose, grouping="manifest").in_no_folder
    assert replace(line, name="ward-2").title == "ward-2"


def test_fields_in_no_folder_are_not_labelled_together(opened: RunTable, monkeypatch: pytest.MonkeyPatch) -> None:
    line = everything(opened.slides)[0]
    loose = replace(line, grouping="folder", name=".")
    monkeypatch.setattr(RunTable, "slide", lambda self, key: loose)
    for action, label in ((Action.ACCEPT, None), (Action.CORRECT, "Pre")):
        with pytest.raises(RequestError, match="label each of them on its own page"):
            opened.verdict_on_slide(loose.slide_key, action, "dr. grey", label)
    assert opened.verdict_on_slide(loose.slide_key, Action.FLAG, "dr. grey").action is Action.FLAG


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


def test_a_label_for_an_abstained_field_corrects_nothing() -> None:
    old = Verdict(
        NIGHT, Action.CORRECT, "anna", "2026-03-01T08:00:00+00:00", "a.png", label="Pro", seen_status="abstained",
        seen_label="Early", seen_confidence=0.4,
    )  # fmt: skip
    found = agreement_of([old, replace(old, seen_status="predicted")])
    assert (found.n, found.corrected, found.without_prediction) == (1, 1, 1)


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


@pytest.mark.parametrize(
    "given",
    [
        {"label": "Blast"}, {"status": "fine"}, {"sort": "../etc"}, {"review": "x"}, {"offset": -1}, {"limit": 0},
        {"limit": 501}, {"text": "x" * 201},
    ],
)  # fmt: skip
def test_questions_that_make_no_sense(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Query(**given)


@pytest.mark.parametrize("key", ["", "x" * 16, "../../etc", "0" * 16])
def test_keys_that_there_are_not(opened: RunTable, key: str) -> None:
    for ask in (opened.slide, opened.patient):
        with pytest.raises(NotFoundError):
            ask(key)
    with pytest.raises(NotFoundError):
        opened.fields(Query(slide=key))
    with pytest.raises(RunNotFoundError):
        open_run_table(opened.out, key)
    for ordinal in (-1, 38, 1 << 80):
        with pytest.raises(NotFoundError):
            opened.field(ordinal)


def test_keys_say_nothing(opened: RunTable) -> None:
    for line in everything(opened.slides):
        assert len(line.slide_key) == 16
        assert line.name not in line.slide_key
    for patient in everything(opened.patients):
        assert patient.patient[2:] not in patient.patient_key
    assert len({s.slide_key for s in everything(opened.slides)}) == len(everything(opened.slides))


def test_a_field_with_all_that_is_known(night: Run, opened: RunTable) -> None:
    rows = rows_of(Path(night.root))
    for ordinal in (0, 20, 34, 35, 36):
        line, row = opened.field(ordinal), rows[ordinal]
        assert (line.image_key, line.status, line.reason) == (row["image_key"], row["status"], row["reason"])
        assert line.details is not None
        assert (line.details.member_sha256, line.details.n_tiles) == (row["member_sha256"], row["n_tiles"])
        cells = opened.cells(ordinal)
        assert len(cells) == (row["n_cells"] or 0)
        assert set(cells["image_key"].to_pylist()) <= {row["image_key"]}
        assert cells["cell_id"].to_pylist() == list(range(1, len(cells) + 1))


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
    assert line.standing.decision.seen_bundle_digest == read_manifest(Storage(str(copy))).bundle_digest  # type: ignore[union-attr]
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


def test_the_next_field_that_needs_a_decision(copy: Path) -> None:
    out = str(copy.parent)
    query = Query(sort=Sort.ORDER, descending=False)
    table = open_run_table(out, NIGHT)
    wanted = [f.ordinal for f in table.fields(replace(query, limit=500)).items if f.label]  # diagnosed: needs one
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


# --- runs in all conditions ------------------------------------------------------------------------------------------


def test_the_list_of_runs(night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = copy.parent
    shutil.copytree(copy, out / "broken")
    (out / "broken" / "manifest.json").write_text("{")
    (out / "not a run").mkdir()
    lines = {line.run_id: line for line in list_runs(str(out))}
    assert set(lines) == {"night", "broken"}
    assert lines["broken"].state == "damaged"
    found = lines["night"]
    assert (found.state, found.members, found.done, found.quarantined, found.missing) == ("finished", 38, 38, 2, 1)
    assert (found.run_key, found.source_kind, found.shadow_of) == (NIGHT, "zip", None)
    read: list[str] = []
    original = Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, key: read.append(key) or original(self, key))
    list_runs(str(out))
    assert read.count("manifest.json") == 1  # of the broken one; the other is known
    with pytest.raises(StorageError):
        open_run_table(str(out), run_key_of("broken"))
    assert list_runs(str(out / "nothing")) == []


def test_a_run_in_progress_shows_what_is_committed(copy: Path, tmp_path: Path) -> None:
    m = read_manifest(Storage(str(copy)))
    assert m is not None
    (copy / "manifest.json").unlink()
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for shard in ("00001", "00002"):
        (copy / f"markers/predictions/{shard}.json").rename(hidden / f"{shard}.json")
        (copy / f"predictions/part-{shard}.parquet").rename(hidden / f"{shard}.parquet")
    (copy / "heartbeat.json").write_bytes(
        dumps(Heartbeat(os.getpid(), socket.gethostname(), now(), "running", phase="screening images"))
    )
    out = str(copy.parent)
    table = open_run_table(out, NIGHT)
    found = table.reconciliation()
    assert (found.received, found.waiting, found.finished, found.state) == (38, 22, False, "running")
    assert (found.balanced, found.missing) == (False, 1)
    assert table.fields().total == 16
    (line,) = list_runs(out)
    assert (line.state, line.done, line.members, line.missing) == ("running", 16, 38, 1)
    assert line.phase == "screening images"
    add(out, table.verdict_on_field(3, Action.FLAG, "dr. grey"))
    with pytest.raises(NotFoundError, match="no field 20"):
        table.field(20)
    # the third shard before the second: ordinals stay those of the plan
    (hidden / "00002.json").rename(copy / "markers/predictions/00002.json")
    assert open_run_table(out, NIGHT).fields().total == 16  # committed, but not in its place yet
    (hidden / "00002.parquet").rename(copy / "predictions/part-00002.parquet")
    table = open_run_table(out, NIGHT)
    assert table.fields().total == 22
    assert table.field(32).image_key == pq.read_table(copy / "plan.parquet")["image_key"][32].as_py()
    assert table.field(3).standing.flagged
    with pytest.raises(NotFoundError):
        table.field(20)
    assert timeline(out, patient_key_of(MARY)).points[0].finished is False


def test_a_run_that_has_just_begun(copy: Path) -> None:
    for name in ("manifest.json", "plan.parquet"):
        (copy / name).unlink()
    shutil.rmtree(copy / "markers")
    shutil.rmtree(copy / "predictions")
    table = open_run_table(str(copy.parent), NIGHT)
    assert (table.fields().total, table.slides().total, table.patients().total) == (0, 0, 0)
    assert table.reconciliation().waiting == 38
    assert list_runs(str(copy.parent))[0].source_kind == ""


def test_a_compacted_run_looks_the_same(night: Run, copy: Path, opened: RunTable) -> None:
    compact_run(str(copy))
    table = open_run_table(str(copy.parent), NIGHT)
    assert table.slides(Query(limit=500)) == opened.slides(Query(limit=500))
    assert table.fields(Query(limit=500)) == opened.fields(Query(limit=500))
    for ordinal in (0, 31, 37):
        assert table.field(ordinal) == opened.field(ordinal)
        assert table.cells(ordinal).equals(opened.cells(ordinal))


def test_a_run_of_an_older_version(copy: Path) -> None:
    path = copy / "manifest.json"
    found = json.loads(path.read_text())
    for name in ("hosts", "config", "bundle_reference", "shadow_of", "notes"):
        found.pop(name)
    path.write_text(json.dumps(found, ensure_ascii=False, sort_keys=True, indent=1) + "\n")
    for part in (copy / "predictions").iterdir():
        table = pq.read_table(part).drop_columns(["ood_score", "scanner", "quality_flags", "meta_ward"])
        pq.write_table(table, part, use_dictionary=False)
    table = open_run_table(str(copy.parent), NIGHT)
    line = table.field(0)
    assert (line.ood, line.scanner, table.fields().total) == (None, None, 38)
    assert line.details is not None
    assert line.details.quality_flags == ()
    assert list_runs(str(copy.parent))[0].shadow_of is None


def test_a_run_of_a_newer_version_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 99'))
    with pytest.raises(StorageError, match="newer leukoflow"):
        open_run_table(str(copy.parent), NIGHT)


def test_a_run_where_nothing_was_predicted(copy: Path) -> None:
    for path in (copy / "predictions").iterdir():
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row |= dict.fromkeys(
                ("label", "confidence", "prediction_set", "n_cells", "slide_id", "patient_id", *PROBABILITIES)
            )
            row |= {"status": "quarantined", "reason": "damaged"}
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    table = open_run_table(str(copy.parent), NIGHT)
    lines = table.slides().items
    assert {s.name for s in lines} == {"ward-0", "ward-1", "ward-2"}
    assert {s.summary.urgency for s in lines} == {0.5}  # silence is not health
    for line in lines:
        s = line.summary
        assert (s.label, s.mean_malignant_probability, s.uncertainty, s.entropy) == (None,) * 4
        assert s.interval is None  # even odds are no measurement
    assert table.patients().total == 0
    assert table.field(0).probabilities == ()


def test_names_that_are_markup_or_formulas_stay_as_they_are(copy: Path) -> None:
    hostile = ['<script>alert("1")</script>', "=cmd|'/c calc'!A1", "../../etc/passwd", "\u202egpj.exe", "a\x00b", ""]
    path = copy / "predictions" / "part-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row, name in zip(rows, hostile, strict=False):
        row["slide_id"] = name
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path, use_dictionary=False)
    opened = open_run_table(str(copy.parent), NIGHT)
    for ordinal, name in enumerate(hostile):
        line = opened.slide(opened.field(ordinal).slide_key)
        assert (line.name, line.grouping) == (name, "manifest")
        assert line.slide_key.isalnum()


def test_what_is_deleted_or_changed_meanwhile(copy: Path) -> None:
    out = str(copy.parent)
    table = open_run_table(out, NIGHT)
    Storage(str(copy)).write("amend.json", b"{}")
    with pytest.raises(RunBusyError, match="in a minute"):
        open_run_table(out, NIGHT)
    (copy / "amend.json").unlink()
    erase_patient(out, MARY)
    fresh = open_run_table(out, NIGHT)
    assert {p.patient for p in fresh.patients().items} == {JANE}
    assert fresh.stamp != table.stamp
    shutil.rmtree(copy)
    with pytest.raises(RunNotFoundError):
        open_run_table(out, NIGHT)
    with pytest.raises(RunNotFoundError, match="not there any more"):
        fresh.field(0)
    with pytest.raises(RunNotFoundError):
        fresh.cells(0)
    with pytest.raises(NotFoundError):
        timeline(out, patient_key_of(JANE))
    assert list_runs(out) == []


def test_damaged_parts_are_said(copy: Path) -> None:
    (copy / "predictions" / "part-00001.parquet").write_bytes(b"PAR1?")
    with pytest.raises(StorageError, match="leukoflow verify"):
        open_run_table(str(copy.parent), NIGHT)


# --- over runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def weeks(spread: Path) -> Path:
    """Three runs of the same patients, a week apart; one is a shadow run, one damaged."""
    out = spread.parent
    for name, at, bundle in (
        ("second", "2026-03-08", None),
        ("third", "2026-03-15", "f" * 64),
        ("shade", "2026-03-16", None),
    ):
        shutil.copytree(spread, out / name)
        for file in ("manifest.json", "run.json"):
            path = out / name / file
            record = json.loads(path.read_text()) | {"run_id": name, "started_at": f"{at}T06:00:00+00:00"}
            record |= {"bundle_digest": bundle} if bundle else {}
            record |= {"shadow_of": "night"} if name == "shade" else {}
            path.write_text(json.dumps(record, ensure_ascii=False, sort_keys=True, indent=1) + "\n")
    shutil.copytree(spread, out / "wreck")
    (out / "wreck" / "manifest.json").write_text("{}")
    path = spread / "manifest.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"started_at": "2026-03-01T06:00:00+00:00"}, sort_keys=True)
    )
    return out


def test_a_fields_urgency_is_its_own_probability(spread: Path) -> None:
    """Not drawn towards one half, as a slide's is: no field could ever have more than two thirds."""
    lines = everything(open_run_table(str(spread.parent), NIGHT).fields)
    for line in lines:
        said = line.status is Status.PREDICTED
        assert line.urgency == pytest.approx(sum(line.probabilities[1:]) if said else 0.5)
    assert max(line.urgency for line in lines) > 0.667
    assert [line.urgency for line in lines] == sorted((line.urgency for line in lines), reverse=True)


def test_a_patients_course(weeks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(weeks)
    for warm in (False, True):
        if warm:
            for line in list_runs(out):
                if line.state != "damaged":
                    open_run_table(out, line.run_key)
        found = timeline(out, patient_key_of(JANE))
        assert [p.run_id for p in found.points] == ["night", "second", "third"]
        assert [p.at[:10] for p in found.points] == ["2026-03-01", "2026-03-08", "2026-03-15"]
        assert [p.same_bundle for p in found.points] == [True, True, False]
        assert (found.patient, found.unread) == (JANE, ("wreck",))
        expected = open_run_table(out, NIGHT).patient(patient_key_of(JANE))
        assert found.points[0].summary == expected.summary
        assert found.points[0].slides == expected.slides
    with pytest.raises(NotFoundError):
        timeline(out, patient_key_of("p_nobody"))


def test_runs_of_the_same_images_are_no_course(weeks: Path) -> None:
    for path in (weeks / "second" / "predictions").iterdir():
        rows = pq.read_table(path).to_pylist()
        hers = [row for row in rows if row["patient_id"] == JANE]
        if hers:
            hers[0]["member_sha256"] = "f" * 64
            pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    for patient, same in ((MARY, [False, True, True]), (JANE, [False, False, False])):
        found = timeline(str(weeks), patient_key_of(patient))
        assert [p.same_images for p in found.points] == same
        # Of three points, the third has another bundle; the first two are joined unless they are of the same images.
        assert timeline_svg(found.points).count('class="line"') == (0 if any(same) else 1)
    day = [
        replace(p, at=f"2026-03-01T{hour}:30:00+00:00")
        for p, hour in zip(found.points, ("06", "14", "22"), strict=True)
    ]
    assert "2026-03-01 06:30" in timeline_svg(day)
    assert ">2026-03-01<" in timeline_svg(found.points)


def _answer(run: Path, patient: str, labels: dict[int, str]) -> None:
    """Predicts a patient's diagnosed fields: of slide number `i` the label `labels[i]`, all others the last one."""
    for path in sorted((run / "predictions").iterdir()):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if row["label"] is None or row["patient_id"] != patient:
                continue
            label = labels.get(int(row["image_key"][5]), next(iter(labels.values())))
            row |= {"status": "predicted", "reason": None, "label": label, "confidence": 0.97}
            row |= {p: 0.97 if c == label else 0.01 for p, c in zip(PROBABILITIES, CLASSES, strict=True)}
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)


def test_runs_that_contradict_each_other_are_remarked(weeks: Path) -> None:
    for run, label in (("night", "Pro"), ("second", "Pro"), ("third", "Early")):
        _answer(weeks / run, MARY, {0: label})
    found = timeline(str(weeks), patient_key_of(MARY))
    fields = [p.summary.counts.predicted for p in found.points]
    assert found.remarks == (
        f"Runs do not agree on this patient: Pro-B in night, second ({fields[0] + fields[1]} fields); Early Pre-B in "
        f"third ({fields[2]} fields). One of the answers may be wrong, or the samples may not be of one patient. Judge "
        "the slides by eye. Not all of these runs used the same model.",
    )


def test_slides_of_a_run_that_contradict_each_other_are_remarked(weeks: Path) -> None:
    for run in ("night", "second", "third"):
        _answer(weeks / run, JANE, {1: "Pre", 2: "Pre"})
    assert timeline(str(weeks), patient_key_of(JANE)).remarks == ()
    _answer(weeks / "second", JANE, {1: "Pre", 2: "Benign"})
    remarks = timeline(str(weeks), patient_key_of(JANE)).remarks
    (remark,) = [r for r in remarks if r.startswith("Slides of run second do not agree: ")]
    assert re.search(r"Pre-B in S1 \(\d+ fields\)", remark)
    assert re.search(r"Benign in (S2, ward-2|ward-2, S2) \(\d+ fields\)", remark)
    assert all("Slides of run night" not in r for r in remarks)


def test_reading_one_patient_does_not_hold_the_run(weeks: Path) -> None:
    timeline(str(weeks), patient_key_of(MARY))
    assert worklist._shelf(str(weeks)).tables == {}


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


def test_kappa_is_not_told_of_a_few_decisions() -> None:
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


def test_kappa_and_its_interval_against_a_reference() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 4000)
    said = np.where(rng.random(4000) < 0.7, truth, rng.integers(0, 4, 4000))
    confusion = np.zeros((4, 4), np.int64)
    np.add.at(confusion, (truth, said), 1)
    kappa, interval = kappa_of(confusion)
    assert kappa == pytest.approx(cohen_kappa_score(truth, said))
    assert interval is not None
    draws = []
    for _ in range(300):
        pick = rng.integers(0, 4000, 4000)
        draws.append(cohen_kappa_score(truth[pick], said[pick]))
    assert (interval[1] - interval[0]) / 2 == pytest.approx(1.96 * np.std(draws), rel=0.15)


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


# --- pure ------------------------------------------------------------------------------------------------------------


def test_entropy_and_interval() -> None:
    found = entropy(np.array([[1.0, 0, 0, 0], [0.25] * 4, [np.nan] * 4]))
    assert found[:2] == pytest.approx([0.0, 1.0], abs=1e-9)
    assert np.isnan(found[2])
    low, high = beta_interval(np.array([0.0, 8.0]), np.array([0.0, 10.0]))
    from scipy.stats import beta

    assert low == pytest.approx(beta.ppf(0.025, [1, 9], [1, 3]))
    assert high == pytest.approx(beta.ppf(0.975, [1, 9], [1, 3]))


def _metrics(**measured: Any) -> dict[str, Any]:
    return {"protocols": {"cluster": {"models": {"leukoflow": {"fields": 1000, **measured}}}}}


def test_confidence_as_a_frequency() -> None:
    counted = frequency(
        _metrics(ece=0.02, reliability=[
            {"confidence": 0.55, "accuracy": 0.4, "fields": 50}, {"confidence": 0.97, "accuracy": 0.93, "fields": 500},
        ]), "Early", 0.99,
    )  # fmt: skip
    assert counted.of_100 == 93
    assert counted.words == (
        "Early Pre-B: of 100 answers with about this confidence, about 93 were right when that was counted."
    )
    assert "500 answers" in counted.basis
    derived = frequency(_metrics(ece=0.0176), "Pro", 0.93)
    assert derived.of_100 == 93
    assert derived.words == (
        "Pro-B: of 100 answers with this confidence, about 93 should be right. That is calibrated, not counted."
    )
    assert derived.basis == (
        "over all confidences, abstained fields included, they were off by 1.8 of 100 on average, measured on fields "
        "of clusters that the classifier had not seen (1,000 fields)"
    )
    assert frequency(_metrics(ece=0.0176), "Pro", 1.0).of_100 == 99
    unknown = frequency({}, "Pro", 0.93)
    assert unknown.of_100 == 93
    assert "not known" in unknown.words
    assert "never measured" in unknown.basis


def test_without_a_manifest_nobody_knows_what_is_missing() -> None:
    assert _missing(0, '{"manifest": null}') is None
    assert _missing(0, '{"manifest": "night.csv"}') == 0
    assert _missing(2, '{"manifest": "night.csv"}') == 2
    assert _missing(0, "") == 0  # a run of before: its settings were not kept


def test_pages_are_values() -> None:
    assert Page((1, 2), 5, 0, 2) == Page((1, 2), 5, 0, 2)
