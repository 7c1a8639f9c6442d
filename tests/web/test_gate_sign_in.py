"""Who comes in: sign-in, sessions, cookies, and the first start."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from gate_world import PASSWORD, World, sign_in, token_in, world

from leukoflow.apps.web.api import router as api
from leukoflow.apps.web.api import runs as api_runs
from leukoflow.apps.web.gate.request import safe_next
from leukoflow.apps.web.pages import router as pages
from leukoflow.apps.web.settings import ProxySettings, Rates, networks

DIAGNOSES = "/api/v1/diagnoses"


# --- who comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/bench", "/admin", "/agreement", "/about", "/runs/0123456789abcdef"])
def test_pages_lead_strangers_to_the_sign_in(place: World, path: str) -> None:
    answer = place.browser().get(path)
    assert answer.status_code == 303
    assert answer.headers["location"] in ("/login", f"/login?next={path}")
    fragment = place.browser().get(path, headers={"HX-Request": "true"})
    assert fragment.status_code == 401
    assert fragment.headers["hx-redirect"].startswith("/login")


def test_every_address_but_a_few_needs_somebody(place: World) -> None:
    public = {"/login", "/logout", "/setup", "/static", "/api/v1/health", "/api/v1/openapi.json", "/api/v1/docs"}
    stranger = place.browser()
    tried = 0
    for route in [*pages.router.routes, *api.router.routes, *api_runs.router.routes]:
        path = getattr(route, "path", "")
        if path in public or not path:
            continue
        address = re.sub(r"\{ordinal\}|\{number\}", "1", path)
        address = re.sub(r"\{job\}", "A" * 22, address)
        address = re.sub(r"\{token\}", "0" * 12, address)
        address = re.sub(r"\{[a-z_:]+\}", "0123456789abcdef", address)
        for method in getattr(route, "methods", None) or ():
            answer = stranger.request(method, address)
            assert answer.status_code in (303, 401, 403, 405), (method, path, answer.status_code)
            assert answer.status_code != 303 or "/login" in answer.headers["location"], path
            tried += 1
    assert tried > 40


def test_sign_in_and_out(place: World) -> None:
    browser = place.browser()
    assert sign_in(browser, "vera", "not her password").status_code == 401
    assert sign_in(browser, "nobody").status_code == 401
    assert sign_in(browser, "vera").status_code == 303
    assert browser.get("/").status_code == 200
    assert browser.post("/logout", data={"csrf": token_in(browser.get("/").text)}).status_code == 303
    assert browser.get("/").status_code == 303


def test_the_cookie_cannot_be_read_by_scripts_nor_sent_by_others(tmp_path: Path) -> None:
    place = world(tmp_path, proxy=ProxySettings(networks(("10.0.0.1",))), names=("smears.lab",))
    plain = sign_in(place.browser(), "vera").headers["set-cookie"]
    assert re.fullmatch(r"leukoflow=[\w-]{43}; Path=/; HttpOnly; SameSite=Strict", plain)
    forwarded = {"x-forwarded-proto": "https", "x-forwarded-for": "10.9.9.9"}
    behind = place.browser(address="10.0.0.1", url="https://smears.lab", **forwarded)
    secure = sign_in(behind, "vera")
    assert re.fullmatch(
        r"__Host-leukoflow=[\w-]{43}; Path=/; HttpOnly; SameSite=Strict; Secure", secure.headers["set-cookie"]
    )
    assert secure.headers["strict-transport-security"]
    # An untrusted address cannot claim that it used TLS.
    claimed = place.browser(address="10.0.0.2", url="http://smears.lab", **forwarded)
    assert "Secure" not in sign_in(claimed, "vera").headers["set-cookie"]


def test_session_fixation(place: World) -> None:
    """Whatever id a browser comes with, after the sign-in it has another one, and the first is worth nothing."""
    attacker = place.browser()
    attacker.get("/login")
    planted = "p" * 43
    victim = place.browser()
    victim.cookies.set("leukoflow", planted, domain="localhost.local", path="/")
    assert sign_in(victim, "vera").status_code == 303
    first = [c.value for c in victim.cookies.jar if c.name == "leukoflow"]
    assert len(set(first) - {planted}) == 1
    thief = place.browser(cookie=f"leukoflow={planted}")
    assert thief.get("/").status_code == 303
    # Signing in again changes the id once more, and ends the session before.
    before = place.browser("vera")
    old = before.cookies["leukoflow"]
    form = {"csrf": token_in(before.get("/").text), "name": "vera", "password": PASSWORD}
    assert before.post("/login", data=form).status_code == 303
    assert before.cookies["leukoflow"] != old
    assert place.browser(cookie=f"leukoflow={old}").get("/").status_code == 303


def test_sessions_end_when_a_person_is_shut_out_or_changes_the_password(place: World) -> None:
    vera, rita = place.browser("vera"), place.browser("rita")
    place.gate.accounts.set_disabled("vera", True)
    assert vera.get("/").status_code == 303
    assert sign_in(place.browser(), "vera").status_code == 401
    place.gate.accounts.set_password("rita", "another smear and lamp")
    assert rita.get("/").status_code == 303


def test_brute_force_is_slowed_down_and_the_person_is_not_locked_out(tmp_path: Path) -> None:
    rates = Rates(logins_by_address=(6, 100.0), logins_by_name=(8, 100.0))
    place = world(tmp_path, rates=rates)
    place.browser("vera", address="10.0.0.7")  # she has signed in from there before
    statuses = [sign_in(place.browser(address="10.0.0.66"), "vera", f"guess number {i}").status_code for i in range(7)]
    assert statuses == [401] * 6 + [429]
    last = sign_in(place.browser(address="10.0.0.66"), "vera")
    assert last.status_code == 429
    assert 1 <= int(last.headers["retry-after"]) <= 800
    spread = [sign_in(place.browser(address=f"10.0.1.{i}"), "vera", f"guess number {i}").status_code for i in range(4)]
    assert 429 in spread  # by name, from wherever
    assert sign_in(place.browser(address="10.0.0.7"), "vera").status_code == 303
    assert '"sign-in held back"' in place.log()


def test_names_that_do_not_exist_take_as_long(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    hasher = place.gate.accounts._hasher

    class Counting:
        def hash(self, password: str) -> str:
            return str(hasher.hash(password))

        def verify(self, encoded: str, password: str) -> bool:
            checked.append(encoded[:9])
            return bool(hasher.verify(encoded, password))

    monkeypatch.setattr(place.gate.accounts, "_hasher", Counting())
    for name in ("vera", "nobody", "../../etc/passwd"):
        assert sign_in(place.browser(), name, "not the password").status_code == 401
    assert checked == ["$argon2id"] * 3


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example", "//evil.example", "/\\evil.example", "\\\\evil.example", "/%0d%0aSet-Cookie:x=1\r\n",
        "javascript:alert(1)", "/a//b", " /x", "/x y", "http:/evil.example", "/\t/evil.example", "data:text/html,x", "",
    ],
)  # fmt: skip
def test_open_redirect(place: World, target: str) -> None:
    answer = sign_in(place.browser(), "vera", target=target)
    assert answer.status_code == 303
    assert re.fullmatch(r"/[^/\\]?.*", answer.headers["location"])
    assert "evil" not in answer.headers["location"]
    assert "\r" not in answer.headers["location"]
    assert safe_next("/runs/0123456789abcdef") == "/runs/0123456789abcdef"


# --- the first start -------------------------------------------------------------------------------------------------


def setup(place: World, key: str, address: str = "127.0.0.1", **headers: str) -> int:
    browser = place.browser(address=address, **headers)
    csrf = token_in(browser.get("/login").text)
    form = {"csrf": csrf, "key": key, "name": "first", "password": PASSWORD, "again": PASSWORD}
    return int(browser.post("/setup", data=form).status_code)


def test_the_first_administrator(tmp_path: Path) -> None:
    place = world(tmp_path, people=False, proxy=ProxySettings(networks(("127.0.0.1",))))
    link = place.gate.setup_link()
    assert link is not None
    assert link.startswith("http://127.0.0.1:8400/setup?key=")
    key = link.partition("key=")[2]
    assert setup(place, key, address="10.0.0.9") == 403  # from elsewhere
    assert setup(place, key, **{"x-forwarded-for": "10.0.0.9"}) == 403  # or through the proxy
    assert setup(place, "x" * len(key)) == 403
    assert place.gate.accounts.empty()
    assert setup(place, key) == 303
    user = place.gate.accounts.user("first")
    assert user is not None
    assert user.role == "admin"
    assert place.gate.setup_link() is None
    assert setup(place, key) in (403, 409)  # once
    assert len(place.gate.accounts.book().users) == 1
    assert key not in place.log()


def test_the_link_of_the_first_start_grows_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = world(tmp_path, people=False)
    key = str(place.gate.setup_link()).partition("key=")[2]
    monkeypatch.setattr(place.gate, "_setup_until", time.monotonic() - 1)
    assert setup(place, key) == 403
