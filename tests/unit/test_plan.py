"""Planning: what the plan records, the manifest, pseudonyms, and what may never depend on how the run is cut."""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leukoflow.errors import ConfigError, SourceError
from leukoflow.records import Member, PlanSummary
from leukoflow.sources import identify, open_reader, spool
from tasks.plan import plan, plan_schema, pseudonym, read_manifest, read_shard, read_summary, shards

KEY = b"a secret that only the hospital has"


def archive(folder: Path, names: list[str]) -> Path:
    path = folder / "fields.zip"
    with zipfile.ZipFile(path, "w") as stored:
        for name in names:
            stored.writestr(name, f"content of {name}")
    return path


def manifest(folder: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def planned(folder: Path, source: Path, **options: Any) -> tuple[PlanSummary, list[Member]]:
    options = {"shard_size": 4, **options}
    summary = plan(identify(source), folder / "plan.parquet", missing_out=folder / "missing.parquet", **options)
    file = pq.ParquetFile(folder / "plan.parquet")
    return summary, [member for k in range(summary.shards) for member in read_shard(file, k)]


NAMES = [f"f{i}.jpg" for i in range(10)]


def test_every_shard_is_one_row_group_in_source_order(tmp_path: Path) -> None:
    names = list(reversed(NAMES))
    source = archive(tmp_path, names)
    summary, members = planned(tmp_path, source, um_per_px=0.5)
    file = pq.ParquetFile(tmp_path / "plan.parquet")
    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [4, 4, 2]
    assert [(s.name, s.first, s.count) for s in shards(summary)] == [
        ("00000", 0, 4), ("00001", 4, 4), ("00002", 8, 2),
    ]  # fmt: skip
    assert [m.image_key for m in members] == names
    assert [m.ordinal for m in members] == list(range(10))
    assert {m.um_per_px for m in members} == {0.5}
    assert summary.members == 10
    with open_reader(summary.source) as reader:
        assert reader.read(read_shard(file, 2)[1]) == b"content of f0.jpg"


def test_strings_are_plain_and_the_schema_is_fixed(tmp_path: Path) -> None:
    planned(tmp_path, archive(tmp_path, NAMES))
    file = pq.ParquetFile(tmp_path / "plan.parquet")
    assert file.schema_arrow.remove_metadata().equals(plan_schema())
    encodings = {
        encoding
        for group in range(file.num_row_groups)
        for column in range(file.metadata.num_columns)
        for encoding in file.metadata.row_group(group).column(column).encodings
    }
    assert not {encoding for encoding in encodings if "DICTIONARY" in encoding}


def test_summary_is_read_back_from_the_file(tmp_path: Path) -> None:
    summary, _ = planned(tmp_path, archive(tmp_path, [*NAMES, "Thumbs.db"]))
    assert summary.ignored == 1
    assert read_summary(tmp_path / "plan.parquet") == summary
    with (tmp_path / "plan.parquet").open("rb") as file:
        assert read_summary(file) == summary


def test_a_parquet_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match="is not a plan"):
        read_summary(tmp_path / "other.parquet")


def test_digest_knows_content_and_manifest_but_not_shard_size(tmp_path: Path) -> None:
    source = archive(tmp_path, NAMES)
    digest = planned(tmp_path, source)[0].digest
    assert planned(tmp_path, source, shard_size=3)[0].digest == digest
    sites = manifest(tmp_path, [{"image_key": "f1.jpg", "site": "Graz"}])
    with_site = planned(tmp_path, source, manifest=sites)[0].digest
    other = planned(tmp_path, archive(tmp_path, [*NAMES[:-1], "x.jpg"]))[0].digest
    assert len({digest, with_site, other}) == 3


def test_compressed_tar_offsets_count_within_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "fields.tar.gz"
    with tarfile.open(path, "w:gz") as stored:
        for i, name in enumerate(NAMES):
            info = tarfile.TarInfo(name)
            if i == 5:
                info.type, info.linkname = tarfile.SYMTYPE, "f0.jpg"
                stored.addfile(info)
                continue
            data = bytes([65 + i]) * (i + 1)
            info.size = len(data)
            stored.addfile(info, io.BytesIO(data))
    summary, members = planned(tmp_path, path)
    assert [m.offset for m in members] == [0, 1, 3, 6, 0, 5, 5, 12, 0, 9]
    wanted = [(shard, members[shard.first : shard.first + shard.count]) for shard in shards(summary)]
    for shard in spool(summary.source, wanted, lambda shard: (tmp_path / shard.name).open("wb")):
        with open_reader(summary.source, spool_file=tmp_path / shard.name) as reader:
            for member in wanted[shard.ordinal][1]:
                if member.ordinal != 5:
                    assert reader.read(member) == bytes([65 + member.ordinal]) * (member.ordinal + 1)


