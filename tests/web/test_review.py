"""Review in real Chromium: what a key decides on, and what cannot be decided by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser_world import RUN, Site, page_of, picture_shown, served, until

from leukoflow.records import Status
from tasks import verdicts
from tasks.verdicts import Verdict
from tasks.worklist import open_run_named

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def copied(site: Site, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    shutil.copytree(site.out, tmp_path / "out")
    return tmp_path / "out"


def changed(out: Path, change: Callable[[int, dict[str, Any]], None]) -> list[dict[str, Any]]:
    """The rows of the run, each of them changed."""
    part = out / RUN / "predictions" / "part-00000.parquet"
    rows = pq.read_table(part).to_pylist()
    for ordinal, row in enumerate(rows):
        change(ordinal, row)
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(part)), part, use_dictionary=False)
    return rows


def address(other: Site, ordinal: int | None = None, slide: str = "slide-a") -> str:
    """The address of a field, or of a slide."""
    table = open_run_named(str(other.out), RUN)
    if ordinal is not None:
        return f"{other.url}/runs/{table.run_key}/fields/{ordinal}"
    (key,) = [s.slide_key for s in table.slides().items if s.name == slide]
    return f"{other.url}/runs/{table.run_key}/slides/{key}"


def said(other: Site) -> list[Verdict]:
    return list(verdicts.read(str(other.out), RUN).given)


def test_keys_on_a_field_of_a_slide_do_not_decide_the_slide(browser: Any, copied: Path, tmp_path: Path) -> None:
    with served(tmp_path, copied) as other:
        page = page_of(browser, other)
        page.goto(address(other))
        assert "Label the whole slide:" in page.inner_text("[data-review]")
        assert "label the whole slide Benign" in page.text_content("#keys")
        page.keyboard.press("j")
        assert page.evaluate("document.activeElement.closest('.list') !== null")
        for key in "a1f":
            page.keyboard.press(key)
            until(lambda: "Nothing was saved: one field has the focus" in page.inner_text("[data-saved]"))
        page.keyboard.press("c")
        assert page.get_attribute("[data-comment-box]", "hidden") is not None
        page.focus(".strip a >> nth=0")
        page.keyboard.press("2")
        page.keyboard.press("Escape")  # out of the list, the keys are for the slide
        page.keyboard.press("4")
        page.wait_for_selector("#standing[data-decision='correct:Pro']")
        assert [(v.target[0], str(v.action), v.label) for v in said(other)] == [("slide", "correct", "Pro")]
        assert page.troubles == []
        page.context.close()


def test_no_key_accepts_benign_where_malignancy_outweighs_it(browser: Any, copied: Path, tmp_path: Path) -> None:
    shares = {"prob_benign": 0.32, "prob_early": 0.24, "prob_pre": 0.24, "prob_pro": 0.2}

    def change(_: int, row: dict[str, Any]) -> None:
        if row["label"]:
            row |= shares | {"status": "predicted", "reason": None, "label": "Benign", "confidence": 0.32}

    changed(copied, change)
    with served(tmp_path, copied) as other:
        page = page_of(browser, other)
        table = open_run_named(str(copied), RUN)
        field = next(f.ordinal for f in table.fields().items if f.label and f.slide == "slide-a")
        for where in (f"{other.url}/runs/{table.run_key}?tab={tab}" for tab in ("slides", "patients", "fields")):
            page.goto(where)
            assert "malignant classes together 0.680" in page.inner_text(".list")
        for where in (address(other), address(other, field)):
            page.goto(where)
            if where.endswith(f"/{field}"):
                picture_shown(page)
            assert page.locator("[data-key=a]").count() == 0
            page.keyboard.press("a")
            until(lambda: "No key accepts Benign here" in page.inner_text("[data-saved]"))
        assert said(other) == []
        page.click("[data-means=accept]")
        until(lambda: [str(v.action) for v in said(other)] == ["accept"])
        assert page.troubles == []
        page.context.close()


def test_what_could_not_be_read_is_not_labelled(browser: Any, copied: Path, tmp_path: Path) -> None:
    table = open_run_named(str(copied), RUN)
    (field,) = [f.ordinal for f in table.fields().items if f.status is Status.QUARANTINED]
    with served(tmp_path, copied) as other:
        page = page_of(browser, other)
        page.goto(address(other, field))
        assert page.locator("[data-review] [data-decides]").count() == 0
        assert "nothing to label" in page.inner_text("[data-review]")
        page.keyboard.press("1")
        page.keyboard.press("f")
        page.wait_for_selector("#standing[data-flagged=yes]")
        assert [str(v.action) for v in said(other)] == ["flag"]
        page.context.close()
