"""`nights.html`: the last nights on one page that needs nothing else, in light and dark, without any script."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import median

from markupsafe import Markup

from leukoflow.core.errors import StorageError
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.monitor.drift import (
    ACT,
    CHANCE,
    MIN_FIELDS,
    MIN_SLIDES,
    QUANTITIES,
    WATCH,
    Drift,
    Level,
    title_of,
    worst,
)
from leukoflow.tasks.monitor.nights import LEVELS, STATUSES, GroupDrift, Night, Nights
from leukoflow.tasks.report import charts
from leukoflow.tasks.report.charts import Place, Series, Tile
from leukoflow.tasks.report.numbers import number, percent, shown
from leukoflow.tasks.report.page import render
from leukoflow.tasks.report.palette import colour_of, series_colour
from leukoflow.tasks.review.wording import class_name

REASONS_SHOWN, CHARTS_SHOWN, DRIFTS_NAMED = 12, 6, 6

_SECTIONS = (
    ("reconciliation", "What came in, and what became of it"),
    ("rates", "Rates"),
    ("drift", "Drift"),
    ("groups", "The last night by site and scanner"),
    ("pace", "Throughput and stages"),
    ("reasons", "Why images have no prediction"),
    ("runs", "Runs"),
)
_LEVEL_WORDS = {"few": "too few to judge", "none": "steady", "watch": "watch", "act": "act"}
_AGAINST = {"reference": "the reference", "week": "the week before"}
_STAGES = ("prepare", "segment", "extract", "classify")
_ACCENT = "var(--accent)"


def nights_page(found: Nights) -> str:
    """Build one HTML page that needs nothing else. Raises StorageError where there is no night to show."""
    if not found.nights:
        raise StorageError(f"{found.out} holds no run that can be read; `leukoflow run SOURCE --out OUT` makes one")
    nights = found.nights
    last = nights[-1]
    places = [Place(str(n.night), f"{n.night:%-d %b}") for n in nights]
    outcomes, stages = _outcomes(nights), _stages(nights)
    pace = Series("images per second", _ACCENT, [n.images_per_second for n in nights])
    return render(
        "nights.html",
        sections=_SECTIONS,
        found=found,
        nights=nights,
        last=last,
        statuses=STATUSES,
        span=f"{nights[0].night} to {last.night}" if len(nights) > 1 else str(last.night),
        drift_words=_LEVEL_WORDS[last.level] if last.comparisons[1] else "drift not compared",
        level_words=_LEVEL_WORDS,
        against=_AGAINST,
        drifted={level: _drifted(last, level) for level in ("act", "watch")},
        drifts_named=DRIFTS_NAMED,
        thresholds={
            "watch": WATCH, "act": ACT, "draws": round(1 / CHANCE), "fields": MIN_FIELDS, "slides": MIN_SLIDES,
        },
        tiles=_tiles(nights),
        open_states={n.night: sorted({r.state for r in n.runs if r.done < r.members}) for n in nights},
        outcomes=[s for s in outcomes if any(s.values)],
        outcomes_chart=charts.columns(places, outcomes, "Images of each night by what became of them"),
        rates=[(s, charts.line(places, s, s.name, percent)) for s in _rates(nights)],
        drift_charts=[
            (kind, _heat_map(nights, places, kind))
            for kind in _AGAINST
            if any(night.drifts(kind) for night in nights)
        ],
        flagged=[
            (d.level, title_of(d.quantity), f"{_compared(g)}: {_explain(d)}", _pairs(d))
            for g, d in _flagged(last)
        ],
        groups=[_group_row(g, worst(g.drifts)) for g in last.drift],
        quantities=[_quantity_row(g, d) for g in last.drift for d in g.drifts],
        pace="–" if last.images_per_second is None else f"{last.images_per_second:.1f}",
        pace_chart=charts.line(places, pace, "Images per second", lambda v: f"{v:.1f}", width=560, height=150),
        stages=stages,
        stages_chart=charts.columns(places, stages, "Worker milliseconds per image by stage", width=560, height=150),
        reasons=_reasons(nights, places),
        runs=_runs(nights),
    )  # fmt: skip


def _tiles(nights: Sequence[Night]) -> list[tuple[str, str, str, str]]:
    """List name, value, what is usual, and colour of each tile."""
    last, before = nights[-1], nights[:-1]

    def usual(values: Iterable[float | None], show: Callable[[float], str]) -> str:
        known = [v for v in values if v is not None]
        return f"median of the nights before: {show(median(known))}" if known else "no night before to compare with"

    def pace(value: float) -> str:
        return f"{value:.1f}"

    handed = ("handed over", number(last.total("members")), usual((n.total("members") for n in before), number), "")
    speed = "–" if last.images_per_second is None else pace(last.images_per_second)
    return [
        handed,
        *(
            (status, percent(last.share(status)), usual((n.share(status) for n in before), percent), colour_of(status))
            for status in STATUSES
        ),
        ("images per second", speed, usual((n.images_per_second for n in before), pace), ""),
    ]


def _outcomes(nights: Sequence[Night]) -> list[Series]:
    """Return images of each night by status; those that are not accounted for last."""
    return [
        *(Series(s, colour_of(s), [float(n.total(s)) for n in nights]) for s in STATUSES),
        Series("unfinished", "var(--left)", [float(n.total("members") - n.total("done")) for n in nights]),
    ]


def _rates(nights: Sequence[Night]) -> list[Series]:
    """Return shares of the statuses without an answer, and of each class among the predicted."""
    return [
        *(
            Series(f"{status} share", colour_of(status), [n.share(status) for n in nights])
            for status in ("abstained", "rejected", "quarantined")
        ),
        *(
            Series(
                f"{class_name(label)} among predicted",
                colour_of(label),
                [n.labels[i] / sum(n.labels) if sum(n.labels) else None for n in nights],
            )
            for i, label in enumerate(CLASSES)
        ),
    ]


def _stages(nights: Sequence[Night]) -> list[Series]:
    """Return milliseconds of worker time per image of each stage."""
    found = []
    for stage in dict.fromkeys(t.stage for n in nights for r in n.runs for t in r.timings):
        values = []
        for night in nights:
            own = [t for r in night.runs for t in r.timings if t.stage == stage]
            images = sum(t.images for t in own)
            values.append(1000 * sum(t.seconds for t in own) / images if images else 0.0)
        colour = series_colour(_STAGES.index(stage)) if stage in _STAGES else "var(--quiet)"
        found.append(Series(shown(stage), colour, values))
    return found


# --- drift -----------------------------------------------------------------------------------------------------------


def _group_name(group: GroupDrift) -> str:
    return "all fields" if group.kind == "all" else f"{group.kind} {shown(group.name, 40)}"


def _compared(group: GroupDrift) -> str:
    return f"{_group_name(group)}, against {_AGAINST[group.against]}"


def _drifted(night: Night, level: str) -> list[str]:
    """Name the quantities of a night that have reached a level."""
    return [
        f"{title_of(d.quantity)} ({_compared(g)}, index {d.psi:.2f})"
        for g in night.drift
        for d in g.drifts
        if d.level == level
    ]


def _heat_map(nights: Sequence[Night], places: Sequence[Place], against: str) -> Markup:
    left, width = 300, 1180

    def tile(night: Night, quantity: str, title: str) -> Tile | None:
        drift = next((d for d in night.drifts(against) if d.quantity == quantity), None)
        if drift is None:
            return None
        words = "·" if drift.psi is None or drift.excess is None else f"{max(0.0, drift.excess):.2f}"
        return Tile(words, f"{night.night}, {title}: {_explain(drift)}", f"cell-{drift.level}")

    return charts.heat_map(
        [q.title for q in QUANTITIES],
        places,
        [[tile(night, q.name, q.title) for night in nights] for q in QUANTITIES],
        f"Drift against {_AGAINST[against]}",
        left=left,
        size=(min(44.0, (width - left) / len(nights)), 22),
        width=width,
    )


def _explain(drift: Drift) -> str:
    if drift.psi is None or drift.excess is None or drift.chance is None:
        return f"{drift.fields} fields of {drift.slides} slides are too few"
    return (
        f"index {drift.psi:.3f}, {drift.excess:.3f} above chance, reached by chance in {100 * drift.chance:.1f} % of "
        f"draws; {drift.fields:,} fields of {drift.slides} slides"
    )


def _flagged(night: Night) -> list[tuple[GroupDrift, Drift]]:
    """Return what a night calls to look at, worst first."""
    flagged = [(g, d) for g in night.drift for d in g.drifts if d.level in ("watch", "act")]
    return heapq.nlargest(CHARTS_SHOWN, flagged, key=lambda item: (LEVELS.index(item[1].level), item[1].excess or 0.0))


def _pairs(drift: Drift) -> Markup:
    """Draw shares of the bins, this night's beside those it is compared with."""
    cuts = drift.cuts
    if cuts:
        between = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(cuts)]
        bins = [f"below {cuts[0]:.3g}", *between, f"from {cuts[-1]:.3g}"]
        ticks = [(i + 1.0, f"{cut:.3g}") for i, cut in enumerate(cuts) if i % 2 == 0]
    else:
        bins = list(CLASSES)
        ticks = [(i + 0.5, label) for i, label in enumerate(CLASSES)]
    return charts.pairs(
        Series("this night", _ACCENT, drift.observed),
        Series("what it is compared with", "var(--quiet)", drift.expected),
        bins,
        ticks,
        f"{title_of(drift.quantity)}: this night and what it is compared with",
        percent,
    )


