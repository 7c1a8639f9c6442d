"""Numbers, durations, times and foreign text as people read them in reports, on pages and on the terminal."""

from __future__ import annotations

from datetime import datetime


def shown(value: object, limit: int = 140) -> str:
    """Return foreign text without control or direction-changing characters, its middle cut out beyond `limit`.

    It is not escaped: templates and charts do that.
    """
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(value))
    return f"{text[: limit // 2]}…{text[-limit // 2 :]}" if len(text) > limit else text


def number(value: float, digits: int = 0) -> str:
    """Write a number with its thousands separated by commas."""
    return f"{value:,.{digits}f}"


def tick(value: float) -> str:
    """Write a number on an axis: with a decimal where it is small and would be another one without."""
    return number(value, 1 if value < 10 and value % 1 else 0)


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share in percent, a dash where there is none; 0 % and 100 % stand for exactly none and all of it."""
    if value is None:
        return "–"
    text = f"{100 * value:.{digits}f} %"
    if value > 0 and text == f"{0:.{digits}f} %":
        return f"< {10**-digits:.{digits}f} %"
    if value < 1 and text == f"{100:.{digits}f} %":
        return f"> {100 - 10**-digits:.{digits}f} %"
    return text


def share(part: float, whole: float) -> str:
    """Write a part in percent of the whole, a dash where there is no whole."""
    return percent(part / whole if whole else None)


def seconds(value: float) -> str:
    """Write a duration in the units that suit its length."""
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"


def moment(value: str) -> str:
    """Write an ISO 8601 time in UTC, to the minute; what is no time stays as it is, bounded as by `shown`."""
    try:
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return shown(value)