def test_empty_sources_are_refused(tmp_path: Path) -> None:
    source = archive(tmp_path, ["Thumbs.db", "folder/"])
    with pytest.raises(SourceError, match=r"holds no images \(2 folders and litter\)"):
        planned(tmp_path, source)
    with pytest.raises(SourceError, match="holds no images"):
        planned(tmp_path, archive(tmp_path, []))


def test_truncation_reaches_the_summary(tmp_path: Path) -> None:
    source = archive(tmp_path, NAMES)
    source.write_bytes(source.read_bytes()[:-100])
    summary, members = planned(tmp_path, source)
    assert "cut off" in (summary.truncated or "")
    assert len(members) == 10


def test_remarks_reach_the_summary_and_plans_without_any_are_read(tmp_path: Path) -> None:
    source = archive(tmp_path, NAMES)
    source.write_bytes(b"#!/bin/sh\n" * 5 + source.read_bytes())
    summary, members = planned(tmp_path, source)
    assert summary.remarks == ("the first 50 bytes hold no file: the zip archive begins behind them",)
    assert (len(members), summary.truncated) == (10, None)
    path = tmp_path / "plan.parquet"
    assert read_summary(path) == summary
    table = pq.read_table(path)
    stored = json.loads(pq.read_metadata(path).metadata[b"leukoflow.plan"])
    del stored["remarks"]  # as older versions wrote it
    pq.write_table(table.replace_schema_metadata({"leukoflow.plan": json.dumps(stored)}), path)
    assert read_summary(path) == replace(summary, remarks=())


# ---------------------------------------------------------------- the manifest


def test_manifest_fields_reach_their_members(tmp_path: Path) -> None:
    rows = [
        {"image_key": "f3.jpg", "slide_id": "0012", "site": "Graz", "scanner": "", "um_per_px": "0.25", "stain": "MGG",
         "note": "dropped"},
        {"image_key": "f1.jpg", "slide_id": "S1", "site": "", "scanner": "Axio", "um_per_px": "", "stain": "",
         "note": ""},
    ]  # fmt: skip
    path = manifest(tmp_path, rows)
    summary, members = planned(
        tmp_path, archive(tmp_path, NAMES), manifest=path, meta_columns=("stain",), um_per_px=0.5
    )
    plain = [(m.slide_id, m.patient_id, m.site, m.scanner, m.um_per_px, m.meta) for m in members]
    assert plain[3] == ("0012", None, "Graz", None, 0.25, (("meta_stain", "MGG"),))
    assert plain[1] == ("S1", None, None, "Axio", 0.5, (("meta_stain", None),))
    assert plain[0] == (None, None, None, None, 0.5, (("meta_stain", None),))
    assert summary.missing == 0
    assert not (tmp_path / "missing.parquet").exists()
    assert b"dropped" not in (tmp_path / "plan.parquet").read_bytes()


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_manifests_of_other_spreadsheets(tmp_path: Path, delimiter: str) -> None:
    path = manifest(tmp_path, [{"image_key": "a, b.jpg", "site": "Graz; Süd"}], delimiter)
    known = read_manifest(path)
    assert known.rows == {"a, b.jpg": 0}
    assert known.table["site"].to_pylist() == ["Graz; Süd"]


def test_parquet_manifest(tmp_path: Path) -> None:
    table = pa.table({"image_key": ["f1.jpg"], "slide_id": [7], "um_per_px": pa.array([0.25], pa.float32())})
    pq.write_table(table, tmp_path / "manifest.parquet")
    _, members = planned(tmp_path, archive(tmp_path, NAMES), manifest=tmp_path / "manifest.parquet")
    assert (members[1].slide_id, members[1].um_per_px) == ("7", 0.25)


def test_images_that_the_manifest_expects_and_nobody_sent(tmp_path: Path) -> None:
    rows = [{"image_key": name, "site": "Graz"} for name in ("f1.jpg", "gone.jpg", "also gone.jpg")]
    summary, _ = planned(tmp_path, archive(tmp_path, NAMES), manifest=manifest(tmp_path, rows))
    assert summary.missing == 2
    missing = pq.read_table(tmp_path / "missing.parquet")
    assert missing["image_key"].to_pylist() == ["gone.jpg", "also gone.jpg"]
    assert missing["site"].to_pylist() == ["Graz", "Graz"]


