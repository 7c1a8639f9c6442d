"""What tests of reviewing share: the finished night as a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.review.worklist import RunTable, open_run_table, run_key_of

NIGHT = run_key_of("night")


@pytest.fixture(scope="module")
def opened(night: Run) -> RunTable:
    return open_run_table(str(Path(night.root).parent), NIGHT)
