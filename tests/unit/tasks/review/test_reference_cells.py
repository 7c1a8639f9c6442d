"""Cells to compare with: of the model's surest fields and of reviewers' labels, and words for which is which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from leukoflow.core.errors import RequestError, RunNotFoundError
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review import reference_cells as module
from leukoflow.tasks.review.keys import run_key_of
from leukoflow.tasks.review.reference_cells import reference_cells
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add

NIGHT = run_key_of("night")


def test_reference_cells(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(copy.parent)
    table = open_run_table(out, NIGHT)
    assert reference_cells(out, NIGHT, "Benign", 4) == ()  # the model is sure of nothing
    monkeypatch.setattr(module, "REFERENCE_CONFIDENCE", 0.26)
    module._kept.clear()
    label = table.field(0).label
    assert label is not None
    cells = reference_cells(out, NIGHT, label, 4)
    assert len(cells) == 4
    slides = [table.field(c.ordinal).slide for c in cells]
    assert len(set(slides)) == 4  # as many slides as there are
    for cell in cells:
        assert cell.picture.shape == (module.REFERENCE_PX, module.REFERENCE_PX, 3)
        assert table.field(cell.ordinal).label == cell.label == label
        own = table.cells(cell.ordinal)
        inside = [c for c in own.to_pylist() if not c["touches_border"]] or own.to_pylist()
        assert cell.attention == pytest.approx(max(c["attention"] for c in inside))
        assert "No expert has confirmed it" in cell.caption
    other = next(c for c in CLASSES if c != label)
    add(out, table.verdict_on_field(5, Action.CORRECT, "dr. grey", other))
    (confirmed,) = reference_cells(out, NIGHT, other, 1)
    assert (confirmed.ordinal, "a reviewer has labelled so" in confirmed.caption) == (5, True)
    assert 5 not in {c.ordinal for c in reference_cells(out, NIGHT, label, 20)}


def test_reference_cells_of_the_latest_run_that_has_some(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFERENCE_CONFIDENCE", 0.26)
    out = copy.parent
    label = open_run_table(str(out), NIGHT).field(0).label
    assert label is not None
    shutil.copytree(copy, out / "second")
    for name in ("manifest.json", "run.json"):
        path = out / "second" / name
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"run_id": "second"}, sort_keys=True, indent=1) + "\n"
        )
    for path in (out / "second" / "predictions").iterdir():
        table = pq.read_table(path)
        i = table.schema.get_field_index("status")
        rejected = ["rejected"] * len(table)
        pq.write_table(table.set_column(i, table.schema.field(i), [rejected]), path, use_dictionary=False)
    found = reference_cells(str(out), run_key_of("second"), label, 2)
    assert {c.run_key for c in found} == {NIGHT}


@pytest.mark.parametrize(("label", "n"), [("Blast", 3), ("Pro", 0), ("Pro", 25), ("", 1)])
def test_reference_cells_that_there_are_not(opened: RunTable, label: str, n: int) -> None:
    with pytest.raises(RequestError):
        reference_cells(opened.out, NIGHT, label, n)
    with pytest.raises(RunNotFoundError):
        reference_cells(opened.out, "0" * 16, "Pro", 3)
