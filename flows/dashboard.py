"""What Prefect learns of a run beside its task runs, so that the dashboard may be away without the night noticing.

Everything here happens in a thread of its own that never waits long: progress and summary (artifacts), and the question
whether somebody pressed Cancel. While the server does not answer, only the newest progress is kept, and the time is
written down; `notes` says afterwards what the record may lack. States of task runs travel by Prefect's own events,
which it keeps and sends again once the server is back; they are given up only when it is away at the end of the run,
since the process could not end before.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.events.clients import PrefectEventsClient
from prefect.events.schemas.events import Event
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

ASK_SECONDS = 5.0
"""How often the server is asked, which is also how soon Cancel is noticed and an outage begins or ends."""

ANSWER_SECONDS = 10.0
LAST_WORD_SECONDS = 15.0
"""How long the end of a run waits for a server that is away to take the summary."""

_AWAY = (httpx.HTTPError, PrefectException, OSError)


_given_up = threading.Event()


def _let_events_be_given_up() -> None:
    """Have Prefect's events client drop what is left once `_given_up` is set: it would try ten seconds for each."""
    emit = PrefectEventsClient._emit
    if emit.__module__ == __name__:
        return

    async def unless_given_up(client: PrefectEventsClient, event: Event) -> None:
        if not _given_up.is_set():
            await emit(client, event)

    # not a subclass: Prefect sends events only by the very classes that it knows
    PrefectEventsClient._emit = unless_given_up  # type: ignore[method-assign,assignment]


@dataclass(frozen=True, slots=True)
class Outage:
    """A time (seconds since the epoch) in which the server did not answer; `end` is None while it lasts."""

    start: float
    end: float | None


class Dashboard:
    """A run's artifacts in Prefect, and the wish to cancel; use it as a context.

    `wish` is set when Cancel was pressed, `complain` is called when an outage begins and ends.
    """

    def __init__(
        self,
        run_id: str,
        flow_run_id: str,
        wish: threading.Event,
        complain: Callable[[str], None],
        progress_key: str = "nightly-progress",
    ) -> None:
        self.outages: list[Outage] = []
        self._run_id = run_id
        self._flow_run_id = uuid.UUID(flow_run_id)
        self._progress_key = progress_key
        self._wish = wish
        self._complain = complain
        self._progress: tuple[float, str] | None = None
        self._summary: ArtifactCreate | None = None
        self._artifact: uuid.UUID | None = None
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._wake, self._over = threading.Event(), threading.Event()
        # in the flow's context, so that what is sent is known to be of this run
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._talk,), name="leukoflow-dashboard", daemon=True
        )

    def __enter__(self) -> Dashboard:
        _given_up.clear()
        _let_events_be_given_up()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *trouble: object) -> None:
        self._over.set()
        self._wake.set()
        at_once = kind is not None and issubclass(kind, KeyboardInterrupt)  # after a second Ctrl-C nobody waits
        self._thread.join(timeout=0.0 if at_once else 2 * ANSWER_SECONDS + LAST_WORD_SECONDS)
        if self.away:
            _given_up.set()

    @property
    def away(self) -> bool:
        """Return whether the server did not answer when it was asked last."""
        return bool(self.outages) and self.outages[-1].end is None

    def progress(self, percent: float, words: str) -> None:
        """Show how far the run is; only the newest word counts."""
        with self._lock:
            self._progress = (percent, f"{self._run_id}: {words}")

    def summary(self, markdown: str, words: str) -> None:
        """Show what became of the run."""
        with self._lock:
            self._summary = ArtifactCreate(
                type="markdown", key="nightly-summary", description=words, data=markdown, flow_run_id=self._flow_run_id
            )
        self._wake.set()

    def notes(self) -> tuple[str, ...]:
        """Say in words what Prefect's record of the run may lack so far; empty when the server always answered.

        Asks once more, since an outage that began a moment ago would otherwise be missing from the run's own record.
        """
        self._once()
        if not self.outages:
            return ()
        times = ", ".join(_span(outage) for outage in self.outages[:5]) + (", ..." if len(self.outages) > 5 else "")
        lacks = "states of shards and log lines since then" if self.away else "log lines of that time"
        return (
            f"the Prefect server did not answer {times}; the results are not concerned, but Prefect's record of the "
            f"run may lack {lacks}, which logs/ has",
        )

    def cancelled(self) -> bool:
        """Return whether Cancel was pressed, as of now; False when nobody can tell."""
        try:
            with _client() as client:
                return self._asked(client)
        except _AWAY:
            return self._wish.is_set()

    def _talk(self) -> None:
        while not self._over.is_set():
            self._once()
            self._wake.wait(ASK_SECONDS)
            self._wake.clear()
        end = time.monotonic() + LAST_WORD_SECONDS
        while not self._once() and time.monotonic() < end:
            time.sleep(1.0)

    def _once(self) -> bool:
        """Say and ask what there is; return whether the server took it."""
        with self._turn:  # the run's own thread asks too
            return self._exchange()

    def _exchange(self) -> bool:
        try:
            with _client() as client:  # a new one each time: connections to a server that was away are of no use
                self._send(client)
                if self._asked(client) and not self._wish.is_set():  # a signal may come here, and set it as well
                    self._wish.set()
        except _AWAY as error:
            if not self.away:
                self.outages.append(Outage(time.time(), None))
                name = type(error).__name__
                self._complain(f"the Prefect server does not answer ({name}); the run goes on without it")
            return False
        if self.away:
            began = self.outages[-1].start
            self.outages[-1] = Outage(began, time.time())
            self._complain(f"the Prefect server answers again after {time.time() - began:.0f} s")
        return True

    def _send(self, client: SyncPrefectClient) -> None:
        with self._lock:
            progress, summary = self._progress, self._summary
        if progress is not None:
            percent, words = progress
            if self._artifact is None:
                made = client.create_artifact(
                    ArtifactCreate(
                        type="progress", key=self._progress_key, description=words, data=percent,
                        flow_run_id=self._flow_run_id,
                    )
                )  # fmt: skip
                self._artifact = made.id
            else:
                client.update_artifact(self._artifact, ArtifactUpdate(data=percent, description=words))
        if summary is not None:
            client.create_artifact(summary)
        with self._lock:
            if self._progress is progress:
                self._progress = None
            if self._summary is summary:
                self._summary = None

    def _asked(self, client: SyncPrefectClient) -> bool:
        state = client.read_flow_run(self._flow_run_id).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())


@contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    """Open a client that asks once and does not wait long; the thread asks again by itself."""
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": ANSWER_SECONDS}, sync_client=True) as client,
    ):
        yield client


def _span(outage: Outage) -> str:
    def clock(t: float) -> str:
        return datetime.fromtimestamp(t, UTC).strftime("%H:%M:%S")

    if outage.end is None:
        return f"from {clock(outage.start)} UTC on"
    return f"from {clock(outage.start)} to {clock(outage.end)} UTC"
