"""Which Prefect server is used, what its clients are told, and what is said when one does not start; no real server."""

from __future__ import annotations

import base64
import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from apps import prefect_server
from apps.prefect_server import LocalServer, PrefectServerError, client_environment, configured_api_url, start_server


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
    assert prefect_server.is_healthy(healthy_url)
    assert not prefect_server.is_healthy(healthy_url.removesuffix("/api"))
    assert not prefect_server.is_healthy("http://127.0.0.1:1/api")
    assert not prefect_server.is_healthy("not an address")


def test_a_state_file_without_a_living_server_is_not_believed(tmp_path: Path, healthy_url: str) -> None:
    state = {"pid": os.getpid(), "url": healthy_url, "keep": True}
    (tmp_path / "server.json").write_text(json.dumps(state))
    assert prefect_server.running_server(tmp_path) is None  # nobody holds the lock
    place, lock = prefect_server._free_place(tmp_path, only_first=True)
    assert place == tmp_path
    found = prefect_server.running_server(tmp_path)
    assert found is not None
    assert (found.url, found.pid) == (healthy_url, os.getpid())
    (tmp_path / "server.json").write_text(json.dumps(state | {"keep": False}))
    assert prefect_server.running_server(tmp_path) is None  # it ends with its run
    beside, other = prefect_server._free_place(tmp_path, only_first=False)
    assert beside == tmp_path / "parallel-1"
    with pytest.raises(PrefectServerError, match="LEUKOFLOW_PREFECT_HOME"):
        prefect_server._free_place(tmp_path, only_first=True)
    os.close(lock)
    os.close(other)
    assert prefect_server.running_server(tmp_path) is None
    (tmp_path / "server.json").write_text("{")
    assert prefect_server.running_server(tmp_path) is None


@pytest.mark.parametrize(
    ("complaint", "remedy"),
    [
        ("TypeError: Body() got an unexpected keyword argument 'min_items'", "install fastapi<0.151"),
        ("OSError: [Errno 28] No space left on device", "make room on the disk"),
        ("sqlite3.DatabaseError: database disk image is malformed", "prefect.db away"),
        ("something else", "leukoflow doctor"),
    ],
)
def test_a_server_that_does_not_start_names_its_last_words_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: str, remedy: str
) -> None:
    fake = tmp_path / "bin" / "prefect" / "__main__.py"
    fake.parent.mkdir(parents=True)
    (fake.parent / "__init__.py").touch()
    fake.write_text(f"raise SystemExit({complaint!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bin"))
    with pytest.raises(PrefectServerError) as failed:
        start_server(keep=False, home=tmp_path / "home")
    assert complaint in str(failed.value)
    assert remedy in str(failed.value)
    assert "ended at once with status 1" in str(failed.value)


def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "bin" / "prefect"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bin"))
    monkeypatch.setattr(prefect_server, "STARTUP_SECONDS", 1.0)
    with pytest.raises(PrefectServerError, match="did not answer within 1 s"):
        start_server(keep=False, home=tmp_path / "home")
    pid = int((tmp_path / "home/server.log").read_text() or 0)
    assert not pid or not prefect_server._alive(pid)
    assert not prefect_server._is_locked(tmp_path / "home")


def test_a_stranger_that_took_the_port_is_not_taken_for_the_own_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, healthy_url: str
) -> None:
    """Two runs that start at once choose the same port; the slower one must not use the quicker one's server."""
    package = tmp_path / "bin" / "prefect"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import time; time.sleep(1); raise SystemExit('Port 1 is already in use.')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bin"))
    taken = int(healthy_url.split(":")[2].split("/")[0])
    asked: list[int] = []
    monkeypatch.setattr(prefect_server, "free_port", lambda preferred: asked.append(preferred) or taken)
    with pytest.raises(PrefectServerError, match="already in use"):
        start_server(keep=False, home=tmp_path / "another-home")
    assert asked == [4200, 0, 0]  # it tries other ports before it gives up


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

    code = "import sys, apps.prefect_server; sys.exit('prefect' in sys.modules)"
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
    assert prefect_server.is_healthy(guarded)
    with pytest.raises(prefect_server.PrefectServerError, match="asks for user and password: set PREFECT_API_AUTH"):
        prefect_server.require_server(guarded)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "night:wrong")
    with pytest.raises(prefect_server.PrefectServerError, match="refuses user and password"):
        prefect_server.require_server(guarded)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "night:secret")
    prefect_server.require_server(guarded)
    with pytest.raises(prefect_server.PrefectServerError, match="which ends with /api"):
        prefect_server.require_server(guarded.removesuffix("/api"))


def test_user_and_password_may_be_in_the_profile(guarded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = f'[profiles.site]\nPREFECT_API_URL = "{guarded}"\nPREFECT_API_AUTH_STRING = "night:secret"\n'
    (tmp_path / "profiles.toml").write_text('active = "site"\n' + profile)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    prefect_server.require_server(prefect_server.configured_api_url())
