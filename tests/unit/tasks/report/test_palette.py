"""The one palette: that of the web application's style sheet, light and dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leukoflow.apps.web import app
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.report import page
from leukoflow.tasks.report.palette import COLOURS, SERIES, attention_colour, colour_of, properties, series_colour

SHEET = (Path(app.__file__).parent / "static" / "style.css").read_text(encoding="utf-8")
THEMES = {
    "light": (r":root \{", 0),
    "dark": (r':root\[data-theme="dark"\] \{', 1),
    "dark by itself": (r':root\[data-theme="auto"\] \{', 1),
}


@pytest.mark.parametrize("theme", THEMES)
def test_the_web_application_has_the_same_colours(theme: str) -> None:
    opening, place = THEMES[theme]
    block = re.split(opening, SHEET, maxsplit=1)[1].partition("}")[0]
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    assert found == {name: pair[place] for name, pair in COLOURS.items()}


def test_classes_and_statuses_have_colours_of_their_own() -> None:
    names = (*CLASSES, "predicted", "abstained", "rejected", "quarantined")
    assert len({colour_of(name) for name in names} | {colour_of("no such class")}) == len(names) + 1
    assert colour_of("no such class") == "var(--quiet)"


def test_series_repeat_after_the_last_colour() -> None:
    assert series_colour(0) == "var(--series-1)"
    assert series_colour(len(SERIES)) == series_colour(0)


def test_attention_goes_from_slate_over_amber_to_red() -> None:
    assert [attention_colour(w) for w in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [
        "#5c7496", "#5c7496", "#f0a21e", "#e02235", "#e02235",
    ]  # fmt: skip


def test_style_sheets_of_reports_name_no_colour_that_the_palette_lacks() -> None:
    folder = Path(page.__file__).parent / "templates"
    used = {
        name
        for path in folder.rglob("*")
        if path.is_file()
        for name in re.findall(r"var\(--([\w-]+)\)", path.read_text(encoding="utf-8"))
    }
    assert used
    assert used <= {*COLOURS, *SERIES}
    css = str(properties())
    assert all(css.count(f"--{name}:") == 2 for name in (*COLOURS, *SERIES))
