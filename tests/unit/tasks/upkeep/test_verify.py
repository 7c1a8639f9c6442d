"""Verifying: a whole run passes, and no byte of it can be changed, lost or added without being found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import StorageError
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.records import Marker, PartRef, RunManifest
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.upkeep.checks import as_written
from leukoflow.tasks.upkeep.verify import LISTED, Verification, verify_run

SHARD = "00001"
FORGED = "00002"  # the one with rows that have no diagnosis


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int((len(data) - 1) * at)] ^= 1
    path.write_bytes(data)


def manifest_of(root: Path) -> RunManifest:
    found = read_manifest(open_storage(str(root)))
    assert found is not None
    return found


def wheres(found: Verification) -> list[str]:
    return [f.where for f in found.findings]


def test_a_whole_run_passes(night: Run) -> None:
    seen: list[tuple[int, int]] = []
    found = verify_run(night.root, lambda done, total: seen.append((done, total)))
    assert found.findings == ()
    assert (found.ok, found.rows, found.skipped, found.more) == (True, 38, None, 0)
    assert found.cells > 50
    assert seen[0][0] == 0
    assert seen[-1] == (found.bytes, found.bytes)
    tables = {name for name, _, _ in manifest_of(Path(night.root)).tables}
    assert tables == {"plan.parquet", "scales.parquet", "slides.parquet", "duplicates.parquet", "missing.parquet"}


def committed(night: Run) -> list[str]:
    m = manifest_of(Path(night.root))
    return [key for part in m.parts for key, _, _ in part.files] + [key for key, _, _ in m.tables]


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_one_bit_in_any_committed_file_is_found(night: Run, copy: Path, at: float) -> None:
    """Every file of one shard, and every table, one after the other."""
    for key in committed(night):
        if SHARD not in key and "/" in key:
            continue
        before = (copy / key).read_bytes()
        flip(copy / key, at)
        found = verify_run(str(copy))
        assert wheres(found)[0] == key
        assert "altered: same size" in found.findings[0].what
        assert "leukoflow rerun" in found.findings[0].remedy or "backup" in found.findings[0].remedy
        (copy / key).write_bytes(before)
    assert verify_run(str(copy)).ok


FIRST = (
    f"predictions/part-{SHARD}.parquet",
    f"cells/part-{SHARD}.parquet",
    f"fields/part-{SHARD}.parquet",
    f"masks.zarr/{SHARD}/zarr.json",
    f"features.zarr/{SHARD}/zarr.json",
    "plan.parquet",
    "slides.parquet",
)


@pytest.mark.parametrize("key", FIRST)
def test_lost_cut_and_grown_files_are_found(copy: Path, key: str) -> None:
    before = (copy / key).read_bytes()
    for data, what in (
        (None, "missing"),
        (before[:-1], "instead of"),
        (before + b"\0", "instead of"),
        (b"", "0 bytes"),
    ):
        if data is None:
            (copy / key).unlink()
        else:
            (copy / key).write_bytes(data)
        found = verify_run(str(copy))
        assert key in wheres(found)
        assert what in found.findings[wheres(found).index(key)].what
        assert found.skipped


def test_a_lost_folder_is_found_file_by_file(copy: Path) -> None:
    shutil.rmtree(copy / "masks.zarr" / SHARD)
    found = verify_run(str(copy))
    assert len(found.findings) > 3
    assert all(w.startswith(f"masks.zarr/{SHARD}/") for w in wheres(found))


@pytest.mark.parametrize("folder", ["predictions", "cells", "fields"])
def test_swapped_parts_are_found_and_named(copy: Path, folder: str) -> None:
    one, two = copy / folder / "part-00000.parquet", copy / folder / f"part-{SHARD}.parquet"
    one.rename(copy / "aside")
    two.rename(one)
    (copy / "aside").rename(two)
    found = verify_run(str(copy))
    assert f"holds what belongs in {folder}/part-{SHARD}.parquet" in found.findings[0].what
    assert len(found.findings) == 2


@pytest.mark.parametrize(
    "key",
    [
        "predictions/part-00009.parquet",
        "predictions/part-copy.parquet",
        "cells/.hidden",
        f"masks.zarr/{SHARD}/extra/c/0",
        "masks.zarr/00077/zarr.json",
        "features.zarr/notes.txt",
        "others.parquet",
        "others.zarr/00000/zarr.json",
        "markers/masks/00077.json",
        "markers/other/00000.json",
    ],
)
def test_what_nobody_has_committed_is_found(copy: Path, key: str) -> None:
    (copy / key).parent.mkdir(parents=True, exist_ok=True)
    (copy / key).write_bytes(b"{}")
    found = verify_run(str(copy))
    assert [key.startswith(w) for w in wheres(found)] == [True]
    assert found.findings[0].what.startswith("added")
    assert "move it away" in found.findings[0].remedy


def test_the_runs_own_book_keeping_is_not_taken_for_results(copy: Path) -> None:
    for name in ("heartbeat.json", "logs/1.log", "report.html", "failures/00000.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"{}")
    assert verify_run(str(copy)).ok
    (copy / "masks.zarr" / "zarr.json").write_text('{"attributes": {"a": 1}, "zarr_format": 3, "node_type": "group"}')
    assert wheres(verify_run(str(copy))) == ["masks.zarr/zarr.json"]


# --- markers and books -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["masks", "features", "predictions"])
def test_any_flipped_bit_of_a_marker_is_found(copy: Path, stage: str) -> None:
    path = copy / "markers" / stage / f"{SHARD}.json"
    before = path.read_bytes()
    for position in range(0, len(before), max(1, len(before) // 60)):
        data = bytearray(before)
        data[position] ^= 1
        path.write_bytes(data)
        found = wheres(verify_run(str(copy)))  # another name of a stage only shows in the sums
        assert {f"markers/{stage}/{SHARD}.json", "manifest.json"} & set(found), before[position - 20 : position + 20]


def test_lost_and_exchanged_markers_are_found(copy: Path) -> None:
    path = copy / "markers" / "features" / f"{SHARD}.json"
    path.unlink()
    found = verify_run(str(copy))
    assert (wheres(found), found.findings[0].what) == ([f"markers/features/{SHARD}.json"], "missing")
    shutil.copy(copy / "markers" / "features" / "00000.json", path)
    assert wheres(verify_run(str(copy))) == [f"markers/features/{SHARD}.json"]


def rewrite(root: Path, change: Callable[[RunManifest], RunManifest]) -> None:
    (root / "manifest.json").write_bytes(dumps(change(manifest_of(root))))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: replace(m, predicted=m.predicted + 1), "do not balance"),
        (
            lambda m: replace(m, predicted=m.predicted - 1, rejected=m.rejected + 1),
            "number of its labels",
        ),
        (lambda m: replace(m, cells=m.cells + 1), "cells is"),
        (lambda m: replace(m, labels=m.labels[::-1]), "labels are"),
        (lambda m: replace(m, reasons=()), "reasons"),
        (lambda m: replace(m, timings=m.timings[1:]), "seconds per stage"),
        (lambda m: replace(m, slowest=m.slowest[1:]), "slowest"),
        (lambda m: replace(m, parts=m.parts[1:]), "does not list stage masks of shard 00000"),
        (lambda m: replace(m, parts=(*m.parts, m.parts[0])), "stage masks of shard 00000 twice"),
        (lambda m: replace(m, parts=()), "lists no parts"),
        (lambda m: replace(m, tables=tuple(t for t in m.tables if t[0] != "slides.parquet")), "added"),
        (lambda m: replace(m, schema_version=99), "schema version 99"),
        (lambda m: replace(m, conflicts=0), "counts 0 rows"),
        (lambda m: replace(m, missing=7), "not the manifest's"),
        (lambda m: replace(m, fingerprint="x"), "fingerprint is"),
        (lambda m: replace(m, run_id="other"), "run_id is"),
        (lambda m: replace(m, started_at="x"), "started_at is"),
    ],
)
def test_a_manifest_that_was_made_to_fit_does_not_fit(
    copy: Path, change: Callable[[RunManifest], RunManifest], what: str
) -> None:
    rewrite(copy, change)
    found = verify_run(str(copy))
    assert any(what in f.what for f in found.findings), found.findings


def test_a_manifest_that_was_edited_by_hand_is_found(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert wheres(verify_run(str(copy))) == ["manifest.json"]
    path.write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        verify_run(str(copy))


def test_fields_that_an_older_version_did_not_have_are_no_damage() -> None:
    marker = Marker(PartRef("masks", "00000", "a", "k", (("a", 1, "b"),)))
    text = json.loads(dumps(marker))

    def written(record: Any) -> bytes:
        return (json.dumps(record, ensure_ascii=False, sort_keys=True, indent=1) + "\n").encode()

    assert as_written(dumps(marker), marker)
    assert as_written(written({"part": text["part"]}), marker)
    assert not as_written(written(text | {"other": 1}), marker)
    assert not as_written(written(text)[:-1] + b" ", marker)


def test_a_lost_or_damaged_binding_is_found(copy: Path) -> None:
    (copy / "run.json").write_text("{")
    assert wheres(verify_run(str(copy))) == ["run.json"]
    (copy / "run.json").unlink()
    assert wheres(verify_run(str(copy))) == ["run.json"]


def forge(root: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a table and makes marker and manifest fit, as somebody would who knows the format."""
    storage, key = open_storage(str(root)), f"{name}/part-{FORGED}.parquet"
    pq.write_table(change(pq.read_table(root / key)), root / key, use_dictionary=False)
    fresh = storage.digest(key)

    def renew(part: PartRef) -> PartRef:
        return replace(part, files=tuple(fresh if f[0] == key else f for f in part.files))

    rewrite(root, lambda m: replace(m, parts=tuple(map(renew, m.parts))))
    for stage in ("masks", "predictions"):
        path = root / "markers" / stage / f"{FORGED}.json"
        marker = loads(Marker, path.read_bytes(), "marker")
        path.write_bytes(dumps(replace(marker, part=renew(marker.part))))


