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

from leukoflow.runs.records import Status
from leukoflow.tasks.review import verdicts
from leukoflow.tasks.review.query import Query
from leukoflow.tasks.review.runs import open_run_named
from leukoflow.tasks.review.verdict_record import Action, Verdict
from leukoflow.tasks.review.wording import class_name

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def copied(site: Site, tmp_path: Path) -> Path:
    """A copy of the run that a test may change, without what other tests have said of it."""
    shutil.copytree(site.out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / RUN / "verdicts", ignore_errors=True)
    return tmp_path / "out"


def changed(out: Path, change: Callable[[int, dict[str, Any]], None]) -> list[dict[str, Any]]:
    """The rows of the run, each of them changed."""
    part = out / RUN / "predictions" / "part-00000.parquet"
    rows = pq.read_table(part).to_pylist()
    for ordinal, row in enumerate(rows):
        change(ordinal, row)
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(part)), part, use_dictionary=False)
    return rows


def answered_everywhere(out: Path, label: str, probabilities: tuple[float, float, float, float]) -> None:
    """Gives every field that was diagnosed this answer."""
    given = dict(zip(("prob_benign", "prob_early", "prob_pre", "prob_pro"), probabilities, strict=True))
    given |= {"status": "predicted", "reason": None, "label": label, "confidence": max(probabilities)}

    def change(_: int, row: dict[str, Any]) -> None:
        if row["label"]:
            row |= given

    changed(out, change)


def address(other: Site, ordinal: int | None = None, slide: str = "slide-a") -> str:
    """The address of a field, or of a slide."""
    table = open_run_named(str(other.out), RUN)
    if ordinal is not None:
        return f"{other.url}/runs/{table.run_key}/fields/{ordinal}"
    (key,) = [s.slide_key for s in table.slides().items if s.name == slide]
    return f"{other.url}/runs/{table.run_key}/slides/{key}"


def said(other: Site) -> list[Verdict]:
    return list(verdicts.read(str(other.out), RUN).given)


def led_on(page: Any) -> None:
    """Waits for the page that follows a decision; a context that is closed on the way there may never close."""
    page.wait_for_selector(".decided")
    page.wait_for_load_state("networkidle")


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
    answered_everywhere(copied, "Benign", (0.32, 0.24, 0.24, 0.2))
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
        led_on(page)
        assert [str(v.action) for v in said(other)] == ["accept"]
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


def test_rows_say_what_was_not_reviewed_and_what_was_said_of_the_slide(
    browser: Any, copied: Path, tmp_path: Path
) -> None:
    table = open_run_named(str(copied), RUN)
    slide = next(s for s in table.slides().items if s.summary.counts.quarantined and s.summary.diagnosed)
    own = table.fields(Query(slide=slide.slide_key, limit=100)).items
    answered = [f for f in own if f.status is Status.PREDICTED]
    for line in own:
        if line.label or line.status is Status.ABSTAINED:
            label = line.label or "Pro"  # the label that was answered, by its own key
            verdicts.add(str(copied), table.verdict_on_field(line.ordinal, Action.CORRECT, "rita", label))
    verdicts.add(str(copied), table.verdict_on_slide(slide.slide_key, Action.CORRECT, "rita", "Pro"))
    with served(tmp_path, copied) as other:
        page = page_of(browser, other)
        page.goto(f"{other.url}/runs/{table.run_key}?tab=slides")
        row = page.locator(f".list tr:has(a[href$='/slides/{slide.slide_key}'])")
        done = slide.summary.diagnosed
        assert f"{done} of {len(own)}; 1 unreadable" in row.locator("td").last.inner_text()
        assert row.locator(".mark.done >> text=all").count() == 0
        assert "slide:" in row.locator(".whole-slide").inner_text()
        assert "Pro-B" in row.locator(".whole-slide").inner_text() or slide.summary.label == "Pro"
        page.goto(f"{other.url}/runs/{table.run_key}?tab=fields&slide={slide.slide_key}")
        assert page.locator(".list .mark.done").count() == len(answered)
        assert page.locator(".list .mark.bad").count() == 0
        assert page.locator(".list tr:has-text('quarantined') td >> nth=0").inner_text().endswith("sorted as 0.5")
        page.goto(address(other, answered[0].ordinal))
        history = page.inner_text("#standing")
        assert f"accepted {class_name(answered[0].label)}" in history
        assert "The last decision counts" not in history
        page.keyboard.press("f")
        page.wait_for_selector("#standing[data-flagged=yes]")
        assert "The last decision counts" not in page.inner_text("#standing")
        assert page.troubles == []
        page.context.close()


def test_a_slide_of_several_patients_and_fields_in_no_folder(browser: Any, copied: Path, tmp_path: Path) -> None:
    others = iter("ab" * 100)

    def change(_: int, row: dict[str, Any]) -> None:
        if row["image_key"].startswith("slide-a/"):
            row["patient_id"] = "p_" + next(others) * 20

    changed(copied, change)
    plan = copied / RUN / "plan.parquet"
    part = copied / RUN / "predictions" / "part-00000.parquet"
    for path in (plan, part):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if row["image_key"].startswith("<img"):
                row["image_key"] = "loose.jpg"
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    with served(tmp_path, copied) as other:
        page = page_of(browser, other)
        page.goto(address(other))
        assert "Fields of 2 patients are on this slide: resolve before reading." in page.inner_text("main")
        page.emulate_media(media="print")
        assert "2 patients: resolve before reading" in page.inner_text(".paper")
        page.emulate_media(media="screen")
        run = address(other).partition("/slides/")[0]
        page.goto(run)
        assert "2 patients: resolve before reading" in page.inner_text(".list")
        page.goto(address(other, slide="."))
        assert page.inner_text("h1") == "(no folder)"
        assert page.locator("[data-decides]").count() == 0
        assert "label each on its own page" in page.inner_text("[data-review]")
        assert page.locator("[data-key=f]").count() == 1
        assert page.troubles == []
        page.context.close()


def test_all_classes_of_the_agreement_fit_the_page(browser: Any, copied: Path, tmp_path: Path) -> None:
    table = open_run_named(str(copied), RUN)
    line = next(f for f in table.fields().items if f.label)
    verdicts.add(str(copied), table.verdict_on_field(line.ordinal, Action.CORRECT, "rita", "Pro"))
    with served(tmp_path, copied) as other:
        page = page_of(browser, other)
        page.goto(f"{other.url}/agreement")
        wide = "document.querySelector('.matrix').parentElement"
        assert page.evaluate(f"{wide}.scrollWidth <= {wide}.clientWidth")
        page.context.close()


def test_one_key_accepts_any_other_answer(browser: Any, copied: Path, tmp_path: Path) -> None:
    answered_everywhere(copied, "Pre", (0.04, 0.03, 0.9, 0.03))
    with served(tmp_path, copied) as other:
        page = page_of(browser, other)
        field = next(f.ordinal for f in open_run_named(str(copied), RUN).fields().items if f.label)
        page.goto(address(other, field))
        picture_shown(page)
        page.keyboard.press("a")
        led_on(page)
        assert [(str(v.action), v.said) for v in said(other)] == [("accept", "Pre")]
        page.context.close()
