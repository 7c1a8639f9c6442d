"""What no request may do: each attack that OWASP would try has a test here."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gate_world import PASSWORD, FakeEngine, World, archive, picture, sign_in, token_in, world
from harness import ROOT

from leukoflow.apps.web import api_runs
from leukoflow.apps.web.api import router as api
from leukoflow.apps.web.gate.request import safe_next
from leukoflow.apps.web.pages import router as pages
from leukoflow.apps.web.settings import ProxySettings, Rates, UploadLimits, networks
from leukoflow.runs.records import Status
from leukoflow.tasks.upkeep.audit import check_log

DIAGNOSES = "/api/v1/diagnoses"
FIELD = b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nx'


@pytest.fixture
def place(tmp_path: Path) -> World:
    return world(tmp_path)


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


# --- what they may do ------------------------------------------------------------------------------------------------


def test_role_escalation(place: World) -> None:
    for name in ("vera", "rita"):
        browser = place.browser(name)
        assert browser.get("/admin").status_code == 403
        csrf = token_in(browser.get("/").text)
        form = {"csrf": csrf, "name": name, "role": "admin", "user": name}
        for what in ("role", "add", "password", "disable", "token"):
            assert browser.post(f"/admin/{what}", data=form).status_code == 403, what
        assert browser.get("/api/v1/tokens").status_code == 403
    vera = place.browser("vera")
    headers = {"x-csrf-token": token_in(vera.get("/").text)}
    verdict = {"action": "flag"}
    for path in ("/api/v1/runs/0123456789abcdef/fields/0/verdicts", "/api/v1/runs/0123456789abcdef/slides/" + "0" * 16):
        path = path if path.endswith("verdicts") else path + "/verdicts"
        assert vera.post(path, json=verdict, headers=headers).status_code == 403
    assert vera.get("/api/v1/runs/0123456789abcdef/exports").status_code == 403
    assert [u.role for u in place.gate.accounts.book().users] == ["viewer", "reviewer", "admin"]


def test_token_scopes(place: World) -> None:
    key = "0123456789abcdef"
    calls = {
        "read": ("GET", "/api/v1/runs", None),
        "diagnose": ("GET", f"{DIAGNOSES}/{'A' * 22}", None),
        "review": ("POST", f"/api/v1/runs/{key}/fields/0/verdicts", {"action": "flag"}),
        "export": ("GET", f"/api/v1/runs/{key}/exports", None),
        "admin": ("GET", "/api/v1/tokens", None),
    }
    for scope in calls:
        program = place.program("anna", scope)
        assert program.get("/api/v1/me").json() == {"name": "anna", "role": "admin", "scopes": [scope], "via": "token"}
        for needed, (method, path, body) in calls.items():
            status = program.request(method, path, json=body).status_code
            assert (status == 403) == (needed != scope), (scope, needed, status)
            assert status not in (401, 500)


def test_tokens_that_are_worth_nothing(place: World) -> None:
    token, text = place.gate.accounts.add_token("anna", "", ("read",), 1)
    for wrong in (text + "x", text[:-1], "lkf_" + "0" * 12 + "_" + "A" * 43, "", "x" * 5000):
        answer = place.browser(authorization=f"Bearer {wrong}").get("/api/v1/runs")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
    good = place.browser(authorization=f"Bearer {text}")
    assert good.get("/api/v1/runs").status_code == 200
    # A bad token is not made up for by a cookie.
    assert place.browser("vera").get("/api/v1/runs", headers={"authorization": "Bearer x"}).status_code == 401
    anna = place.program("anna", "admin")
    assert anna.delete(f"/api/v1/tokens/{token.id}").status_code == 204
    assert anna.delete(f"/api/v1/tokens/{token.id}").status_code == 404
    assert good.get("/api/v1/runs").status_code == 401


def test_results_of_single_images_belong_to_one_person(place: World) -> None:
    vera, rita = place.program("vera", "diagnose"), place.program("rita", "diagnose")
    with place:  # the application's life
        job = vera.post(DIAGNOSES, files={"file": ("a.png", picture())}).json()
        assert vera.get(f"{DIAGNOSES}/{job['id']}").status_code == 200
        assert rita.get(f"{DIAGNOSES}/{job['id']}").status_code == 404
        assert rita.delete(f"{DIAGNOSES}/{job['id']}").status_code == 404
        assert rita.get(f"{DIAGNOSES}/{job['id']}/events").status_code == 404
        assert vera.delete(f"{DIAGNOSES}/{job['id']}").status_code == 204
        assert vera.get(f"{DIAGNOSES}/{job['id']}").status_code == 404


# --- requests that others have made up -------------------------------------------------------------------------------


def test_csrf_missing_wrong_or_of_another_session(place: World) -> None:
    vera, rita = place.browser("vera"), place.browser("rita")
    own, others = token_in(vera.get("/").text), token_in(rita.get("/").text)
    assert own != others
    files = {"file": ("a.png", picture())}
    for headers in ({}, {"x-csrf-token": ""}, {"x-csrf-token": "0" * 64}, {"x-csrf-token": others}):
        assert vera.post(DIAGNOSES, files=files, headers=headers).status_code == 403
        assert vera.post("/logout", headers=headers).status_code == 403
        assert vera.post("/bench", files=files, headers=headers).status_code == 403
        assert vera.delete(f"{DIAGNOSES}/{'A' * 22}", headers=headers).status_code == 403
    for form in ({}, {"csrf": ""}, {"csrf": others}, {"csrf": "\u00e4" * 64}):
        assert vera.post("/logout", data=form).status_code == 403
        assert vera.post("/bench", data=form, files=files).status_code == 403
    assert place.engine.seen == []
    with place:
        assert vera.post(DIAGNOSES, files=files, headers={"x-csrf-token": own}).status_code == 200
        assert vera.post("/bench", data={"csrf": own}, files=files).status_code == 303
    assert vera.post("/logout", data={"csrf": own}, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert vera.get("/").status_code == 200


def test_csrf_of_the_sign_in_itself(place: World) -> None:
    """Nobody can be signed in under another name without noticing."""
    browser = place.browser()
    form = {"name": "vera", "password": PASSWORD}
    assert browser.post("/login", data=form).status_code == 403
    foreign = token_in(place.browser().get("/login").text)
    assert browser.post("/login", data=form | {"csrf": foreign}).status_code == 403


def test_tokens_need_no_csrf_and_cookies_do_not_help_them(place: World) -> None:
    program = place.program("vera", "diagnose")
    with place:
        assert program.post(DIAGNOSES, files={"file": ("a.png", picture())}).status_code == 200


def test_host_header(tmp_path: Path) -> None:
    place = world(tmp_path, names=("smears.lab",))
    for host in ("localhost", "localhost:8400", "127.0.0.1:8400", "[::1]:8400", "smears.lab", "SMEARS.lab:443"):
        assert place.browser().get("/login", headers={"host": host}).status_code == 200, host
    for host in (
        "evil.example",
        "localhost.evil.example",
        "",
        "smears.lab.evil",
        "127.0.0.1.evil",
        "[::2]",
        "a@localhost",
    ):
        answer = place.browser().get("/login", headers={"host": host})
        assert answer.status_code == 400, host
        assert "evil" not in answer.text
    assert place.browser().get("/api/v1/health", headers={"host": "evil.example"}).status_code == 400


def test_header_spoofing_of_the_oidc_proxy(tmp_path: Path) -> None:
    roles = (("lab-readers", "viewer"), ("lab-admins", "admin"))
    proxy = ProxySettings(networks(("10.0.0.1",)), True, roles=roles)
    place = world(tmp_path, proxy=proxy)
    headers = {
        "x-forwarded-user": "olga@house",
        "x-forwarded-groups": "staff, lab-admins",
        "x-forwarded-for": "10.5.5.5",
    }
    inside = place.browser(address="10.0.0.1", **headers)
    assert inside.get("/api/v1/me").json() | {"scopes": []} == {
        "name": "olga@house", "role": "admin", "via": "proxy", "scopes": [],
    }  # fmt: skip
    for address in ("10.0.0.2", "127.0.0.1", "10.5.5.5"):
        assert place.browser(address=address, **headers).get("/api/v1/me").status_code == 401
    # A second header of that name, which a client may have sent: the last one is the proxy's.
    doubled = place.browser(address="10.0.0.1")
    pairs = [("x-forwarded-user", "root"), ("x-forwarded-user", "rolf"), ("x-forwarded-groups", "lab-readers")]
    assert doubled.get("/api/v1/me", headers=pairs).json()["name"] == "rolf"
    # Known, but in no group that may come in.
    nobody = place.browser(address="10.0.0.1", **(headers | {"x-forwarded-groups": "staff"}))
    assert nobody.get("/").status_code == 403
    assert nobody.get("/api/v1/runs").status_code == 403
    assert place.browser(address="10.0.0.1").get("/").status_code == 303
    # Passwords do not work beside it, and requests need their token all the same.
    assert inside.post("/logout").status_code == 403
    csrf = token_in(inside.get("/").text)
    form = {"csrf": csrf, "name": "anna", "password": PASSWORD}
    assert inside.post("/login", data=form).status_code == 403


def test_without_that_switch_identity_headers_say_nothing(tmp_path: Path) -> None:
    place = world(tmp_path, proxy=ProxySettings(networks(("10.0.0.1",)), roles=(("g", "admin"),)))
    headers = {"x-forwarded-user": "anna", "x-forwarded-groups": "g", "x-forwarded-for": "1.2.3.4"}
    assert place.browser(address="10.0.0.1", **headers).get("/api/v1/me").status_code == 401


def test_a_client_cannot_choose_its_address(tmp_path: Path) -> None:
    """What a client sends as X-Forwarded-For counts neither from elsewhere nor in front of the proxy's own entry."""
    rates = Rates(logins_by_address=(2, 100.0), logins_by_name=(100, 0.001))
    place = world(tmp_path, rates=rates, proxy=ProxySettings(networks(("10.0.0.1",))))
    for address, header in (("10.0.0.9", "1.1.1.{}"), ("10.0.0.1", "1.1.1.{}, 10.7.7.7")):
        statuses = [
            sign_in(
                place.browser(address=address, **{"x-forwarded-for": header.format(i)}), "vera", "a guess"
            ).status_code
            for i in range(4)
        ]
        assert statuses == [401, 401, 429, 429]


