"""What the command line shows: plans, live progress, outcomes, runs and checks, as rich tables and plain lines."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from leukoflow.core.counts import count_of
from leukoflow.runs.records import CLASSES, read_reasons

if TYPE_CHECKING:
    from leukoflow.apps.doctor import Check
    from leukoflow.runs.progress import RunProgress
    from leukoflow.runs.records import PlanSummary, RunManifest
    from leukoflow.tasks.store.compact import Compaction
    from leukoflow.tasks.upkeep.amend import Amended
    from leukoflow.tasks.upkeep.audit import AuditVerdict
    from leukoflow.tasks.upkeep.diff import RunDiff
    from leukoflow.tasks.upkeep.retention import Decision
    from leukoflow.tasks.upkeep.verify import Verification

_UNBOUNDED = 100_000
_POLL_SECONDS = 1.0
_PLAIN_SECONDS = 10.0
_STATE_STYLE = {"running": "cyan", "finished": "green", "cancelled": "yellow", "killed": "red", "failed": "red"}


def console() -> Console:
    """The console for results: standard output. What is piped or kept in a file is never cut to lines of a width."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _UNBOUNDED)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _ago(moment: str) -> str:
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(moment)
    except (ValueError, TypeError):
        return "?"
    return f"{duration(max(age, timedelta(0)).total_seconds())} ago"


def _facts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


# --- a run that begins and goes on -----------------------------------------------------------------------------------


def show_plan(target: Console, run_id: str, root: str, summary: PlanSummary) -> None:
    """What is about to be done."""
    table = _facts()
    table.add_row("run", Text(run_id, style="bold"))
    table.add_row("source", Text(f"{summary.source.uri} ({summary.source.kind})"))
    found = f"{count_of(summary.members, 'image')} in {count_of(summary.shards, 'shard')}"
    extra = [
        f"{count:,} {what}"
        for count, what in ((summary.missing, "missing"), (summary.ignored, "other entries ignored"))
        if count
    ]
    table.add_row("plan", Text(", ".join([found, *extra])))
    if summary.truncated:
        table.add_row("source", Text(f"incomplete: {summary.truncated}", style="yellow"))
    for remark in summary.remarks:
        table.add_row("remark", Text(remark, style="yellow"))
    table.add_row("output", Text(root))
    target.print(table)


class _Pace:
    """Images per second, from the first shard that was seen to be finished in this session.

    What an earlier session has done must not flatter the rate, and the start-up must not belittle it.
    """

    def __init__(self) -> None:
        self._before: int | None = None
        self._first: tuple[float, int] | None = None

    def describe(self, done: int, members: int) -> str:
        """Rate and time left in words, as soon as there is something to go by."""
        if self._before is None:
            self._before = done
        if self._first is None and done > self._before:
            self._first = time.monotonic(), done
        if self._first is None:
            return "no shard done yet"
        since, already = self._first
        if done == already:
            return "measuring the rate"
        rate = (done - already) / (time.monotonic() - since)
        return f"{rate:.1f} images/s, {duration((members - done) / rate)} left"


@contextmanager
def live_progress(target: Console, root: str) -> Iterator[None]:
    """Shows how far the run at `root` is while the block runs: a bar, or without a terminal a line now and then."""
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(target, root, ended), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)


def _follow(target: Console, root: str, ended: threading.Event) -> None:
    from leukoflow.runs.progress import ProgressReader

    reader, pace = ProgressReader(root), _Pace()
    if not target.is_terminal:
        while not ended.wait(_PLAIN_SECONDS):
            progress = _try_read(reader)
            if progress is not None:
                pace_now = pace.describe(progress.done, progress.members)
                target.print(
                    f"{progress.done:,} of {progress.members:,} images, {progress.shards_done} of {progress.shards} "
                    f"shards; {pace_now if progress.done else progress.phase or pace_now}; {_counts(progress)}",
                    soft_wrap=True,
                )
        return
    with Progress(
        SpinnerColumn(),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[line]}"),
        console=target,
        transient=True,
    ) as bar:
        task: TaskID = bar.add_task("run", total=None, line="starting")
        while True:
            progress = _try_read(reader)
            if progress is not None and progress.done:
                speed = pace.describe(progress.done, progress.members)
                line = f"{progress.done:,}/{progress.members:,}  {speed}  [dim]{_counts(progress)}[/]"
                bar.update(task, completed=progress.done, total=progress.members, line=line)
            elif progress is not None:
                pace.describe(0, progress.members)
                bar.update(task, line=escape(progress.phase or "starting"))
            if ended.wait(_POLL_SECONDS):
                return


