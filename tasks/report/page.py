"""What pages for people share: numbers and foreign text made safe to show, tables, bars, and the style sheet."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # even a hostile key could load nothing
STATUS_COLOURS = {"predicted": "#3b78b5", "abstained": "#8d8f99", "rejected": "#d09a2d", "quarantined": "#c0392b"}
LABEL_COLOURS = {"Benign": "#3f8f83", "Early": "#c79a1e", "Pre": "#d9692b", "Pro": "#b0396b"}


def text(value: object, limit: int = 140) -> str:
    """Foreign text, safe to show: escaped, without control or direction-changing characters, of bounded length."""
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(value))
    if len(shown) > limit:
        shown = f"{shown[: limit // 2]}…{shown[-limit // 2 :]}"
    return html.escape(shown)


def number(value: float, digits: int = 0) -> str:
    """A number with thousands separated."""
    return f"{value:,.{digits}f}"


def tick(value: float) -> str:
    """A number on an axis: with a decimal where it is small and would be another one without."""
    return number(value, 1 if value < 10 and value % 1 else 0)


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, a dash where there is none; all and none of it are told of exactly these alone."""
    if value is None:
        return "–"
    shown = f"{100 * value:.{digits}f} %"
    if value > 0 and shown == f"{0:.{digits}f} %":
        return f"< {10**-digits:.{digits}f} %"
    if value < 1 and shown == f"{100:.{digits}f} %":
        return f"> {100 - 10**-digits:.{digits}f} %"
    return shown


def share(part: float, whole: float) -> str:
    """A part in percent, a dash where there is no whole."""
    return percent(part / whole if whole else None)


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"


def moment(value: str) -> str:
    """An ISO 8601 time in UTC, to the minute."""
    try:
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return text(value)


def table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], empty: str = "none") -> str:
    """A table; `head` is (title, class of the column), cells are HTML already."""
    body = "".join(
        "<tr>" + "".join(f'<td class="{head[i][1]}">{cell}</td>' for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    if not body:
        return f'<p class="quiet">{empty}</p>'
    titles = "".join(f'<th class="{kind}">{title}</th>' for title, kind in head)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(share: float, colour: str) -> str:
    """A bar as long as the share."""
    return f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%;background:{colour}"></i></span>'


def style(*files: str) -> str:
    """Style sheets of this folder in one line, without the comment at each head; by default `run_report.css`."""
    here = Path(__file__)
    names = files or ("run_report.css",)
    read = [here.with_name(name).read_text(encoding="utf-8").partition("*/")[2] for name in names]
    return "".join(read).replace("\n", "")


def dot(colour: str) -> str:
    """A dot of a colour."""
    return f'<span class="dot" style="background:{colour}"></span>'
