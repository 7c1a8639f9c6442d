"""Pages at every width and on paper, requests that fail, comments, and decisions that lead on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from browser_world import LONG, PASSWORD, RUN, Site, page_of, picture_shown, upload
from test_accessibility import places, settled

from leukoflow.apps.web.drawing import view_cache
from leukoflow.runs.records import Status
from leukoflow.tasks.review.keys import run_key_of
from leukoflow.tasks.review.query import Query
from leukoflow.tasks.review.runs import open_run_table

pytestmark = pytest.mark.timeout(180)
WIDTHS = (1280, 820, 390)
RUN_KEY = run_key_of(RUN)


def failed_requests(page: Any) -> list[str]:
    """Fills up with the requests of a page that fail, or are answered with an error."""
    found: list[str] = []
    page.on("response", lambda r: found.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on(
        "requestfailed", lambda r: found.append(f"{r.failure} {r.url}") if "ABORTED" not in str(r.failure) else None
    )
    return found


def test_no_page_scrolls_sideways_or_asks_for_what_is_not_there(browser: Any, site: Site) -> None:
    page = page_of(browser, site, "anna")
    page.goto(f"{site.url}/bench")
    picture = site.folder / f"{LONG}.jpg"
    picture.write_bytes(site.fields[0].read_bytes())
    page.select_option("[name=other]", label="other")
    upload(page, picture)
    answer = page.get_attribute(".card a.go", "href")
    everywhere = places(page, site) | {"api": "/api/v1/docs", "answer": answer, "upload": answer.rpartition("/")[0]}
    everywhere |= {"other slide": page_with(page, site, LONG)}
    failed = failed_requests(page)
    wrong: dict[str, Any] = {}
    for name, path in everywhere.items():
        page.goto(site.url + path)
        settled(page, name)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 860})
            inside, window = page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            if inside > window:
                wrong[f"{name} at {width}"] = inside
        page.wait_for_load_state("networkidle")
        if failed and name != "not there":
            wrong[name] = failed.copy()
        failed.clear()
    page.context.close()
    assert len(everywhere) > 15
    assert wrong == {}


def page_with(page: Any, site: Site, name: str) -> str:
    """The address of the slide of that name."""
    page.goto(f"{site.url}/runs/{RUN_KEY}?sort=name&order=down")
    found = page.locator(".list a.go").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    for address in found:
        page.goto(site.url + address)
        if name in page.inner_text("h1") or name[:20] in page.inner_text("h1"):
            return str(address)
    raise AssertionError(f"no slide {name}")


def test_sign_in_does_not_scroll_sideways(browser: Any, site: Site) -> None:
    page = page_of(browser, site, None)
    page.goto(f"{site.url}/login")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 860})
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.context.close()


def test_no_field_asks_for_a_picture_that_is_not_there(browser: Any, site: Site) -> None:
    """Nor does the field before it, which looks ahead."""
    fields = open_run_table(str(site.out), RUN_KEY).fields(Query(limit=500)).items
    assert {"rejected", "quarantined"} <= {str(f.status) for f in fields}
    page = page_of(browser, site)
    failed = failed_requests(page)
    for field in fields:
        page.goto(f"{site.url}/runs/{RUN_KEY}/fields/{field.ordinal}")
        page.wait_for_selector("[data-scene], .review .empty")
        page.wait_for_load_state("networkidle")
        if field.status == "quarantined":
            assert "not an image" in page.inner_text(".review .empty").lower()
            assert page.locator(".review [hx-get]").count() == 0
    page.context.close()
    assert failed == []
    assert page.troubles == []


def test_pages_of_a_run_whose_source_is_gone(browser: Any, site: Site) -> None:
    source, aside = site.folder / "smears.zip", site.folder / "aside.zip"
    source.rename(aside)
    view_cache._views._kept.clear()  # as after a restart
    try:
        page = page_of(browser, site)
        slide = page_with(page, site, LONG)
        failed = failed_requests(page)
        page.goto(site.url + slide)
        page.wait_for_load_state("networkidle")
        page.click(".list a.go >> nth=0")
        page.wait_for_selector("[data-scene], .review .empty")
        page.wait_for_load_state("networkidle")
        words = page.inner_text(".review")
        page.context.close()
    finally:
        aside.rename(source)
        view_cache._views._kept.clear()
    assert failed == []
    assert "cannot be" in words


CLIPPED = (
    "[...document.querySelectorAll('.cell dd, .cell dt')].filter(e => e.checkVisibility() &&"
    " e.getBoundingClientRect().right > e.closest('.cell').getBoundingClientRect().right).map(e => e.innerText)"
)
"""What a cell's card cuts off."""
ON_SCREEN_ONLY = (
    "button, .button, nav, form, input, select, textarea, dialog, summary.button, .crumbs, .tabs, .filters, .paging, "
    ".top"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_has_no_controls_and_says_whose_it_is(browser: Any, site: Site, scheme: str) -> None:
    page = page_of(browser, site, color_scheme=scheme)
    page.click(f"[data-theme-choice={scheme}]")
    there = places(page, site)
    patients = {f.patient for f in open_run_table(str(site.out), RUN_KEY).fields(Query(limit=500)).items}
    started = open_run_table(str(site.out), RUN_KEY).started_at[:10]
    slide = page_with(page, site, LONG)
    page.goto(site.url + slide)
    field = page.locator(".list a.go").first.get_attribute("href")
    wanted = {
        "field": (field, ("patient", "slide", "run")), "slide": (slide, ("patient", "slide", "run")),
        "patient": (there["patient"], ("patient", "run")), "slides": (there["slides"], ("run",)),
        "fields": (there["fields"], ("run",)), "patients": (there["patients"], ("run",)),
    }  # fmt: skip
    for name, (path, facts) in wanted.items():
        page.goto(site.url + path)
        if name == "field":
            picture_shown(page)
        assert not page.locator(".paper").is_visible()
        assert page.evaluate(CLIPPED) == [], name
        page.emulate_media(media="print")
        seen = page.evaluate(
            "which => [...document.querySelectorAll(which)].filter(e => !e.closest('.cell') && e.checkVisibility())"
            ".map(e => e.outerHTML.slice(0, 80))",
            ON_SCREEN_ONLY,
        )
        assert seen == [], name
        assert page.evaluate(CLIPPED) == [], name
        head = page.inner_text(".paper")
        assert started in head, name
        assert "rita" in head
        if "run" in facts:
            assert "night" in head, name
        if "patient" in facts:
            assert any(p and p in head for p in patients), name
        if "slide" in facts:
            assert LONG[-40:] in head, name
        ink, paper = page.evaluate(
            "[getComputedStyle(document.querySelector('h1')).color,"
            " getComputedStyle(document.querySelector('.sheet')).backgroundColor]"
        )
        assert sum(map(int, re.findall(r"\d+", ink)[:3])) < 200, "dark letters"
        assert sum(map(int, re.findall(r"\d+", paper)[:3])) > 650, "on light paper"
        if name == "field":
            assert page.locator(".cell svg").first.is_visible()
        page.emulate_media(media="screen")
    assert page.troubles == []
    page.context.close()


# --- comments --------------------------------------------------------------------------------------------------------


def drafts(page: Any) -> list[str]:
    found: list[str] = page.evaluate("Object.keys(sessionStorage).filter(k => k.includes('draft'))")
    return found


def sign_in(page: Any, site: Site, name: str) -> None:
    page.goto(f"{site.url}/login")
    page.fill("[name=name]", name)
    page.fill("[name=password]", PASSWORD)
    page.click("main button.primary")
    page.wait_for_url(f"{site.url}/")


def test_a_comment_is_kept_until_it_is_saved(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    first, second = (f"{site.url}/runs/{RUN_KEY}/fields/{n}" for n in (2, 3))
    for keys in ("Control+Enter", "Meta+Enter"):
        page.goto(first)
        page.wait_for_selector("[data-scene]")
        page.keyboard.press("c")
        page.keyboard.type(f"rim of cytoplasm, by {keys}")
        page.goto(second)
        page.wait_for_selector("[data-scene]")
        assert page.locator("[data-comment-box]").is_hidden()
        page.goto(first)
        page.wait_for_selector("[data-saved]:has-text('restored')")
        assert page.input_value("[name=comment]") == f"rim of cytoplasm, by {keys}"
        page.focus("[name=comment]")
        page.keyboard.press(keys)
        page.wait_for_selector(f".comment-text:has-text('by {keys}')")
        page.wait_for_selector("[data-saved].good")
        assert page.url == first  # a comment is no decision
        assert page.input_value("[name=comment]") == ""
        assert drafts(page) == []
    page.context.close()


def test_drafts_are_gone_with_the_person(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    field = f"{site.url}/runs/{RUN_KEY}/fields/2"

    def begin() -> None:
        page.goto(field)
        page.wait_for_selector("[data-scene]")
        page.keyboard.press("c")
        page.keyboard.type("started")
        assert len(drafts(page)) == 1

    begin()
    page.click("text=Sign out")
    page.wait_for_url(f"{site.url}/login")
    assert drafts(page) == []
    sign_in(page, site, "rita")
    begin()
    page.context.clear_cookies()  # the session has ended, and somebody else sits down
    sign_in(page, site, "anna")
    assert drafts(page) == []
    page.goto(field)
    page.wait_for_selector("[data-scene]")
    assert page.locator("[data-comment-box]").is_hidden()
    page.context.close()


# --- decisions lead on -----------------------------------------------------------------------------------------------


def test_a_decision_leads_on_and_can_be_withdrawn(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    table = open_run_table(str(site.out), RUN_KEY)
    wanted = [f.ordinal for f in table.fields(Query(status=Status.PREDICTED, limit=500)).items]
    address = f"{site.url}/runs/{RUN_KEY}/fields/{{}}?status=predicted"
    left = [o for o in wanted if not table.field(o).standing.decision]
    assert len(left) > 2
    page.goto(address.format(left[0]))
    page.wait_for_selector("[data-scene]")
    page.keyboard.press("u")
    assert "no decision to withdraw" in page.inner_text("[data-saved]")
    page.keyboard.press("1")  # its answer is any, and no key accepts a Benign that is outweighed
    page.wait_for_url(re.compile(rf"/fields/{left[1]}\?.*decided={left[0]}"))
    assert "Saved" in page.inner_text(".decided")
    page.wait_for_selector("[data-scene]")
    page.keyboard.press("4")
    page.wait_for_url(re.compile(rf"/fields/{left[2]}\?.*decided={left[1]}"))
    page.keyboard.press("b")
    page.wait_for_url(re.compile(rf"/fields/{left[1]}\?"))
    page.wait_for_selector("#standing[data-decision='correct:Pro']")
    here = page.url
    page.keyboard.press("u")
    page.wait_for_selector("#standing[data-decision='']")
    page.wait_for_selector("[data-saved].good")
    assert page.url == here
    assert page.is_disabled("[data-means=withdraw]")
    assert "withdrew" in page.inner_text(".history")
    for pressed in page.locator("[data-decides]").all():
        assert pressed.get_attribute("aria-pressed") == "false"
    page.goto(address.format(left[0]))
    page.wait_for_selector("[data-scene]")
    page.click("[data-means=withdraw]")
    page.wait_for_selector("#standing[data-decision='']")
    now = open_run_table(str(site.out), RUN_KEY)
    assert [o for o in wanted if not now.field(o).standing.decision] == left
    assert page.troubles == []
    page.context.close()


def nothing_to_accept(page: Any, url: str, out: Path, status: Status, words: str) -> None:
    """Presses `a` on a field of that status: nothing is saved, and a live region says why."""
    field = open_run_table(str(out), RUN_KEY).fields(Query(status=status)).items[0]
    page.goto(f"{url}/runs/{RUN_KEY}/fields/{field.ordinal}")
    page.wait_for_selector("[data-scene], .review .empty")
    here, before = page.url, page.locator(".history li").count()
    page.keyboard.press("a")
    page.wait_for_selector(f"[data-saved][role=status]:has-text('{words}')")
    assert (page.url, page.locator(".history li").count()) == (here, before)


@pytest.mark.parametrize(
    ("status", "words"), [(Status.REJECTED, "no answer to accept"), (Status.QUARANTINED, "nothing to label")]
)
def test_accept_without_a_prediction_says_why(browser: Any, site: Site, status: Status, words: str) -> None:
    page = page_of(browser, site)
    nothing_to_accept(page, site.url, site.out, status, words)
    page.context.close()