# --- what is sent ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sender(place: World) -> Iterator[tuple[World, object]]:
    with place:
        yield place, place.program("vera", "diagnose")


@pytest.mark.parametrize(
    "key", ["..;", "%2e%2e", "..%2f..%2fetc", "%00", "a" * 16, "0123456789ABCDEF", "....//", "~root"]
)
def test_path_traversal_in_keys(place: World, key: str) -> None:
    """A key is looked up among those that there are; it never becomes a path."""
    secret = Path(place.settings.out).parent / "secret"
    secret.mkdir()
    (secret / "run.json").write_text("{}")
    browser = place.browser("rita")
    for path in (
        f"/runs/{key}", f"/runs/{key}/fields/0", f"/patients/{key}", f"/bench/{key}", f"/static/{key}/../../app.py",
        f"/api/v1/runs/{key}", f"/api/v1/runs/{key}/exports", f"/api/v1/patients/{key}/timeline",
        f"{DIAGNOSES}/{key}", f"/runs/{key}/export.csv",
        "/static/..%2f..%2fgate/guard.py", "/static/%2e%2e/gate/guard.py",
    ):  # fmt: skip
        answer = browser.get(path)
        assert answer.status_code in (303, 404, 422), (path, answer.status_code)
        assert "from __future__" not in answer.text
        assert str(place.settings.out) not in answer.text


