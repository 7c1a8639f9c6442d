"""Users, tokens and sessions: what is written down, and who is let in."""

from __future__ import annotations

import json
import stat
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from gate_world import HASHER, PASSWORD

from leukoflow.apps.web.gate.accounts import AccountError, Accounts
from leukoflow.apps.web.gate.sessions import Sessions
from leukoflow.apps.web.settings import checked_host_name, checked_root_path, checked_users_file, networks
from leukoflow.core.errors import ConfigError


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(tmp_path / "state" / "users.json", HASHER)


def test_the_file_is_private_and_holds_neither_passwords_nor_tokens(accounts: Accounts) -> None:
    accounts.add("anna", "admin", PASSWORD)
    _, text = accounts.add_token("anna", "scanner", ("read",), 30)
    assert stat.S_IMODE(accounts.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(accounts.path.parent.stat().st_mode) == 0o700
    written = accounts.path.read_text()
    assert PASSWORD not in written
    assert text not in written
    assert text.split("_", 2)[2] not in written  # the secret may itself hold underscores
    assert json.loads(written)["users"][0]["password"].startswith("$argon2id$")
    assert [p.name for p in accounts.path.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_a_file_that_others_can_read_is_refused(accounts: Accounts) -> None:
    accounts.add("anna", "admin", PASSWORD)
    accounts.path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Accounts(accounts.path, HASHER).book()


def test_a_damaged_file_lets_nobody_in(accounts: Accounts) -> None:
    accounts.add("anna", "admin", PASSWORD)
    accounts.path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        accounts.user("anna")


def test_passwords(accounts: Accounts) -> None:
    user = accounts.add("Anna", "admin", PASSWORD)
    assert accounts.check_password("anna", PASSWORD) == user
    assert accounts.check_password("Anna", PASSWORD + " ") is None
    assert accounts.check_password("nobody", PASSWORD) is None
    assert accounts.check_password("", "") is None
    accounts.set_password("anna", "another lamp and smear")
    assert accounts.check_password("anna", PASSWORD) is None
    accounts.add("bert", "admin", PASSWORD)
    accounts.set_disabled("anna", True)
    assert accounts.check_password("anna", "another lamp and smear") is None


@pytest.mark.parametrize(
    "password", ["short", "aaaaaaaaaaaaaaaaaa", "hello anna hello", "leukoflow leukoflow", "x" * 257]
)
def test_weak_passwords_are_refused(accounts: Accounts, password: str) -> None:
    with pytest.raises(AccountError):
        accounts.add("anna", "admin", password)
    assert accounts.empty()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "x" * 65, "anna\n", "<b>", "-", ".hidden"])
def test_names_that_are_none(accounts: Accounts, name: str) -> None:
    with pytest.raises(AccountError, match="a name has"):
        accounts.add(name, "viewer", PASSWORD)


def test_the_last_administrator_stays(accounts: Accounts) -> None:
    accounts.add("anna", "admin", PASSWORD)
    accounts.add("vera", "viewer", PASSWORD)
    with pytest.raises(AccountError, match="last administrator"):
        accounts.set_disabled("anna", True)
    with pytest.raises(AccountError, match="last administrator"):
        accounts.set_role("anna", "viewer")
    accounts.set_role("vera", "admin")
    accounts.set_role("anna", "viewer")