def put(table: pa.Table, column: str, values: list[Any]) -> pa.Table:
    place = table.schema.get_field_index(column)
    return table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))


def everywhere(column: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda t: put(t, column, [value] * len(t))


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("predictions", lambda t: t.slice(1), "5 rows instead of 6"),
        ("predictions", lambda t: pa.concat_tables([t, t.slice(0, 1)]), "7 rows instead of 6"),
        ("predictions", lambda t: pa.concat_tables([t.slice(0, 5), t.slice(0, 1)]), "image_key are not"),
        ("predictions", lambda t: t.take([1, 0, *range(2, 6)]), "image_key are not"),
        ("predictions", everywhere("patient_id", None), "patient_id are not"),
        ("predictions", everywhere("meta_ward", "9"), "meta_ward are not"),
        ("predictions", everywhere("run_id", "other"), "run_id is not"),
        ("predictions", everywhere("bundle_digest", "other"), "bundle_digest is not"),
        ("predictions", everywhere("status", "fine"), "status is none of"),
        ("predictions", everywhere("label", None), "label is null"),
        ("predictions", everywhere("status", "predicted"), "null"),
        ("predictions", everywhere("label", "Pro"), "null"),
        ("predictions", lambda t: put(t, "label", [x and "Pro" for x in t["label"].to_pylist()]), "rows add up"),
        ("predictions", lambda t: t.drop_columns(["ood_score"]), "columns are not"),
        ("predictions", everywhere("n_cells", 1), "does not have the cells that"),
        ("cells", lambda t: t.slice(1), "rows instead of"),
        ("cells", lambda t: pa.concat_tables([t.slice(1), t.slice(0, 1)]), "does not have the cells that"),
        ("fields", lambda t: t.slice(1), "5 rows instead of 6"),
    ],
)  # fmt: skip
def test_rows_are_held_against_the_plan_even_where_digests_fit(
    copy: Path, name: str, change: Callable[[pa.Table], pa.Table], what: str
) -> None:
    forge(copy, name, change)
    found = verify_run(str(copy))
    assert any(what in f.what for f in found.findings), found.findings


