"""What a run clears away behind it."""

from __future__ import annotations

from pathlib import Path

from leukoflow.flows.run import clear_attempts
from leukoflow.storage.opening import open_storage


def test_attempts_of_others_stay_when_those_of_shards_are_removed(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for name in ("00001/one", "spool-1", "preflight-1", "amend-1", "compact-1", "expand-1", "moving-1"):
        storage.write(f"_attempts/{name}/x", b"x")
    clear_attempts(storage)
    assert storage.names("_attempts") == ["amend-1", "compact-1", "expand-1", "moving-1"]
    storage.delete("_attempts")
    storage.write("_attempts/00001/one/x", b"x")
    clear_attempts(storage)
    assert not (tmp_path / "_attempts").exists()
