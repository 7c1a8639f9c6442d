"""The evaluation's page: complete, escaped, drawn from the result alone."""

from __future__ import annotations

import copy
import re
from typing import Any

from leukoflow.tasks.report.evaluation_report import render

PLAIN: dict[str, Any] = {
    "fields": 8,
    "accuracy": 0.75,
    "macro_f1": 0.7,
    "mcc": 0.6,
    "auc_ovr": 0.9,
    "ece": 0.1,
    "intervals_95": {key: [0.5, 0.9] for key in ("accuracy", "macro_f1", "mcc", "auc_ovr", "ece")},
    "per_group": {"C<1>": {"label": "Pre", "fields": 8, "accuracy": 0.75, "answered": 1.0}},
    "worst_group": {"group": "C<1>", "accuracy": 0.75, "fields": 8},
}
FULL: dict[str, Any] = PLAIN | {
    "accuracy": 0.8765,
    "per_class": {"Pre": {"fields": 8, "sensitivity": 0.7, "specificity": 0.8, "auc": 0.9}},
    "coverage_per_class": {"Pre": 0.96},
    "malignant": {
        "sensitivity_at_specificity_0.95": 0.91,
        "sensitivity_at_specificity_0.99": 0.81,
        "specificity_at_sensitivity_0.99": 0.71,
    },
    "reliability": [{"confidence": 0.6, "accuracy": 0.5, "fields": 4}, {"confidence": 0.9, "accuracy": 1, "fields": 4}],
    "risk_coverage": [[0.5, 0.0], [1.0, 0.25]],
    "confusion": [[2, 0, 0, 0], [0, 2, 0, 0], [0, 1, 1, 0], [0, 0, 0, 2]],
    "coverage": 0.95,
    "mean_set_size": 1.2,
    "abstention_rate": 0.04,
    "abstained": {"foreign": 1},
    "accuracy_answered": 0.9,
}
RESULT: dict[str, Any] = {
    "bundle": {"name": "<b>pocket", "digest": "ab" * 32},
    "data": {"digest": "cd" * 32, "fields": 8, "classes": {"Pre": 8}, "slides": 3, "clusters": 2},
    "recipe": {"text": "how it was done"},
    "protocols": {
        name: {"repeats": 2, "folds": 5, "models": {"leukoflow": FULL, "colour histogram": PLAIN, "corner only": PLAIN}}
        for name in ("cluster", "random")
    },
    "comparison": {
        "cluster": {
            "against": "colour histogram", "difference": -0.1265, "p_t": 0.0321, "p_wilcoxon": 0.05,
            "interval_95": (-0.2, -0.03), "effect_size": -1.5, "scores": 10,
        },
    },
    "ablations": [
        {"name": "whole method", "what": "all", "scores": [0.8, 0.9], "mean": 0.85, "difference": None, "p_t": None,
         "p_t_holm": None, "p_wilcoxon": None, "effect_size": None},
        {"name": "no attention", "what": "averaged", "scores": [0.7, 0.8], "mean": 0.75, "difference": -0.1, "p_t": 0.2,
         "p_t_holm": 0.4, "p_wilcoxon": 0.5, "effect_size": -1.0},
    ],
    "select_k": [{"k": 50, "scores": [0.7], "mean": 0.7}, {"k": 100, "scores": [0.8], "mean": 0.8}],
    "probes": [
        {"name": "untouched", "what": "as is", "accuracy": 0.9, "baseline": None, "fields": 8},
        {"name": "bar", "what": "moved", "accuracy": 0.85, "baseline": 0.9, "fields": 8},
    ],
    "robustness": [{"kind": "blur", "severity": 1, "value": "1 px", "accuracy": 0.8, "answered": 0.7}],
    "explanations": {"fields": 8, "removed": [1, 2], "top": [0.2, 0.3], "random": [0.0, 0.1]},
    "segmentation": {"dice_cell_d1": 0.9712},
    "foreign": {"images": 3, "outcomes": {"foreign": 3}, "labels_of_answered": {"Pre": 0}, "abstained_or_benign": 1.0},
}  # fmt: skip


def test_the_page_shows_every_section_and_needs_nothing_else() -> None:
    page = render(RESULT)
    for part in (
        "0.8765", "Research use only", "Reliability", "no attention", "Shortcuts", "Robustness", "faithful", "0.9712",
        "another laboratory", "p = 0.0321", "+0.0300 to +0.2000", "75.0 %", "-0.1000",
    ):  # fmt: skip
        assert part in page, part
    assert "//" not in page
    assert "url(" not in page
    assert not re.search(r"<(img|image|link|iframe|object|use)\b", page)
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';' in page
    assert "<script" not in page
    assert page.count("<svg") == 8


def test_abstention_is_reported_in_todays_words() -> None:
    """The figures are of a bundle that was measured when the reason had another word."""
    page = render(RESULT)
    assert "out of distribution 3" in page
    assert "foreign" not in page


def test_names_are_escaped() -> None:
    page = render(RESULT)
    assert "<b>pocket" not in page
    assert "C<1>" not in page
    assert "&lt;b&gt;pocket" in page


def test_what_was_not_measured_is_left_out() -> None:
    page = render({key: RESULT[key] for key in ("bundle", "data")})
    assert "Shortcuts" not in page
    assert "<svg" not in page
    assert page.startswith("<!doctype html>")


def test_numbers_come_from_the_result() -> None:
    changed = copy.deepcopy(RESULT)
    changed["protocols"]["cluster"]["models"]["leukoflow"]["accuracy"] = 0.1234
    numbers = [set(re.findall(r"\d\.\d{4}", render(r))) for r in (RESULT, changed)]
    assert "0.1234" in numbers[1] - numbers[0]


def test_counts_and_accuracy_say_what_they_are_of() -> None:
    page = render(RESULT)
    assert "<th>accuracy, abstained fields included</th>" in page
    assert "Counts are over all 2 repeats.</p>" in page
    once = {"cluster": RESULT["protocols"]["cluster"] | {"repeats": 1}}
    assert "Counts are over" not in render(RESULT | {"protocols": once})