def _try_read(reader: object) -> RunProgress | None:
    """The display must never end a run: whatever goes wrong while looking is looked at again a second later."""
    try:
        return reader.read()  # type: ignore[attr-defined, no-any-return]
    except Exception:
        return None


def _counts(p: RunProgress) -> str:
    parts = (
        (p.predicted, "predicted"),
        (p.abstained, "abstained"),
        (p.rejected, "rejected"),
        (p.quarantined, "quarantined"),
    )
    return ", ".join(f"{n:,} {name}" for n, name in parts if n or name == "predicted")


# --- a run that has ended --------------------------------------------------------------------------------------------


def show_outcome(target: Console, root: str, manifest: RunManifest) -> None:
    """Totals that reconcile, labels, pace, and where to look next."""
    from leukoflow.tasks.report.page import share

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
    balanced = m.predicted + m.abstained + m.rejected + m.quarantined == m.members
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
    pace = _facts()
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
        ("report", f"{root}/report.html"),
        ("tables", f"duckdb -c \"select status, label, count(*) from '{table}' group by all\""),
    ):
        target.print(Text.assemble((f"{name:<9}  ", "dim"), line), soft_wrap=True)


# --- status ----------------------------------------------------------------------------------------------------------


def show_runs(target: Console, out: str, runs: Sequence[RunProgress], damaged: Sequence[tuple[str, str]]) -> None:
    """One line for every run, the newest first; then those whose records cannot be read, with the reason."""
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
            _ago(p.last_activity),
        )
    target.print(table)
    for name, reason in damaged:
        target.print(Text.assemble(f"  {name}  ", ("damaged", "red"), f"  {reason}"), soft_wrap=True)
    target.print(f"[dim]one of them in detail: leukoflow status {escape(shlex.quote(out))} RUN_ID[/]", soft_wrap=True)


def _state_in_words(p: RunProgress) -> str:
    """The state with what it does or waits for, or with the exit code and the reason of its end."""
    code = f" (exit code {p.exit_code})" if p.exit_code is not None and p.state in ("failed", "cancelled") else ""
    doing = p.phase if p.state == "running" else ""
    return ": ".join([p.state + code, *filter(None, [doing, p.message])])


def show_status(target: Console, root: str, p: RunProgress) -> None:
    """One run in detail, with what to do about it."""
    from leukoflow.runs.progress import ProgressReader

    reader = ProgressReader(root)
    table = _facts()
    table.add_row("run", Text(p.run_id, style="bold"))
    if p.shadow_of is not None:
        table.add_row("shadow of", Text(f"{p.shadow_of}: not the night's result", style="yellow"))
    table.add_row("state", Text(_state_in_words(p), style=_STATE_STYLE.get(p.state, "yellow")))
    share = f" ({100 * p.done / p.members:.0f} %)" if p.members else ""
    planned = f"{p.done:,} of {p.members:,}{share}: {_counts(p)}" if p.members else "the source is not planned yet"
    table.add_row("images", planned)
    for stage in ("masks", "features", "predictions"):
        done = len(reader.storage.names(f"markers/{stage}"))
        table.add_row(stage, f"{done:,} of {p.shards:,} shards")
    table.add_row("started", f"{p.started_at} ({_ago(p.started_at)})")
    table.add_row("last sign", f"{p.last_activity} ({_ago(p.last_activity)})")
    for shard, message in p.failed_shards[:10]:
        table.add_row("failed", Text(f"shard {shard}: {message}", style="red"))
    if len(p.failed_shards) > 10:
        table.add_row("", f"and {count_of(len(p.failed_shards) - 10, 'more shard')}")
    if p.dashboard and p.state == "running":
        table.add_row("dashboard", Text(p.dashboard))
    if p.state == "finished":
        table.add_row("report", Text(f"{root}/report.html"))
    elif p.state == "running":
        table.add_row("next", "wait, or look at the dashboard; Ctrl-C or SIGTERM to its process stops it resumably")
    target.print(table)
    if p.state not in ("running", "finished"):
        if p.failed_shards:
            target.print("a shard that fails again needs its cause mended first; `leukoflow doctor` looks for it")
        target.print(Text.assemble(("continue with  ", "dim"), p.command), soft_wrap=True)
    manifest = reader.manifest()
    if manifest is not None:
        show_outcome(target, root, manifest)


