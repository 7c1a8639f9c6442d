"""The one kit of charts: each function returns an SVG (or a bar of HTML) that fits into a page without any script.

What a chart shows at a place is said in that place's tooltip; `label` says to screen readers what the chart is. Words
are escaped here. Colours are CSS: properties of `palette`, so that a chart follows the page from light to dark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from markupsafe import Markup

from leukoflow.tasks.report.numbers import number, tick
from leukoflow.tasks.report.palette import series_colour

NOTHING = Markup('<p class="quiet">Nothing yet.</p>')


@dataclass(frozen=True, slots=True)
class Series:
    """Values under one name and one colour; None where there is nothing to show at a place."""

    name: str
    colour: str
    values: Sequence[float | None]

    def at(self, place: int) -> float:
        """Return the value at a place, 0 where there is none."""
        return self.values[place] or 0.0


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of numbers: its name, and the lowest and highest value it reaches."""

    name: str
    low: float
    high: float

    def share(self, value: float) -> float:
        """Return where a value lies between the ends, 0 to 1."""
        return (value - self.low) / max(self.high - self.low, 1e-9)


@dataclass(frozen=True, slots=True)
class Place:
    """A place on an axis of names: the name in full, for tooltips, and as it stands below the axis."""

    name: str
    short: str


@dataclass(frozen=True, slots=True)
class Tile:
    """A field of a heat map: its words, its tooltip, and either a class of the style sheet or a strength, 0 to 1."""

    words: str
    said: str = ""
    kind: str = ""
    strength: float | None = None


class Svg:
    """An SVG that grows shape by shape. Lengths are in its own units, from the upper left corner."""

    def __init__(self, width: float, height: float, label: str, kind: str = "plot") -> None:
        self._parts = [
            Markup('<svg class="{}" width="{:g}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(
                kind, width, width, height, label
            )
        ]

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "") -> None:
        """Draw a straight line; `kind` is a class of the style sheet."""
        named = Markup(' class="{}"').format(kind) if kind else ""
        self._parts.append(
            Markup('<line{} x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(named, x1, x2, y1, y2)
        )

    def text(self, words: str, x: float, y: float, anchor: str = "start", kind: str = "") -> None:
        """Write words that start, end or have their middle at a place."""
        named = Markup(' class="{}"').format(kind) if kind else ""
        self._parts.append(
            Markup('<text{} x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(named, x, y, anchor, words)
        )

    def rect(
        self, x: float, y: float, width: float, height: float, colour: str, said: str = "", opacity: float = 1.0
    ) -> None:
        """Draw a filled rectangle with a tooltip."""
        faint = f";opacity:{opacity:.3f}" if opacity < 1 else ""
        self._parts.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" style="fill:{}{}"').format(
                x, y, width, height, colour, faint
            )
            + _tooltip(said, "rect")
        )

    def dot(self, x: float, y: float, radius: float, colour: str, said: str = "", opacity: float = 1.0) -> None:
        """Draw a filled circle with a tooltip."""
        faint = f";opacity:{opacity:.3f}" if opacity < 1 else ""
        self._parts.append(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:g}" style="fill:{}{}"').format(x, y, radius, colour, faint)
            + _tooltip(said, "circle")
        )

    def path(self, points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> None:
        """Draw a line through points."""
        dashes = ";stroke-dasharray:4 4" if dashed else ""
        self._parts.append(
            Markup('<polyline points="{}" style="fill:none;stroke:{};stroke-width:2{}"/>').format(
                " ".join(f"{x:.1f},{y:.1f}" for x, y in points), colour, dashes
            )
        )

    def tile(self, x: float, y: float, width: float, height: float, tile: Tile, colour: str) -> None:
        """Draw a field of a heat map with its words in the middle."""
        look = "" if tile.strength is None else f"fill:{colour};opacity:{0.06 + 0.7 * tile.strength:.3f}"
        self._parts.append(Markup('<g class="{}">').format(tile.kind or "cell"))
        self._parts.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="3"{}/>').format(
                x + 1, y + 1, width - 2, height - 2, Markup(' style="{}"').format(look) if look else ""
            )
        )
        self.text(tile.words, x + width / 2, y + height / 2 + 4, "middle")
        self._parts.append((Markup("<title>{}</title>").format(tile.said) if tile.said else "") + Markup("</g>"))

    def done(self) -> Markup:
        """Return the SVG."""
        return Markup("").join(self._parts) + Markup("</svg>")


def _tooltip(said: str, tag: str) -> Markup:
    """Return the end of a shape that has been opened."""
    return Markup("><title>{}</title></{}>").format(said, tag) if said else Markup("/>")


# --- bars in tables and above them -----------------------------------------------------------------------------------


def bar(share: float, colour: str) -> Markup:
    """Return a bar of HTML that is as long as a share, 0 to 1, of its place."""
    return Markup('<span class="bar"><i style="width:{:.1f}%;background:{}"></i></span>').format(
        100 * min(1.0, max(0.0, share)), colour
    )


