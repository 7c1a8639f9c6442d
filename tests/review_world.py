"""Names of the run that the tests of review look at, and its rows and lists as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import table as table_of

from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.review.keys import run_key_of
from leukoflow.tasks.review.query import Query

KEY = b"a key that only these tests have"
MARY, JANE = pseudonym("mary", KEY), pseudonym("jane", KEY)
NIGHT = run_key_of("night")
PROBABILITIES = ("prob_benign", "prob_early", "prob_pre", "prob_pro")


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
