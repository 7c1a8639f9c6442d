"""The frame of every report: one HTML file that needs nothing else, made from templates that escape all they are given.

A page has no script, loads nothing (`templates/base.html` says so to the browser), and carries its style sheets. In the
templates a line break between two tags means nothing, and any other one is a space.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from leukoflow.core.counts import count_of
from leukoflow.tasks.report import charts, numbers, palette
from leukoflow.tasks.review.wording import class_name, mean_words, probability

_BREAK_OF_TAGS, _BREAK = re.compile(r">\s*\n\s*<"), re.compile(r"\s*\n\s*")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    formats = (
        numbers.shown, numbers.number, numbers.percent, numbers.seconds, numbers.moment, class_name, mean_words,
        probability,
    )  # fmt: skip
    environment.filters |= {made.__name__: made for made in formats}
    environment.globals |= {
        "bar": charts.bar,
        "colour_of": palette.colour_of,
        "count_of": count_of,
        "palette": palette.properties(),
        "share": numbers.share,
    }
    return environment


def render(template: str, **content: object) -> str:
    """Return the page that a template of `templates/` makes of its content; a name that it lacks is an error."""
    page = _environment().get_template(template).render(content)
    return _BREAK.sub(" ", _BREAK_OF_TAGS.sub("><", page))
