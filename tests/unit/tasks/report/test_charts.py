"""The kit of charts: shapes where the numbers say, words escaped, a name for screen readers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from leukoflow.tasks.report import charts
from leukoflow.tasks.report.charts import Axis, Place, Series, Tile

HOSTILE = "<script>\"&'"
PLACES = [Place(f"2026-03-0{i}", f"{i} Mar") for i in (1, 2, 3)]
ONE = Series(HOSTILE, "var(--benign)", [1.0, None, 3.0])
TWO = Series("two", "var(--pro)", [1.0, 2.0, 1.0])


def _shapes(svg: Markup, tag: str) -> list[dict[str, str]]:
    return [element.attrib for element in ElementTree.fromstring(str(svg)).iter(tag)]


def _titles(svg: Markup) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(str(svg)).iter("title")]


@pytest.mark.parametrize(
    "svg",
    [
        charts.columns(PLACES, [ONE, TWO], HOSTILE),
        charts.histogram([ONE, TWO], Axis(HOSTILE, 0, 1), (0.0, 1.0), HOSTILE),
        charts.pairs(ONE, TWO, ["a", HOSTILE, "c"], [(1.0, HOSTILE)], HOSTILE, str),
        charts.line(PLACES, ONE, HOSTILE, str),
        charts.line(PLACES, ONE, HOSTILE, str, bare=True),
        charts.curves([(HOSTILE, [(0, 0), (1, 1)]), ("ideal", [(0, 0)])], Axis("x", 0, 1), Axis("y", 0, 1), "curves"),
        charts.bars([(HOSTILE, 0.5)], HOSTILE),
        charts.strip([(HOSTILE, [0.5, 0.7])], HOSTILE),
        charts.heat_map([HOSTILE], PLACES, [[Tile(HOSTILE, HOSTILE), None, None]], "h", left=9, size=(9, 9), width=99),
    ],
)  # fmt: skip
def test_charts_are_well_formed_named_and_escaped(svg: Markup) -> None:
    root = ElementTree.fromstring(str(svg))  # fails where anything foreign was not escaped
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"]
    assert "<script" not in svg
    assert not re.search("#[0-9a-f]{6}", svg)  # every colour is a property of the palette
    assert "nan" not in svg


def test_columns_stand_on_each_other() -> None:
    svg = charts.columns(PLACES, [ONE, TWO], "label")
    rects = _shapes(svg, "rect")
    assert len(rects) == 5  # nothing is drawn where there is nothing
    lower, upper = rects[:2]
    assert float(upper["y"]) + float(upper["height"]) == pytest.approx(float(lower["y"]))
    assert lower["x"] == upper["x"]
    highest = rects[3:]
    assert sum(float(r["height"]) for r in highest) == pytest.approx(180 - 14, abs=0.1)
    assert _titles(svg)[1] == "2026-03-01: 1 two"


def test_nothing_is_said_where_there_is_nothing_to_draw() -> None:
    empty = Series("one", "var(--pro)", [None, 0.0, None])
    assert charts.columns(PLACES, [empty], "label") == charts.NOTHING
    assert charts.line(PLACES, Series("one", "var(--pro)", [None] * 3), "label", str) == charts.NOTHING


def test_a_histogram_says_its_bins() -> None:
    svg = charts.histogram([TWO], Axis("share", 0.25, 1.0), (0.25, 1.0), "label")
    assert _titles(svg) == ["0.25 to 0.50: 1 two", "0.50 to 0.75: 2 two", "0.75 to 1.00: 1 two"]


def test_a_line_leaves_out_what_is_not_there() -> None:
    svg = charts.line(PLACES, ONE, "label", lambda v: f"{v:.0f} %")
    assert _titles(svg) == ["2026-03-01: 1 %", "2026-03-03: 3 %"]
    assert len(_shapes(svg, "circle")) == 2
    assert [s["class"] for s in _shapes(svg, "line") if "class" in s] == ["median"]


def test_bars_are_as_long_as_their_values() -> None:
    assert [float(r["width"]) for r in _shapes(charts.bars([("a", 0.5), ("b", 1.0)], "label"), "rect")] == [
        100.0,
        200.0,
    ]
    assert 'style="width:25.0%;background:var(--pro)"' in charts.bar(0.25, "var(--pro)")
    assert "width:100.0%" in charts.bar(1.5, "var(--pro)")


def test_a_heat_map_has_its_tiles_in_their_places() -> None:
    tiles = [[Tile("a", kind="cell-act"), None], [Tile("b", strength=1.0), Tile("c", strength=0.0)]]
    svg = charts.heat_map(["r1", "r2"], PLACES[:2], tiles, "label", left=50, size=(10, 20), width=100)
    assert [(r["x"], r["y"]) for r in _shapes(svg, "rect")] == [("51.0", "21.0"), ("51.0", "41.0"), ("61.0", "41.0")]
    assert 'class="cell-act"' in svg
    assert "opacity:0.760" in svg
    assert "opacity:0.060" in svg


def test_names_on_an_axis_are_thinned_out_but_the_last_one_stays() -> None:
    places = [Place(f"n{i}", f"n{i}") for i in range(40)]
    svg = charts.columns(places, [Series("s", "var(--pro)", [1.0] * 40)], "label")
    words = re.findall(r">(n\d+)<", svg)
    assert len(words) <= 16
    assert words[-1] == "n39"
