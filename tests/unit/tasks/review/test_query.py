"""What can be asked of a list, and what cannot."""

from __future__ import annotations

from typing import Any

import pytest

from leukoflow.core.errors import RequestError
from leukoflow.tasks.review.query import Query


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
