"""What the documentation names is there: files in back quotes, modules by their dotted names, and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = ROOT / "docs" / "pictures"
ELSEWHERE = ("OUT/", "RUN_ID/", "BUNDLE/", "DEST/", "stack-out/", "demo-out/", "out/", "/", "~/", "s3://", "http")
"""Beginnings of paths that lie outside of the repository: of runs, of hosts, of addresses."""

_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"[\w./~-]*/[\w.-]*\.(?:py|toml|yaml|md)|[\w./-]+/")
_DOTTED = re.compile(r"leukoflow(?:\.[a-z_0-9]+)+")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_ROOMS = ("apps", "deployments", "flows", "infra", "leukoflow", "models", "tasks", "tests", "benchmarks", "docs")


def quoted(page: Path) -> list[str]:
    """Texts in back quotes, outside of fenced blocks."""
    return _QUOTED.findall(_FENCED.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as the site and the forges make them."""
    plain = (
        re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower() for title in _HEADING.findall(page.read_text())
    )
    return {re.sub(r"[ ]", "-", title) for title in plain}


def named_files(page: Path) -> list[str]:
    """Paths of the repository that a page names: files of source and settings, and folders of its rooms."""
    found = [text for text in quoted(page) if _PATH.fullmatch(text) and not text.startswith(ELSEWHERE)]
    return [text for text in found if not text.endswith("/") or text.split("/")[0] in _ROOMS]


def test_the_pages_name_files() -> None:
    assert len(named_files(ROOT / "CONTRIBUTING.md")) > 20
    assert "tasks/store/" in named_files(ROOT / "docs" / "architecture.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_are_there(page: Path) -> None:
    assert [name for name in named_files(page) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_are_there(page: Path) -> None:
    names = [text for text in quoted(page) if _DOTTED.fullmatch(text) and text.split(".")[1] in _ROOMS]
    assert [name for name in names if not is_there(name)] == []


def is_there(dotted: str) -> bool:
    """Say whether a dotted name is a module, a package, or something that a module defines."""
    path = ROOT / dotted.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module = path.parent.with_suffix(".py")
    defined = rf"^(?:async )?(?:def|class) {path.name}\b|^{path.name}\b.*="
    return module.is_file() and re.search(defined, module.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for link in _LINK.findall(_FENCED.sub("", page.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if target.parent == PICTURES and target.name in (PICTURES / "render.py").read_text():
            continue  # drawn by that program; a checkout need not hold it
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []
