"""What is written down, headers, and live views."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest
from gate_world import PASSWORD, FakeEngine, World, picture, sign_in, token_in, world

from leukoflow.tasks.upkeep.audit import check_log

DIAGNOSES = "/api/v1/diagnoses"


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
    checked = first.gate.trail.check()
    assert (checked.entries, checked.problems) == (6, ())


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
        checked = check_log(file.read_bytes())
        assert checked.problems == ()
        heads.add(checked.head)
        entries += sum('"action":"test"' in line for line in file.read_text().splitlines())
    assert entries == 12
    first_entries = [json.loads(file.read_text().splitlines()[0]) for file in files]
    bound = {dict(entry["details"])["last"] for entry in first_entries if entry["action"] == "continues"}
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
