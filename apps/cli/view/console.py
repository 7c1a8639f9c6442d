"""The console that results are written to, and the small words of all views: durations, sizes, ages."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta

from rich.console import Console
from rich.table import Table

_UNBOUNDED = 100_000


def open_console() -> Console:
    """Return the console for results: standard output. What is piped or kept in a file is never cut to a width."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _UNBOUNDED)


def duration(seconds: float) -> str:
    """Return a time in words: `42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def age_of(moment: str) -> str:
    """Return how long ago an ISO moment was, as in `5 s ago`; `?` where it is none."""
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(moment)
    except (ValueError, TypeError):
        return "?"
    return f"{duration(max(age, timedelta(0)).total_seconds())} ago"


def facts_table() -> Table:
    """Make a table of names and facts, one pair a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def size(count: int) -> str:
    """Return a number of bytes in words: `812 bytes`, `3.4 MB`, `1.2 GB`."""
    if count < 1000:
        return f"{count} bytes"
    units = ("kB", "MB", "GB", "TB")
    power = next((i for i in range(len(units)) if count < 999.95 * 1000 ** (i + 1)), len(units) - 1)
    return f"{count / 1000 ** (power + 1):.1f} {units[power]}"
