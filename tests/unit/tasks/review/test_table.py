"""A run opened for people: the same numbers as the run's own tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from review_world import JANE, MARY, NIGHT, everything, rows_of

from leukoflow.core.errors import NotFoundError, RequestError, RunNotFoundError
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.records import Status
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.publish.ranking import rank_slides
from leukoflow.tasks.review.keys import patient_key_of
from leukoflow.tasks.review.query import Query, Sort
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add


def test_reconciliation_is_the_manifests(night: Run, opened: RunTable) -> None:
    m = read_manifest(open_storage(night.root))
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


def test_a_fields_urgency_is_its_own_probability(spread: Path) -> None:
    """Not drawn towards one half, as a slide's is: no field could ever have more than two thirds."""
    lines = everything(open_run_table(str(spread.parent), NIGHT).fields)
    for line in lines:
        said = line.status is Status.PREDICTED
        assert line.urgency == pytest.approx(sum(line.probabilities[1:]) if said else 0.5)
    assert max(line.urgency for line in lines) > 0.667
    assert [line.urgency for line in lines] == sorted((line.urgency for line in lines), reverse=True)


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


def test_a_slide_says_how_many_patients_are_on_it(copy: Path) -> None:
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


def test_fields_in_no_folder_are_not_labelled_together(opened: RunTable, monkeypatch: pytest.MonkeyPatch) -> None:
    line = everything(opened.slides)[0]
    loose = replace(line, grouping="folder", name=".")
    monkeypatch.setattr(RunTable, "slide", lambda self, key: loose)
    for action, label in ((Action.ACCEPT, None), (Action.CORRECT, "Pre")):
        with pytest.raises(RequestError, match="label each of them on its own page"):
            opened.verdict_on_slide(loose.slide_key, action, "dr. grey", label)
    assert opened.verdict_on_slide(loose.slide_key, Action.FLAG, "dr. grey").action is Action.FLAG


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