@pytest.mark.parametrize(
    "name",
    ["../../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd", "C:\\x.png", "a\x00b.png", "a/../b.png", "x" * 5000],
)
def test_upload_names_are_only_shown(sender: tuple[World, object], name: str, tmp_path: Path) -> None:
    place, program = sender
    place.gate.trail.add("-", "the log is there")
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    files = {"file": ("good.zip", archive({name.replace("\x00", ""): picture()}))}
    for sent in (files, {"file": (name, picture())}):
        answer = program.post(DIAGNOSES, files=sent)  # type: ignore[attr-defined]
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 200:
            assert all(len(item["name"]) <= 220 and "\x00" not in item["name"] for item in answer.json()["items"])
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before
    assert name[:60] not in place.log()


def test_xss_through_file_names(place: World) -> None:
    """A file name is text in a page, whatever it holds; and no page may run a script that is written into it."""
    evil = "\"><img src=x onerror=alert(1)><script>alert(2)</script>'{{7*7}}.png"
    browser = place.browser("vera")
    with place:
        csrf = token_in(browser.get("/bench").text)
        answer = browser.post("/bench", data={"csrf": csrf}, files={"file": (evil, picture())})
        assert answer.status_code == 303
        for _ in range(50):
            page = browser.get(answer.headers["location"])
            time.sleep(0.02)
    assert page.status_code == 200
    assert "<script>alert" not in page.text
    assert "<img src=x" not in page.text
    assert "49.png" not in page.text
    assert "onerror=alert(1)" in page.text  # as text
    csp = page.headers["content-security-policy"]
    assert "default-src 'none'" in csp
    assert "unsafe" not in csp
    assert page.headers["x-content-type-options"] == "nosniff"


