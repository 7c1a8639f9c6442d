"""What is held of a run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from review_world import NIGHT, everything

from leukoflow.tasks.review.run_cache import cache_of
from leukoflow.tasks.review.runs import open_run_table


def test_missing_images_are_counted_by_slide_and_patient(copy: Path) -> None:
    def counted() -> tuple[dict[tuple[str, str], int], dict[str, int]]:
        table = open_run_table(str(copy.parent), NIGHT)
        slides, patients = everything(table.slides), everything(table.patients)
        return {(s.grouping, s.name): s.missing for s in slides if s.missing}, {
            p.patient: p.missing for p in patients if p.missing
        }

    lost = pq.read_table(copy / "missing.parquet")
    (row,) = lost.to_pylist()
    named = row["slide_id"] is not None
    slide = ("manifest", row["slide_id"]) if named else ("folder", row["image_key"].rpartition("/")[0])
    assert counted() == ({slide: 1}, {row["patient_id"]: 1} if row["patient_id"] else {})
    given = next(s for s in everything(open_run_table(str(copy.parent), NIGHT).slides) if s.patient)
    rows = [row, row | {"slide_id": given.name, "patient_id": given.patient}]
    pq.write_table(pa.Table.from_pylist(rows, lost.schema), copy / "missing.parquet")
    cache_of(str(copy.parent)).forget("night")
    assert counted()[0][(given.grouping, given.name)] == 1 + (slide == (given.grouping, given.name))
    assert counted()[1][given.patient] == 1 + (row["patient_id"] == given.patient)
