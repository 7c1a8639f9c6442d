"""The web application as a browser meets it: a real server, a small run, a small bundle, and Chromium."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from gate_world import GENEROUS, HASHER, PASSWORD, PEOPLE
from harness import screen_here, small_bundle, white, with_other_thresholds, write_zip

from leukoflow.apps.web.app import create_app
from leukoflow.apps.web.settings import WebSettings
from leukoflow.core.config import LimitSettings
from leukoflow.models.bundle import Bundle
from leukoflow.tasks.imaging.synthetic import write_sample

CHROMIUM = os.environ.get("LEUKOFLOW_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = "<img src=x onerror=document.title='owned'>"
"""As the name of a folder, which stands for a slide, and of a file: on a page it must be text and nothing else."""
LONG = "scanned-2026-11-25_ward-12_" + "one-long-name-without-a-blank_" * 4
"""In the name of a slide and of its files, as microscopes make them: no page may become wider for it."""
RUN = "night"


@dataclass
class Site:
    """A server that runs."""

    url: str
    app: Any
    out: Path
    folder: Path
    fields: list[Path]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not here; set LEUKOFLOW_CHROMIUM to its program")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def make_run(folder: Path, bundle: Bundle) -> tuple[Path, list[Path]]:
    """A finished run over made-up fields of two patients, a white field, no image, and hostile names."""
    sample = write_sample(folder / "sample", 12, 5, 224).directory / "fields"
    fields = sorted(sample.iterdir())
    slides = ("slide-a/", f"slide-b_{LONG}/{LONG}")
    members = {f"{slides[n % 2]}{p.name}": p.read_bytes() for n, p in enumerate(fields[:8])}
    members |= {
        f"{HOSTILE}/{HOSTILE}.jpg": fields[8].read_bytes(),
        "slide-a/white.png": white(),
        f"{slides[1]}no.png": b"no",
    }
    archive = write_zip(folder / "smears.zip", members)
    manifest = folder / "manifest.csv"
    lines = [f'"{key}",p{"ab".index(key[6]) + 1},Site-{key[6].upper()}' for key in members if key.startswith("slide-")]
    manifest.write_text("image_key,patient_id,site\n" + "\n".join(lines) + "\n", encoding="utf-8")
    os.environ["LEUKOFLOW_PATIENT_KEY"] = "a key that only these tests have"
    try:
        screen_here(archive, folder / "out", RUN, bundle, manifest=str(manifest))
    finally:
        del os.environ["LEUKOFLOW_PATIENT_KEY"]
    return folder / "out", fields


@contextmanager
def served(folder: Path, out: Path, *bundles: Bundle, people: bool = True) -> Iterator[Site]:
    """The application on a port of its own; without bundles it diagnoses no single images."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = LimitSettings(max_member_mb=8, max_megapixels=8, decode_memory_mb=512)
    settings = WebSettings(
        out=str(out), users_file=folder / "state" / "users.json", rates=GENEROUS, port=port,
        bundles=tuple(str(b.path) for b in bundles), limits=limits,
    )  # fmt: skip
    app = create_app(settings)
    accounts = app.state.gate.accounts
    accounts._hasher = HASHER
    for name, role in (PEOPLE if people else {}).items():
        accounts.add(name, role, PASSWORD)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the server does not start"
            assert time.monotonic() < end, "the server does not start in time"
            time.sleep(0.05)
        yield Site(f"http://127.0.0.1:{port}", app, out, folder, [])
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def whole_site(folder: Path) -> Iterator[Site]:
    """A server with a run and a bundle of tiny random networks."""
    bundle = small_bundle(folder / "bundle")
    out, fields = make_run(folder, bundle)
    other = with_other_thresholds(bundle, folder / "other", 3.0)
    with served(folder, out, bundle, other) as site:
        site.fields = fields
        yield site


def page_of(browser: Any, site: Site, name: str | None = "rita", **context: Any) -> Any:
    """A page of a new browser window, signed in if named; what goes wrong in it is gathered in `page.troubles`."""
    window = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | context))
    window.set_default_timeout(30_000)
    page = window.new_page()
    page.troubles = []
    page.on("pageerror", lambda error: page.troubles.append(f"error: {error}"))
    page.on("console", lambda m: page.troubles.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("dialog", lambda d: (page.troubles.append(f"dialog: {d.message}"), d.dismiss()))
    if name is not None:
        page.goto(f"{site.url}/login")
        page.fill("[name=name]", name)
        page.fill("[name=password]", PASSWORD)
        page.click("main button.primary")
        page.wait_for_url(f"{site.url}/")
    return page


def until(what: Callable[[], Any], seconds: float = 30.0) -> None:
    """Waits for something to be true. `page.wait_for_function` would need what the pages' policy forbids."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.05)


def upload(page: Any, *files: Path) -> Any:
    """Chooses files on the bench and waits for their answers; returns that upload's part of the page.

    Earlier uploads of the same person stand below it, with answers of their own.
    """
    before = page.locator("#jobs > section").count()
    page.set_input_files("#files", [str(file) for file in files])
    until(lambda: page.locator("#jobs > section").count() == before + 1)
    page.wait_for_selector("#jobs:not(:has([aria-busy]))", timeout=120_000)
    return page.locator("#jobs > section >> nth=0")


def picture_shown(page: Any) -> None:
    """Waits until the field's picture is there, and its pixels with it."""
    page.wait_for_selector(".canvas image")
    assert page.evaluate(
        "async () => { const i = new Image(); i.src = document.querySelector('.canvas image').getAttribute('href');"
        " await i.decode(); return i.naturalWidth > 0; }"
    )
