"""The records that lists are answered with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from review_world import NIGHT, PROBABILITIES, everything

from leukoflow.tasks.review.lines import Page, is_outweighed
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.table import RunTable


def test_pages_are_values() -> None:
    assert Page((1, 2), 5, 0, 2) == Page((1, 2), 5, 0, 2)


def test_what_lies_in_no_folder_is_no_slide(opened: RunTable) -> None:
    line = everything(opened.slides)[0]
    loose = replace(line, grouping="folder", name=".")
    assert (loose.title, loose.in_no_folder) == ("(no folder)", True)
    assert not replace(loose, grouping="manifest").in_no_folder
    assert replace(line, name="ward-2").title == "ward-2"


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
    assert [is_outweighed(label, 0.9) for label in ("Benign", "Pre", None)] == [True, False, False]
    assert not is_outweighed("Benign", None)
