"""What a slide is, and how urgent its fields make it: the definitions that the run's tables and the worklist share."""

from __future__ import annotations

from typing import Any

import numpy as np

MALIGNANT = slice(1, 4)
"""Places of the malignant classes among CLASSES."""


def slide_of(slide_id: str | None, image_key: str) -> tuple[str, str]:
    """(grouping, slide) of an image: what the manifest says, else the folder it lies in."""
    return ("folder", image_key.rpartition("/")[0] or ".") if slide_id is None else ("manifest", slide_id)


def urgency_of(malignant: Any, predicted: Any) -> Any:
    """Expected share of malignant fields, shrunk towards one half where few speak.

    `malignant` is the sum of the predicted fields' malignant probabilities, `predicted` their number; arrays of both do
    as well. A slide on which nothing could be predicted has urgency one half: nobody may take silence for health.
    """
    return (malignant + 1.0) / (predicted + 2.0)


def mean_malignant_probability(sums: Any, answered: Any) -> Any:
    """Mean over answered fields of P(Early) + P(Pre) + P(Pro), each field counting once, however many cells it has.

    It is `malignant_score` in `slides.parquet`. No differential count: no cell is diagnosed by itself.

    Args:
        sums: sums of the answered fields' probabilities, float64 [..., 4] in the order of CLASSES.
        answered: their number [...], at least 1.
    """
    return (sums / np.asarray(answered)[..., None])[..., MALIGNANT].sum(-1)
