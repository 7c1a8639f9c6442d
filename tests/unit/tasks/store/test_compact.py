"""Compacting: the same rows in fewer files, and a run that can be read and finished wherever it was cut off."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import digests, table
from typer.testing import CliRunner

import leukoflow.tasks.store.compact
from leukoflow.apps.cli.main import app
from leukoflow.core.codec import dumps
from leukoflow.core.errors import StorageError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.lock import LockHolder, held
from leukoflow.runs.progress import now, read_manifest
from leukoflow.runs.records import PartRef, RunManifest
from leukoflow.storage.base import Storage
from leukoflow.storage.local import LocalStorage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.publish.publish import publish
from leukoflow.tasks.report.run_report import build_report
from leukoflow.tasks.store.compact import FILE_BYTES, compact_run, groups_of, merged_name
from leukoflow.tasks.store.tables import stream, table_files
from leukoflow.tasks.upkeep.diff import diff_runs
from leukoflow.tasks.upkeep.verify import verify_run

MERGED = ("predictions/part-00000-00002.parquet", "cells/part-00000-00002.parquet")


def manifest_of(root: Path | str) -> RunManifest:
    found = read_manifest(open_storage(str(root)))
    assert found is not None
    return found


def rows(root: Path | str, name: str) -> list[dict[str, Any]]:
    """A table as a reader sees it that trusts the manifest."""
    storage = open_storage(str(root))
    keys = [f.key for f in table_files(manifest_of(root).parts, name)]
    return [row for piece in stream(storage, keys) for row in piece.to_pylist()]


# --- which parts go together -----------------------------------------------------------------------------------------


def part(ordinal: int, predictions: int, cells: int) -> PartRef:
    name = f"{ordinal:05d}"
    files = ((f"predictions/part-{name}.parquet", predictions, "x"), (f"cells/part-{name}.parquet", cells, "x"))
    return PartRef("predictions", name, "a", "k", files)


def test_parts_go_together_until_the_larger_table_is_full() -> None:
    parts = [part(0, 4, 1), part(1, 4, 1), part(2, 4, 1), part(3, 1, 12), part(4, 1, 1), part(5, 1, 9)]
    groups = groups_of(list(reversed(parts)), 10)
    assert [[p.shard for p in g] for g in groups] == [["00000", "00001"], ["00002"], ["00003"], ["00004", "00005"]]
    assert merged_name(groups[0]) == "00000-00001"
    assert groups_of([], 10) == []


# --- a run -----------------------------------------------------------------------------------------------------------


def test_the_rows_are_the_same_in_fewer_files(night: Run, copy: Path) -> None:
    before = {name: pq.read_table(sorted((copy / name).iterdir())[0]).schema for name in ("predictions", "cells")}
    seen: list[tuple[int, int]] = []
    done = compact_run(str(copy), report=lambda a, b: seen.append((a, b)))
    assert (done.files_before, done.files_after, done.removed) == (6, 2, 6)
    assert seen[-1] == (done.bytes_before, done.bytes_before)
    for name in ("predictions", "cells"):
        assert [p.name for p in (copy / name).iterdir()] == ["part-00000-00002.parquet"]
        merged = pq.ParquetFile(copy / name / "part-00000-00002.parquet")
        assert merged.schema_arrow.equals(before[name])
        assert merged.num_row_groups == 1
        assert table(copy, name, drop=()).to_pylist() == table(Path(night.root), name, drop=()).to_pylist()
        assert rows(copy, name) == rows(night.root, name)
    old, new = manifest_of(night.root), manifest_of(copy)
    assert replace(new, parts=old.parts) == old
    assert [p for p in new.parts if p.stage != "predictions"] == [p for p in old.parts if p.stage != "predictions"]
    kept = {
        k: v for k, v in digests(Path(night.root)).items() if not k.startswith(("predictions", "cells", "manifest"))
    }
    assert {k: v for k, v in digests(copy).items() if not k.startswith(("predictions", "cells", "manifest"))} == kept
    assert not (copy / "_attempts").exists()


def test_everything_else_still_works_on_a_compacted_run(
    night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact_run(str(copy))
    found = verify_run(str(copy))
    assert found.findings == ()
    assert found.rows == 38
    assert diff_runs(night.root, str(copy)).same
    run = reopened(night, copy, monkeypatch)
    assert run.finished == manifest_of(copy)
    page = build_report(str(copy), run.finished)
    assert page == build_report(night.root, manifest_of(night.root))
    assert "cannot be read (" not in page


def reopened(night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "a key that only these tests have")
    return open_run(night.config.model_copy(update={"out": str(copy.parent)}))


def test_doing_it_again_does_nothing(copy: Path) -> None:
    compact_run(str(copy))
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    again = compact_run(str(copy))
    assert (again.files_before, again.files_after, again.removed) == (2, 2, 0)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()} == before


def test_small_files_give_several_groups_and_row_groups(
    night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leukoflow.tasks.store.compact, "ROW_GROUP", 10)
    size = max(size for p in manifest_of(copy).parts if p.stage == "predictions" for _, size, _ in p.files)
    compact_run(str(copy), size * 2)
    names = sorted(p.name for p in (copy / "predictions").iterdir())
    assert names == ["part-00000-00001.parquet", "part-00002-00002.parquet"]
    assert pq.ParquetFile(copy / "predictions" / names[0]).num_row_groups == 4
    for name in ("predictions", "cells"):
        assert rows(copy, name) == rows(night.root, name)
    assert verify_run(str(copy)).ok
    assert compact_run(str(copy), FILE_BYTES).files_after == 4


# --- crashes ---------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone."""


