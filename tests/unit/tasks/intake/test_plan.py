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

from leukoflow.core.errors import ConfigError, SourceError
from leukoflow.runs.records import Member, PlanSummary
from leukoflow.sources.identify import identify
from leukoflow.sources.reading import open_reader
from leukoflow.sources.spool import spool
from leukoflow.tasks.intake.manifest import read_manifest
from leukoflow.tasks.intake.manifest_join import _below_item
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.intake.plan import plan
from leukoflow.tasks.intake.plan_file import plan_schema, read_shard, read_summary, shards

KEY = b"a secret that only the hospital has"


def archive(folder: Path, names: list[str]) -> Path:
    path = folder / "fields.zip"
    with zipfile.ZipFile(path, "w") as stored:
        for name in names:
            stored.writestr(name, "" if name.endswith("/") else f"content of {name}")
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
    with pytest.raises(SourceError, match=r"holds no images \(2 folders and files that are not images\)"):
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


@pytest.mark.parametrize("names", [["./a.jpg", "a.jpg", "b.jpg"], ["b.jpg", "a.jpg", "./a.jpg"]])
@pytest.mark.parametrize("shard_size", [1, 4])
def test_of_a_name_with_and_without_dot_slash_the_equal_one_has_the_line(
    tmp_path: Path, names: list[str], shard_size: int
) -> None:
    path = tmp_path / "fields.tar"
    with tarfile.open(path, "w") as stored:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            stored.addfile(info, io.BytesIO(b"abc"))
    rows = [{"image_key": "a.jpg", "site": "Graz"}]
    summary, members = planned(tmp_path, path, manifest=manifest(tmp_path, rows), shard_size=shard_size)
    assert {m.image_key: m.site for m in members} == {"./a.jpg": None, "a.jpg": "Graz", "b.jpg": None}
    assert summary.missing == 0