def test_bidirectional_and_control_characters_are_not_shown(sender: tuple[World, object]) -> None:
    _, program = sender
    answer = program.post(DIAGNOSES, files={"file": ("gnp.\u202efdp\u200b.png", picture())})  # type: ignore[attr-defined]
    assert answer.json()["items"][0]["name"] == "gnp.\ufffdfdp\ufffd.png"


@pytest.mark.parametrize("page", ["/login", "/", "/bench", "/about", "/agreement", "/admin", "/nope"])
def test_no_page_has_scripts_or_styles_in_line(place: World, page: str) -> None:
    text = place.browser("anna").get(page).text
    assert not re.search(r"<script(?![^>]*\bsrc=)", text)
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", text)
    assert not re.search(r"(src|href|action)=.https?://", text)


def test_zip_bomb(tmp_path: Path) -> None:
    place = world(tmp_path, uploads=UploadLimits(file_mb=2, total_mb=4, files=20))
    bomb = archive({"zeros.png": b"\0" * (2 << 20)})
    many = archive({f"{i}.png": bytes([i]) * 10 + picture() for i in range(30)})
    nested = archive({"inner.zip": archive({"a.png": picture()}), "ok.png": picture()})
    flat = archive({f"{i}.png": b"\0" * 4096 + bytes(range(256)) * 4000 for i in range(6)}, zipfile.ZIP_STORED)
    # One member's data named by many entries, and one that states less than it unpacks to.
    with place:
        program = place.program("vera", "diagnose")

        def send(data: bytes) -> tuple[int, list[str]]:
            answer = program.post(DIAGNOSES, files={"file": ("x.zip", data)})
            return answer.status_code, [i["error"] or "" for i in answer.json().get("items", [])]

        status, errors = send(bomb)
        assert status == 200
        assert "far more" in errors[0]
        assert send(many)[0] == 413
        status, errors = send(nested)
        assert status == 200
        assert sorted(map(bool, errors)) == [False, True]
        assert "archive within an archive" in "".join(errors)
        assert send(flat)[0] == 413
        status, errors = send(overlapping(2 << 20, 200))
        assert status in (200, 413)
        status, errors = send(understated())
        assert status == 200
        assert "unpacks to more" in errors[0]
        assert send(b"PK\x03\x04" + b"\0" * 100)[0] == 200
        litter = {"a/": b"", "__MACOSX/._a": b"x", "@eaDir/ok.png": b"x", "ok.png.part": b"x"}
        assert send(archive({**litter, "ok.png": picture()}))[1] == [""]
        assert "thumbnail of a MIRAX slide" in send(archive({"a.mrxs": picture()}))[1][0]
    assert len(place.engine.seen) == 2