def test_only_one_can_be_the_first(accounts: Accounts) -> None:
    errors: list[AccountError] = []

    def try_it(name: str) -> None:
        try:
            accounts.add_first(name, PASSWORD)
        except AccountError as error:
            errors.append(error)

    threads = [threading.Thread(target=try_it, args=(f"user{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accounts.book().users) == 1
    assert len(errors) == 5


def test_changes_of_several_processes_are_all_kept(accounts: Accounts) -> None:
    accounts.add("anna", "admin", PASSWORD)
    others = [Accounts(accounts.path, HASHER) for _ in range(8)]
    threads = [
        threading.Thread(target=other.add, args=(f"user{i}", "viewer", PASSWORD)) for i, other in enumerate(others)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {u.name for u in accounts.book().users} == {"anna", *(f"user{i}" for i in range(8))}


def test_tokens_can_do_no_more_than_their_owner(accounts: Accounts) -> None:
    accounts.add("anna", "admin", PASSWORD)
    accounts.add("rita", "reviewer", PASSWORD)
    with pytest.raises(AccountError, match="does not include"):
        accounts.add_token("rita", "", ("admin",), 1)
    _, text = accounts.add_token("rita", "", ("read", "review"), 1)
    found = accounts.check_token(text)
    assert found is not None
    assert found[1] == {"read", "review"}
    accounts.set_role("rita", "viewer")
    found = accounts.check_token(text)
    assert found is not None
    assert found[1] == {"read"}
    accounts.set_disabled("rita", True)
    assert accounts.check_token(text) is None


def test_tokens_end(accounts: Accounts) -> None:
    accounts.add("anna", "admin", PASSWORD)
    token, text = accounts.add_token("anna", "", ("read",), 1)
    assert accounts.check_token(text) is not None
    assert accounts.check_token(text[:-1] + ("A" if text[-1] != "A" else "B")) is None
    assert replace(token, expires=(datetime.now(UTC) - timedelta(seconds=1)).isoformat()).expired(datetime.now(UTC))
    for wrong in ("", "lkf_", f"lkf_{'0' * 12}_{'A' * 43}", text + "x"):
        assert accounts.check_token(wrong) is None
    accounts.revoke_token(token.id)
    assert accounts.check_token(text) is None
    with pytest.raises(AccountError, match="no token"):
        accounts.revoke_token(token.id)


@pytest.mark.parametrize(("scopes", "days"), [((), 1.0), (("all",), 1.0), (("read",), 0.0), (("read",), 4000.0)])
def test_tokens_that_make_no_sense(accounts: Accounts, scopes: tuple[str, ...], days: float) -> None:
    accounts.add("anna", "admin", PASSWORD)
    with pytest.raises(AccountError):
        accounts.add_token("anna", "", scopes, days)


def test_sessions_end_by_themselves_and_everywhere(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    user = accounts.add("anna", "admin", PASSWORD)
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    sessions = Sessions(accounts, idle_seconds=60, seconds=200)
    first, second = sessions.start(user), sessions.start(user)
    assert first != second
    assert sessions.find(first) == user
    clock += 59
    assert sessions.find(first) == user  # and so is used
    clock += 59
    assert sessions.find(first) == user
    assert sessions.find(second) is None  # idle
    clock += 59
    assert sessions.find(first) == user
    clock += 59
    assert sessions.find(first) is None  # 200 s are over, however busy it was
    third = sessions.start(user)
    accounts.end_sessions("anna")
    assert sessions.find(third) is None
    user = accounts.user("anna")
    assert user is not None
    fourth = sessions.start(user)
    sessions.end(fourth)
    assert sessions.find(fourth) is None
    assert not any(first in key for key in sessions._open)


def test_a_role_changes_within_a_session(accounts: Accounts) -> None:
    accounts.add("anna", "admin", PASSWORD)
    sessions = Sessions(accounts, 60, 60)
    session = sessions.start(accounts.add("rita", "reviewer", PASSWORD))
    accounts.set_role("rita", "viewer")
    found = sessions.find(session)
    assert found is not None
    assert found.role == "viewer"


def test_the_users_file_lies_outside_of_the_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="among the results"):
        checked_users_file(tmp_path / "out" / "users.json", str(tmp_path / "out"))
    assert checked_users_file(tmp_path / "users.json", str(tmp_path / "out")) == tmp_path / "users.json"


def test_settings_that_are_wrong_are_named() -> None:
    with pytest.raises(ConfigError, match="not-an-address"):
        networks(("10.0.0.0/8", "not-an-address"))
    for path in ("leukoflow", "/a//b", "/a/../b", "/a b", "/<x>"):
        with pytest.raises(ConfigError):
            checked_root_path(path)
    assert checked_root_path("/lab/leukoflow/") == "/lab/leukoflow"
    for name in ("http://x", "x:80", "x/y", "", "-x"):
        with pytest.raises(ConfigError):
            checked_host_name(name)
