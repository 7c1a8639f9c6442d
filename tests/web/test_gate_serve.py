"""`leukoflow serve` as a process, and `leukoflow users`."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

import pytest
from gate_world import token_in
from harness import ROOT, until
from typer.testing import CliRunner, Result

from leukoflow.apps.cli.main import app
from leukoflow.apps.web.gate.accounts import Accounts

LONG = "a smear under the lamp"


def call(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=text, env={"COLUMNS": "200"})


def test_users_on_the_command_line(tmp_path: Path) -> None:
    users = str(tmp_path / "users.json")
    assert "no users yet" in call("users", "list", "--users", users).output
    added = call("users", "add", "anna", "--role", "admin", "--users", users, "--password-stdin", text=LONG + "\n")
    assert added.exit_code == 0, added.output
    asked = call("users", "add", "rita", "--role", "reviewer", "--users", users, text=f"{LONG}\n{LONG}\n")
    assert asked.exit_code == 0, asked.output
    assert LONG not in asked.output
    for wrong in (
        ("add", "anna"), ("add", "../x"), ("add", "bert", "--role", "king"), ("disable", "anna"), ("disable", "nobody"),
        ("role", "anna", "viewer"), ("token", "rita", "--scope", "admin"), ("revoke", "0" * 12),
    ):  # fmt: skip
        refused = call(
            "users", *wrong, "--users", users, *(["--password-stdin"] if wrong[0] == "add" else []), text=LONG
        )
        assert refused.exit_code == 1, wrong
    assert call("users", "role", "rita", "viewer", "--users", users).exit_code == 0
    made = call("users", "token", "rita", "--scope", "read", "--days", "2", "--label", "test", "--users", users)
    token = made.output.split()[0]
    found = Accounts(Path(users)).check_token(token)
    assert found is not None
    assert (found[0].name, found[1]) == ("rita", {"read"})
    listed = call("users", "list", "--users", users).output
    assert "rita" in listed
    assert token not in listed
    assert call("users", "disable", "rita", "--users", users).exit_code == 0
    assert Accounts(Path(users)).check_token(token) is None
    assert call("users", "enable", "rita", "--users", users).exit_code == 0
    assert call("users", "revoke", token.split("_")[1], "--users", users).exit_code == 0
    assert Accounts(Path(users)).check_token(token) is None
    changed = call("users", "password", "rita", "--users", users, "--password-stdin", text="another lamp and smear\n")
    assert changed.exit_code == 0
    assert Accounts(Path(users)).check_password("rita", "another lamp and smear") is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "in the clear"),
        (("--tls-cert", "c.pem"), "belong together"),
        (("--tls-cert", "c.pem", "--tls-key", "k.pem"), "does not exist"),
        (("--proxy-sign-in",), "anybody could claim"),
        (("--proxy-from", "proxy.example"), "address or a network"),
        (("--proxy-from", "10.0.0.1", "--proxy-sign-in", "--proxy-role", "x=king"), "GROUP=ROLE"),
        (("--root-path", "x"), "must look like"),
        (("--name", "http://x"), "host name"),
        (("--host", "192.0.2.1", "--plain-http"), "cannot listen"),
    ],
)
def test_settings_that_would_be_unsafe_or_wrong_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "out").mkdir()
    users = ("--users", str(tmp_path / "users.json"), "--port", "0")
    refused = call("serve", str(tmp_path / "out"), *users, *arguments)
    assert refused.exit_code == 1
    assert words in refused.output


def test_the_users_file_must_not_lie_among_the_results(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused = call("serve", str(tmp_path / "out"), "--users", str(tmp_path / "out" / "users.json"), "--port", "0")
    assert refused.exit_code == 1
    assert "among the results" in refused.output


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = call("serve", str(tmp_path / "out"), "--users", str(tmp_path / "u.json"), "--port", port)
    assert refused.exit_code == 1
    assert f"port {port}" in refused.output


def test_first_start_as_a_process(tmp_path: Path) -> None:
    """The link on the console makes the administrator; the server ends when asked to, and its log names nobody."""
    (tmp_path / "out").mkdir()
    command = [
        sys.executable, "-m", "leukoflow", "serve", str(tmp_path / "out"), "--port", "0",
        "--no-diagnose", "--users", str(tmp_path / "state" / "users.json"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300", "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "printed").open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
    try:
        printed = tmp_path / "printed"
        link = until(lambda: re.search(r"http://127\.0\.0\.1:(\d+)/setup\?key=(\S+)", printed.read_text()), 120, "link")
        port, key = int(link[1]), link[2]

        def ask(method: str, path: str, form: dict[str, str] | None = None, cookie: str = "") -> tuple[int, str, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {"Cookie": cookie} | ({"Content-Type": "application/x-www-form-urlencoded"} if form else {})
            connection.request(method, path, urlencode(form) if form else None, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            cookies = "; ".join(v.partition(";")[0] for k, v in answer.getheaders() if k.lower() == "set-cookie")
            assert answer.getheader("server") is None
            connection.close()
            return answer.status, text, cookies

        assert ask("GET", "/api/v1/health")[0] == 200
        status, page, cookie = ask("GET", f"/setup?key={key}")
        assert status == 200
        form = {"csrf": token_in(page), "key": key, "name": "anna", "password": LONG, "again": LONG}
        status, _, session = ask("POST", "/setup", form, cookie)
        assert status == 303
        assert ask("GET", "/admin", cookie=session)[0] == 200
        assert ask("GET", "/", cookie=session)[0] == 200
        assert ask("GET", f"/setup?key={key}")[0] in (303, 403, 409)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        text = printed.read_text()
        log = text[text.index(key) + len(key) :]
        assert "GET /admin 200" in log
        assert key not in log
        assert "anna" not in log
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    verified = call("verify", str(tmp_path / "out"))
    assert "audit log of the web application follows" in verified.output


def test_starting_takes_no_torch(tmp_path: Path) -> None:
    """The server's own process holds no model: it starts at once, and stays small."""
    code = "import sys, leukoflow.apps.web.app; print(any(m == 'torch' or m.startswith('torch.') for m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True, timeout=200,
    )  # fmt: skip
    assert done.stdout.strip() == "False"
