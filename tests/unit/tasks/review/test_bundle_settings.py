"""Settings of bundles are read without their weights."""

from __future__ import annotations

from pathlib import Path

from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.bundle_settings import bundle_document, method_of


def test_bundles_are_read_without_their_weights(tmp_path: Path) -> None:
    assert method_of("pocket") is not None
    document = bundle_document("pocket")
    assert document is not None
    assert document["classes"] == list(CLASSES)
    assert bundle_document("nothing") is None
    assert bundle_document(str(tmp_path)) is None
    assert bundle_document("../pocket") is None
