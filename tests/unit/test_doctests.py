"""Examples in docstrings say what happens: each is run."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
from harness import ROOT

PACKAGE = ROOT / "leukoflow"
HEAVY = {"leukoflow.apps.notebook.diagnosis"}
"""Modules whose examples load a bundle."""


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = sorted(
    _name(path)
    for folder in (PACKAGE, *(p for p in PACKAGE.iterdir() if p.is_dir()))
    for path in (folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py"))
    if ">>> " in path.read_text()
)


def test_modules_with_examples_are_found() -> None:
    assert {"leukoflow.core.counts", "leukoflow.tasks.report.palette"} <= set(MODULES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in MODULES]
)
def test_examples(name: str) -> None:
    module = import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0, "what was expected and what came is above"
