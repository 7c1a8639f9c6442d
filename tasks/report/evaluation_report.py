"""The evaluation as one HTML page that needs nothing else. Every number comes from the measured result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from leukoflow.runs.records import CLASSES, read_reason
from leukoflow.tasks.report import charts
from leukoflow.tasks.report.charts import Axis, Place, Tile
from leukoflow.tasks.report.page import render as render_page

METRICS = {
    "accuracy": "accuracy, abstained fields included",
    "macro_f1": "macro-F1",
    "mcc": "MCC",
    "auc_ovr": "AUC, one against rest",
    "ece": "ECE",
}
PROTOCOLS = {
    "cluster": "Whole clusters of photographs held out: the figures to judge by",
    "slide": "Whole slides held out",
    "random": "Random split: neighbours of test fields are in training",
}

Result = dict[str, Any]


def render(result: Result) -> str:
    """Build the page from the content of `evaluation.json`. Sections that were not measured are left out."""
    protocols = result.get("protocols", {})
    probes, explanations = result.get("probes", []), result.get("explanations")
    return render_page(
        "evaluation.html",
        bundle=result["bundle"],
        data=result["data"],
        metrics=METRICS,
        recipe=result.get("recipe", {}).get("text", ""),
        shortcut=_shortcut(protocols),
        protocols=[
            (
                title,
                protocols[name],
                result.get("comparison", {}).get(name),
                _detail(protocols[name], name == "cluster"),
            )
            for name, title in PROTOCOLS.items()
            if name in protocols
        ],
        ablations=result.get("ablations", []),
        ablations_chart=_ablations_chart(result.get("ablations", [])),
        selection_chart=_selection_chart(result.get("select_k", [])),
        probes=probes,
        robustness=result.get("robustness", []),
        robustness_chart=_robustness_chart(probes, result.get("robustness", [])),
        explanations=explanations if explanations and explanations["top"] else None,
        explanations_chart=_explanations_chart(explanations),
        segmentation=result.get("segmentation"),
        foreign=result.get("foreign"),
        ratio=_ratio,
        signed=_signed,
        p_value=_p_value,
        reason=_reason,
        nan=math.nan,
    )


def _shortcut(protocols: Result) -> dict[str, float | None] | None:
    """Return the accuracies that show what a random split is worth; None where they were not measured."""
    models = protocols.get("random", {}).get("models", {})
    if not {"leukoflow", "colour histogram"} <= set(models):
        return None
    return {
        "model": models["leukoflow"]["accuracy"],
        "histogram": models["colour histogram"]["accuracy"],
        "corner": models.get("corner only", {}).get("accuracy"),
    }


def _detail(protocol: Result, drawn: bool) -> Result | None:
    """Return the model's figures under a protocol, with charts where these are to be drawn; None without them."""
    measured = protocol["models"].get("leukoflow", {})
    if "reliability" not in measured:
        return None
    return {"measured": measured, "repeats": protocol["repeats"], "charts": _detail_charts(measured) if drawn else ()}


# --- charts ----------------------------------------------------------------------------------------------------------

Points = list[tuple[float, float]]


def _detail_charts(measured: Result) -> tuple[tuple[Markup, str], ...]:
    """Return charts with their captions: reliability, risk, accuracy by group, confusion."""
    curve = [(b["confidence"], b["accuracy"]) for b in measured["reliability"]]
    low = min([0.5, *(value for point in curve for value in point)])
    risk = [(share, wrong) for share, wrong in measured["risk_coverage"]]
    groups = sorted(measured["per_group"].items(), key=lambda item: float(item[1]["accuracy"]))
    bars = [(f"{name} {row['label']}, {row['fields']}", row["accuracy"]) for name, row in groups]
    reliability = charts.curves(
        [("ideal", [(low, low), (1, 1)]), ("measured", curve)],
        Axis("confidence", low, 1),
        Axis("share that is right", low, 1),
        "Reliability",
    )
    errors = charts.curves(
        [("risk", risk)],
        Axis("share of fields answered", 0, 1),
        Axis("share wrong", 0, max(0.02, *(wrong for _, wrong in risk))),
        "Share of wrong answers by share of fields answered",
    )
    return (
        (reliability, "Reliability: fields grouped by confidence."),
        (errors, "Errors among the most confident fields."),
        (charts.bars(bars, "Accuracy by group"), "Accuracy by group, worst first."),
        (_confusion(measured["confusion"]), "True class by row, answer by column."),
    )


def _confusion(table: Sequence[Sequence[int]]) -> Markup:
    tiles = [
        [
            Tile(f"{count}", f"true {CLASSES[i]}, answer {CLASSES[j]}: {count}", strength=count / max(sum(row), 1))
            for j, count in enumerate(row)
        ]
        for i, row in enumerate(table)
    ]
    places = [Place(name, name) for name in CLASSES]
    return charts.heat_map(
        CLASSES, places, tiles, "Confusion of the classes", left=66, size=(52, 44), width=290, kind="plot fixed shares"
    )


def _ablations_chart(ablations: Sequence[Result]) -> Markup | None:
    if not ablations:
        return None
    return charts.strip([(a["name"], a["scores"]) for a in ablations], "Accuracy of each fold")


def _selection_chart(curve: Sequence[Result]) -> Markup | None:
    """Draw accuracy by the number of columns that are kept."""
    if not curve:
        return None
    points = sorted((float(c["k"]), float(c["mean"])) for c in curve)
    low, high = min(y for _, y in points), max(y for _, y in points)
    pad = max(0.005, (high - low) / 4)
    kept = Axis("columns kept", 0, points[-1][0])
    return charts.curves([("mRMR", points)], kept, Axis("accuracy", low - pad, high + pad), "Accuracy by columns kept")


def _robustness_chart(probes: Sequence[Result], robustness: Sequence[Result]) -> Markup | None:
    """Draw accuracy by severity of each kind of damage, from the untouched field on."""
    if not robustness:
        return None
    kinds: dict[str, Points] = {}
    for r in robustness:
        start = probes[0]["accuracy"] if probes else r["accuracy"]
        kinds.setdefault(r["kind"], [(0.0, start)]).append((float(r["severity"]), r["accuracy"]))
    low = min(y for points in kinds.values() for _, y in points)
    accuracy = Axis("accuracy", max(0.0, low - 0.05), 1)
    return charts.curves(list(kinds.items()), Axis("severity", 0, 3), accuracy, "Accuracy by severity of damage")


def _explanations_chart(found: Result | None) -> Markup | None:
    """Draw what the answer's probability loses when cells are taken away."""
    if not found or not found["top"]:
        return None
    removed = [float(n) for n in found["removed"]]
    lines = [
        (name, list(zip(removed, found[key], strict=True)))
        for name, key in (("most attended", "top"), ("random", "random"))
    ]
    values = [y for _, points in lines for _, y in points]
    lost = Axis("probability lost", min(0.0, *values), max(*values, 0.01))
    return charts.curves(
        lines, Axis("cells removed", min(removed), max(removed)), lost, "Probability lost by cells removed"
    )


# --- numbers ---------------------------------------------------------------------------------------------------------


def _ratio(value: float) -> str:
    """Write a measured share in percent, as it is."""
    return f"{100 * value:.1f} %"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def _p_value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value >= 0.0001 else "below 0.0001"


def _reason(stored: str) -> str:
    """Write a stored reason in today's words."""
    return read_reason(stored) or stored
