"""The automations of deployments/automations.yaml on a real Prefect server: they fire, act, and tell people."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from harness import ROOT, until

from leukoflow.apps.prefect_server import free_port
from leukoflow.core.errors import ConfigError

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:'imghdr' is deprecated"),  # apprise's, on Python 3.11 and 3.12
]

FILE = ROOT / "deployments" / "automations.yaml"
FLOW = """
import sys, time
from prefect import flow

@flow(name="leukoflow test", flow_run_name=sys.argv[1])
def test():
    if sys.argv[2] == "fail":
        raise RuntimeError("on purpose")
    time.sleep(600)

test()
"""


@dataclass
class Received:
    """What has arrived by webhook and by e-mail."""

    url: str = ""
    email: str = ""
    webhooks: list[dict[str, Any]] = field(default_factory=list)
    mails: list[str] = field(default_factory=list)

    def about(self, **wanted: str) -> list[dict[str, Any]]:
        return [m for m in self.webhooks if all(m.get(k) == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def received() -> Iterator[Received]:
    received = Received()

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.webhooks.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Mailbox:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            received.mails.append(envelope.content.decode())
            return "250 OK"

    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    port = free_port(0)
    mail = Controller(Mailbox(), hostname="127.0.0.1", port=port)
    mail.start()
    received.url = f"http://127.0.0.1:{hook.server_address[1]}/hook?token=secret-token"
    received.email = f"mailto://127.0.0.1:{port}?from=night@example.org&to=lab@example.org"
    yield received
    mail.stop()
    hook.shutdown()
    hook.server_close()


@pytest.fixture(scope="module")
def automations(server: str, received: Received) -> Iterator[dict[str, str]]:
    """The file applied with short times; gone from the shared server afterwards."""
    from prefect.client.orchestration import get_client

    from leukoflow.apps.automations import PREFIX, apply_automations

    environment = {
        "LEUKOFLOW_WEBHOOK_URL": received.url,
        "LEUKOFLOW_EMAIL_URL": received.email,
        "LEUKOFLOW_SILENCE_SECONDS": "10",
    }
    apply_automations(FILE, environment)
    yield environment
    with get_client(sync_client=True) as client:
        for automation in client.read_automations():
            if automation.name.startswith(PREFIX):
                client.delete_automation(automation.id)


def start_flow(name: str, what: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen([sys.executable, "-c", FLOW, name, what], stdout=sink, stderr=sink)


def read_run(name: str) -> Any:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
        return found[0] if found else None


def heartbeats(run_id: Any) -> int:
    from prefect.client.orchestration import get_client

    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run_id}"]}}
    with get_client(sync_client=True) as client:
        answer = client._client.post("/events/filter", json={"filter": wanted})
        return int(answer.json()["total"])


def test_a_second_time_changes_nothing(automations: dict[str, str]) -> None:
    from prefect.client.orchestration import get_client

    from leukoflow.apps.automations import apply_automations

    again = apply_automations(FILE, automations)
    assert len(again.unchanged) == 8
    assert not again.created + again.updated + again.deleted + again.silent
    with get_client(sync_client=True) as client:
        paused = client.read_automations_by_name("leukoflow: drift")[0]
        client.pause_automation(paused.id)
    # without the variables the server keeps its blocks; another time is an update; what was paused stays so
    changed = apply_automations(FILE, {"LEUKOFLOW_SILENCE_SECONDS": "10", "LEUKOFLOW_PENDING_SECONDS": "60"})
    assert changed.updated == ["leukoflow: run stuck before it began"]
    assert not changed.silent
    with get_client(sync_client=True) as client:
        assert not client.read_automations_by_name("leukoflow: drift")[0].enabled
        client.resume_automation(paused.id)


@pytest.mark.chaos  # waits on the server's own services, which have let it wait beyond a minute
def test_a_failed_run_is_reported_by_webhook_and_mail(
    automations: dict[str, str], received: Received, tmp_path: Path
) -> None:
    process = start_flow("a run that fails", "fail", tmp_path / "log")
    process.wait(timeout=120)
    found = until(lambda: received.about(flow_run="a run that fails"), 60, "the webhook")
    assert found[0]["automation"] == "leukoflow: run failed"
    assert found[0]["state"] == "Failed"
    assert "on purpose" in found[0]["message"]
    mail = until(lambda: [m for m in received.mails if "a run that fails" in m], 60, "the e-mail")[0]
    assert "To: lab@example.org" in mail


@pytest.mark.chaos
def test_a_killed_process_is_noticed_and_its_run_crashed(
    automations: dict[str, str], received: Received, tmp_path: Path
) -> None:
    process = start_flow("a run that dies", "sleep", tmp_path / "log")
    try:
        run = until(lambda: (r := read_run("a run that dies")) and r.state.is_running() and r, 120, "the run")
        until(lambda: heartbeats(run.id), 60, "a sign of life")
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    crashed = until(lambda: (r := read_run("a run that dies")) and r.state.is_crashed() and r, 90, "the verdict")
    assert crashed.state.message.startswith("No sign of life")
    assert until(lambda: received.about(flow_run="a run that dies", state="Crashed"), 60, "the webhook")


def test_what_a_night_has_found_is_reported(automations: dict[str, str], received: Received) -> None:
    from prefect.events.worker import EventsWorker

    from leukoflow.flows.events import emit

    figures = {"quarantined": 7, "share": 0.07, "allowed": 0.01}
    for name in ("quarantined-too-many", "abstained-too-many", "drift", "deadline-at-risk"):
        emit(f"leukoflow.run.{name}", "night-2026-03-01", figures)  # type: ignore[arg-type]
    emit("leukoflow.run.finished", "night-2026-03-01", {})  # nobody is woken for that
    EventsWorker.drain_all(timeout=10)
    until(lambda: len(received.about(run="night-2026-03-01")) >= 4, 60, "four webhooks")
    found = {m["automation"]: m["figures"] for m in received.about(run="night-2026-03-01")}
    assert found == dict.fromkeys(
        ("leukoflow: too many quarantined", "leukoflow: too many abstained", "leukoflow: drift",
         "leukoflow: deadline at risk"), figures,
    )  # fmt: skip
    mail = until(lambda: [m for m in received.mails if "drift" in m and "Subject" in m], 60, "the e-mail")[0]
    assert "share: 0.07" in mail


def test_secrets_are_not_readable_on_the_server(automations: dict[str, str]) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for name, kind in (("leukoflow-webhook", "webhook"), ("leukoflow-email", "leukoflow-email")):
            document = client.read_block_document_by_name(name, kind, include_secrets=False)
            assert "secret-token" not in document.model_dump_json()
            assert "example.org" not in json.dumps(document.data)
    assert "secret-token" not in FILE.read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("automations: 3", "lists of tables"),
        ("automations: [", "not valid YAML"),
        ("automations: [{name: other}]", "begins with"),
        ("automations: [{name: 'leukoflow: x', actions: [{block: nobody}]}]", "names the block nobody"),
        ("blocks: [{name: a, type: pigeon, wants: A, data: {}}]\nautomations: []", "pigeon"),
        ("automations: [{name: 'leukoflow: x', within: '${NOT_SET}'}]", "NOT_SET is not set"),
    ],
)
def test_a_wrong_file_is_named(text: str, words: str, tmp_path: Path) -> None:
    from leukoflow.apps.automations import read_automations

    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_automations(tmp_path / "a.yaml", {})