def overlapping(size: int, entries: int) -> bytes:
    """A zip whose central directory names the same data many times, each a well-compressed member (Fifield's bomb)."""
    data = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw = data.compress(b"\0" * size) + data.flush()
    crc = zlib.crc32(b"\0" * size)
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(raw), size, 5, 0) + b"a.png" + raw
    central = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, crc, len(raw), size, 5, 0, 0, 0, 0, 0, 0)
        + b"a.png"
        for _ in range(entries)
    )
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, entries, entries, len(central), len(local), 0)
    return local + central + end


def understated() -> bytes:
    """A member that states ten bytes and unpacks to a million."""
    whole = archive({"a.png": bytes(range(256)) * 4000})
    at = whole.index(b"PK\x01\x02")
    size = struct.pack("<L", 10)
    return whole[:22] + size + whole[26 : at + 24] + size + whole[at + 28 :]


def test_oversized_pixels_are_left_to_the_decoder_with_its_limits(place: World) -> None:
    """An image of 60,000 x 60,000 px in a few kilobytes reaches no decoder of the server's own process."""
    ihdr = struct.pack(">2L5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">L", len(ihdr)) + b"IHDR" + ihdr + struct.pack(">L", zlib.crc32(b"IHDR" + ihdr))
    huge = b"\x89PNG\r\n\x1a\n" + chunk
    with place:
        answer = place.program("vera", "diagnose").post(DIAGNOSES, files={"file": ("huge.png", huge)})
    assert answer.status_code == 200
    assert place.engine.seen == [("vera", huge)]
    for module in ("app", "gate/guard", "gate/body", "gate/uploads", "engine/engine", "engine/jobs", "api/diagnoses"):
        source = (ROOT / "apps" / "web" / f"{module}.py").read_text()
        assert not re.search(r"\bPIL\b|\bcv2\b", source), "only the engine's children decode what was uploaded"


def test_body_limits_hold_while_the_body_arrives(tmp_path: Path) -> None:
    place = world(tmp_path, uploads=UploadLimits(file_mb=1, total_mb=2, files=3))
    program = place.program("vera", "diagnose", "read")
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        while sent < 64 << 20:
            sent += 1 << 16
            yield b"\xff" * (1 << 16)

    with place:
        kind = {"content-type": "multipart/form-data; boundary=B"}
        assert program.post(DIAGNOSES, content=endless(), headers=kind).status_code == 413
        too_long = kind | {"content-length": str(1 << 40)}
        assert program.post(DIAGNOSES, content=b"", headers=too_long).status_code == 413
        assert program.post(DIAGNOSES, files={"file": ("a.png", b"\xff" * ((1 << 20) + 1))}).status_code == 413
        several = [("file", (f"{i}.png", picture())) for i in range(4)]
        assert program.post(DIAGNOSES, files=several).status_code == 413
        fields = {f"field{i}": "x" for i in range(40)}
        assert program.post(DIAGNOSES, data=fields, files=several[:1]).status_code == 400
        assert program.post(DIAGNOSES, data={"a": "x" * 5000}, files=several[:1]).status_code == 413
    # Everything else takes small bodies only, from strangers too.
    assert place.browser().post("/login", content=b"x" * (1 << 20)).status_code == 413
    assert place.browser().post(DIAGNOSES, content=b"x" * (1 << 20)).status_code == 413
    search = "/api/v1/runs/0123456789abcdef/search"
    assert program.post(search, content=b"x" * (1 << 20)).status_code == 413
    assert place.engine.seen == []
    assert place.gate.receiving == 0


def test_every_file_that_is_sent_has_an_answer(tmp_path: Path) -> None:
    place = world(tmp_path)
    program = place.program("vera", "diagnose", "read")
    sent = [
        ("file", ("a.png", picture())),
        ("file", ("hollow.png", b"")),
        ("file", ("bare.zip", archive({}))),
        ("file", ("litter.zip", archive({"__MACOSX/._a.png": b"x", ".DS_Store": b"x"}))),
        ("unsent", ("slides", b"folder")),
        ("unsent", ("huge.tif", b"large")),
        ("unsent", ("away.png", b"unreadable")),
        ("unsent", ("odd.png", b"<b>whatever</b>")),
    ]
    with place:
        items = program.post(DIAGNOSES, files=sent).json()["items"]
    assert [i["name"] for i in items] == [name for _, (name, _) in sent]
    assert [i["error"] for i in items] == [
        None,
        "empty: 0 bytes",
        "an archive without images",
        "an archive without images",
        "a folder: open it and choose the images in it",
        "larger than 64 MB",
        *["the browser could not read it: copy it to this computer and choose it again"] * 2,
    ]
    assert len(place.engine.seen) == 1


def test_an_abstention_has_no_answer_in_the_api_nor_on_the_bench(tmp_path: Path) -> None:
    place = world(tmp_path)
    whole = place.engine.examine

    async def unsure(data: bytes, **given: Any) -> Any:
        found = await whole(data, **given)
        return replace(found, status=Status.ABSTAINED, reason="ambiguous: 0.5 < 0.53", width_px=2592)

    place.engine.examine = unsure  # type: ignore[method-assign]
    program = place.program("vera", "diagnose", "read")
    browser = place.browser("vera")
    with place:
        (item,) = program.post(DIAGNOSES, files={"file": ("a.png", picture())}).json()["items"]
        shown = [item[name] for name in ("status", "label", "confidence", "prediction_set")]
        assert shown == ["abstained", None, None, []]
        assert item["probabilities"]["Early"] == 0.7
        pages = {}
        for scale in ("", "0.2"):
            form = {"csrf": token_in(browser.get("/bench").text), "um_per_px": scale}
            where = browser.post("/bench", data=form, files={"file": ("a.png", picture())}).headers["location"]
            for _ in range(100):
                page = browser.get(f"{where}/0")
                if page.status_code == 200:
                    break
            pages[scale] = page.text
            exported = browser.get(f"{where}/0/export.json").json()
            assert (exported["label"], exported["confidence"], exported["prediction_set"]) == (None, None, [])
    for page in pages.values():
        assert "No answer" in page
        assert "Had it answered" not in page
        assert "Prediction set:" not in page
        assert "of 100 answers" not in page
    assert "The likeliest cause is the missing scale" in pages[""]
    assert "Enter the scale" in pages[""]
    assert "missing scale" not in pages["0.2"]


def test_an_answer_of_unknown_scale_is_cautioned_against_on_the_bench(tmp_path: Path) -> None:
    place = world(tmp_path)
    whole = place.engine.examine

    async def small(data: bytes, **given: Any) -> Any:
        return replace(await whole(data, **given), width_px=112, height_px=112)

    place.engine.examine = small  # type: ignore[method-assign]
    browser = place.browser("vera")
    pages = {}
    with place:
        for scale in ("", "0.2"):
            form = {"csrf": token_in(browser.get("/bench").text), "um_per_px": scale}
            where = browser.post("/bench", data=form, files={"file": ("a.png", picture())}).headers["location"]
            for _ in range(100):
                page = browser.get(f"{where}/0")
                if page.status_code == 200:
                    break
            card = browser.get(where).text
            pages[scale] = page.text
            exported = browser.get(f"{where}/0/export.json").json()
            assert ("Do not rely on this answer" in card) == (scale == "")
            assert (exported["caution"] is not None) == (scale == "")
    assert pages[""].index("Do not rely on this answer") < pages[""].index("Early Pre-B: of 100 answers")
    assert "Do not rely" not in pages["0.2"]


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("image/png", b"x", 415),
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"--B--", 400),
        ("multipart/form-data; boundary=" + "B" * 200, b"--B--", 400),
        ("multipart/form-data; boundary=B", b"", 400),
        ("multipart/form-data; boundary=B", b"garbage", 400),
        ("multipart/form-data; boundary=B", b"--B\r\n\r\nx\r\n--B--\r\n", 400),
        ("multipart/form-data; boundary=B", FIELD, 400),
        ("multipart/form-data; boundary=B", FIELD + b"\r\n--B--\r\n", 422),
        ("multipart/form-data; boundary=B", b"--B\r\nX: " + b"y" * 9000 + b"\r\n\r\nx\r\n--B--\r\n", 400),
        ("multipart/form-data; boundary=\xe4", b"", 400),
    ],
)  # fmt: skip
def test_forms_that_are_none(sender: tuple[World, object], kind: str, body: bytes, status: int) -> None:
    _, program = sender
    headers = {"content-type": kind.encode("latin-1")}
    assert program.post(DIAGNOSES, content=body, headers=headers).status_code == status  # type: ignore[attr-defined]