def _group_row(group: GroupDrift, most_drifted: Drift | None) -> dict[str, object]:
    """Return a row of the groups' table: how a group compares in the quantity that calls for most."""
    largest = max(group.drifts, key=lambda d: d.fields, default=None)
    level: Level = most_drifted.level if most_drifted else "few"
    return {
        "group": _group_name(group),
        "against": _AGAINST[group.against],
        "fields": largest.fields if largest else 0,
        "slides": largest.slides if largest else 0,
        "level": level,
        "quantity": title_of(most_drifted.quantity) if most_drifted else "–",
        "measured": _measured(most_drifted),
    }


def _quantity_row(group: GroupDrift, drift: Drift) -> dict[str, object]:
    """Return a row of the table of every quantity."""
    return {
        "group": _group_name(group),
        "against": _AGAINST[group.against],
        "fields": drift.fields,
        "level": drift.level,
        "quantity": title_of(drift.quantity),
        "measured": _measured(drift),
    }


def _measured(drift: Drift | None) -> tuple[str, str, str]:
    """Write index, excess over chance and probability of chance; dashes where there were too few fields."""
    if drift is None or drift.psi is None or drift.excess is None or drift.chance is None:
        return "–", "–", "–"
    return f"{drift.psi:.3f}", f"{drift.excess:.3f}", f"{100 * drift.chance:.1f} %"


