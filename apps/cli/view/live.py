"""What is shown of work that goes on: the plan of a run, its progress, and how far a long check is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from leukoflow.apps.cli.view.console import duration, facts_table, size
from leukoflow.core.counts import count_of

if TYPE_CHECKING:
    from leukoflow.runs.progress import RunProgress
    from leukoflow.runs.records import PlanSummary

_POLL_SECONDS = 1.0
_PLAIN_SECONDS = 10.0


def show_plan(target: Console, run_id: str, root: str, summary: PlanSummary) -> None:
    """Show what is about to be done."""
    table = facts_table()
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


class Pace:
    """Images per second, from the first shard that was seen to be finished in this session.

    What an earlier session has done must not flatter the rate, and the start-up must not belittle it.
    """

    def __init__(self) -> None:
        self._before: int | None = None
        self._first: tuple[float, int] | None = None

    def describe(self, done: int, members: int) -> str:
        """Say rate and time left, as soon as there is something to go by."""
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
    """Show how far the run at `root` is while the block runs: a bar, or without a terminal a line now and then."""
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

    reader, pace = ProgressReader(root), Pace()
    if not target.is_terminal:
        while not ended.wait(_PLAIN_SECONDS):
            progress = _try_read(reader)
            if progress is not None:
                pace_now = pace.describe(progress.done, progress.members)
                target.print(
                    f"{progress.done:,} of {progress.members:,} images, {progress.shards_done} of {progress.shards} "
                    f"shards; {pace_now if progress.done else progress.phase or pace_now}; {count_outcomes(progress)}",
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
                line = f"{progress.done:,}/{progress.members:,}  {speed}  [dim]{count_outcomes(progress)}[/]"
                bar.update(task, completed=progress.done, total=progress.members, line=line)
            elif progress is not None:
                pace.describe(0, progress.members)
                bar.update(task, line=escape(progress.phase or "starting"))
            if ended.wait(_POLL_SECONDS):
                return


def _try_read(reader: object) -> RunProgress | None:
    """Read the progress; None when that fails, since the display must never end a run and looks again soon."""
    try:
        return reader.read()  # type: ignore[attr-defined, no-any-return]
    except Exception:
        return None


def count_outcomes(p: RunProgress) -> str:
    """Say what has become of the images so far, without the outcomes that none has."""
    parts = (
        (p.counts.predicted, "predicted"),
        (p.counts.abstained, "abstained"),
        (p.counts.rejected, "rejected"),
        (p.counts.quarantined, "quarantined"),
    )
    return ", ".join(f"{n:,} {name}" for n, name in parts if n or name == "predicted")


@contextmanager
def bytes_progress(target: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what is to be called with bytes done and in all: a bar, or without a terminal a line now and then."""
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
