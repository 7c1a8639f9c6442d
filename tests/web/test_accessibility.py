"""axe on every page, in light and dark, and how much a page weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from browser_world import Site, page_of, picture_shown, upload

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


def counted(loaded: list[int]) -> Callable[[Any], None]:
    """Adds the bytes of what is no picture."""

    def note(response: Any) -> None:
        if response.request.resource_type != "image" and response.ok:
            loaded.append(len(response.body()))

    return note


def settled(page: Any, name: str) -> None:
    """Waits for what a page loads after itself."""
    if name.endswith("field"):
        page.wait_for_selector("[data-scene], .review .empty")
    if name == "field":
        picture_shown(page)
        for value in ("nucleus", "cytoplasm"):
            page.check(f"[name=over][value={value}]")


LATER = pytest.mark.chaos  # all pages again take a quarter of a minute


@pytest.mark.parametrize(
    ("scheme", "size"),
    [("light", WIDE), pytest.param("dark", WIDE, marks=LATER), pytest.param("light", TABLET, marks=LATER)],
)
def test_every_page(browser: Any, site: Site, scheme: str, size: dict[str, int]) -> None:
    """No serious finding; no scrolling to the side; nothing from outside, nothing in line; less than 300 KB."""
    page = page_of(browser, site, "anna", color_scheme=scheme, viewport=size, reduced_motion="reduce")
    page.context.new_cdp_session(page).send("Network.setCacheDisabled", {"cacheDisabled": True})
    addresses: list[str] = []
    loaded: list[int] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("response", counted(loaded))
    wrong: dict[str, list[str]] = {}
    for name, path in places(page, site).items():
        loaded.clear()
        page.goto(site.url + path)
        settled(page, name)
        found = findings(page)
        if scheme == "light" and name in ("slide", "field", "slides"):
            page.keyboard.press("?")
            page.wait_for_selector("dialog[open]")
            found += findings(page)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            found.append(f"{wide} px wider than its window")
        if sum(loaded) > BYTES:
            found.append(f"it weighs {sum(loaded)} bytes")
        if page.evaluate("document.querySelectorAll('[style], style, script:not([src])').length"):
            found.append("it has styles or scripts in line")
        if found:
            wrong[name] = found
    page.context.close()
    assert wrong == {}
    assert {a for a in addresses if not a.startswith((site.url, "blob:", "data:"))} == set()
    assert len(page.troubles) <= 1  # of the page that is not there


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_answers_of_the_bench_have_no_serious_findings(browser: Any, site: Site, scheme: str) -> None:
    page = page_of(browser, site, color_scheme=scheme, reduced_motion="reduce")
    page.goto(f"{site.url}/bench")
    upload(page, *site.fields[:2])
    wrong = {"bench": findings(page)}
    page.click(".card a.go >> nth=0")
    picture_shown(page)
    page.wait_for_selector(".references, [data-here] p")
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