# --- columns ---------------------------------------------------------------------------------------------------------


def columns(
    places: Sequence[Place], series: Sequence[Series], label: str, width: int = 1180, height: int = 180
) -> Markup:
    """Return stacked columns, one for each place."""
    top = max((sum(s.at(i) for s in series) for i in range(len(places))), default=0.0)
    if not top:
        return NOTHING
    side = 44
    step = (width - side) / len(places)
    wide = min(46.0, 0.7 * step)
    svg = Svg(width, height + 20, label, "plot wide")
    _scale(svg, top, side, width, height)
    for i, place in enumerate(places):
        middle = side + (i + 0.5) * step
        stack = [(s.at(i), s.colour, f"{place.name}: {number(s.at(i))} {s.name}") for s in series if s.at(i)]
        _stack(svg, stack, top, middle - wide / 2, wide, height)
        if _is_labelled(i, len(places)) and (width > 600 or _is_labelled(i, 2 * len(places))):
            svg.text(place.short, middle, height + 15, "middle")
    svg.line(side, height, width, height, "axis")
    return svg.done()


def histogram(
    series: Sequence[Series], axis: Axis, ticks: Sequence[float], label: str, width: int = 460, height: int = 170
) -> Markup:
    """Return stacked columns over an axis of numbers; bins are of one width between its ends."""
    bins = len(series[0].values)
    top = max(sum(s.at(i) for s in series) for i in range(bins))
    side = 44
    step = (width - side) / bins
    svg = Svg(width, height + 22, label)
    _scale(svg, top, side, width, height)
    for i in range(bins):
        low, high = (axis.low + (axis.high - axis.low) * (i + end) / bins for end in (0, 1))
        stack = [(s.at(i), s.colour, f"{low:.2f} to {high:.2f}: {number(s.at(i))} {s.name}") for s in series]
        _stack(svg, stack, top, side + i * step + 1, step - 2, height)
    svg.line(side, height, width, height, "axis")
    for value in ticks:
        x = side + axis.share(value) * (width - side)
        svg.text(f"{value:g}", x, height + 16, "end" if value == axis.high else "middle")
    return svg.done()


def pairs(
    first: Series, second: Series, bins: Sequence[str], ticks: Sequence[tuple[float, str]], label: str,
    show: Callable[[float], str], width: int = 360, height: int = 110,
) -> Markup:  # fmt: skip
    """Return columns side by side, two for each bin; `bins` names these, `ticks` lie at bins counted from the left."""
    top = max(s.at(i) for s in (first, second) for i in range(len(bins)))
    step = width / len(bins)
    svg = Svg(width, height + 18, label)
    for i, name in enumerate(bins):
        for s, shift in ((first, 0.1), (second, 0.5)):
            tall = s.at(i) / top * (height - 8)
            svg.rect((i + shift) * step, height - tall, 0.4 * step, tall, s.colour, f"{name}: {show(s.at(i))}")
    svg.line(0, height, width, height, "axis")
    for place, words in ticks:
        svg.text(words, place * step, height + 14, "middle")
    return svg.done()


def _scale(svg: Svg, top: float, side: int, width: int, height: int) -> None:
    """Draw the lines at half and at the whole of the highest column, with their numbers."""
    for part in (0.5, 1.0):
        y = height - part * (height - 14)
        svg.line(side, y, width, y)
        svg.text(tick(top * part), side - 6, y + 4, "end")


def _stack(svg: Svg, stack: Sequence[tuple[float, str, str]], top: float, x: float, wide: float, height: int) -> None:
    """Draw one column from the axis up: (value, colour, tooltip) of each part."""
    base = float(height)
    for value, colour, said in stack:
        tall = value / top * (height - 14)
        base -= tall
        svg.rect(x, base, wide, tall, colour, said)