def test_uploads_are_counted_by_person(tmp_path: Path) -> None:
    place = world(tmp_path, rates=replace(Rates(), uploads=(5, 60.0)))
    vera, rita = place.program("vera", "diagnose"), place.program("rita", "diagnose")
    with place:
        files = [("file", (f"{i}.png", picture())) for i in range(4)]
        assert vera.post(DIAGNOSES, files=files).status_code == 200
        refused = vera.post(DIAGNOSES, files=files)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert rita.post(DIAGNOSES, files=files).status_code == 200


def test_a_fault_of_the_engine_names_nothing(place: World, caplog: pytest.LogCaptureFixture) -> None:
    place.engine.error = RuntimeError("patient Jane Doe, /srv/secret/path")
    with place, caplog.at_level(logging.DEBUG):
        answer = place.program("vera", "diagnose").post(DIAGNOSES, files={"file": ("a.png", picture())})
    assert answer.status_code == 200
    assert "fault of the program" in answer.json()["items"][0]["error"]
    for text in (answer.text, place.log(), caplog.text):
        assert "Jane Doe" not in text
        assert "secret" not in text
    assert "RuntimeError at gate_world.py" in caplog.text


# --- what is written down --------------------------------------------------------------------------------------------


def test_the_log_says_who_saw_what_and_each_line_is_bound_to_the_one_before(place: World) -> None:
    sign_in(place.browser(), "vera", "not her password")
    sign_in(place.browser(), "my-password-typed-as-name")
    vera = place.browser("vera")
    vera.get("/")
    vera.get("/admin")
    with place:
        csrf = token_in(vera.get("/bench").text)
        vera.post("/bench", data={"csrf": csrf}, files={"file": ("Jane Doe.png", picture())})
    place.program("rita", "read").get("/api/v1/runs")
    entries = [json.loads(line) for line in place.log().splitlines()]
    assert [(e["who"], e["action"]) for e in entries] == [
        ("vera", "sign-in failed"), ("-", "sign-in failed"), ("vera", "sign-in"), ("vera", "runs"), ("vera", "refused"),
        ("vera", "diagnosis asked for"), ("rita", "runs"),
    ]  # fmt: skip
    assert "my-password" not in place.log()
    assert "Jane" not in place.log()
    data = place.settings.audit_path().read_bytes()
    assert check_log(data).problems == ()
    lines = data.splitlines(keepends=True)
    for broken in (b"".join(lines[:2] + lines[3:]), data.replace(b'"who":"vera"', b'"who":"rita"', 1)):
        assert check_log(broken).problems
    assert place.settings.audit_path().stat().st_mode & 0o077 == 0


