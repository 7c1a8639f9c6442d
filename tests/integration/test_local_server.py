"""The local Prefect server for real: it answers, shows its dashboard, keeps to itself, and never outlives its run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from harness import ROOT

from leukoflow.apps import prefect_connection
from leukoflow.apps.prefect_connection import PrefectServerError
from leukoflow.apps.prefect_server import client_environment, running_server, start_server, stop

pytestmark = pytest.mark.integration


def _eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


class _Proxy:
    """A web proxy that only counts who calls: an HTTP client that wants to leave the machine would come here."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.calls: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.calls.append(connection.recv(200))

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Proxy]:
    recorder = _Proxy()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, recorder.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield recorder
    recorder.close()


def test_a_server_of_a_run_answers_shows_its_dashboard_and_keeps_to_itself(tmp_path: Path, proxy: _Proxy) -> None:
    server = start_server(keep=False, home=tmp_path / "prefect")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(server.ui_url, timeout=10) as page:
            assert page.status == 200
            assert b"Prefect" in page.read()
        with opener.open(f"{server.url}/admin/settings", timeout=10) as settings:
            assert b'"analytics_enabled":false' in settings.read().replace(b" ", b"")
        assert running_server(tmp_path / "prefect") is None  # it belongs to this run and is nobody else's to use
        with pytest.raises(PrefectServerError, match="belongs to a run"):
            stop(tmp_path / "prefect")

        second = start_server(keep=False, home=tmp_path / "prefect")
        try:
            assert second.home == tmp_path / "prefect" / "parallel-1"
            assert second.url != server.url
        finally:
            second.stop()

        process = psutil.Process(server.pid)
        time.sleep(2)
        remote = [c.raddr.ip for c in process.net_connections(kind="inet") if c.raddr]
        listening = [c.laddr.ip for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
        assert set(remote) <= {"127.0.0.1"}
        assert set(listening) == {"127.0.0.1"}
        assert proxy.calls == []
    finally:
        server.stop()
    assert not psutil.pid_exists(server.pid)
    assert not prefect_connection.is_healthy(server.url)


def test_a_kept_server_is_used_again_and_stopped_on_request(tmp_path: Path) -> None:
    home = tmp_path / "prefect"
    assert stop(home) is False
    server = start_server(keep=True, home=home)
    assert server.process is not None
    try:
        server.stop()  # does nothing: it is to be kept
        found = running_server(home)
        assert found is not None
        assert (found.url, found.pid) == (server.url, server.pid)
        again = start_server(keep=False, home=home)
        assert (again.url, again.process) == (server.url, None)
        again.stop()  # nor does a run that merely used it
        assert prefect_connection.is_healthy(server.url)
    finally:
        assert stop(home) is True
        server.process.wait(10)
    assert running_server(home) is None


def test_a_server_dies_with_the_run_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from leukoflow.apps.prefect_server import start_server\n"
        f"server = start_server(keep=False, home=Path({str(tmp_path / 'prefect')!r}))\n"
        "print(server.pid, server.url, flush=True)\n"
        "time.sleep(600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert run.stdout is not None
    pid, url = run.stdout.readline().split()
    assert prefect_connection.is_healthy(url)
    os.kill(run.pid, signal.SIGKILL)
    run.wait(10)
    run.stdout.close()
    assert _eventually(lambda: not prefect_connection.is_healthy(url))
    assert _eventually(lambda: not psutil.pid_exists(int(pid)))


def test_a_client_uses_the_server_in_spite_of_a_proxy(tmp_path: Path, proxy: _Proxy) -> None:
    server = start_server(keep=False, home=tmp_path / "prefect")
    try:
        script = (
            "from prefect import flow\n"
            "from prefect.settings import get_current_settings\n"
            "@flow\n"
            "def nothing() -> int:\n"
            "    return 7\n"
            "print(nothing(), get_current_settings().api.url)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | client_environment(server),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            check=True,
        )
        assert done.stdout.split() == ["7", server.url]
        assert proxy.calls == []
    finally:
        server.stop()
