"""The frame of the reports: what is given to a template is escaped, and what is missing is an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import DictLoader, UndefinedError
from markupsafe import escape

from leukoflow.tasks.report import page
from leukoflow.tasks.report.numbers import shown


def test_text_is_escaped_and_bounded() -> None:
    assert str(escape(shown("a<b>&\n"))) == "a&lt;b&gt;&amp;\\u000a"
    assert len(shown("x" * 1000, 40)) == 41


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = page._environment().overlay(
        loader=DictLoader({"small.html": "<p>\n<b>{{ words | shown(20) }}</b>\nand\n  more.</p>\n{# no #}\n<p>.</p>"})
    )
    monkeypatch.setattr(page, "_environment", lambda: environment)


@pytest.mark.usefixtures("small")
def test_words_are_escaped_and_breaks_between_tags_are_no_spaces() -> None:
    assert page.render("small.html", words="<i>'\n") == "<p><b>&lt;i&gt;&#39;\\u000a</b> and more.</p><p>.</p>"


@pytest.mark.usefixtures("small")
def test_a_missing_name_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="words"):
        page.render("small.html")


def test_the_frame_lets_a_page_load_nothing() -> None:
    folder = Path(page.__file__).parent / "templates"
    base = (folder / "base.html").read_text()
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in base
    for name in ("run.html", "nights.html", "evaluation.html"):
        assert (folder / name).read_text().startswith('{% extends "base.html" %}')
    for path in folder.rglob("*"):
        if path.is_file():
            assert not re.search(r"\| *safe|autoescape|<script|\bon\w+=|url\(|@import|https?:", path.read_text()), path