def test_nobody_is_served_without_a_whole_log(place: World) -> None:
    vera = place.browser("vera")
    path = place.settings.audit_path()
    path.write_bytes(path.read_bytes().replace(b'"who":"vera"', b'"who":"rita"'))
    assert vera.get("/").status_code == 503
    assert "tampered" in vera.get("/").text


def test_two_servers_write_one_log(tmp_path: Path) -> None:
    first, second = world(tmp_path), world(tmp_path)
    for i in range(6):
        (first if i % 2 else second).gate.trail.add(f"user{i}", "test")
    verdict = first.gate.trail.check()
    assert (verdict.entries, verdict.problems) == (6, ())


def test_a_full_log_goes_on_in_a_new_one(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leukoflow.apps.web.gate.trail._ROLL_AT", 1000)
    other = world(Path(place.settings.out).parent)
    for i in range(12):
        (place if i % 2 else other).gate.trail.add("vera", "test", str(i))
    folder = place.settings.audit_path().parent
    files = sorted(folder.glob("web-audit*.jsonl"))
    assert len(files) > 2
    entries = 0
    heads = set()
    for file in files:
        verdict = check_log(file.read_bytes())
        assert verdict.problems == ()
        heads.add(verdict.head)
        entries += sum('"action":"test"' in line for line in file.read_text().splitlines())
    assert entries == 12
    begun = [json.loads(file.read_text().splitlines()[0]) for file in files]
    bound = {dict(entry["details"])["last"] for entry in begun if entry["action"] == "continues"}
    assert len(bound) == len(files) - 1
    assert bound < heads


def test_nothing_of_a_person_or_query_is_in_the_access_log(place: World, caplog: pytest.LogCaptureFixture) -> None:
    vera = place.browser("vera")
    with caplog.at_level(logging.DEBUG, "leukoflow.web"):
        vera.get("/patients/Jane-Doe?born=1970")
        vera.get("/runs/0123456789abcdef?find=Jane")
        vera.get("/Jane/Doe.html")
        vera.get("/static/Jane.css")
    assert "Jane" not in caplog.text
    assert "1970" not in caplog.text
    assert "vera" not in caplog.text
    assert "GET /patients/{patient_key} 404" in caplog.text
    assert "GET unmatched 404" in caplog.text


def test_headers_are_on_every_answer(place: World) -> None:
    for path in ("/login", "/nope", "/", "/api/v1/health", "/api/v1/runs", "/static/style.css"):
        headers = place.browser().get(path).headers
        for name in (
            "content-security-policy", "x-content-type-options", "referrer-policy", "permissions-policy",
            "cross-origin-opener-policy", "cross-origin-resource-policy", "x-frame-options",
        ):  # fmt: skip
            assert name in headers, (path, name)
        assert "camera=(self)" in headers["permissions-policy"]
        assert ("no-store" in headers["cache-control"]) == (not path.startswith("/static"))
        assert "server" not in headers


def test_below_a_path_of_a_proxy(tmp_path: Path) -> None:
    place = world(tmp_path, root_path="/leukoflow")
    for prefix in ("/leukoflow", ""):  # whether the proxy takes it off or not
        browser = place.browser()
        assert browser.get(f"{prefix}/").headers["location"] == "/leukoflow/login"
        page = browser.get(f"{prefix}/login")
        assert 'action="/leukoflow/login"' in page.text
        form = {"csrf": token_in(page.text), "name": "vera", "password": PASSWORD, "next": "/bench"}
        answer = browser.post(f"{prefix}/login", data=form)
        assert answer.headers["location"] == "/leukoflow/bench"
        assert browser.get(f"{prefix}/bench").status_code == 200
        assert browser.get(f"{prefix}/static/style.css").status_code == 200
        assert browser.get(f"{prefix}/api/v1/me").status_code == 200
    assert place.browser("vera").get("/leukoflow").status_code == 200


# --- live views ------------------------------------------------------------------------------------------------------


def test_events_of_a_diagnosis(place: World) -> None:
    program = place.program("vera", "diagnose")
    with place:
        job = program.post(DIAGNOSES, params={"wait": "false"}, files={"file": ("a.png", picture())})
        assert job.status_code == 200
        assert job.headers["location"] == f"{DIAGNOSES}/{job.json()['id']}"
        text = program.get(job.headers["location"] + "/events").text
        assert text.endswith("\n\n")
        assert "event: done" in text
        last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["items"] == [{"name": "a.png", "stage": "done", "error": None}]
        found = program.get(job.headers["location"]).json()
    assert found["done"] is True
    assert found["items"][0]["label"] == "Early"
    assert found["items"][0]["confidence"] == pytest.approx(0.7)
    assert "research use only" in found["notice"].lower()


def test_a_job_that_is_forgotten_stops(tmp_path: Path) -> None:
    engine = FakeEngine()
    place = world(tmp_path, engine)
    with place:
        engine.hold = asyncio.Event()
        program = place.program("vera", "diagnose")
        job = program.post(DIAGNOSES, params={"wait": "false"}, files={"file": ("a.png", picture())}).json()
        assert program.get(f"{DIAGNOSES}/{job['id']}").json()["done"] is False
        assert program.delete(f"{DIAGNOSES}/{job['id']}").status_code == 204
        assert place.app.state.jobs._jobs == {}
