"""Names and keys that are sent: none becomes a path, a script, or anything but text."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from gate_world import World, archive, picture, token_in

DIAGNOSES = "/api/v1/diagnoses"


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
