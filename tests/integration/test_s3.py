"""A night on an object store: source and output behind a real S3 interface, conditional writes, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from harness import ROOT, arrays, start, table, until, write_zip

from leukoflow.core.errors import PreflightError
from leukoflow.models.bundle import Bundle
from leukoflow.runs.progress import read_manifest, read_progress
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.storage.s3 import S3Storage
from leukoflow.tasks.intake.preflight import conditional_writes

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def test_create_is_granted_once(client: Any) -> None:
    storage = open_storage("s3://lab/create")
    assert storage.create("markers/a.json", b"first")
    assert not storage.create("markers/a.json", b"second")
    assert storage.read("markers/a.json") == b"first"
    conditional_writes(storage)
    assert storage.names("_attempts") == []


def test_a_store_that_overwrites_is_refused(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Storage, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True

    monkeypatch.setattr(S3Storage, "create", careless)
    with pytest.raises(PreflightError, match="does not honour conditional writes"):
        conditional_writes(open_storage("s3://lab/careless"))


def test_the_verbs_of_storage(client: Any) -> None:
    storage, other = open_storage("s3://lab/one"), open_storage("s3://lab/two")
    with pytest.raises(FileNotFoundError):
        storage.read("absent")
    assert storage.names("nowhere") == []
    storage.delete("nowhere")
    storage.write("_attempts/00000/x/parts/a.bin", b"abc")
    files = (open_storage("s3://lab/one/_attempts/00000/x").digest("parts/a.bin"),)
    assert files[0][:2] == ("parts/a.bin", 3)
    assert not storage.intact(files)
    storage.promote("_attempts/00000/x", files)
    assert storage.intact(files)
    assert storage.names("") == ["_attempts", "parts"]
    other.adopt(storage, files, "_attempts/00000/y")
    other.promote("_attempts/00000/y", files)
    assert other.read("parts/a.bin") == b"abc"
    before = storage.stamp("parts/a.bin")
    storage.write("parts/a.bin", b"abd")
    assert storage.stamp("parts/a.bin") != before
    assert not storage.intact(files)
    assert storage.exists("parts/a.bin")
    storage.delete("parts")
    assert not storage.exists("parts/a.bin")


@pytest.mark.chaos
def test_a_run_on_the_store(
    client: Any,
    account: dict[str, str],
    server: str,
    screen: Any,
    bundle: Bundle,
    members: dict[str, bytes],
    tmp_path: Path,
) -> None:
    source = write_zip(tmp_path / "night.zip", members | {f"again/{name}": data for name, data in members.items()})
    client.put_object(Bucket="lab", Key="in/night.zip", Body=source.read_bytes())
    words = ["run", "s3://lab/in/night.zip", "--out", "s3://lab/out", "--run-id", "night"]
    words += ["--bundle", str(bundle.path), "--shard-size", "16", "--workers", "2"]
    settings = account | {
        "PREFECT_API_URL": server, "EXTRA_PATH": str(ROOT / "tests" / "hooks"), "TEST_DELAY_SECONDS": "0.4",
    }  # fmt: skip
    root = open_storage("s3://lab/out/night")
    first = start(words, tmp_path / "first.log", **settings)
    try:
        # Six shards on two workers: when the first is through, some have not even been read.
        until(lambda: root.names("markers/predictions"), 240, "the first shard is committed", first)
        first.process.kill()
        first.process.wait()
        assert first.survivors() == []
    finally:
        first.end()
    kept = root.names("markers/predictions")
    stamps = {name: root.stamp(f"markers/predictions/{name}") for name in kept}
    assert 1 <= len(kept) < 6
    second = start(words, tmp_path / "second.log", **(settings | {"TEST_DELAY_SECONDS": "0"}))
    try:
        assert second.wait() == 3, second.text()[-3000:]
    finally:
        second.end()
    assert {name: root.stamp(f"markers/predictions/{name}") for name in kept} == stamps
    assert root.names("_attempts") == []
    manifest = read_manifest(root)
    assert manifest is not None
    assert (manifest.members, manifest.exit_code) == (96, 3)
    assert read_progress("s3://lab/out/night").state == "finished"
    assert "96 of 96 images accounted for" in root.read(f"logs/{root.names('logs')[-1]}").decode()

    assert screen(source, tmp_path, "night").is_completed()  # the same on a local disk
    parts = pq.read_table("lab/out/night/predictions", filesystem=root.fs)
    mine = table(tmp_path / "night", "predictions")
    assert parts.drop_columns(["run_id", "source_uri"]).to_pylist() == mine.to_pylist()
    stores = {"masks.zarr": ("semantic", "cells", "to_source"), "features.zarr": ("hybrid", "cells")}
    for store, names in (stores | {"activations.zarr": ("maps",)}).items():
        group = zarr.open_group(root.zarr(store, read_only=True), mode="r")
        for name in names:
            here = arrays(tmp_path / "night", store, name)
            there = [np.asarray(group[f"0000{i}/{name}"][:]) for i in range(6)]
            assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))
