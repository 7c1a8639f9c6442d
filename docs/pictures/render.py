"""Render the pictures of the README over a generated sample: `python docs/pictures/render.py` at the checkout's root.

Needs Chromium (Playwright's, or one on the PATH). Nothing in these pictures is real blood.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

import leukoflow
from leukoflow.tasks.imaging.synthetic import render_field, write_sample

HERE = Path(__file__).parent
PASSWORD = "a sample has nothing to hide"


def main() -> None:
    """Write `field.png`, `worklist.png` and `report.png` beside this file."""
    with tempfile.TemporaryDirectory() as name, sync_playwright() as play:
        folder = Path(name)
        write_sample(folder / "archive", images=96, seed=7)
        run = leukoflow.run(
            folder / "archive/smears.zip", out=folder / "out", manifest=folder / "archive/manifest.csv", run_id="sample"
        )
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860}, device_scale_factor=1.5)
        draw_field(page, folder)
        page.goto(f"file://{folder}/out/{run.run_id}/report.html")
        page.screenshot(path=HERE / "report.png")
        shoot_worklist(page, folder)
        browser.close()


def draw_field(page: Page, folder: Path) -> None:
    """Diagnose drawn fields until one is answered as it was drawn, and take its picture as a notebook shows it."""
    for seed, label in itertools.product(range(6), ("Pre", "Early", "Pro", "Benign")):
        found = leukoflow.diagnose(render_field(np.random.default_rng(seed), label).rgb)
        if found.label == label:
            break
    (folder / "field.html").write_text(f'<body style="margin:16px;width:1040px">{found._repr_html_()}</body>', "utf-8")
    page.goto(f"file://{folder}/field.html")
    page.locator("body > div").screenshot(path=HERE / "field.png")


def shoot_worklist(page: Page, folder: Path) -> None:
    """Serve the sample's run, come in as its first user, and take the picture of the worklist."""
    words = [sys.executable, "-m", "leukoflow", "serve", str(folder / "out"), "--port", "0", "--no-diagnose"]
    with subprocess.Popen(
        [*words, "--users", str(folder / "users.json")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        link = next(m[0] for line in server.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+/setup\?key=\S+", line)))
        page.goto(link)
        page.fill("[name=name]", "anna")
        page.fill("[name=password]", PASSWORD)
        page.fill("[name=again]", PASSWORD)
        page.click("button[type=submit]")
        page.goto(re.sub(r"/setup.*", "/", link))
        page.locator("a[href*='/runs/']").first.click()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=HERE / "worklist.png")
        server.terminate()


if __name__ == "__main__":
    main()
