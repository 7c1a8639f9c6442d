"""Watches a run's deadline beside the run: warns when it will be missed, and hands over what is done when it comes."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

from leukoflow.core.errors import DeadlineError, RunCancelledError, words_of
from leukoflow.flows.events import emit
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import ProgressReader, RunProgress
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.commands import command_about
from leukoflow.tasks.publish.partial import Pace, hand_over, lateness

POLL_SECONDS = 5.0
"""How often the watch looks at what is committed."""


@contextmanager
def watch_deadline(run: Run, stop: threading.Event, note: Callable[[str], None]) -> Iterator[None]:
    """Watch the deadline of a run for the block. `note` gets the present forecast in words, empty when all is well.

    Where the settings say so, sets `stop` at the deadline, and the RunCancelledError that comes of it leaves the block
    as a DeadlineError.
    """
    if run.config.deadline is None:
        yield
        return
    watch = _Watch(run, run.config.deadline, stop, note)
    context = contextvars.copy_context()  # logs and artifacts belong to the flow run
    thread = threading.Thread(target=context.run, args=(watch.follow,), name="leukoflow-deadline", daemon=True)
    thread.start()
    patience = 600.0
    try:
        yield
    except KeyboardInterrupt:  # a second Ctrl-C: nobody wants to wait for the hand-over any more
        patience = 0.0
        raise
    except RunCancelledError as error:
        if watch.stopped:
            raise DeadlineError(
                f"run {run.run_id} has reached its deadline ({watch.words}) and stops as its settings say; what is "
                f"done is in {run.root}/{RunKey.PARTIAL}. The next night finishes it, or: {run.binding.command}"
            ) from error
        raise
    finally:
        watch.over.set()
        thread.join(timeout=patience)  # what it hands over must not appear after the run has ended


class _Watch:
    def __init__(self, run: Run, deadline: datetime, stop: threading.Event, note: Callable[[str], None]) -> None:
        self.run, self.deadline, self.stop, self.note = run, deadline, stop, note
        self.words = f"{deadline:%Y-%m-%d %H:%M %Z}"
        self.over = threading.Event()
        self.stopped = False
        self.log = get_run_logger()
        self._reader = ProgressReader(run.root)
        self._began: int | None = None  # images done when this session began
        self._first: tuple[float, int] | None = None  # when its first shard was seen to be done, and images then
        self._warned = False

    def follow(self) -> None:
        """Watch until the run is over or has handed over."""
        passed = datetime.now(UTC) >= self.deadline
        while not passed and not self.over.is_set():
            try:
                self.look(self._reader.read(), datetime.now(UTC), time.monotonic())
            except Exception as error:  # a look that fails must not end a night's work
                self.log.warning("deadline: %s", words_of(error))
            left = (self.deadline - datetime.now(UTC)).total_seconds()
            if left <= 0:
                break
            self.over.wait(min(POLL_SECONDS, left))
        if not self.over.is_set():
            self.reached(may_stop=not passed)

    def look(self, progress: RunProgress, moment: datetime, clock: float) -> None:
        """Take one reading, and warn when the run is late at the present rate."""
        if self._began is None:
            self._began = progress.done
        if self._first is None:
            if progress.done > self._began:
                self._first = clock, progress.done
            return
        pace = Pace(progress.done - self._first[1], clock - self._first[0])
        late = lateness(progress, pace, self.deadline, moment)
        if late is None:
            return
        if late <= timedelta(0):
            self.note("")
            return
        words = (
            f"at the present rate ({pace.rate:.1f} images/s) it misses its deadline ({self.words}) by "
            f"{late.total_seconds() / 60:.0f} min"
        )
        self.note(words)
        if not self._warned:
            self._warned = True
            self.log.warning("run %s: %s; urgent images are done first", self.run.run_id, words)
            self._artifact(f"**Run {self.run.run_id} is late:** {words}.")
            emit(
                "leukoflow.run.deadline-at-risk",
                self.run.run_id,
                {
                    "deadline": self.deadline.isoformat(),
                    "minutes_late": round(late.total_seconds() / 60, 1),
                    "images_per_second": round(pace.rate, 2),
                    "images_left": progress.members - progress.done,
                },
            )

    def reached(self, may_stop: bool) -> None:
        """Hand over what is done, and stop the run where its settings say so: first, so that no shard is started."""
        if may_stop and self.run.config.at_deadline == "stop":
            self.stopped = True
            self.stop.set()
        try:
            done = hand_over(self.run.root)
            words = f"handed over at the deadline ({self.words}): {done.done} of {done.members} images"
        except Exception as error:
            why = f"{type(error).__name__}: {words_of(error)}"
            words = f"what is done could not be handed over ({why}); try: {command_about(self.run, 'report')}"
        self.note(words)
        self.log.warning("run %s: %s", self.run.run_id, words)
        self._artifact(
            f"**Run {self.run.run_id} is unfinished.** {words}. Partial ranking and report: "
            f"`{self.run.root}/{RunKey.PARTIAL}/`"
        )

    def _artifact(self, text: str) -> None:
        try:
            create: Any = create_markdown_artifact
            create(text, key="nightly-deadline", description=f"Deadline of {self.run.run_id}")
        except Exception as error:
            self.log.warning("deadline: %s", words_of(error))
