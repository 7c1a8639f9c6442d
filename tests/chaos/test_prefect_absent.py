"""A run that is to start while the configured Prefect server does not answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.world import free_port
from harness import small_bundle, smears, start, write_zip

pytestmark = [pytest.mark.chaos, pytest.mark.chaos_short, pytest.mark.timeout(600)]


@pytest.mark.parametrize("manifest", [False, True])
def test_it_says_what_is_missing(manifest: bool, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle")
    source = write_zip(tmp_path / "night.zip", smears(tmp_path / "sample", 16, seed=51))
    words = ["run", str(source), "--out", str(tmp_path), "--run-id", "night", "--bundle", str(bundle.path)]
    if manifest:
        (tmp_path / "slides.csv").write_text("image_key,slide_id\nx,y\n")
        words += ["--manifest", str(tmp_path / "slides.csv")]
    api = f"http://127.0.0.1:{free_port()}/api"
    command = start(words, tmp_path / "log", PREFECT_API_URL=api, PREFECT_CLIENT_MAX_RETRIES="1")
    try:
        assert command.wait(300) == 1
    finally:
        command.end()
    said = " ".join(command.text().split())
    assert "the Prefect server" in said
    assert "does not answer" in said
    assert ("it may hold the key for the patients" if manifest else "unset PREFECT_API_URL") in said
    assert "bug in the program" not in said
