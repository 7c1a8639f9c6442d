"""Opaque keys."""

from __future__ import annotations

from review_world import everything

from leukoflow.tasks.review.table import RunTable


def test_keys_say_nothing(opened: RunTable) -> None:
    for line in everything(opened.slides):
        assert len(line.slide_key) == 16
        assert line.name not in line.slide_key
    for patient in everything(opened.patients):
        assert patient.patient[2:] not in patient.patient_key
    assert len({s.slide_key for s in everything(opened.slides)}) == len(everything(opened.slides))
