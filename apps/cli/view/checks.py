"""What is shown of `leukoflow doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leukoflow.core.counts import count_of

if TYPE_CHECKING:
    from leukoflow.apps.doctor import Check


def show_checks(target: Console, checks: Sequence[Check]) -> None:
    """Show the checks, each with its outcome and, where needed, its remedy."""
    style = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(Text(check.verdict, style=style[check.verdict]), check.name, Text(check.found))
        if check.remedy:
            table.add_row("", "", Text(f"→ {check.remedy}", style=style[check.verdict]))
    target.print(table)
    failed, warned = (sum(c.verdict == v for c in checks) for v in ("fail", "warn"))
    if not failed:
        target.print("[green]a run can start[/]" + (f", with {count_of(warned, 'warning')}" if warned else ""))
    else:
        target.print(f"[red]{failed} of {len(checks)} checks failed[/]")
