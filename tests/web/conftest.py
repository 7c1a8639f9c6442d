"""One server with one run for all tests that drive a browser: starting it costs more than most of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser_world import Site, chromium, whole_site


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def site(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with whole_site(tmp_path_factory.mktemp("site")) as found:
        yield found
