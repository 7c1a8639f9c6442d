"""What is shown of runs by `run` and `status`: totals and labels, one line for each run, one run in detail."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from leukoflow.apps.cli.view.console import age_of, duration, facts_table
from leukoflow.apps.cli.view.live import count_outcomes
from leukoflow.core.counts import count_of
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.records import CLASSES, read_reasons

if TYPE_CHECKING:
    from leukoflow.runs.progress import RunProgress
    from leukoflow.runs.records import RunManifest

_STATE_STYLE = {"running": "cyan", "finished": "green", "cancelled": "yellow", "killed": "red", "failed": "red"}


def show_outcome(target: Console, root: str, manifest: RunManifest) -> None:
    """Show totals that reconcile, labels, pace, and where to look next."""
    from leukoflow.tasks.report.numbers import share

    m = manifest
    totals = Table(box=None, padding=(0, 2), show_header=False)
    totals.add_column(style="dim")
    totals.add_column(justify="right")
    totals.add_column(style="dim")
    for name, count in (
        ("predicted", m.predicted),
        ("abstained", m.abstained),
        ("rejected", m.rejected),
        ("quarantined", m.quarantined),
    ):
        totals.add_row(name, f"{count:,}", share(count, m.members))
    balanced = m.counts.accounted == m.members
    totals.add_row("members", Text(f"{m.members:,}", style="bold"), "balanced" if balanced else "DO NOT BALANCE")
    for name, count in (("missing", m.missing), ("ignored", m.ignored), ("patient conflicts", m.conflicts)):
        if count:
            totals.add_row(name, f"{count:,}", "")

    labels = Table(box=None, padding=(0, 2), show_header=False)
    labels.add_column(style="dim")
    labels.add_column(justify="right")
    labels.add_column()
    # A run of schema 1 has counted the labels of abstained images as well.
    labels.add_row(
        "labels", "", Text("of predicted" if m.schema_version >= 2 else "of predicted and abstained", style="dim")
    )
    most = max([*m.labels, 1])
    for name, count in zip(CLASSES, m.labels, strict=True):
        labels.add_row(name, f"{count:,}", Text("█" * round(16 * count / most), style="cyan"))

    both = Table.grid(padding=(0, 4))
    both.add_row(totals, labels)
    pace = facts_table()
    rate = m.processed / m.processing_seconds if m.processing_seconds else 0.0
    pace.add_row(
        "time",
        f"{duration(m.processing_seconds)} for {m.processed:,} images ({rate:.1f}/s), "
        f"after {m.startup_seconds:.1f} s of start-up",
    )
    stages = ", ".join(f"{t.stage} {1000 * t.seconds / max(1, t.images):.0f} ms" for t in m.timings)
    if stages:
        pace.add_row("per image", stages)
    for reason, count in read_reasons(m.reasons)[:5]:
        pace.add_row("reason", Text(f"{count:,} × {reason}"))
    if m.source_truncated:
        pace.add_row("source", Text(f"incomplete: {m.source_truncated}", style="yellow"))
    for note in m.notes:
        pace.add_row("note", Text(note, style="yellow"))
    target.print(Group(Padding(both, (1, 0), expand=False), pace))
    table = root.replace("'", "''") + "/predictions/*.parquet"
    for name, line in (  # printed unwrapped, to be copied
        ("report", f"{root}/{RunKey.REPORT}"),
        ("tables", f"duckdb -c \"select status, label, count(*) from '{table}' group by all\""),
    ):
        target.print(Text.assemble((f"{name:<9}  ", "dim"), line), soft_wrap=True)


def show_runs(target: Console, out: str, runs: Sequence[RunProgress], damaged: Sequence[tuple[str, str]]) -> None:
    """Show a line for every run, the newest first; then those whose records cannot be read, with the reason."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name, justify in (
        ("run", "left"),
        ("state", "left"),
        ("images", "right"),
        ("shards", "right"),
        ("last sign", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for p in sorted(runs, key=lambda p: p.started_at, reverse=True):
        table.add_row(
            Text.assemble((p.run_id, "bold" if p.shadow_of is None else "dim"), "  shadow" if p.shadow_of else ""),
            Text(p.state, style=_STATE_STYLE.get(p.state, "yellow")),
            f"{p.done:,}/{p.members:,}",
            f"{p.shards_done:,}/{p.shards:,}",
            age_of(p.last_activity),
        )
    target.print(table)
    for name, reason in damaged:
        target.print(Text.assemble(f"  {name}  ", ("damaged", "red"), f"  {reason}"), soft_wrap=True)
    target.print(f"[dim]one of them in detail: leukoflow status {escape(shlex.quote(out))} RUN_ID[/]", soft_wrap=True)


def _state_in_words(p: RunProgress) -> str:
    """Say the state with what the run does or waits for, or with the exit code and the reason of its end."""
    code = f" (exit code {p.exit_code})" if p.exit_code is not None and p.state in ("failed", "cancelled") else ""
    doing = p.phase if p.state == "running" else ""
    return ": ".join([p.state + code, *filter(None, [doing, p.message])])


def show_status(target: Console, root: str, p: RunProgress) -> None:
    """Show one run in detail, with what to do about it."""
    from leukoflow.runs.progress import ProgressReader

    reader = ProgressReader(root)
    table = facts_table()
    table.add_row("run", Text(p.run_id, style="bold"))
    if p.shadow_of is not None:
        table.add_row("shadow of", Text(f"{p.shadow_of}: not the night's result", style="yellow"))
    table.add_row("state", Text(_state_in_words(p), style=_STATE_STYLE.get(p.state, "yellow")))
    share = f" ({100 * p.done / p.members:.0f} %)" if p.members else ""
    planned = (
        f"{p.done:,} of {p.members:,}{share}: {count_outcomes(p)}" if p.members else "the source is not planned yet"
    )
    table.add_row("images", planned)
    for stage in (Stage.MASKS, Stage.FEATURES, Stage.PREDICTIONS):
        done = len(reader.storage.names(RunKey.markers(stage)))
        table.add_row(stage, f"{done:,} of {p.shards:,} shards")
    table.add_row("started", f"{p.started_at} ({age_of(p.started_at)})")
    table.add_row("last sign", f"{p.last_activity} ({age_of(p.last_activity)})")
    for shard, message in p.failed_shards[:10]:
        table.add_row("failed", Text(f"shard {shard}: {message}", style="red"))
    if len(p.failed_shards) > 10:
        table.add_row("", f"and {count_of(len(p.failed_shards) - 10, 'more shard')}")
    if p.dashboard and p.state == "running":
        table.add_row("dashboard", Text(p.dashboard))
    if p.state == "finished":
        table.add_row("report", Text(f"{root}/{RunKey.REPORT}"))
    elif p.state == "running":
        table.add_row("next", "wait, or look at the dashboard; Ctrl-C or SIGTERM to its process stops it resumably")
    target.print(table)
    if p.state not in ("running", "finished"):
        if p.failed_shards:
            target.print("a shard that fails again needs its cause fixed first; `leukoflow doctor` looks for it")
        target.print(Text.assemble(("continue with  ", "dim"), p.command), soft_wrap=True)
    manifest = reader.manifest()
    if manifest is not None:
        show_outcome(target, root, manifest)