VERBS = ("writer", "digest", "promote", "write", "delete", "create", "intact")


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Lets the process die at the n-th step that touches the storage, clean-up included; returns the steps' names."""
    log: list[str] = []

    def wrap(verb: str) -> None:
        original = getattr(LocalStorage, verb)

        def stepped(self: Storage, *arguments: Any, **options: Any) -> Any:
            if len(log) >= step:
                raise Crash
            log.append(verb)
            return original(self, *arguments, **options)

        monkeypatch.setattr(LocalStorage, verb, stepped)

    for verb in VERBS:
        wrap(verb)
    return log


def steps_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        log = crash_at(patch, 10**6)
        compact_run(str(root))
    return len(log)


@pytest.mark.slow
def test_wherever_it_is_cut_off_the_run_is_readable_and_finished_by_the_same_command(
    night: Run, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(copy, tmp_path / "whole" / "night")
    total = steps_of(tmp_path / "whole" / "night", monkeypatch)
    assert total > 15
    wanted = {name: rows(night.root, name) for name in ("predictions", "cells")}
    states = set()
    for step in range(total):
        root = tmp_path / f"cut-{step}" / "night"
        shutil.copytree(copy, root)
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            with pytest.raises(Crash):
                compact_run(str(root))
        lock = root / RunKey.LOCK
        if lock.exists():  # its holder, this process, lives; a dead one's lock is taken over
            lock.write_bytes(dumps(LockHolder(2**22 + 1, os.uname().nodename, now(), "compacting")))
        for name in wanted:
            assert rows(root, name) == wanted[name], step
        states.add(manifest_of(root) == manifest_of(night.root))
        found = verify_run(str(root))
        assert all("interrupted" in f.what and "leukoflow compact" in f.remedy for f in found.findings), found.findings
        compact_run(str(root))
        assert digests(root) == digests(tmp_path / "whole" / "night"), step
        shutil.rmtree(root)
    assert states == {True, False}  # both sides of the moment in which the new files come into force


def test_a_part_that_is_not_what_was_committed_is_not_compacted(copy: Path) -> None:
    path = copy / "cells" / "part-00001.parquet"
    whole = path.read_bytes()
    before = manifest_of(copy)
    for data in (whole[:-1], whole[:9] + b"?" + whole[10:], None):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(StorageError, match=r"part-00001\.parquet is not what was committed; nothing was changed"):
            compact_run(str(copy))
        if data is None:
            path.touch()
    path.write_bytes(whole)
    assert manifest_of(copy) == before
    assert verify_run(str(copy)).ok


def test_rows_that_do_not_come_back_are_never_put_in_force(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = leukoflow.tasks.store.compact.stream
    monkeypatch.setattr(leukoflow.tasks.store.compact, "stream", lambda *a: (t.slice(1) for t in original(*a)))
    with pytest.raises(StorageError, match="does not have the rows"):
        compact_run(str(copy))
    assert verify_run(str(copy)).ok


def test_a_manifest_that_changes_meanwhile_stays(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LocalStorage.promote

    def promote(self: Storage, attempt: str, files: Any) -> None:
        original(self, attempt, files)
        (copy / "manifest.json").write_bytes(dumps(replace(manifest_of(copy), finished_at="later")))

    monkeypatch.setattr(LocalStorage, "promote", promote)
    with pytest.raises(StorageError, match="changed by somebody else"):
        compact_run(str(copy))
    assert manifest_of(copy).finished_at == "later"


def test_of_two_at_once_one_waits_for_people(copy: Path) -> None:
    storage = open_storage(str(copy))
    with (
        held(storage, RunKey.LOCK, "compacting"),
        pytest.raises(StorageError, match="is held for compacting by process"),
    ):
        compact_run(str(copy))
    assert not (copy / RunKey.LOCK).exists()
    (copy / RunKey.LOCK).write_bytes(dumps(LockHolder(1, "another-host", now(), "compacting")))
    with pytest.raises(StorageError, match=r"on another-host.*delete that file if the process is gone"):
        compact_run(str(copy))
    (copy / RunKey.LOCK).write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        compact_run(str(copy))
    (copy / RunKey.LOCK).write_bytes(dumps(LockHolder(2**22 + 1, os.uname().nodename, now(), "compacting")))
    assert compact_run(str(copy)).files_after == 2


# --- a compacted run that is repaired --------------------------------------------------------------------------------


def test_a_lost_summary_of_a_compacted_run_is_published_again_from_the_same_bytes(
    night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact_run(str(copy))
    (copy / "slides.parquet").unlink()
    run = reopened(night, copy, monkeypatch)
    assert run.finished is None
    for name in ("predictions", "cells", "fields", "markers"):  # taken apart into the very files that were merged
        assert digests(copy / name) == digests(Path(night.root) / name)
    publish(run, 1.0, 2.0, 0)
    assert verify_run(str(copy)).ok


def test_a_damaged_merged_file_is_not_taken_apart(night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compact_run(str(copy))
    data = bytearray((copy / MERGED[0]).read_bytes())
    data[100] ^= 1
    (copy / MERGED[0]).write_bytes(data)
    assert verify_run(str(copy)).findings[0].where == MERGED[0]
    assert reopened(night, copy, monkeypatch).finished is None
    assert list((copy / "predictions").iterdir()) == []
    assert not (copy / "manifest.json").exists()


def test_a_compaction_beside_an_opening_run_is_not_mistaken_for_damage(
    night: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is read, then the run is compacted, then the old files are looked for."""
    import leukoflow.tasks.intake.open_run

    original, calls = leukoflow.tasks.intake.open_run.intact, []

    def intact(storage: Storage, groups: Any) -> bool:
        if not calls:
            compact_run(str(copy))
        calls.append(1)
        return original(storage, groups)

    monkeypatch.setattr(leukoflow.tasks.intake.open_run, "intact", intact)
    assert reopened(night, copy, monkeypatch).finished == manifest_of(copy)
    assert verify_run(str(copy)).ok


# --- verify, and the command -----------------------------------------------------------------------------------------


def test_verify_sees_what_is_wrong_with_merged_parts(copy: Path) -> None:
    compact_run(str(copy))
    new = manifest_of(copy)
    merged = next(p for p in new.parts if p.stage == "predictions")
    forged = replace(merged, key="other")
    parts = tuple(forged if p is merged else p for p in new.parts)
    (copy / "manifest.json").write_bytes(dumps(replace(new, parts=parts)))
    assert "is not made of its shards' parts" in verify_run(str(copy)).findings[0].what
    (copy / "manifest.json").write_bytes(dumps(new))
    shutil.copy(copy / MERGED[0], copy / "predictions" / "part-00001.parquet")
    assert "interrupted" in verify_run(str(copy)).findings[0].what
    (copy / "predictions" / "part-00001.parquet").unlink()
    table = pq.read_table(copy / MERGED[0])
    pq.write_table(pa.concat_tables([table.slice(1), table.slice(0, 1)]), copy / MERGED[0])
    assert verify_run(str(copy)).findings[0].where == MERGED[0]


def test_the_command(copy: Path, tmp_path: Path) -> None:
    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["compact", *arguments], env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})

    first, second = invoke(str(copy.parent), "night"), invoke(str(copy.parent), "night")
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    assert "6 files" in first.output
    assert "became 2 files" in first.output
    assert "nothing to merge" in second.output
    absent = invoke(str(tmp_path), "absent")
    assert (absent.exit_code, len(absent.stderr.splitlines())) == (1, 1)
    assert "holds no run" in absent.stderr
