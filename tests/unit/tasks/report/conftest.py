"""Runs that the tests of reports look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_report import (
    MEMBERS,
    manifest_of,
    write_run,
)

from leukoflow.runs.records import RunManifest
from leukoflow.tasks.imaging.synthetic import write_sample


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("archive")
    write_sample(directory, images=MEMBERS, seed=5)
    return directory


@pytest.fixture
def run(tmp_path: Path, archive: Path) -> tuple[Path, RunManifest]:
    root = tmp_path / "out" / "demo"
    summary, receipts = write_run(root, archive)
    return root, manifest_of(root, summary, receipts)
