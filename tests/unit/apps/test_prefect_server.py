"""Which Prefect server is used, what its clients get, and what is said when one does not start; no real server."""

from __future__ import annotations

import base64
import fcntl
import http.server
import json
import os
import socket
import ssl
import sys
import threading
import urllib.error
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from leukoflow.apps import prefect_connection, prefect_server
from leukoflow.apps.prefect_connection import PrefectServerError, configured_api_url
from leukoflow.apps.prefect_server import LocalServer, client_environment, start_server


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "PREFECT_API_URL",
        "PREFECT_API_AUTH_STRING",
        "PREFECT_PROFILE",
        "PREFECT_PROFILES_PATH",
        "NO_PROXY",
        "no_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "dot-prefect"))


def test_the_environment_wins_over_the_active_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert configured_api_url() is None
    (tmp_path / "dot-prefect").mkdir()
    profiles = tmp_path / "dot-prefect/profiles.toml"
    profiles.write_text(
        'active = "lab"\n[profiles.lab]\nPREFECT_API_URL = "http://lab:4200/api"\n[profiles.ephemeral]\n'
    )
    assert configured_api_url() == "http://lab:4200/api"
    monkeypatch.setenv("PREFECT_PROFILE", "ephemeral")
    assert configured_api_url() is None
    monkeypatch.setenv("PREFECT_API_URL", "http://night:4200/api")
    assert configured_api_url() == "http://night:4200/api"
    monkeypatch.delenv("PREFECT_API_URL")
    profiles.write_text("not toml [")
    assert configured_api_url() is None


def test_the_home_follows_the_usual_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LEUKOFLOW_PREFECT_HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert prefect_server.default_home() == tmp_path / "state/leukoflow/prefect"
    monkeypatch.setenv("LEUKOFLOW_PREFECT_HOME", str(tmp_path / "mine"))
    assert prefect_server.default_home() == tmp_path / "mine"


def test_clients_keep_to_themselves_and_reach_loopback_past_a_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet,127.0.0.1")
    server = LocalServer("http://127.0.0.1:4200/api", 1, tmp_path, keep=False)
    assert server.ui_url == "http://127.0.0.1:4200"
    env = client_environment(server)
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert env["NO_PROXY"] == "intranet,127.0.0.1,localhost"
    assert (env["DO_NOT_TRACK"], env["PREFECT_SERVER_ANALYTICS_ENABLED"]) == ("1", "false")
    own = client_environment(None)
    assert own["DO_NOT_TRACK"] == "1"
    assert "PREFECT_API_URL" not in own
    assert "PREFECT_HOME" not in own


class _Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path in ("/api/health", "/api/admin/settings") else 404)
        self.end_headers()
        if self.path == "/api/admin/settings":
            self.wfile.write(json.dumps({"home": str(self.server.home)}).encode())  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def healthy_url(tmp_path: Path) -> Iterator[str]:
    """A server that answers like Prefect's, with `tmp_path` as its home."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Health) as server:
        server.home = tmp_path  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()
        thread.join()


def test_health_is_asked_for(healthy_url: str) -> None:
    assert prefect_connection.is_healthy(healthy_url)
    assert not prefect_connection.is_healthy(healthy_url.removesuffix("/api"))
    assert not prefect_connection.is_healthy("http://127.0.0.1:1/api")
    assert not prefect_connection.is_healthy("not an address")


def test_a_state_file_without_a_living_server_is_not_believed(tmp_path: Path, healthy_url: str) -> None:
    state = {"pid": os.getpid(), "url": healthy_url, "keep": True}
    (tmp_path / "server.json").write_text(json.dumps(state))
    assert prefect_server.running_server(tmp_path) is None  # nobody holds the lock
    place, _, lock = prefect_server._free_place(tmp_path, only_first=True)
    assert place == tmp_path
    found = prefect_server.running_server(tmp_path)
    assert found is not None
    assert (found.url, found.pid) == (healthy_url, os.getpid())
    (tmp_path / "server.json").write_text(json.dumps(state | {"keep": False}))
    assert prefect_server.running_server(tmp_path) is None  # it ends with its run
    beside, number, other = prefect_server._free_place(tmp_path, only_first=False)
    assert (beside, number) == (tmp_path / "parallel-1", 1)
    with pytest.raises(PrefectServerError, match="LEUKOFLOW_PREFECT_HOME"):
        prefect_server._free_place(tmp_path, only_first=True)
    os.close(lock)
    os.close(other)
    assert prefect_server.running_server(tmp_path) is None
    (tmp_path / "server.json").write_text("{")
    assert prefect_server.running_server(tmp_path) is None


def _instead_of_prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Has the process of the server run `code` where it would import Prefect's application."""
    package = tmp_path / "bin" / "prefect" / "server" / "api"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "server.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bin"))


