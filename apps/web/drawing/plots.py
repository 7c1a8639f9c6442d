"""Bars and plots, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

from markupsafe import Markup, escape

from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.agreement import WeekLine
from leukoflow.tasks.review.timeline import TimelinePoint
from leukoflow.tasks.review.wording import mean_words


def shares(parts: Sequence[tuple[str, float]], whole: float = 1000.0) -> list[tuple[str, str, str]]:
    """Return (kind, x, width) of a stacked bar that is `whole` wide, for parts (kind, amount)."""
    total = sum(amount for _, amount in parts) or 1.0
    x, out = 0.0, []
    for kind, amount in parts:
        if amount <= 0:
            continue
        width = whole * amount / total
        out.append((kind, f"{x:.2f}", f"{max(width, 1.0):.2f}"))
        x += width
    return out


def hundred(right: int) -> list[tuple[str, str, str]]:
    """Return (x, y, kind) of 100 squares; the first `right` are `on`."""
    return [(f"{i % 20 * 12.5:g}", f"{i // 20 * 10:g}", "on" if i < right else "") for i in range(100)]


def timeline_svg(points: Sequence[TimelinePoint]) -> Markup:
    """Plot a patient's mean malignant probability over runs, with its interval; a table beside it has the numbers."""
    width, height, left, right, top, foot = 1000, 300, 56, 24, 24, 46
    tall = height - top - foot

    def level(share: float) -> float:
        return top + (1 - share) * tall

    plot = _Plot(width, height, "course-title")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        plot.line("grid" if share else "axis", left, level(share), width - right, level(share))
        plot.text(f"{share:g}", left - 10, level(share) + 4, "end")
    xs = _places([p.at for p in points], left, width - left - right)
    segments: list[list[str]] = []
    for x, point in zip(xs, points, strict=True):
        if point.summary.interval is not None:
            low, high = (level(v) for v in point.summary.interval)
            plot.line("whisker", x, low, x, high)
            plot.line("whisker", x - 5, low, x + 5, low)
            plot.line("whisker", x - 5, high, x + 5, high)
        if point.summary.mean_malignant_probability is not None:
            if not segments or not point.same_bundle or point.same_images:
                segments.append(
                    []
                )  # not joined: another bundle measures differently, and the same images show no change over time
            segments[-1].append(f"{x:.1f} {level(point.summary.mean_malignant_probability):.1f}")
    plot.parts += [f'<path class="line" d="M{"L".join(s)}"/>' for s in segments if len(s) > 1]
    named = -math.inf
    for x, point in zip(xs, points, strict=True):
        share_, label = point.summary.mean_malignant_probability, point.summary.label
        if share_ is not None:
            kind = f"c-{label}" if label in CLASSES else ""
            plot.parts.append(f'<circle class="point {kind}" cx="{x:.1f}" cy="{level(share_):.1f}" r="7"/>')
            dx, anchor = (-12, "end") if x > width - 90 else (12, "start")
            plot.text(mean_words(share_), x + dx, level(share_) - 9, anchor, "strong")
        alone = [p.at[:10] for p in points].count(point.at[:10]) == 1
        if x - named >= (92 if alone else 140):  # else the dates would overlap
            plot.text(point.at[:10] if alone else f"{point.at[:10]} {point.at[11:16]}", x, height - 22, "middle")
            named = x
    return plot.done()


def weeks_svg(weeks: Sequence[WeekLine]) -> Markup:
    """Plot decisions by week: accepted and corrected."""
    if not weeks:
        return Markup("")
    latest = weeks[-26:]
    width, height, left, foot, top = 1000, 220, 44, 34, 14
    tall, base = height - foot - top, float(height - foot)
    most = max(w.n for w in latest) or 1
    step = min(70.0, (width - left) / len(latest))
    plot = _Plot(width, height, "weeks-title")
    for share in (0.5, 1.0):
        plot.line("grid", left, top + (1 - share) * tall, width, top + (1 - share) * tall)
        plot.text(f"{most * share:g}", left - 8, top + (1 - share) * tall + 4, "end")
    for i, week in enumerate(latest):
        x, y = left + (i + 0.15) * step, base
        for amount, kind in ((week.accepted, "c-predicted"), (week.corrected, "c-rejected")):
            y -= amount / most * tall
            size = f'width="{0.7 * step:.1f}" height="{amount / most * tall:.1f}"'
            plot.parts.append(f'<rect class="f-bar {kind}" x="{x:.1f}" y="{y:.1f}" {size} rx="2"/>')
        if len(latest) <= 14 or i % 2 == 0:
            plot.text(week.week[-3:], x + 0.35 * step, height - 12, "middle")
    plot.line("axis", left, base, width, base)
    return plot.done()


class _Plot:
    """Builds an SVG; colours come from the style sheet, by class."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{title}">']

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(self, words: str, x: float, y: float, anchor: str, kind: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def done(self) -> Markup:
        """Return the SVG; foreign text in it has been escaped."""
        return Markup("".join(self.parts) + "</svg>")


def _places(times: Sequence[str], left: float, inner: float) -> list[float]:
    """Return x in proportion to time; evenly spaced if times cannot be parsed or are all the same."""
    try:
        stamps = [datetime.fromisoformat(t).timestamp() for t in times]
    except ValueError:
        stamps = [float(i) for i in range(len(times))]
    first, last = min(stamps, default=0.0), max(stamps, default=0.0)
    if last <= first:
        return [left + inner * (i + 1) / (len(times) + 1) for i in range(len(times))]
    margin = inner * 0.06
    return [left + margin + (inner - 2 * margin) * (s - first) / (last - first) for s in stamps]