def test_what_is_no_finished_run_is_an_error_that_says_so(copy: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(StorageError, match="run night is not finished"):
        verify_run(str(copy))
    with pytest.raises(StorageError, match="holds no run"):
        verify_run(str(tmp_path / "nothing"))


def test_findings_are_counted_beyond_those_that_are_listed(copy: Path) -> None:
    for i in range(LISTED + 5):
        (copy / "cells" / f"stray-{i}").touch()
    found = verify_run(str(copy))
    assert (len(found.findings), found.more) == (LISTED, 5)


# --- the command -----------------------------------------------------------------------------------------------------


def verify(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments], env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})


def test_the_command_says_what_is_wrong_and_what_to_do(copy: Path) -> None:
    out = str(copy.parent)
    whole = verify(out, "night")
    assert whole.exit_code == 0, whole.output
    assert "night is as it was committed" in whole.output
    assert "38 rows" in whole.output
    flip(copy / FIRST[0])
    (copy / "cells" / "stray.parquet").touch()
    harmed = verify(out)
    assert harmed.exit_code == 1
    for part in (f"{FIRST[0]}: altered", "→ repeat the run's command", "cells/stray.parquet: added", "2 findings"):
        assert part in harmed.output
    assert "Traceback" not in harmed.output


def test_one_broken_run_does_not_hide_the_others(copy: Path) -> None:
    (copy.parent / "broken").mkdir()
    (copy.parent / "broken" / "manifest.json").write_text("{")
    (copy.parent / "unfinished").mkdir()
    shutil.copy(copy / "run.json", copy.parent / "unfinished")
    found = verify(str(copy.parent))
    assert found.exit_code == 1
    assert "broken cannot be verified" in found.output
    assert "night is as it was committed" in found.output
    assert "not finished, so not verified: unfinished" in found.output


def test_the_command_without_a_run_is_one_line(tmp_path: Path) -> None:
    for arguments, words in (([str(tmp_path)], "holds no run"), ([str(tmp_path), "x"], "holds no run")):
        found = verify(*arguments)
        assert found.exit_code == 1
        assert words in found.stderr
        assert len(found.stderr.splitlines()) == 1