# --- tables ----------------------------------------------------------------------------------------------------------


def _reasons(nights: Sequence[Night], places: Sequence[Place]) -> list[tuple[str, int, int, Markup]]:
    """List the commonest reasons with their counts in the last night and in all, and a line over the nights."""
    of_night: list[Counter[str]] = []
    for night in nights:
        counts: Counter[str] = Counter()
        for run in night.runs:
            counts.update(dict(run.reasons))
        of_night.append(counts)
    totals: Counter[str] = Counter()
    for counts in of_night:
        totals.update(counts)
    rows = []
    for reason, count in totals.most_common(REASONS_SHOWN):
        series = Series(reason, _ACCENT, [float(counts[reason]) for counts in of_night])
        line = charts.line(places, series, shown(reason), lambda v: f"{v:.0f}", width=240, height=26, bare=True)
        rows.append((reason, of_night[-1][reason], count, line))
    return rows


def _runs(nights: Sequence[Night]) -> list[tuple[object, bool]]:
    """List all runs, the last one first, and whether each has another bundle than the run before it."""
    rows: list[tuple[object, bool]] = []
    bundle = None
    for night in nights:
        for run in night.runs:
            rows.append((run, bundle is not None and bundle != run.bundle_digest))
            bundle = run.bundle_digest
    return rows[::-1]
