"""Images that kill or hang any process that touches them: quarantined alone, while every neighbour keeps every bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Command, dotted, smears, start, table, write_zip

from leukoflow.models.bundle import Bundle
from leukoflow.runs.progress import read_manifest
from leukoflow.storage.opening import open_storage

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(900)]
HOOKS = ROOT / "tests" / "hooks"
DECODER, NORMALIZE, EXTRACT, FOREVER = (13, 37, 111), (13, 37, 112), (13, 37, 113), (13, 37, 114)
STAGE_SECONDS = 20.0
POISON = {3: DECODER, 15: NORMALIZE, 47: EXTRACT, 48: FOREVER}
"""One of each in its own shard, and a shard without any between them."""


@pytest.fixture(scope="module")
def poisoned(
    bundle: Bundle, server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, bytes], Command]]:
    """The finished run over an archive with four poisonous images, by the command line."""
    folder = tmp_path_factory.mktemp("poison")
    fields = smears(folder / "sample", 49, seed=11)
    names = list(fields)
    for place, color in POISON.items():
        fields[names[place]] = dotted(fields[names[place]], color)
    source = write_zip(folder / "ward.zip", fields)
    words = ["run", str(source), "--out", str(folder), "--run-id", "ward", "--bundle", str(bundle.path)]
    command = start(
        [*words, "--shard-size", "16", "--workers", "2"],
        folder / "log",
        EXTRA_PATH=str(HOOKS),
        PREFECT_API_URL=server,
        LEUKOFLOW_LIMITS__STAGE_SECONDS=str(STAGE_SECONDS),
        LEUKOFLOW_LIMITS__RETRY_DELAY_SECONDS="0.1",
    )
    try:
        command.wait(600)
        yield folder, fields, command
    finally:
        command.end()


def test_each_poisonous_image_is_quarantined_alone(poisoned: tuple[Path, dict[str, bytes], Command]) -> None:
    folder, fields, command = poisoned
    assert command.process.returncode == 3, command.text()[-3000:]
    names = list(fields)
    rows = table(folder / "ward", "predictions").to_pylist()
    quarantined = {r["image_key"]: r["reason"] for r in rows if r["status"] == "quarantined"}
    assert list(quarantined) == [names[place] for place in POISON]
    decoder, normalize, extract, forever = quarantined.values()
    assert decoder == "decoding it kills the decoder (SIGSEGV)"
    assert normalize == extract == "its processing kills the worker process: signal 9"
    assert forever == f"its processing kills the worker process: a stage ran longer than {STAGE_SECONDS:.0f} s"
    manifest = read_manifest(open_storage(str(folder / "ward")))
    assert manifest is not None
    assert manifest.quarantined == 4
    assert manifest.members == 49
    assert command.survivors() == []


def test_the_log_says_what_happened(poisoned: tuple[Path, dict[str, bytes], Command]) -> None:
    folder, _, _ = poisoned
    log = next((folder / "ward" / "logs").iterdir()).read_text()
    assert "shard 00000: searching for the image that kills its worker" in log
    assert "shard 00002: searching for the image that kills its worker" in log
    assert f"ran longer than its limit of {STAGE_SECONDS:.0f} s (limits.stage_seconds)" in log
    assert "shard 00001: searching" not in log  # it never died, it only stood beside those who did


def test_neighbours_keep_every_bit(
    poisoned: tuple[Path, dict[str, bytes], Command], screen: Any, tmp_path: Path
) -> None:
    """Compared with the same archive in which the four are merely unreadable."""
    folder, fields, _ = poisoned
    names = list(fields)
    harmless = fields | {names[place]: b"nothing to see" for place in POISON}
    state = screen(write_zip(tmp_path / "ward.zip", harmless), tmp_path, "ward")
    assert state.is_completed(), state.message
    own = ("run_id", "source_uri", "reason", "member_sha256")
    mine, theirs = (table(root / "ward", "predictions", own).to_pylist() for root in (folder, tmp_path))
    assert mine == theirs
    assert table(folder / "ward", "cells").equals(table(tmp_path / "ward", "cells"))
    zarrs = [{p.relative_to(r): p.read_bytes() for p in r.rglob("c/**/*") if p.is_file()} for r in _stores(folder)]
    assert zarrs == [
        {p.relative_to(r): p.read_bytes() for p in r.rglob("c/**/*") if p.is_file()} for r in _stores(tmp_path)
    ]
    assert all(zarrs)


def _stores(folder: Path) -> list[Path]:
    return [folder / "ward" / name for name in ("masks.zarr", "features.zarr", "activations.zarr")]