@pytest.mark.parametrize(
    ("key", "inside"),
    [
        ("a.zip/x.jpg", "x.jpg"),
        ("./a.zip/x.jpg", "x.jpg"),
        ("./a.zip/s/x.jpg", "s/x.jpg"),
        (" ./a.zip/x.jpg", "x.jpg"),
        ("/a.zip/x.jpg", "x.jpg"),
        ("a.zip\\x.jpg", "x.jpg"),
        ("a.zip/ x.jpg", " x.jpg"),
    ],
)
def test_keys_within_an_archive_of_an_inbox(key: str, inside: str) -> None:
    assert _below_item(key) == inside


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"file": "f1.jpg"}], "has no column image_key among its 1 column:"),
        ([{"image_key": "f1.jpg", "site": ""}, {"image_key": "", "site": "Graz"}], "line 3: no image_key"),
        ([{"image_key": n, "site": str(i)} for i, n in enumerate("abacb")], r"lines 2, 4 \(1 more such lines\)"),
        ([{"image_key": "a", "um_per_px": "4"}, {"image_key": "b", "um_per_px": "four"}], "line 3: um_per_px is not a"),
        ([{"image_key": "a", "um_per_px": "-1"}], "line 2: um_per_px is not a positive number"),
        ([{"image_key": "a", "um_per_px": "1.234,5"}], "line 2: um_per_px is not a positive number"),
        ([{"image_key": "a", "patient_id": "P1"}], "set LEUKOFLOW_PATIENT_KEY"),
    ],
)  # fmt: skip
def test_unusable_manifests_say_what_and_where(tmp_path: Path, rows: list[dict[str, str]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_manifest(manifest(tmp_path, rows))


def test_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "odd.csv").write_bytes(b"image_key,site\na.jpg,\x81\n")
    with pytest.raises(ConfigError, match="line 2 is neither UTF-8 nor Windows-1252"):
        read_manifest(tmp_path / "odd.csv")
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(ConfigError):
        read_manifest(tmp_path / "empty.csv")


def test_configured_columns_must_be_there_and_may_not_evade_the_pseudonyms(tmp_path: Path) -> None:
    path = manifest(tmp_path, [{"image_key": "a", "patient_id": "P1"}])
    with pytest.raises(ConfigError, match="lacks stain"):
        read_manifest(path, ("stain",), KEY)
    with pytest.raises(ConfigError, match="names patient_id, which"):
        read_manifest(path, ("patient_id",), KEY)


# ---------------------------------------------------------------- images and lines that are spelled differently


@pytest.mark.parametrize(
    ("keys", "names", "expected", "words"),
    [
        (["slide1\\a.jpg", ".\\slide1\\b.jpg"], ["slide1/a.jpg", "slide1/b.jpg"], [0, 1], "apart from blanks, slashes"),
        (["slide1/a.jpg ", " slide1/b.jpg"], ["slide1/a.jpg", "slide1/b.jpg"], [0, 1], "apart from blanks, slashes"),
        (["s/Mu\u0308ller.jpg"], ["s/M\u00fcller.jpg"], [0], "apart from blanks, slashes"),
        (["S/A.JPG", "S/b.jpg"], ["s/a.jpg", "S/b.jpg"], [0, 1], "apart from upper and lower case"),
        (["s1/a.jpg", "s2/a.jpg"], ["night/s2/a.jpg", "night/s1/a.jpg"], [1, 0], "without the folder that everything"),
        (["fields/s1/a.jpg"], ["s1/a.jpg", "s2/a.jpg"], [0, None], "up to the source's own name"),
        (["D:\\scans\\fields\\s1\\a.jpg"], ["s1/a.jpg"], [0], "up to the source's own name"),
        (["a.jpg", "b.jpg"], ["s1/a.jpg", "s2/b.jpg", "s2/c.jpg"], [0, 1, None], "by the names of files alone"),
    ],
)  # fmt: skip
def test_lines_find_images_that_are_spelled_differently(
    tmp_path: Path, keys: list[str], names: list[str], expected: list[int | None], words: str
) -> None:
    path = manifest(tmp_path, [{"image_key": key, "site": f"site {i}"} for i, key in enumerate(keys)])
    summary, members = planned(tmp_path, archive(tmp_path, names), manifest=path)
    assert [m.site for m in members] == [None if i is None else f"site {i}" for i in expected]
    assert (summary.missing, len(summary.remarks)) == (0, 1)
    assert words in summary.remarks[0]
    assert summary.remarks[0].startswith("matched to their images ")
    assert read_summary(tmp_path / "plan.parquet") == summary


@pytest.mark.parametrize(
    ("keys", "names", "hint"),
    [
        # the manifest of another slide, whose fields have the same names
        (["s1/a.jpg", "s1/b.jpg"], ["s2/a.jpg", "s2/b.jpg"], "2 of 2 would match if their folders were left out"),
        # one field lacks, and somewhere else is one of the same name
        (["s1/a.jpg", "s1/b.jpg"], ["s1/a.jpg", "s2/b.jpg"], "1 of 1 would match if their folders were left out"),
        (["x/s1/a.jpg", "x/s1/b.jpg"], ["s1/a.jpg", "s1/b.jpg", "s2/c.jpg"],
         "2 of 2 would match if the outermost folder that the manifest gives were left out"),
        (["s1/a.jpg", "s2/b.jpg"], ["x/s1/a.jpg", "y/s2/b.jpg"],
         "2 of 2 would match if the outermost folder of the source stood in front of them"),
        (["s1/a.jpg"], ["s1/a.tif"], "1 of 1 would match if folders and the endings of the file names were left out"),
        # two images for one line, two lines for one image
        (["A.jpg"], ["a.JPG", "a.jpg"], None),
        (["A.jpg", "a.JPG"], ["a.jpg"], None),
        (["a.jpg"], ["s1/a.jpg", "s2/a.jpg"], None),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_not_matched(
    tmp_path: Path, keys: list[str], names: list[str], hint: str | None
) -> None:
    path = manifest(tmp_path, [{"image_key": key, "site": key} for key in keys])
    summary, members = planned(tmp_path, archive(tmp_path, names), manifest=path)
    assert [m.site for m in members] == [m.image_key if m.image_key in keys else None for m in members]
    assert summary.missing == len(set(keys) - set(names))
    hints = [r for r in summary.remarks if "would match if" in r]
    assert len(hints) == (hint is not None)
    assert hint is None or hint in hints[0]
    for name in (*keys, *names):
        assert name not in " ".join(summary.remarks)


def test_an_exact_name_comes_before_any_other_spelling(tmp_path: Path) -> None:
    rows = [{"image_key": key, "site": key} for key in ("a.jpg", "A.jpg", "b.jpg")]
    _, members = planned(tmp_path, archive(tmp_path, ["A.jpg", "a.jpg", "B.jpg"]), manifest=manifest(tmp_path, rows))
    assert [m.site for m in members] == ["A.jpg", "a.jpg", "b.jpg"]


def test_a_manifest_of_something_else_is_named_as_such(tmp_path: Path) -> None:
    path = manifest(tmp_path, [{"image_key": "x.tif"}])
    summary, _ = planned(tmp_path, archive(tmp_path, NAMES), manifest=path)
    assert summary.remarks == ("no line of the manifest names an image of the source: is it the manifest of this one?",)


# ---------------------------------------------------------------- slides of one name


def test_an_image_without_a_line_belongs_to_the_slide_whose_folder_it_lies_in(tmp_path: Path) -> None:
    names = ["S1/a.jpg", "S1/b.jpg", "S1/new.jpg", "night/S2/a.jpg", "night/S2/new.jpg", "S3/a.jpg"]
    said = {"S1/a.jpg": "S1", "S1/b.jpg": "S1", "night/S2/a.jpg": "S2", "S3/gone.jpg": "S3"}
    rows = [{"image_key": key, "slide_id": slide, "patient_id": "7"} for key, slide in said.items()]
    path = manifest(tmp_path, rows)
    summary, members = planned(tmp_path, archive(tmp_path, names), manifest=path, patient_key=KEY)
    assert [m.slide_id for m in members] == ["S1", "S1", "S1", "S2", "S2", None]
    seven = pseudonym("7", KEY)
    assert [m.patient_id for m in members] == [seven, seven, None, seven, None, None]
    assert summary.remarks == (
        "2 images to which the manifest gives no slide lie in the folder of one of its slides, and are counted to that "
        "slide, without a patient",
    )


@pytest.mark.parametrize(
    "rows",
    [
        [("1/a.jpg", "1"), ("1/b.jpg", "2")],  # folder 1 holds more than slide 1
        [("1/a.jpg", "1"), ("2/b.jpg", "1")],  # slide 1 lies in more than folder 1
        [("2/b.jpg", "1")],  # slide 1 lies somewhere else
    ],
)
def test_a_folder_named_like_another_slide_is_named_apart(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    path = manifest(tmp_path, [{"image_key": key, "slide_id": slide} for key, slide in rows])
    source = archive(tmp_path, ["1/a.jpg", "1/b.jpg", "1/new.jpg", "2/b.jpg"])
    summary, members = planned(tmp_path, source, manifest=path)
    said = dict(rows)
    for m in members:
        folder = m.image_key[0]
        apart = f"{folder} (not in the manifest)" if folder in said.values() else None
        assert m.slide_id == said.get(m.image_key, apart)
    assert "has the name of one of its slides and is another" in summary.remarks[0]


# ---------------------------------------------------------------- patients


def test_a_plan_with_patients_knows_its_key_by_a_check_value(tmp_path: Path) -> None:
    path = manifest(tmp_path, [{"image_key": "f1.jpg", "patient_id": "P1"}])
    source = archive(tmp_path, NAMES)
    summary, _ = planned(tmp_path, source, manifest=path, patient_key=KEY)
    known = hmac.new(KEY, b"leukoflow: check value of a patient key", hashlib.sha256).hexdigest()[:16]
    assert summary.patient_key_check == read_summary(tmp_path / "plan.parquet").patient_key_check == known
    assert KEY not in (tmp_path / "plan.parquet").read_bytes()
    assert planned(tmp_path, source)[0].patient_key_check == ""
    nobody = manifest(tmp_path, [{"image_key": "f1.jpg", "patient_id": "NaN"}])
    assert planned(tmp_path, source, manifest=nobody, patient_key=KEY)[0].patient_key_check == ""


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (b"x", "it has 1 characters"),
        (b"0123456789abcdef0123456789abcde", "it has 31 characters"),
        (b"x" * 64, "it has 1 different characters"),
        (b"a9f3c1d8e7b2" * 3, "it repeats a pattern"),
        (b"change-me-change-the-key-please-now", "it holds a placeholder"),
    ],
)
def test_keys_that_can_be_guessed_are_refused_with_the_rule(tmp_path: Path, key: bytes, why: str) -> None:
    path = manifest(tmp_path, [{"image_key": "f1.jpg", "patient_id": "P1"}])
    with pytest.raises(ConfigError, match=why) as refused:
        read_manifest(path, patient_key=key)
    assert "at least 32 characters, 8 different ones" in str(refused.value)
    assert "secrets.token_hex(32)" in str(refused.value)
    if len(key) > 1:
        assert key.decode() not in str(refused.value)


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


def test_a_patient_in_an_image_name_is_warned_of_without_naming_it(tmp_path: Path) -> None:
    path = manifest(tmp_path, [{"image_key": "MRN-4711/f1.jpg", "patient_id": "MRN-4711"}])
    (remark,) = read_manifest(path, patient_key=KEY).remarks
    assert "1 image names contain their patient's id" in remark
    assert "4711" not in remark


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
