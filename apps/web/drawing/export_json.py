"""Export of a field as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from leukoflow.apps.web.words import Cell, Subject
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.imaging.cytoplasm import measured
from leukoflow.tasks.review.wording import RESEARCH_USE


def export_json(subject: Subject, cells: Sequence[Cell], by: str) -> bytes:
    """Return everything that is reported about a field, for programs."""
    content: dict[str, Any] = {
        "notice": " ".join(filter(None, (subject.shadow, RESEARCH_USE))),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_by": by,
        "title": subject.title,
        "status": subject.status,
        "reason": subject.reason,
        "label": subject.label,
        "confidence": subject.confidence,
        "caution": subject.caution or None,
        "probabilities": dict(zip(CLASSES, subject.probabilities, strict=False)),
        "prediction_set": list(subject.prediction_set),
        "ood_score": subject.ood,
        "width_px": subject.width_px,
        "height_px": subject.height_px,
        "um_per_px": subject.um_per_px,
        "um_per_px_source": subject.source,
        "quality": dict(subject.quality),
        "remarks": list(subject.remarks),
        "bundle": subject.bundle,
        "bundle_digest": subject.bundle_digest,
        "member_sha256": subject.sha256,
        "cells": [
            {
                "cell_id": c.cell_id,
                "rank": c.rank,
                "attention": c.attention,
                "nc_ratio": measured(c.nc_ratio),  # null: the segmenter saw no cytoplasm
                "nucleus_area_px": c.nucleus_area_px,
                "cell_area_px": c.cell_area_px,
                "eccentricity": c.eccentricity,
                "touches_border": c.touches_border,
            }
            for c in cells
        ],
    }
    return json.dumps(content, ensure_ascii=False, indent=1).encode()
