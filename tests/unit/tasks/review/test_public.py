"""The keys of what the JSON API serves: programs rely on them, so none comes or goes unnoticed."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from leukoflow.tasks.review.agreement import Agreement
from leukoflow.tasks.review.lines import FieldLine, Page, PatientLine, Reconciliation, RunLine, SlideLine
from leukoflow.tasks.review.timeline import Timeline

COUNTS = "predicted abstained rejected quarantined"
KEYS = {
    "RunLine": (
        f"run_key run_id state started_at finished_at source_kind members done {COUNTS} missing bundle bundle_digest "
        "shadow_of message phase"
    ),
    "Reconciliation": f"received {COUNTS} waiting missing ignored truncated conflicts finished state balanced",
    "FieldCounts": COUNTS,
    "Summary": (
        "counts label probabilities urgency mean_malignant_probability interval malignant_fields uncertainty entropy "
        "cells answered_cells reviewed diagnosed flagged worst"
    ),
    "Verdict": "action who at label comment seen_status seen_label seen_confidence seen_bundle_digest",
    "Standing": "decision flagged comment verdicts",
    "SlideLine": (
        "slide_key name grouping patient_key patient site scanner summary standing rank missing patients"
    ),
    "PatientLine": "patient_key patient site slides summary worst_slide missing",
    "FieldDetails": (
        "member_sha256 bundle_digest um_per_px um_per_px_source um_per_px_sd um_per_px_stated width_px height_px "
        "focus exposure quality_flags shard zarr_index n_tiles verdicts"
    ),
    "FieldLine": (
        "ordinal image_key slide_key slide patient_key patient site scanner status reason label confidence "
        "probabilities prediction_set ood n_cells urgency uncertainty standing details"
    ),
    "Page": "items total offset limit",
    "Timeline": "patient_key patient points unread remarks",
    "TimelinePoint": (
        "run_key run_id at finished slides summary corrected bundle_digest same_bundle same_images"
    ),
    "Agreement": (
        "n accepted corrected without_prediction confusion kappa kappa_interval no_kappa weeks unread"
    ),
    "WeekLine": "week n accepted corrected kappa",
}  # fmt: skip


def records(served: Any) -> dict[str, dict[str, Any]]:
    """Schemas of a record and of all that it holds, by their titles."""
    schema = TypeAdapter(served).json_schema(mode="serialization")
    return {s["title"]: s for s in [schema, *schema.get("$defs", {}).values()] if "properties" in s}


@pytest.mark.parametrize(
    "served",
    [RunLine, Reconciliation, Page[SlideLine], Page[PatientLine], Page[FieldLine], FieldLine, Timeline, Agreement],
)
def test_the_keys_of_what_is_served(served: Any) -> None:
    for title, schema in records(served).items():
        assert list(schema["properties"]) == KEYS[title].split()
        optional = set(schema["properties"]) - set(schema["required"])
        assert optional == ({"details"} if title == "FieldLine" else set())
