"""Slides ranked by urgency, from rows alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from leukoflow.runs.schema import SLIDES
from leukoflow.tasks.publish.ranking import rank_slides


def field(slide: str | None, status: str = "predicted", malignant: float = 0.5, key: str = "f/1.jpg") -> dict[str, Any]:
    p: list[float | None] = [1 - malignant, malignant, 0.0, 0.0] if status == "predicted" else [None] * 4
    names = ("prob_benign", "prob_early", "prob_pre", "prob_pro")
    return {
        "run_id": "night",
        "image_key": key, "slide_id": slide, "patient_id": None, "site": None, "status": status, "n_cells": 4,
        **dict(zip(names, p, strict=True)),
    }  # fmt: skip


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    table = rank_slides(rows)
    assert table.schema.equals(SLIDES)
    return table.to_pylist()


def test_slides_are_ranked_by_urgency() -> None:
    rows = [field("calm", malignant=0.1)] * 8 + [field("ill", malignant=0.9)] * 8 + [field("blurred", "rejected")] * 3
    found = ranked(rows)
    assert {s["run_id"] for s in found} == {"night"}
    assert [(s["rank"], s["slide_id"]) for s in found] == [(1, "ill"), (2, "blurred"), (3, "calm")]
    ill, blurred, calm = found
    assert ill["urgency"] == pytest.approx((8 * 0.9 + 1) / 10)
    assert blurred["urgency"] == 0.5  # silence is no health
    assert (blurred["label"], blurred["n_rejected"], blurred["n_images"]) == (None, 3, 3)
    assert (calm["label"], ill["label"]) == ("Benign", "Early")
    assert (ill["n_malignant"], calm["n_malignant"], ill["n_cells"]) == (8, 0, 32)


def test_few_fields_speak_less_loudly_than_many() -> None:
    found = ranked([field("one", malignant=0.95)] + [field("many", malignant=0.9)] * 20)
    assert [s["slide_id"] for s in found] == ["many", "one"]


def test_without_a_manifest_folders_are_slides() -> None:
    found = ranked([field(None, key="a/b/1.jpg"), field(None, key="a/b/2.jpg"), field(None, key="3.jpg"), field("a/b")])
    assert {(s["slide_id"], s["grouping"]): s["n_images"] for s in found} == {
        ("a/b", "folder"): 2, (".", "folder"): 1, ("a/b", "manifest"): 1,
    }  # fmt: skip


def test_the_most_suspicious_field_is_named() -> None:
    found = ranked([field("s", malignant=m, key=f"{m}.jpg") for m in (0.2, 0.8, 0.4)])
    assert (found[0]["top_image_key"], found[0]["top_confidence"]) == ("0.8.jpg", pytest.approx(0.8))
    assert np.isclose(found[0]["malignant_score"], 1.4 / 3)


def test_a_slide_has_the_patient_that_any_of_its_fields_names() -> None:
    named = {**field("S1"), "patient_id": "p_7", "site": "north"}
    for rows in ([field("S1"), named], [named, field("S1")]):
        (slide,) = ranked(rows)
        assert (slide["slide_id"], slide["patient_id"], slide["site"], slide["n_images"]) == ("S1", "p_7", "north", 2)
