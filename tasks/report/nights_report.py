"""`nights.html`: the last nights on one page that needs nothing else, in light and dark, without any script."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median

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
from leukoflow.tasks.report import page
from leukoflow.tasks.review.wording import class_name

REASONS_SHOWN, CHARTS_SHOWN = 12, 6

_LEVEL_WORDS = {"few": "too few to judge", "none": "steady", "watch": "watch", "act": "act"}
_STAGE_COLOURS = {
    "prepare": "#6d8fb3",
    "segment": "#3f8f83",
    "extract": "#c79a1e",
    "classify": "#b0396b",
}


def nights_page(found: Nights) -> str:
    """One HTML page that needs nothing else. Raises StorageError where there is no night to show."""
    if not found.nights:
        raise StorageError(f"{found.out} holds no run that can be read; `leukoflow run SOURCE --out OUT` makes one")
    nights = found.nights
    last = nights[-1]
    sections = (
        ("reconciliation", "What came in, and what became of it", _reconciliation(nights)),
        ("rates", "Rates", _rates(nights)),
        ("drift", "Drift", _drift(found)),
        ("groups", "The last night by site and scanner", _groups(last)),
        ("pace", "Throughput and stages", _pace(nights)),
        ("reasons", "Why images have no prediction", _reasons(nights)),
        ("runs", "Runs", _runs(nights)),
    )
    drift = _LEVEL_WORDS[last.level] if last.comparisons[1] else "drift not compared"
    contents = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{html}</section>' for name, title, html in sections)
    span = f"{nights[0].night} to {last.night}" if len(nights) > 1 else str(last.night)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{page.POLICY}">'
        f"<title>nights to {last.night} · leukoflow</title>"
        f"<style>{page.style('run_report.css', 'nights_report.css')}</style></head>"
        f'<body><header><p class="brand">leukoflow <span>over the nights</span></p><h1>{span} '
        f'<span class="state level-{last.level}">{drift}</span></h1>'
        f'<p class="quiet">{page.text(found.out)} · made {page.moment(found.made_at)}</p></header>'
        f"<main>{_verdict(found)}{_tiles(nights)}<nav>{contents}</nav>{body}</main>"
        "<footer><b>Research use only.</b> Not a medical device. Drift means that fields look different from before, "
        "or are answered differently. It does not mean that the answers are wrong; no drift does not mean that they "
        "are right.</footer></body></html>"
    )


def _verdict(found: Nights) -> str:
    last = found.nights[-1]
    lines = []
    sums = " + ".join(f"{page.number(last.total(s))} {s}" for s in STATUSES)
    if last.balanced:
        lines.append(
            (
                "good",
                f"<b>The night of {last.night} is reconciled.</b> Each of {page.number(last.total('members'))} "
                f"images has exactly one row: {sums}.",
            )
        )
    else:
        left = last.total("members") - last.total("done")
        states = ", ".join(
            f"{page.text(r.run_id, 60)} {page.text(r.state)}" for r in last.runs if r.state != "finished"
        )
        said = f" Runs that are not finished: {states}." if states else ""
        lines.append(
            (
                "open",
                f"<b>The night of {last.night} is not finished:</b> {page.number(left)} images are unfinished.{said}",
            )
        )
    if last.total("missing"):
        lines.append(("warn", f"{page.number(last.total('missing'))} images that a manifest lists have not arrived."))
    if any(run.truncated for run in last.runs):
        lines.append(
            (
                "warn",
                "The source of at least one run was incomplete: images may be absent from these figures.",
            )
        )
    for level, kind in (("act", "bad"), ("watch", "warn")):
        told = [
            f"{title_of(d.quantity)} ({_group_name(g)}, against {_AGAINST[g.against]}, index {d.psi:.2f})"
            for g in last.drift
            for d in g.drifts
            if d.level == level
        ]
        if told:
            more = f" and {len(told) - 6} more" if len(told) > 6 else ""
            lines.append((kind, f"<b>Drift, {level}:</b> {'; '.join(told[:6])}{more}."))
    if not last.comparisons[0]:
        lines.append(("open", f"<b>Drift was not judged.</b> {_not_judged(last)}"))
    lines += [("warn", page.text(note, 400)) for note in found.notes]
    return "".join(f'<p class="verdict {kind}">{text}</p>' for kind, text in lines)


def _not_judged(night: Night) -> str:
    """Why nothing of a night could be compared."""
    if not night.comparisons[1]:
        return "Nothing could be compared: there is no reference, or no earlier night within a week."
    return (
        f"Nothing could be compared: on one side there are fewer than {MIN_FIELDS} fields or {MIN_SLIDES} slides of "
        "every quantity."
    )


def _percent(value: float | None) -> str:
    return page.text(page.percent(value))


_AGAINST = {"reference": "the reference", "week": "the week before"}


def _group_name(group: GroupDrift) -> str:
    return "all fields" if group.kind == "all" else f"{group.kind} {page.text(group.name, 40)}"


def _tiles(nights: Sequence[Night]) -> str:
    last, before = nights[-1], nights[:-1]

    def tile(name: str, value: str, usual: str, colour: str = "") -> str:
        mark = page.dot(colour) if colour else ""
        return f'<div class="tile">{mark}{name}<b>{value}</b><small>{usual}</small></div>'

    def usual(values: Iterable[float | None], show: Callable[[float], str]) -> str:
        known = [v for v in values if v is not None]
        return f"median of the nights before: {show(median(known))}" if known else "no night before to compare with"

    tiles = [
        tile(
            "handed over",
            page.number(last.total("members")),
            usual((n.total("members") for n in before), lambda v: page.number(v)),
        )
    ]
    for status in STATUSES:
        tiles.append(
            tile(
                status,
                _percent(last.share(status)),
                usual((n.share(status) for n in before), _percent),
                page.STATUS_COLOURS[status],
            )
        )
    tiles.append(
        tile(
            "images per second",
            "–" if last.images_per_second is None else f"{last.images_per_second:.1f}",
            usual((n.images_per_second for n in before), lambda v: f"{v:.1f}"),
        )
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _reconciliation(nights: Sequence[Night]) -> str:
    colours = page.STATUS_COLOURS | {"unfinished": "var(--line)"}
    series = {s: [float(n.total(s)) for n in nights] for s in STATUSES}
    series["unfinished"] = [float(n.total("members") - n.total("done")) for n in nights]
    legend = "".join(f"{page.dot(colours[s])}{s} " for s in series if any(series[s]))
    head = (
        ("night", "key"), ("runs", "n"), ("handed over", "n"), *((s, "n") for s in STATUSES), ("unfinished", "n"),
        ("missing", "n"), ("", ""),
    )  # fmt: skip
    rows = [
        (
            str(n.night),
            str(len(n.runs)),
            page.number(n.total("members")),
            *(page.number(n.total(s)) for s in STATUSES),
            page.number(n.total("members") - n.total("done")),
            page.number(n.total("missing")),
            "balanced"
            if n.balanced
            else f"<b>{'; '.join(sorted({r.state for r in n.runs if r.done < r.members}))}</b>",
        )
        for n in reversed(nights)
    ]
    return (
        f'<p class="quiet">{legend}</p>{_columns(nights, series, colours, 1180, 180)}'
        f"<details><summary>As a table</summary>{page.table(head, rows)}</details>"
    )


def _rates(nights: Sequence[Night]) -> str:
    charts = [
        (f"{status} share", page.STATUS_COLOURS[status], [n.share(status) for n in nights])
        for status in ("abstained", "rejected", "quarantined")
    ]
    for i, label in enumerate(CLASSES):
        shares = [n.labels[i] / sum(n.labels) if sum(n.labels) else None for n in nights]
        charts.append((f"{class_name(label)} among predicted", page.LABEL_COLOURS[label], shares))
    figures = "".join(
        f'<div class="small"><h3>{page.dot(colour)}{name} <span class="n">{_percent(values[-1])}</span></h3>'
        f"{_line(nights, values, colour, _percent)}</div>"
        for name, colour, values in charts
    )
    lead = (
        '<p class="quiet">Shares of the images that are accounted for; those of the classes are of the predicted '
        "images alone. The dashed line is the median.</p>"
    )
    return f'{lead}<div class="smalls">{figures}</div>'


def _drift(found: Nights) -> str:
    lead = (
        f'<p class="quiet">Each number is the population stability index of a night against '
        f"{'the reference' if found.reference else 'the week before'}, less what chance alone gives. {WATCH:g} or more "
        f'means <b class="level-watch">watch</b>, {ACT:g} or more <b class="level-act">act</b>, provided that chance '
        f"reaches it in fewer than 1 of {round(1 / CHANCE)} random exchanges of whole slides and that both sides have "
        f"at least {MIN_FIELDS} fields of {MIN_SLIDES} slides; where they have not, a dot is shown. Hover over a "
        "number for details.</p>"
    )
    if found.reference:
        lead += (
            f'<p class="quiet">Reference: {page.text(found.reference, 200)}, made of '
            f"{page.text(', '.join(found.reference_runs), 200)}, "
            f"bundle {page.text((found.reference_bundle or '')[:12])}. "
            "Where a night was run with another bundle, only what does not depend on it is compared.</p>"
        )
    out = [lead]
    for against in ("reference", "week"):
        if any(n.drifts(against) for n in found.nights):
            out.append(f"<h3>Against {_AGAINST[against]}</h3>{_heatmap(found.nights, against)}")
    out.append(_flagged(found.nights[-1]))
    return "".join(out)


def _heatmap(nights: Sequence[Night], against: str) -> str:
    left, top, high = 224, 20, 22
    step = min(44.0, (1180 - left) / len(nights))
    height = top + high * len(QUANTITIES)
    parts = [f'<div class="scroll"><svg class="plot heat-table" viewBox="0 0 1180 {height}" role="img">']
    for i, night in enumerate(nights):
        if _is_labelled(i, len(nights)):
            parts.append(
                f'<text x="{left + (i + 0.5) * step:.1f}" y="12" text-anchor="middle">{night.night:%-d %b}</text>'
            )
    for k, quantity in enumerate(QUANTITIES):
        y = top + k * high
        parts.append(f'<text class="row" x="{left - 10}" y="{y + 15}" text-anchor="end">{quantity.title}</text>')
        for i, night in enumerate(nights):
            drift = next((d for d in night.drifts(against) if d.quantity == quantity.name), None)
            if drift is None:
                continue
            x = left + i * step
            said = "·" if drift.psi is None or drift.excess is None else f"{max(0.0, drift.excess):.2f}"
            parts.append(
                f'<g class="cell-{drift.level}"><rect x="{x + 1:.1f}" y="{y + 1}" width="{step - 2:.1f}" '
                f'height="{high - 2}" rx="3"/>'
                f'<text x="{x + step / 2:.1f}" y="{y + 15}" text-anchor="middle">{said}</text>'
                f"<title>{night.night}, {quantity.title}: {_said(drift)}</title></g>"
            )
    return "".join(parts) + '</svg></div><p class="quiet">Numbers: the index above what chance gives.</p>'


def _said(drift: Drift) -> str:
    if drift.psi is None or drift.excess is None or drift.chance is None:
        return f"{drift.fields} fields of {drift.slides} slides are too few"
    return (
        f"index {drift.psi:.3f}, {drift.excess:.3f} above chance, reached by chance in {100 * drift.chance:.1f} % of "
        f"draws; {drift.fields:,} fields of {drift.slides} slides"
    )


def _flagged(night: Night) -> str:
    """Distributions of what the last night calls to look at, worst first."""
    flagged = [(g, d) for g in night.drift for d in g.drifts if d.level in ("watch", "act")]
    flagged = heapq.nlargest(
        CHARTS_SHOWN, flagged, key=lambda item: (LEVELS.index(item[1].level), item[1].excess or 0.0)
    )
    if not flagged:
        judged, there = night.comparisons
        if not judged:
            return f'<p class="quiet">{_not_judged(night)}</p>'
        few = f"; {page.number(there - judged)} had too few fields or slides" if there > judged else ""
        return (
            f'<p class="quiet">Of {page.number(there)} comparisons of the last night, {page.number(judged)} could be '
            f"judged, and none of these calls for a look{few}.</p>"
        )
    figures = "".join(
        f'<div class="small"><h3><b class="level-{d.level}">{d.level}</b> {title_of(d.quantity)}</h3>'
        f'<p class="quiet">{_group_name(g)}, against {_AGAINST[g.against]}: {_said(d)}</p>{_pairs(d)}</div>'
        for g, d in flagged
    )
    return (
        f"<h3>The night of {night.night}, where it differs most</h3>"
        f'<p class="quiet">{page.dot("var(--accent)")}this night {page.dot("var(--quiet)")}what it is compared with</p>'
        f'<div class="smalls">{figures}</div>'
    )


def _pairs(drift: Drift) -> str:
    """Columns in pairs: shares of the bins, this night's and the reference's."""
    width, height, foot = 360, 110, 18
    top = max(*drift.observed, *drift.expected)
    step = width / len(drift.observed)
    parts = [f'<svg class="plot" viewBox="0 0 {width} {height + foot}" role="img">']
    for i, (mine, theirs) in enumerate(zip(drift.observed, drift.expected, strict=True)):
        for value, shift, colour in ((mine, 0.1, "var(--accent)"), (theirs, 0.5, "var(--quiet)")):
            tall = value / top * (height - 8)
            parts.append(
                f'<rect x="{(i + shift) * step:.1f}" y="{height - tall:.1f}" width="{0.4 * step:.1f}" '
                f'height="{tall:.1f}" style="fill:{colour}"><title>{_bin(drift, i)}: {_percent(value)}</title>'
                "</rect>"
            )
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>')
    if drift.cuts:
        for i, cut in enumerate(drift.cuts):
            if i % 2 == 0:
                parts.append(f'<text x="{(i + 1) * step:.1f}" y="{height + 14}" text-anchor="middle">{cut:.3g}</text>')
    else:
        for i, label in enumerate(CLASSES):
            parts.append(f'<text x="{(i + 0.5) * step:.1f}" y="{height + 14}" text-anchor="middle">{label}</text>')
    return "".join(parts) + "</svg>"


def _bin(drift: Drift, i: int) -> str:
    if not drift.cuts:
        return CLASSES[i]
    if i == 0:
        return f"below {drift.cuts[0]:.3g}"
    return f"from {drift.cuts[-1]:.3g}" if i == len(drift.cuts) else f"{drift.cuts[i - 1]:.3g} to {drift.cuts[i]:.3g}"


def _groups(night: Night) -> str:
    head = (
        ("", ""), ("against", ""), ("fields", "n"), ("slides", "n"), ("level", ""), ("most drifted", ""),
        ("index", "n"), ("above chance", "n"), ("by chance", "n"),
    )  # fmt: skip
    rows, details = [], []
    for g in night.drift:
        most = max(g.drifts, key=lambda d: d.fields, default=None)
        told = worst(g.drifts)
        level: Level = told.level if told else "few"
        rows.append(
            (
                _group_name(g),
                _AGAINST[g.against],
                page.number(most.fields if most else 0),
                page.number(most.slides if most else 0),
                f'<b class="level-{level}">{_LEVEL_WORDS[level]}</b>',
                title_of(told.quantity) if told else "–",
                *_numbers(told),
            )
        )
        details += [
            (
                _group_name(g),
                _AGAINST[g.against],
                title_of(d.quantity),
                f'<b class="level-{d.level}">{_LEVEL_WORDS[d.level]}</b>',
                page.number(d.fields),
                *_numbers(d),
            )
            for d in g.drifts
        ]
    every = page.table(
        (
            ("", ""), ("against", ""), ("quantity", ""), ("level", ""), ("fields", "n"), ("index", "n"),
            ("above chance", "n"), ("by chance", "n"),
        ),
        details,
    )  # fmt: skip
    return (
        page.table(head, rows, "Nothing to compare with yet.")
        + f"<details><summary>Every quantity</summary>{every}</details>"
    )


def _numbers(drift: Drift | None) -> tuple[str, str, str]:
    if drift is None or drift.psi is None or drift.excess is None or drift.chance is None:
        return "–", "–", "–"
    return f"{drift.psi:.3f}", f"{drift.excess:.3f}", f"{100 * drift.chance:.1f} %"


def _pace(nights: Sequence[Night]) -> str:
    stages = list(dict.fromkeys(t.stage for n in nights for r in n.runs for t in r.timings))
    series: dict[str, list[float]] = {}
    for stage in stages:
        values = []
        for night in nights:
            own = [t for r in night.runs for t in r.timings if t.stage == stage]
            images = sum(t.images for t in own)
            values.append(1000 * sum(t.seconds for t in own) / images if images else 0.0)
        series[stage] = values
    colours = {s: _STAGE_COLOURS.get(s, "var(--quiet)") for s in stages}
    legend = "".join(f"{page.dot(colours[s])}{page.text(s)} " for s in stages)
    rates = [n.images_per_second for n in nights]
    shown = "–" if rates[-1] is None else f"{rates[-1]:.1f}"
    return (
        f'<div class="two"><div><h3>Images per second <span class="n">{shown}</span></h3>'
        f"{_line(nights, rates, 'var(--accent)', lambda v: f'{v:.1f}', width=560, height=150)}"
        '<p class="quiet">Of the session that finished a run; start-up is left out.</p></div>'
        f"<div><h3>Worker milliseconds per image</h3>{_columns(nights, series, colours, 560, 150)}"
        f'<p class="quiet">{legend}</p></div></div>'
    )


def _reasons(nights: Sequence[Night]) -> str:
    totals: Counter[str] = Counter()
    last: Counter[str] = Counter()
    for night in nights:
        for run in night.runs:
            totals.update(dict(run.reasons))
            if night is nights[-1]:
                last.update(dict(run.reasons))
    rows = []
    for reason, count in totals.most_common(REASONS_SHOWN):
        values: list[float | None] = [
            float(sum(dict(run.reasons).get(reason, 0) for run in night.runs)) for night in nights
        ]
        rows.append(
            (
                page.text(reason),
                page.number(last[reason]),
                page.number(count),
                _line(nights, values, "var(--accent)", lambda v: f"{v:.0f}", width=240, height=26, bare=True),
            )
        )
    return page.table(
        (("reason", ""), ("last night", "n"), ("all nights", "n"), ("", "spark")),
        rows,
        "No image without a prediction.",
    )


def _runs(nights: Sequence[Night]) -> str:
    head = (
        ("night", "key"), ("run", "key"), ("state", ""), ("began", ""), ("ended", ""), ("images", "n"), ("done", "n"),
        ("failed shards", "n"), ("bundle", "key"),
    )  # fmt: skip
    rows, bundle = [], None
    for night in nights:
        for run in night.runs:
            changed = bundle is not None and bundle != run.bundle_digest
            bundle = run.bundle_digest
            name = f"{page.text(run.bundle.rpartition('/')[2], 40)} {page.text(run.bundle_digest[:12])}"
            rows.append(
                (
                    str(run.night),
                    page.text(run.run_id, 60),
                    f'<span class="state {page.text(run.state)}">{page.text(run.state)}</span>',
                    page.moment(run.started_at),
                    page.moment(run.finished_at) if run.finished_at else "–",
                    page.number(run.members),
                    page.number(run.done),
                    page.number(run.failed_shards),
                    f"<b>{name}, new</b>" if changed else name,
                )
            )
    return page.table(head, reversed(rows))


# --- charts ----------------------------------------------------------------------------------------------------------


def _is_labelled(i: int, count: int) -> bool:
    """Whether a night has its date on the axis: the last one always, the others as far as there is room."""
    every = -(-count // 16)
    return (count - 1 - i) % every == 0


def _columns(
    nights: Sequence[Night], series: dict[str, list[float]], colours: dict[str, str], width: int, height: int
) -> str:
    """Stacked columns, one per night."""
    side, foot = 44, 20
    top = max((sum(column) for column in zip(*series.values(), strict=True)), default=0.0)
    if not top:
        return '<p class="quiet">Nothing yet.</p>'
    step = (width - side) / len(nights)
    wide = min(46.0, 0.7 * step)
    parts = [f'<svg class="plot wide" viewBox="0 0 {width} {height + foot}" role="img">']
    for share in (0.5, 1.0):
        y = height - share * (height - 12)
        parts.append(f'<line x1="{side}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{side - 6}" y="{y + 4:.1f}" text-anchor="end">{page.tick(top * share)}</text>')
    for i, night in enumerate(nights):
        middle, base = side + (i + 0.5) * step, float(height)
        for name, values in series.items():
            tall = values[i] / top * (height - 12)
            base -= tall
            if tall:
                parts.append(
                    f'<rect x="{middle - wide / 2:.1f}" y="{base:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                    f'style="fill:{colours[name]}"><title>{night.night}: {page.number(values[i])} {page.text(name)}'
                    "</title></rect>"
                )
        if _is_labelled(i, len(nights)) and (width > 600 or _is_labelled(i, 2 * len(nights))):
            parts.append(f'<text x="{middle:.1f}" y="{height + 15}" text-anchor="middle">{night.night:%-d %b}</text>')
    parts.append(f'<line class="axis" x1="{side}" x2="{width}" y1="{height}" y2="{height}"/>')
    return "".join(parts) + "</svg>"


def _line(
    nights: Sequence[Night],
    values: Sequence[float | None],
    colour: str,
    show: Callable[[float], str],
    width: int = 360,
    height: int = 96,
    bare: bool = False,
) -> str:
    """A line over the nights with a dot for each, from zero up; `bare` leaves out axis and median."""
    known = [v for v in values if v is not None]
    if not known:
        return '<p class="quiet">Nothing yet.</p>'
    side, foot = (4, 0) if bare else (52, 18)
    top = max(known) or 1.0
    step = (width - side - 8) / max(1, len(nights) - 1)

    def at(i: int, value: float) -> tuple[float, float]:
        return side + (i * step if len(nights) > 1 else (width - side) / 2), height - 3 - value / top * (height - 12)

    kind = "plot bare" if bare else "plot wide"
    parts = [f'<svg class="{kind}" viewBox="0 0 {width} {height + foot}" role="img">']
    if not bare:
        for value in (0.0, top) if max(known) else (0.0,):
            y = at(0, value)[1]
            parts.append(f'<line x1="{side}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{side - 6}" y="{y + 4:.1f}" text-anchor="end">{show(value)}</text>')
        y = at(0, median(known))[1]
        parts.append(f'<line class="median" x1="{side}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for i, anchor in {0: "start", len(nights) - 1: "end"}.items():
            parts.append(
                f'<text x="{at(i, 0)[0]:.1f}" y="{height + 14}" text-anchor="{anchor}">{nights[i].night:%-d %b}</text>'
            )
    points = [(*at(i, v), v, nights[i]) for i, v in enumerate(values) if v is not None]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    parts.append(f'<polyline points="{path}" style="fill:none;stroke:{colour};stroke-width:2"/>')
    parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 if bare else 3}" style="fill:{colour}">'
        f"<title>{n.night}: {show(v)}</title></circle>"
        for x, y, v, n in points
    ]
    return "".join(parts) + "</svg>"
