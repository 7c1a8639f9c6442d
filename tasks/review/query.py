"""Filters, order and page that people ask of a list."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from leukoflow.core.errors import RequestError
from leukoflow.runs.records import CLASSES, Status

MAX_PAGE = 500


class Sort(StrEnum):
    """What lists are sorted by."""

    URGENCY = "urgency"
    NAME = "name"
    ORDER = "order"  # as in the plan
    LABEL = "label"
    MALIGNANT = "malignant"
    UNCERTAINTY = "uncertainty"
    CONFIDENCE = "confidence"
    FIELDS = "fields"
    CELLS = "cells"
    REVIEWED = "reviewed"


class Review(StrEnum):
    """States of review that lists are filtered by."""

    REVIEWED = "reviewed"
    UNREVIEWED = "unreviewed"
    FLAGGED = "flagged"
    CORRECTED = "corrected"


@dataclass(frozen=True, slots=True)
class Query:
    """One page of a list: which lines, in which order. Raises RequestError for values that do not exist.

    `slide` and `patient` are opaque keys. Filters on label, status and review hold of the line itself: of a slide,
    `status` asks for at least one such field, and `label` for the slide's own.
    """

    text: str = ""
    label: str | None = None
    status: Status | None = None
    site: str | None = None
    scanner: str | None = None
    review: Review | None = None
    slide: str | None = None
    patient: str | None = None
    sort: Sort = Sort.URGENCY
    descending: bool = True
    offset: int = 0
    limit: int = 50

    def __post_init__(self) -> None:
        if self.label is not None and self.label not in CLASSES:
            raise RequestError(f"there is no label {self.label!r}: one of {', '.join(CLASSES)}")
        for name, kind in (("status", Status), ("review", Review), ("sort", Sort)):
            value = getattr(self, name)
            if value is None or isinstance(value, kind):
                continue
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                raise RequestError(f"there is no {name} {value!r}: one of {', '.join(kind)}") from None
        if not 0 <= self.offset <= 1 << 40 or not 1 <= self.limit <= MAX_PAGE:
            raise RequestError(f"a page begins at 0 or later and has 1 to {MAX_PAGE} lines")
        if len(self.text) > 200:
            raise RequestError("a search has at most 200 characters")


EVERYTHING = Query()