def _is_labelled(place: int, count: int) -> bool:
    """Say whether a place has its name on the axis: the last one always, the others as far as there is room."""
    every = -(-count // 16)
    return (count - 1 - place) % every == 0


# --- lines -----------------------------------------------------------------------------------------------------------


def line(
    places: Sequence[Place], series: Series, label: str, show: Callable[[float], str],
    width: int = 360, height: int = 96, bare: bool = False,
) -> Markup:  # fmt: skip
    """Return a line with a dot at each place, from zero up, and a dashed line at the median; `bare` has no axis."""
    known = [v for v in series.values if v is not None]
    if not known:
        return NOTHING
    side, foot = (4, 0) if bare else (52, 18)
    top = max(known) or 1.0
    step = (width - side - 8) / max(1, len(places) - 1)

    def across(place: int) -> float:
        return side + (place * step if len(places) > 1 else (width - side) / 2)

    def up(value: float) -> float:
        return height - 3 - value / top * (height - 12)

    svg = Svg(width, height + foot, label, "plot bare" if bare else "plot wide")
    if not bare:
        for value in (0.0, top) if max(known) else (0.0,):
            svg.line(side, up(value), width, up(value))
            svg.text(show(value), side - 6, up(value) + 4, "end")
        svg.line(side, up(median(known)), width, up(median(known)), "median")
        for place, anchor in {0: "start", len(places) - 1: "end"}.items():
            svg.text(places[place].short, across(place), height + 14, anchor)
    points = [(i, value) for i, value in enumerate(series.values) if value is not None]
    svg.path([(across(i), up(value)) for i, value in points], series.colour)
    for i, value in points:
        svg.dot(across(i), up(value), 2 if bare else 3, series.colour, f"{places[i].name}: {show(value)}")
    return svg.done()


def curves(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], x: Axis, y: Axis, label: str) -> Markup:
    """Return curves through (x, y) with a key beside them; the one named "ideal" is dashed and has no dots."""
    width, height, left, right, foot = 480, 260, 48, 350, 226
    svg = Svg(width, height, label, "plot fixed")
    for i in range(5):
        across, up = (axis.low + i / 4 * (axis.high - axis.low) for axis in (x, y))
        level = foot - i / 4 * (foot - 16)
        svg.line(left, level, right, level)
        svg.text(f"{up:.3g}", left - 6, level + 4, "end")
        svg.text(f"{across:.3g}", left + i / 4 * (right - left), foot + 16, "middle")
    svg.text(y.name, left, 10)
    svg.text(x.name, right, height - 4, "end")
    for i, (name, points) in enumerate(lines):
        colour, ideal = series_colour(i), name == "ideal"
        at = [(left + x.share(a) * (right - left), foot - y.share(b) * (foot - 16)) for a, b in points]
        svg.path(at, colour, dashed=ideal)
        if not ideal:
            for (across, up), (a, b) in zip(at, points, strict=True):
                svg.dot(across, up, 3, colour, f"{x.name} {a:.3g}, {y.name} {b:.3g}")
        svg.rect(right + 10, 20 + 20 * i, 12, 3, colour)
        svg.text(name, right + 26, 26 + 20 * i)
    return svg.done()


# --- rows ------------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[tuple[str, float]], label: str) -> Markup:
    """Return horizontal bars with their names before and their values, 0 to 1, behind them."""
    svg = Svg(420, 10 + 18 * len(rows), label, "plot fixed")
    for i, (name, value) in enumerate(rows):
        y = 4 + 18 * i
        svg.text(name, 4, y + 11)
        svg.rect(150, y, 200 * value, 13, series_colour(0))
        svg.text(f"{value:.3f}", 156 + 200 * value, y + 11)
    return svg.done()


def strip(rows: Sequence[tuple[str, Sequence[float]]], label: str) -> Markup:
    """Return a row of dots for each name, one dot for each value, and a bar at their mean; all rows on one scale."""
    values = [value for _, dots in rows for value in dots]
    axis = Axis("", min(values), max(values))
    left, wide = 170, 440
    foot = 26 * len(rows) + 22
    svg = Svg(640, foot + 8, label, "plot fixed")
    for i, (name, dots) in enumerate(rows):
        y = 18 + 26 * i
        svg.text(name, 4, y + 4)
        for value in dots:
            svg.dot(left + wide * axis.share(value), y, 3.5, series_colour(0), f"{value:.3f}", opacity=0.45)
        mean = left + wide * axis.share(fmean(dots))
        svg.rect(mean - 1.5, y - 9, 3, 18, series_colour(1), f"mean {fmean(dots):.3f}")
    svg.text(f"{axis.low:.3f}", left, foot)
    svg.text(f"{axis.high:.3f}", left + wide, foot, "end")
    return svg.done()


# --- heat map --------------------------------------------------------------------------------------------------------


def heat_map(
    rows: Sequence[str], places: Sequence[Place], tiles: Sequence[Sequence[Tile | None]], label: str,
    *, left: int, size: tuple[float, float], width: int, kind: str = "plot heat-map",
) -> Markup:  # fmt: skip
    """Return tiles in rows and columns with the rows' names before and the columns' names above them.

    `tiles[row][column]` is None where nothing is to be shown; `left` is the room of the rows' names, `size` the width
    and height of a tile.
    """
    head, (wide, high) = 20, size
    svg = Svg(width, head + high * len(rows), label, kind)
    for i, place in enumerate(places):
        if _is_labelled(i, len(places)):
            svg.text(place.short, left + (i + 0.5) * wide, 12, "middle")
    for k, (name, line_of_tiles) in enumerate(zip(rows, tiles, strict=True)):
        svg.text(name, left - 10, head + (k + 0.5) * high + 4, "end", "row")
        for i, tile in enumerate(line_of_tiles):
            if tile is not None:
                svg.tile(left + i * wide, head + k * high, wide, high, tile, series_colour(0))
    return svg.done()
