"""axe on every page, in light and dark, and how much a page weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from browser_world import Site, page_of, picture_shown

pytestmark = pytest.mark.timeout(180)
BYTES = 300_000
WIDE, TABLET = {"width": 1280, "height": 860}, {"width": 820, "height": 1180}


def places(page: Any, site: Site) -> dict[str, str]:
    """Every page there is, by name."""
    page.goto(site.url + "/")
    run = page.get_attribute(".run h2 a", "href")

    def first(query: str, nth: int = 0) -> str:
        page.goto(f"{site.url}{run}{query}")
        return str(page.locator(".list a.go").nth(nth).get_attribute("href"))

    return {
        "runs": "/",
        "slides": run,
        "patients": f"{run}?tab=patients",
        "fields": f"{run}?tab=fields",
        "nothing fits": f"{run}?tab=fields&status=quarantined&label=Pro",
        "slide": first(""),
        "field": first("?tab=fields"),
        "rejected field": first("?tab=fields&status=rejected"),
        "quarantined field": first("?tab=fields&status=quarantined"),
        "patient": first("?tab=patients"),
        "agreement": "/agreement",
        "bench": "/bench",
        "about": "/about",
        "admin": "/admin",
        "not there": "/runs/0123456789abcdef",
    }


def findings(page: Any) -> list[str]:
    """Serious and critical findings of axe."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    found = axe.run(page).response["violations"]
    return [
        f"{v['id']} ({v['impact']}): {v['help']}: {[n['target'] for n in v['nodes']][:4]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(("scheme", "size"), [("light", WIDE), ("dark", WIDE), ("light", TABLET)])
def test_no_serious_findings(browser: Any, site: Site, scheme: str, size: dict[str, int]) -> None:
    page = page_of(browser, site, "anna", color_scheme=scheme, viewport=size, reduced_motion="reduce")
    wrong: dict[str, list[str]] = {}
    for name, path in places(page, site).items():
        page.goto(site.url + path)
        page.wait_for_load_state("networkidle")
        if name == "field":
            picture_shown(page)
            for value in ("nucleus", "cytoplasm"):
                page.check(f"[name=over][value={value}]")
        if list_ := findings(page):
            wrong[name] = list_
        if name in ("slide", "field", "slides"):
            page.keyboard.press("?")
            page.wait_for_selector("dialog[open]")
            if list_ := findings(page):
                wrong[f"{name}, help"] = list_
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            wrong.setdefault(name, []).append(f"the page is {wide} px wider than its window")
    page.context.close()
    assert wrong == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_answers_of_the_bench_have_no_serious_findings(browser: Any, site: Site, scheme: str) -> None:
    page = page_of(browser, site, color_scheme=scheme, reduced_motion="reduce")
    page.goto(f"{site.url}/bench")
    page.set_input_files("#files", [str(p) for p in site.fields[:2]])
    page.wait_for_selector("#jobs section:not([aria-busy])", timeout=120_000)
    wrong = {"bench": findings(page)}
    page.click(".card a.go >> nth=0")
    picture_shown(page)
    page.wait_for_load_state("networkidle")
    wrong["answer"] = findings(page)
    page.context.close()
    assert not any(wrong.values()), wrong


def test_pages_of_those_who_are_not_signed_in(browser: Any, site: Site) -> None:
    page = page_of(browser, site, None)
    page.goto(f"{site.url}/login")
    assert findings(page) == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") in ("A", "INPUT", "BUTTON")
    page.context.close()


def test_skip_link_and_landmarks(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    page.goto(f"{site.url}/about")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for landmark in ("header", "nav", "main", "footer"):
        assert page.locator(landmark).count() >= 1
    assert page.locator("h1").count() == 1
    page.context.close()


def test_no_page_weighs_more_than_300_kb(browser: Any, site: Site) -> None:
    page = page_of(browser, site, "anna")
    weights: dict[str, int] = {}
    for name, path in places(page, site).items():
        fresh = page_of(browser, site, "anna")
        loaded: list[int] = []
        fresh.on("response", counted(loaded))
        fresh.goto(site.url + path)
        fresh.wait_for_load_state("networkidle")
        weights[name] = sum(loaded)
        fresh.context.close()
    page.context.close()
    assert max(weights.values()) < BYTES, weights


def counted(loaded: list[int]) -> Callable[[Any], None]:
    """Adds the bytes of what is no picture."""

    def note(response: Any) -> None:
        if response.request.resource_type != "image" and response.ok:
            loaded.append(len(response.body()))

    return note


def test_nothing_comes_from_outside_and_nothing_is_in_line(browser: Any, site: Site) -> None:
    page = page_of(browser, site, "anna")
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    for name, path in places(page, site).items():
        page.goto(site.url + path)
        page.wait_for_load_state("networkidle")
        content = page.content()
        assert " style=" not in content, name
        assert "<style" not in content, name
        assert page.locator("script:not([src])").count() == 0, name
    assert {u for u in asked if not u.startswith(site.url)} == set()
    assert page.troubles == [t for t in page.troubles if "404" in t]
    page.context.close()