def test_a_leading_dot_slash_makes_no_difference(tmp_path: Path) -> None:
    rows = [{"image_key": "a.jpg", "site": "Graz"}]
    summary, members = planned(tmp_path, archive(tmp_path, ["./a.jpg"]), manifest=manifest(tmp_path, rows))
    assert (members[0].image_key, members[0].site, summary.missing) == ("./a.jpg", "Graz", 0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"file": "f1.jpg"}], "has no column image_key, only file"),
        ([{"image_key": "f1.jpg"}, {"image_key": ""}], "line 3: no image_key"),
        ([{"image_key": n} for n in ("a", "b", "a", "c", "b")], "more than one line for a, b: keep one each"),
        ([{"image_key": "a", "um_per_px": "4"}, {"image_key": "b", "um_per_px": "0,4"}], "line 3: um_per_px is '0,4'"),
        ([{"image_key": "a", "um_per_px": "-1"}], "line 2: um_per_px is '-1'"),
        ([{"image_key": "a", "um_per_px": "nan"}], "line 2: um_per_px is 'nan'"),
        ([{"image_key": "a", "patient_id": "P1"}], "set LEUKOFLOW_PATIENT_KEY"),
    ],
)  # fmt: skip
def test_unusable_manifests_say_what_and_where(tmp_path: Path, rows: list[dict[str, str]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_manifest(manifest(tmp_path, rows))


def test_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("image_key,site\na.jpg,Süd\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="neither UTF-8 CSV nor Parquet"):
        read_manifest(tmp_path / "latin.csv")
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(ConfigError):
        read_manifest(tmp_path / "empty.csv")


def test_configured_columns_must_be_there_and_may_not_evade_the_pseudonyms(tmp_path: Path) -> None:
    path = manifest(tmp_path, [{"image_key": "a", "patient_id": "P1"}])
    with pytest.raises(ConfigError, match="lacks stain"):
        read_manifest(path, ("stain",), KEY)
    with pytest.raises(ConfigError, match="names patient_id, which"):
        read_manifest(path, ("patient_id",), KEY)


# ---------------------------------------------------------------- patients


def test_pseudonym_is_a_keyed_hash() -> None:
    assert pseudonym("P1", KEY) == "p_" + hmac.new(KEY, b"P1", hashlib.sha256).hexdigest()[:32]
    assert pseudonym("P1", KEY) != pseudonym("P1", b"another key")


def test_no_plain_patient_id_is_written_or_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"image_key": f"f{i}.jpg", "patient_id": f"MRN-{4711 + i % 2}"} for i in range(4)]
    rows += [{"image_key": "gone.jpg", "patient_id": "MRN-4711"}, {"image_key": "f4.jpg", "patient_id": ""}]
    path = manifest(tmp_path, rows)
    _, members = planned(tmp_path, archive(tmp_path, NAMES), manifest=path, patient_key=KEY)
    first, second = pseudonym("MRN-4711", KEY), pseudonym("MRN-4712", KEY)
    assert [m.patient_id for m in members[:5]] == [first, second, first, second, None]
    assert pq.read_table(tmp_path / "missing.parquet")["patient_id"].to_pylist() == [first]
    for name in ("plan.parquet", "missing.parquet"):
        table = pq.read_table(tmp_path / name)
        assert "MRN" not in str(table.to_pylist())
    assert "MRN" not in caplog.text


def test_a_patient_in_an_image_name_is_warned_of_without_naming_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = manifest(tmp_path, [{"image_key": "MRN-4711/f1.jpg", "patient_id": "MRN-4711"}])
    read_manifest(path, patient_key=KEY)
    assert "1 image names contain their patient's id" in caplog.text
    assert "4711" not in caplog.text


def test_a_column_of_empty_patients_needs_no_key(tmp_path: Path) -> None:
    path = manifest(tmp_path, [{"image_key": "a", "patient_id": ""}])
    assert read_manifest(path).table["patient_id"].to_pylist() == [None]


def test_members_survive_the_round_trip(tmp_path: Path) -> None:
    """Every field of a member comes back from the file, also a refusal and odd names."""
    source = archive(tmp_path, ["ä,\n.jpg", "x.zip"])
    _, members = planned(tmp_path, source)
    assert replace(members[0], offset=0) == Member(
        0, "ä,\n.jpg", "", 0, 19, 19, 0, members[0].identity, None, None, None, None, None, None, ()
    )
    assert members[1].refusal == "archive within the source: unpack it and hand over its images"
