"""What Prefect is sent beside the task runs, against a small HTTP server that can go away and come back."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from leukoflow.core.errors import RunCancelledError
from leukoflow.flows import dashboard
from leukoflow.flows.dashboard import ANSWER_SECONDS, LAST_WORD_SECONDS, Dashboard

FLOW_RUN = uuid.UUID(int=7)


class Api:
    """As much of Prefect's API as is asked for."""

    def __init__(self) -> None:
        self.state = "RUNNING"
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: Any, status: int = 200) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def body(self) -> Any:
                return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

            def do_GET(self) -> None:
                if f"/flow_runs/{FLOW_RUN}" not in self.path:
                    return self.answer({"detail": "not found"}, 404)
                state = {"type": api.state, "name": api.state.title()}
                return self.answer({"id": str(FLOW_RUN), "flow_id": str(FLOW_RUN), "name": "x", "state": state})

            def do_POST(self) -> None:
                found = self.body() | {"id": str(uuid.uuid4())}
                api.artifacts[found["key"]] = found
                self.answer(found, 201)

            def do_PATCH(self) -> None:
                api.artifacts["nightly-progress"] |= self.body()
                self.answer({}, 200)

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    EventsWorker.set_client_override(NullEventsClient)
    monkeypatch.setattr(dashboard, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(dashboard, "LAST_WORD_SECONDS", 1.0)
    found = Api()
    found.start()
    with temporary_settings({PREFECT_API_URL: found.url}):
        yield found
    found.stop()
    EventsWorker.set_client_override(None)


def soon(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_progress_and_summary_arrive_and_nothing_is_noted(api: Api) -> None:
    with Dashboard("night", str(FLOW_RUN), threading.Event(), print) as board:
        board.progress(0.0, "starting")
        soon(lambda: "nightly-progress" in api.artifacts)
        for percent in range(1, 51):
            board.progress(float(percent), f"{percent} of 100")
        soon(lambda: api.artifacts["nightly-progress"]["data"] == 50.0)
        assert api.artifacts["nightly-progress"]["description"] == "night: 50 of 100"
        assert api.artifacts["nightly-progress"]["flow_run_id"] == str(FLOW_RUN)
        assert board.notes() == ()
        board.summary("## all is well", "what became of it")
    assert api.artifacts["nightly-summary"]["data"] == "## all is well"


@pytest.mark.slow
def test_an_outage_that_nobody_has_noticed_yet_is_noted(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's record is written once; what the thread would find out seconds later must stand in it."""
    monkeypatch.setattr(dashboard, "ASK_SECONDS", 60.0)
    with Dashboard("night", str(FLOW_RUN), threading.Event(), print) as board:
        board.progress(0.0, "starting")
        soon(lambda: "nightly-progress" in api.artifacts)
        api.stop()
        (note,) = board.notes()
        assert "states of shards and log lines since then" in note
        assert board.away


def test_cancel_sets_the_wish(api: Api) -> None:
    wish = threading.Event()
    with Dashboard("night", str(FLOW_RUN), wish, print) as board:
        assert not board.cancelled()
        assert not wish.is_set()
        api.state = "CANCELLING"
        assert wish.wait(30)
        assert board.cancelled()


def test_a_second_ctrl_c_does_not_wait_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, release, waits = threading.Event(), threading.Event(), list[float | None]()

    def talk(self: Dashboard) -> None:
        busy.set()
        release.wait(60)

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        waits.append(timeout)

    def body(how: type[BaseException]) -> None:
        with monkeypatch.context() as patch, Dashboard("night", str(FLOW_RUN), threading.Event(), print):
            assert busy.wait(30)
            patch.setattr(threading.Thread, "join", join)
            raise how

    monkeypatch.setattr(Dashboard, "_talk", talk)
    for how, patience in ((KeyboardInterrupt, 0.0), (RunCancelledError, 2 * ANSWER_SECONDS + LAST_WORD_SECONDS)):
        with pytest.raises(how):
            body(how)
        assert waits.pop() == patience
    release.set()


@pytest.mark.slow
def test_a_server_that_comes_back_gets_the_newest_and_the_time_is_noted(api: Api) -> None:
    said: list[str] = []
    with Dashboard("night", str(FLOW_RUN), threading.Event(), said.append) as board:
        board.progress(10.0, "before")
        soon(lambda: "nightly-progress" in api.artifacts)
        api.stop()
        soon(lambda: board.away)
        board.progress(20.0, "never seen")
        board.progress(30.0, "seen later")
        assert not board.cancelled()
        (note,) = board.notes()
        assert " UTC on; " in note
        assert "states of shards and log lines since then" in note
        api.start()
        soon(lambda: not board.away)
        (note,) = board.notes()
        assert " to " in note
        assert "may lack log lines of that time" in note
        soon(lambda: api.artifacts["nightly-progress"]["description"] == "night: seen later")
    assert [words.split(" (")[0].split(" after")[0] for words in said] == [
        "the Prefect server does not answer",
        "the Prefect server answers again",
    ]
    assert not dashboard._given_up.is_set()


@pytest.mark.slow
def test_a_server_that_stays_away_is_given_up_soon(api: Api) -> None:
    api.stop()
    with Dashboard("night", str(FLOW_RUN), threading.Event(), print) as board:
        board.summary("## all is well", "what became of it")
        soon(lambda: board.away)
        started = time.monotonic()
    assert time.monotonic() - started < 25
    assert dashboard._given_up.is_set()
    assert api.artifacts == {}