# --- the life of a finished run --------------------------------------------------------------------------------------

_FINDINGS_SHOWN = 20


def size(count: int) -> str:
    """`812 bytes`, `3.4 MB`, `1.2 GB`."""
    if count < 1000:
        return f"{count} bytes"
    units = ("kB", "MB", "GB", "TB")
    power = next((i for i in range(len(units)) if count < 999.95 * 1000 ** (i + 1)), len(units) - 1)
    return f"{count / 1000 ** (power + 1):.1f} {units[power]}"


@contextmanager
def bytes_progress(target: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is to be called with bytes done and in all: a bar, or without a terminal a line now and then."""
    if not target.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _PLAIN_SECONDS:
                last = time.monotonic()
                target.print(f"{what}: {size(done)} of {size(total)}", soft_wrap=True)

        yield line
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=32), DownloadColumn(),
        TimeRemainingColumn(), console=target, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_verification(target: Console, found: Verification) -> None:
    """One run's verdict: a line when all is well, else what is wrong and what to do."""
    measured = (
        f"{found.files:,} files, {size(found.bytes)}, {found.rows:,} rows and {found.cells:,} cells in "
        f"{duration(found.seconds)}"
    )
    if found.ok:
        words = f"is as it was committed: {measured}; manifest SHA-256 {found.manifest_sha256}"
        if found.verdicts:
            words += f"; {found.verdicts:,} verdicts, the last one's digest {found.verdict_head}"
        target.print(Text.assemble((found.run_id, "bold green"), " ", words), soft_wrap=True)
        return
    count = len(found.findings) + found.more
    target.print(
        Text.assemble((found.run_id, "bold red"), f" is not as it was committed: {count_of(count, 'finding')}"),
        soft_wrap=True,
    )
    remedies: dict[str, list[str]] = {}
    for finding in found.findings:
        remedies.setdefault(finding.remedy, []).append(f"{finding.where}: {finding.what}")
    for remedy, lines in remedies.items():
        for text in lines[:_FINDINGS_SHOWN]:
            target.print(Text.assemble("  ", (text, "red")), soft_wrap=True)
        if len(lines) > _FINDINGS_SHOWN:
            target.print(f"  and {len(lines) - _FINDINGS_SHOWN} more of this kind")
        target.print(Text.assemble("  → ", remedy), soft_wrap=True)
    if found.more:
        target.print(f"  and {found.more:,} more findings")
    if found.skipped:
        target.print(Text(f"  {found.skipped}", style="dim"), soft_wrap=True)


def show_broken(target: Console, run_id: str, message: str) -> None:
    """A run that cannot be looked into at all."""
    target.print(Text.assemble((run_id, "bold red"), f" cannot be verified: {message}"), soft_wrap=True)


def show_compaction(target: Console, done: Compaction) -> None:
    """What compacting has done."""
    if done.files_after == done.files_before:
        words = f"has nothing to merge: {done.files_after:,} files, {size(done.bytes_after)}"
        if done.removed:
            words += f"; {done.removed:,} files that an interrupted compaction left behind are gone"
    else:
        words = (
            f"is compacted: {done.files_before:,} files, {size(done.bytes_before)}, became {done.files_after:,} files, "
            f"{size(done.bytes_after)}"
        )
    target.print(Text.assemble((done.run_id, "bold green"), f" {words}"), soft_wrap=True)


def show_audit(target: Console, out: str, log: AuditVerdict, name: str = "audit.jsonl") -> None:
    """The verdict on an audit log."""
    title = "audit log" if name == "audit.jsonl" else "audit log of the web application"
    if not log.problems and not log.entries:
        target.print(Text.assemble((title, "bold"), " is empty: nothing was looked at"), soft_wrap=True)
        return
    if not log.problems:
        words = f" follows line by line: {log.entries:,} entries; last line SHA-256 {log.head}"
        target.print(Text.assemble((title, "bold green"), words), soft_wrap=True)
        return
    target.print(Text.assemble((title, "bold red"), f" was tampered with: {out}/{name}"), soft_wrap=True)
    for problem in log.problems[:_FINDINGS_SHOWN]:
        target.print(Text.assemble("  ", (problem, "red")), soft_wrap=True)
    if len(log.problems) > _FINDINGS_SHOWN:
        target.print(f"  and {len(log.problems) - _FINDINGS_SHOWN:,} more")
    target.print("  → compare it with a backup; then move it aside; the next entry starts a new log", soft_wrap=True)


def show_retention(target: Console, found: Sequence[Decision], dry_run: bool) -> None:
    """What goes, or has gone, and what stays, each with the reason."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name, justify in (("run", "left"), ("", "left"), ("age", "right"), ("size", "right"), ("why", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    word = "would go" if dry_run else "deleted"
    for d in found:
        table.add_row(
            Text(d.run_id, style="bold"),
            Text(word if d.delete else "stays", style="yellow" if d.delete else "green"),
            "?" if d.age_days is None else f"{d.age_days:.0f} d",
            size(d.bytes) if d.delete else "",
            Text(d.why),
        )
    target.print(table)
    gone = [d for d in found if d.delete]
    total, files = sum(d.bytes for d in gone), sum(d.files for d in gone)
    target.print(f"{len(gone):,} of {len(found):,} runs {word}: {files:,} files, {size(total)}", soft_wrap=True)


def show_amended(target: Console, found: Sequence[Amended], done: str, dry_run: bool) -> None:
    """In which runs a patient is erased or corrected."""
    if not found:
        target.print("no run has a patient (or slide) by that name; nothing was changed")
        return
    for e in found:
        words = f"{count_of(e.images, 'image')}" + (f" and {e.missing:,} missing ones" if e.missing else "")
        if dry_run:
            target.print(Text.assemble((e.run_id, "bold"), f"  {words} would be {done}"), soft_wrap=True)
            continue
        line = f"  {words} {done}, {e.files:,} files rewritten; manifest SHA-256 {e.manifest_after}"
        target.print(Text.assemble((e.run_id, "bold"), line), soft_wrap=True)
    if not dry_run:
        target.print(
            "reports were deleted; `leukoflow report OUT RUN_ID` builds it again, from the source as it is now"
        )


_SLIDES_SHOWN = 20


def show_diff(target: Console, found: RunDiff) -> None:
    """Two runs side by side: how they were made, what became of labels, and the slides that changed most."""
    facts = _facts()
    facts.add_row("A", Text(found.run_a))
    facts.add_row("B", Text(found.run_b))
    target.print(facts)
    if found.setup:
        setup = Table(box=None, padding=(0, 2), header_style="dim")
        for name in ("made differently", "A", "B"):
            setup.add_column(name, overflow="fold")
        for row in found.setup:
            setup.add_row(*map(Text, row))
        target.print(Padding(setup, (1, 0, 0, 0), expand=False))
    if not found.images:
        target.print("\n[yellow]nothing was compared[/]: neither run has an image")
        return
    if found.same:
        target.print(f"\n[green]the same[/]: all {found.images:,} images have the same outcome in both")
        return
    if moved := [step for step in found.transitions if step[0] != step[1]]:
        states = list(dict.fromkeys([*CLASSES, *sorted({s for step in moved for s in step[:2]})]))
        states = [s for s in states if any(s in step[:2] for step in moved)]
        counts = {step[:2]: step[2] for step in found.transitions}
        matrix = Table(box=None, padding=(0, 2), header_style="dim")
        matrix.add_column("A ↓  B →")
        for state in states:
            matrix.add_column(state, justify="right")
        for before in states:
            cells = []
            for after in states:
                n = counts.get((before, after), 0)
                cells.append(Text(f"{n:,}" if n else "·", style="dim" if before == after or not n else "yellow"))
            matrix.add_row(before, *cells)
        target.print(Padding(matrix, (1, 0, 0, 0), expand=False))
    slides = Table(box=None, padding=(0, 2), header_style="dim")
    slides.add_column("slide", overflow="fold")
    for name in ("images", "label or status", "any change"):
        slides.add_column(name, justify="right")
    slides.add_column("what became of them", overflow="fold")
    slides.add_column("such as", overflow="fold")
    for s in found.slides[:_SLIDES_SHOWN]:
        steps = ", ".join(f"{a} → {b} {n:,}" for a, b, n in s.transitions[:4])
        example = Text(s.examples[0] if s.examples else "")
        slides.add_row(Text(s.slide), f"{s.images:,}", f"{s.moved:,}", f"{s.changed:,}", steps, example)
    target.print(Padding(slides, (1, 0), expand=False))
    if len(found.slides) > _SLIDES_SHOWN:
        target.print(f"and {len(found.slides) - _SLIDES_SHOWN:,} more slides; --csv or --json has all of them")
    fields = ", ".join(f"{name} {n:,}" for name, n in found.fields)
    target.print(
        f"[yellow]different[/]: of {found.images:,} images {found.changed:,} differ{f' ({fields})' if fields else ''}, "
        f"{found.only_a:,} are only in A, {found.only_b:,} only in B",
        soft_wrap=True,
    )


# --- evaluate --------------------------------------------------------------------------------------------------------


def show_evaluation(target: Console, found: Mapping[str, Any]) -> None:
    """The figures of `leukoflow evaluate`: each protocol beside its baselines, then masks and other laboratories."""
    for protocol, row in found["protocols"].items():
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column({"cluster": "clusters held out", "slide": "slides held out"}.get(protocol, "random split"))
        for name in row["models"]:
            table.add_column(name, justify="right")
        for key, words in (
            ("accuracy", "accuracy"),
            ("macro_f1", "macro F1"),
            ("mcc", "MCC"),
            ("auc_ovr", "AUC, one against rest"),
            ("ece", "calibration error"),
        ):
            table.add_row(words, *(f"{model[key]:.4f}" for model in row["models"].values()))
        worst = (model["worst_group"] for model in row["models"].values())
        table.add_row("worst group", *(f"{w['group']} {w['accuracy']:.3f}" for w in worst))
        target.print(table)
        model = row["models"]["leukoflow"]
        target.print(
            f"  sets: coverage {model['coverage']:.3f}, size {model['mean_set_size']:.2f}; "
            f"abstained {100 * model['abstention_rate']:.1f} %\n",
            highlight=False,
        )
    facts = _facts()
    for key, value in found.get("segmentation", {}).items():
        facts.add_row(key.replace("_", " "), f"{value:.4g}")
    if foreign := found.get("foreign"):
        facts.add_row(
            "healthy blood of another laboratory",
            f"{foreign['abstained_or_benign']:.3f} of {foreign['images']} images abstained from or called Benign",
        )
    target.print(facts)


def show_checks(target: Console, checks: Sequence[Check]) -> None:
    """The checks, each with its verdict and, where needed, its remedy."""
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
