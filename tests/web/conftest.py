"""Servers for tests: with people and a made-up engine for the gate, which is tried with each attack of OWASP; and one
with a run for all tests that drive a browser, since starting it costs more than most of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_world import Site, chromium, whole_site
from gate_world import World, world


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def site(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with whole_site(tmp_path_factory.mktemp("site")) as found:
        yield found


@pytest.fixture
def place(tmp_path: Path) -> World:
    return world(tmp_path)


@pytest.fixture
def sender(place: World) -> Iterator[tuple[World, object]]:
    with place:
        yield place, place.program("vera", "diagnose")
