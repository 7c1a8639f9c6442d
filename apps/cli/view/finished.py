"""What is shown of finished runs: verified, compared, compacted, deleted, and with a patient erased or corrected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from leukoflow.apps.cli.view.console import duration, facts_table, size
from leukoflow.core.counts import count_of
from leukoflow.runs.layout import OutKey
from leukoflow.runs.records import CLASSES

if TYPE_CHECKING:
    from leukoflow.tasks.store.compact import Compaction
    from leukoflow.tasks.upkeep.amendment import Amended
    from leukoflow.tasks.upkeep.audit import AuditVerdict
    from leukoflow.tasks.upkeep.diff import RunDiff
    from leukoflow.tasks.upkeep.retention import Decision
    from leukoflow.tasks.upkeep.verify import Verification

_FINDINGS_SHOWN = 20
_SLIDES_SHOWN = 20


def show_verification(target: Console, found: Verification) -> None:
    """Show what verifying a run has found: a line when all is well, else what is wrong and what to do."""
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
    """Show a run that cannot be looked into at all."""
    target.print(Text.assemble((run_id, "bold red"), f" cannot be verified: {message}"), soft_wrap=True)


def show_compaction(target: Console, done: Compaction) -> None:
    """Show what compacting has done."""
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


def show_audit(target: Console, out: str, log: AuditVerdict, name: str = OutKey.AUDIT) -> None:
    """Show whether an audit log is whole."""
    title = "audit log" if name == OutKey.AUDIT else "audit log of the web application"
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
    """Show what goes, or has gone, and what stays, each with the reason."""
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
    """Show in which runs a patient is erased or corrected."""
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


def show_diff(target: Console, found: RunDiff) -> None:
    """Show two runs side by side: how they were made, what became of labels, and the slides that changed most."""
    facts = facts_table()
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
