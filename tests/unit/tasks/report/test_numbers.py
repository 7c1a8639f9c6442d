"""Numbers for people: never a certainty, nor nothing, by rounding alone."""

from __future__ import annotations

import pytest

from leukoflow.apps.web import words
from leukoflow.tasks.report.numbers import percent, share, tick
from leukoflow.tasks.review.wording import probability


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.0, "> 0.999"),
        (0.9999, "> 0.999"),
        (0.9994, "0.999"),
        (0.5, "0.500"),
        (0.0006, "0.001"),
        (0.0004, "< 0.001"),
        (0.0, "< 0.001"),
    ],
)
def test_probabilities(value: float, shown: str) -> None:
    assert probability(value) == shown
    assert words.prob(value) == shown


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (None, 1, "–"),
        (0.0, 1, "0.0 %"),
        (0.0001, 1, "< 0.1 %"),
        (0.9999, 1, "> 99.9 %"),
        (1.0, 1, "100.0 %"),
        (0.998, 0, "> 99 %"),
        (0.002, 0, "< 1 %"),
        (0.42, 0, "42 %"),
    ],
)
def test_shares(value: float | None, digits: int, shown: str) -> None:
    assert percent(value, digits) == shown
    assert words.percent(value, digits) == shown.replace(" %", "\u202f%")


def test_a_share_of_nothing_is_none() -> None:
    assert share(0, 0) == "–"
    assert share(1, 4) == "25.0 %"


def test_a_tick_is_where_it_says() -> None:
    assert [tick(v) for v in (2.5, 5, 12.5, 1200)] == ["2.5", "5", "12", "1,200"]