@pytest.mark.parametrize(
    ("complaint", "remedy"),
    [
        ("TypeError: Body() got an unexpected keyword argument 'min_items'", "install fastapi<0.151"),
        ("OSError: [Errno 28] No space left on device", "make room on the disk"),
        ("fastapi/x.py: sqlite3.OperationalError: database or disk is full", "make room on the disk"),
        ("sqlite3.DatabaseError: database disk image is malformed", "prefect.db away"),
        ("something else", "leukoflow doctor"),
    ],
)
@pytest.mark.slow
def test_a_server_that_does_not_start_names_its_last_words_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: str, remedy: str
) -> None:
    _instead_of_prefect(tmp_path, monkeypatch, f"raise SystemExit({complaint!r})")
    with pytest.raises(PrefectServerError) as failed:
        start_server(keep=False, home=tmp_path / "home")
    assert complaint in str(failed.value)
    assert remedy in str(failed.value)
    assert "ended at once with status 1" in str(failed.value)


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _instead_of_prefect(tmp_path, monkeypatch, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    monkeypatch.setattr(prefect_server, "STARTUP_SECONDS", 1.0)
    with pytest.raises(PrefectServerError, match="did not answer within 1 s"):
        start_server(keep=False, home=tmp_path / "home")
    pid = int((tmp_path / "home/server.log").read_text() or 0)
    assert not pid or not prefect_server._alive(pid)
    assert not prefect_server._is_locked(tmp_path / "home")


ANSWERS = """
import json, os

def create_app(final):
    async def app(scope, receive, send):
        if scope["type"] == "http":
            body = json.dumps({"home": os.environ["PREFECT_HOME"]}).encode()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
    return app
"""


@pytest.mark.slow
def test_the_port_is_taken_before_the_server_starts_and_nobody_can_take_it_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server opens its port many seconds after it was started; another run took the same one by then."""
    _instead_of_prefect(tmp_path, monkeypatch, f"import time; time.sleep(1)\n{ANSWERS}")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        preferred = int(listening.getsockname()[1])
    monkeypatch.setattr(prefect_server, "_PREFERRED_PORT", preferred)
    spawn, taken = prefect_server._spawn, list[int]()

    def meanwhile(home: Path, lock: int, listening: socket.socket, keep: bool) -> Any:
        process = spawn(home, lock, listening, keep)
        listening.close()  # from now on only the server has it
        try:
            socket.create_server(("127.0.0.1", preferred)).close()
            taken.append(preferred)
        except OSError:
            pass
        return process

    monkeypatch.setattr(prefect_server, "_spawn", meanwhile)
    server = start_server(keep=False, home=tmp_path / "home")
    try:
        assert not taken
        assert server.url == f"http://127.0.0.1:{preferred}/api"
        second = start_server(keep=False, home=tmp_path / "home")
        try:
            assert second.home == tmp_path / "home" / "parallel-1"
            assert second.url != server.url
        finally:
            second.stop()
    finally:
        server.stop()
    assert not prefect_server._is_locked(tmp_path / "home")


@pytest.mark.slow
def test_a_port_that_a_stranger_has_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, healthy_url: str
) -> None:
    _instead_of_prefect(tmp_path, monkeypatch, ANSWERS)
    monkeypatch.setattr(prefect_server, "_PREFERRED_PORT", int(healthy_url.split(":")[2].split("/")[0]))
    server = start_server(keep=False, home=tmp_path / "home")
    server.stop()
    assert server.url != healthy_url


@pytest.mark.slow
def test_a_server_that_is_to_stay_is_started_once_by_two_commands_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _instead_of_prefect(tmp_path, monkeypatch, f"import time; time.sleep(1)\n{ANSWERS}")
    home, found = tmp_path / "home", list[LocalServer]()
    other = threading.Thread(target=lambda: found.append(start_server(keep=True, home=home)))
    other.start()
    try:
        found.append(start_server(keep=True, home=home))
        other.join()
        assert len({(server.pid, server.url) for server in found}) == 1
    finally:
        other.join()
        assert prefect_server.stop(home)
        for server in found:
            if server.process is not None:
                server.process.wait(10)


@pytest.mark.slow
def test_a_server_that_is_to_stay_is_known_before_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that starts it may be killed while it waits."""
    _instead_of_prefect(tmp_path, monkeypatch, "import time; time.sleep(60)")
    home, pids = tmp_path / "home", list[int]()

    def look(home: Path, url: str) -> bool:
        found = prefect_server._recorded(home)
        if found is None:
            raise LookupError("nobody knows it")
        assert (found.keep, found.url) == (True, url)
        pids.append(found.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(prefect_server, "_is_of", look)
    with pytest.raises(KeyboardInterrupt):
        start_server(keep=True, home=home)
    assert len(pids) == 1
    assert not prefect_server._alive(pids[0])
    assert not (home / "server.json").exists()


def test_only_the_note_of_the_server_that_was_ended_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefect_server._record(LocalServer("http://127.0.0.1:1/api", 11, tmp_path, keep=True))
    _, _, lock = prefect_server._free_place(tmp_path, only_first=True)

    def terminate(pid: int, process: object) -> None:
        assert pid == 11
        os.close(lock)
        prefect_server._record(LocalServer("http://127.0.0.1:2/api", 12, tmp_path, keep=True))  # by another command

    monkeypatch.setattr(prefect_server, "_terminate", terminate)
    assert prefect_server.stop(tmp_path)
    assert json.loads((tmp_path / "server.json").read_text())["pid"] == 12


def test_somebody_who_looks_whether_a_home_is_taken_does_not_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looker = os.open(tmp_path / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(looker, fcntl.LOCK_EX)
    monkeypatch.setattr(prefect_server.time, "sleep", lambda seconds: fcntl.flock(looker, fcntl.LOCK_UN))
    place, _, lock = prefect_server._free_place(tmp_path, only_first=True)
    assert place == tmp_path
    os.close(lock)
    os.close(looker)


def test_only_the_main_thread_may_start_a_server_that_ends_with_it(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            start_server(keep=False, home=tmp_path)
        except PrefectServerError as error:
            caught.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert len(caught) == 1


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrefectServerError, match="LEUKOFLOW_PREFECT_HOME"):
        start_server(keep=True, home=tmp_path / "file" / "prefect")


def test_importing_the_module_does_not_import_prefect() -> None:
    import subprocess

    code = "import sys, leukoflow.apps.prefect_server; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def guarded() -> Iterator[str]:
    """Address of a server that wants user and password for everything but its health."""

    class Guard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = f"Basic {base64.b64encode(b'night:secret').decode()}"
            ok = self.path == "/api/health" or (
                self.path == "/api/admin/version" and self.headers.get("Authorization") == wanted
            )
            self.send_response(200 if ok else 404 if not self.path.startswith("/api/") else 401)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/api"
        server.shutdown()


def test_user_and_password_are_sent_to_a_server_that_asks(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prefect_connection.is_healthy(guarded)
    with pytest.raises(prefect_connection.PrefectServerError, match="asks for user and password: set PREFECT_API_AUTH"):
        prefect_connection.require_server(guarded)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "night:wrong")
    with pytest.raises(prefect_connection.PrefectServerError, match="refuses user and password"):
        prefect_connection.require_server(guarded)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "night:secret")
    prefect_connection.require_server(guarded)
    with pytest.raises(prefect_connection.PrefectServerError, match="which ends with /api"):
        prefect_connection.require_server(guarded.removesuffix("/api"))


def test_user_and_password_may_be_in_the_profile(guarded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = f'[profiles.site]\nPREFECT_API_URL = "{guarded}"\nPREFECT_API_AUTH_STRING = "night:secret"\n'
    (tmp_path / "profiles.toml").write_text('active = "site"\n' + profile)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    prefect_connection.require_server(prefect_connection.configured_api_url())


def test_a_server_without_which_a_run_can_do_is_taken_away_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prefect_server.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    url = f"http://127.0.0.1:{prefect_server.free_port(0)}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(PrefectServerError, match=r"does not answer: start that server, or unset PREFECT_API_URL so"):
        prefect_connection.require_server(url)
    (tmp_path / "profiles.toml").write_text(f'active = "site"\n[profiles.site]\nPREFECT_API_URL = "{url}"\n')
    with pytest.raises(PrefectServerError, match=r"does not answer: .*`prefect config unset PREFECT_API_URL`"):
        prefect_connection.require_server(url)


def _certificate_error() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (urllib.error.URLError(_certificate_error()), r"refused \(self-signed cert.*set PREFECT_API_SSL_CERT_FILE"),
        (urllib.error.HTTPError("http://a", 502, "Bad Gateway", Message(), None), "answers with HTTP 502: see to that"),
        (FileNotFoundError(2, "No such file or directory"), "/etc/gone.pem, which PREFECT_API_SSL_CERT_FILE names"),
    ],
)
def test_a_server_that_cannot_be_talked_to_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def refuse(*_: Any) -> bytes:
        raise error

    monkeypatch.setattr(prefect_server.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(prefect_connection, "_open", refuse)
    monkeypatch.setenv("PREFECT_API_SSL_CERT_FILE", "/etc/gone.pem")
    with pytest.raises(PrefectServerError, match=words):
        prefect_connection.require_server("https://night/api")
