"""The manifests that hospitals send: read as they are meant, or refused with the line; never quoted, never guessed."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leukoflow.core.errors import ConfigError
from leukoflow.tasks.intake.manifest import Manifest, manifest_keys, read_manifest
from leukoflow.tasks.intake.patient_key import pseudonym

KEY = b"a key that only these tests have"
HEADER = "image_key,slide_id,patient_id\n"


def read(folder: Path, text: str | bytes, meta: tuple[str, ...] = ()) -> Manifest:
    path = folder / "slides.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(path, meta, KEY)


def refused(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as error:
        read(folder, text)
    return str(error.value).replace(str(folder), "")


def column(known: Manifest, name: str) -> list[Any]:
    values: list[Any] = known.table[name].to_pylist()
    return values


def patients(*names: str | None) -> list[str | None]:
    return [None if name is None else pseudonym(name, KEY) for name in names]


# ---------------------------------------------------------------- nothing of a line in any message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEADER + "a.jpg,S1,Family, Given *1.1.1900\n", "line 2 has 4 fields, the header names 3; quote values that "
         "contain commas"),
        (HEADER + "a.jpg,S1,7\nb.jpg,Family\nc.jpg,Family\n", "line 3 has 2 fields, the header names 3 (2 such "
         "lines)"),
        (HEADER.replace(",", ";") + "a.jpg;S1;Family; Given\n", "quote values that contain semicolons"),
        (HEADER + 'a.jpg,S1,"Family\nb.jpg,S1,7\n', "line 2: its quotation marks do not match"),
        (HEADER + 'a.jpg,"Family" Given,7\n', "line 2: its quotation marks do not match"),
        (HEADER + f'a.jpg,S1,{"Family" * 30000}\n', "line 2: its quotation marks do not match"),
        ("slide1/Family.jpg,Family,1900\n", "has no column image_key among its 3 columns:"),
        (HEADER + "a.jpg,S1,Family\na.jpg,S1,Given\n", "with different values: lines 2, 3; keep one"),
        (HEADER + ",S1,Family\n", "line 2: no image_key"),
        ("image_key,um_per_px\na.jpg,Family\n", "line 2: um_per_px is not a positive number"),
        ("image_key,um_per_px\na.jpg,0.42\nb.jpg,420\n", "line 3: um_per_px is not between 0.01 and 100"),
        ("image_key,um_per_px\na.jpg,4.2e-7\n", "line 2: um_per_px is not between 0.01 and 100"),
        ("image_key,site,Site \na.jpg,Family,Family\n", "has more than one column site"),
        (HEADER.encode() + b"a.jpg,S1,Family\0\n", "line 2 contains zero bytes"),
        (b"PK\x03\x04Family", "is a workbook of a spreadsheet: save it as CSV"),
        (b"\xff\xfeF\0a\0m", "looks like UTF-16 and is damaged"),
        (b"PAR1Family", "is a damaged Parquet file"),
        (b"\n \n", "is empty"),
    ],
)  # fmt: skip
def test_messages_give_the_line_and_nothing_that_it_says(tmp_path: Path, text: str | bytes, words: str) -> None:
    message = refused(tmp_path, text)
    assert words in message
    assert "Family" not in message
    assert "Given" not in message


def test_lines_are_those_of_an_editor_after_a_quoted_line_break(tmp_path: Path) -> None:
    text = HEADER + 'a.jpg,"S1\nx",7\nb.jpg,S2,8\n\n,S3,9\n'
    assert ", line 6: no image_key" in refused(tmp_path, text)
    known = read(tmp_path, HEADER + 'a.jpg,"S1\r\n\r\nx",7\r\nb.jpg,S2,NA\r\n')
    assert "in line 5:" in known.remarks[0]


# ---------------------------------------------------------------- what spreadsheets write


@pytest.mark.parametrize(
    "data",
    [
        "image_key;site\nä.jpg;Süd\n".encode("utf-8-sig"),
        "image_key\tsite\r\nä.jpg\tSüd\r\n".encode("utf-16"),
        "image_key\tsite\nä.jpg\tSüd\n".encode("utf-16-le"),
        "image_key\tsite\nä.jpg\tSüd\n".encode("utf-16-be"),
        "sep=;\r\nimage_key;site\r\nä.jpg;Süd\r\n".encode(),
        "\n Image Key ; SITE ;;\n\nä.jpg;Süd;;\n;;;\n\n".encode(),
        "image_key,site\rä.jpg,Süd\r".encode(),
        'image_key;site,city,country\nä.jpg;"Süd"\n'.replace("site,city,country", "site").encode(),
        '"image_key";"site"\n"ä.jpg";"Süd"'.encode(),
        "image_key,site\nä.jpg,Süd,,,\n".encode(),
        "image_key,site\nä.jpg,\u200bSu\u0308d\u00a0\n".encode(),
    ],
)
def test_what_programs_put_around_values_makes_no_difference(tmp_path: Path, data: bytes) -> None:
    known = read(tmp_path, data)
    assert (dict(known.rows), column(known, "site"), known.remarks) == ({"ä.jpg": 0}, ["Süd"], ())


def test_lines_in_windows_1252_are_read_and_counted(tmp_path: Path) -> None:
    lines = [b"image_key,site", "ä.jpg,Süd".encode(), "b.jpg,Süd €".encode("cp1252"), b"c.jpg,Graz"]
    known = read(tmp_path, b"\n".join(lines))
    assert column(known, "site") == ["Süd", "Süd €", "Graz"]
    assert known.remarks == (
        "1 of the manifest's lines read as Windows-1252, since they are not UTF-8: line 3; save it as UTF-8",
    )


def test_scales_with_a_decimal_comma_or_nothing(tmp_path: Path) -> None:
    known = read(tmp_path, "image_key;um_per_px\na;0,42\nb; 0.25 \nc;NaN\nd;\n")
    assert column(known, "um_per_px") == [0.42, 0.25, None, None]
    (remark,) = known.remarks
    assert "um_per_px says nothing" in remark
    assert "in line 4: these images have no scale of their own" in remark


def test_a_header_alone_is_remarked(tmp_path: Path) -> None:
    known = read(tmp_path, HEADER)
    assert known.rows == {}
    assert known.remarks == ("the manifest has a header and no line: it says nothing of any image",)


def test_a_line_that_is_repeated_word_for_word_counts_once(tmp_path: Path) -> None:
    known = read(tmp_path, HEADER + "a,S1,7\nb,S1,8\na,S1,7 \nc,S2,9\n")
    assert dict(known.rows) == {"a": 0, "b": 1, "c": 2}
    assert column(known, "patient_id") == patients("7", "8", "9")
    assert known.remarks[1:] == ("repeated word for word in the manifest, and counted once: line 4",)
    assert known.places([2]) == "line 5"
    assert manifest_keys(tmp_path / "slides.csv") == ["a", "b", "c"]


# ---------------------------------------------------------------- ids


def test_patients_that_are_nobody_are_never_one_patient(tmp_path: Path) -> None:
    nobody = ["NaN", "nan", "NA", "N/A", "#N/A", "None", "null", " ", "", "unknown", "-", "#REF!"]
    text = HEADER + "".join(f"{i}.jpg,S{i},{name}\n" for i, name in enumerate(nobody)) + "x.jpg,N/A,7\n"
    known = read(tmp_path, text)
    assert column(known, "patient_id") == patients(*[None] * len(nobody), "7")
    assert column(known, "slide_id") == [*(f"S{i}" for i in range(len(nobody))), None]
    assert known.remarks == (
        "slide_id says nothing (empty, NaN, NA, unknown or the like) in line 14: these images are grouped by the "
        "folder that they lie in",
        "patient_id says nothing (empty, NaN, NA, unknown or the like) in lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 "
        "more: these images have no patient",
    )


def test_a_column_without_any_patient_needs_no_remark(tmp_path: Path) -> None:
    assert read(tmp_path, HEADER + "a.jpg,S1,\nb.jpg,S1,\n").remarks == ()


def test_ids_that_a_spreadsheet_has_cut_are_no_ids(tmp_path: Path) -> None:
    known = read(tmp_path, HEADER + 'a,S1,1.23457E+11\nb,1E+05,1.23457E+11\nc,23E0456,7\nd,S2,"1,2e+11"\n')
    assert column(known, "patient_id") == patients(None, None, "7", None)
    assert column(known, "slide_id") == ["S1", None, "23E0456", "S2"]
    assert "patient_id has lost its digits to a spreadsheet, as in 1.2E+11, in lines 2, 3, 5: these" in known.remarks[1]
    assert "slide_id has lost its digits to a spreadsheet, as in 1.2E+11, in line 3: these" in known.remarks[0]


def test_dates_that_a_spreadsheet_has_made(tmp_path: Path) -> None:
    dates = [
        "01.03.2026",
        "3/1/2026",
        "2026-03-01 00:00:00",
        "1-Mar",
        "Mar-26",
        "01. Mär 26",
        "120385-1234",
        "12-34-56",
    ]
    known = read(tmp_path, HEADER + "".join(f"{i},{d},{d}\n" for i, d in enumerate(dates)))
    assert column(known, "patient_id") == patients(*[None] * 6, "120385-1234", "12-34-56")
    assert column(known, "slide_id") == dates
    assert "slide_id is a date in lines 2, 3, 4, 5, 6, 7, which" in known.remarks[0]
    assert "patient_id is a date in lines 2, 3, 4, 5, 6, 7, which" in known.remarks[1]
    assert "these images have no patient" in known.remarks[1]


def test_blanks_and_invisible_characters_make_no_other_patient(tmp_path: Path) -> None:
    ids = ["7 ", "7", " 7", "7\u00a0", "\u200b7", '"=""7"""', "'7"]
    known = read(tmp_path, HEADER + "".join(f"{i},S1 ,{one}\n" for i, one in enumerate(ids)))
    assert column(known, "patient_id") == patients(*["7"] * len(ids))
    assert set(column(known, "slide_id")) == {"S1"}
    assert known.remarks == (
        "slide_id has blanks, quotation marks or invisible characters around it in lines 2, 3, 4, 5, 6, 7, 8: they are "
        "left out",
        "patient_id has blanks, quotation marks or invisible characters around it in lines 2, 4, 5, 6, 7, 8: they are "
        "left out",
    )


def test_ids_that_look_alike_stay_apart_with_a_remark(tmp_path: Path) -> None:
    known = read(tmp_path, HEADER + "a,s1,007\nb,S1,7\nc,S2,7.0\nd,S3,70\n")
    assert column(known, "patient_id") == patients("007", "7", "7.0", "70")
    assert column(known, "slide_id") == ["s1", "S1", "S2", "S3"]
    assert (
        "slide_id differs only in leading zeros, a trailing .0 or upper and lower case in lines 2, 3:"
        in known.remarks[0]
    )
    assert "patient_id differs only in leading zeros" in known.remarks[1]
    assert "in lines 2, 3, 4: they are treated as different" in known.remarks[1]


def test_a_column_of_numbers_with_gaps_has_no_decimal_points(tmp_path: Path) -> None:
    known = read(tmp_path, HEADER + "a,S1,7.0\nb,S1,\nc,S1,12.0\n")
    assert column(known, "patient_id") == patients("7", None, "12")
    assert "every patient_id of the manifest ends with .0" in known.remarks[0]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([7.0, float("nan"), None, 8.0]), ["7", None, None, "8"]),
        (pa.array([7, None, 8, 9], pa.int32()), ["7", None, "8", "9"]),
        (pa.array(["7 ", "nan", "", None]), ["7", None, None, None]),
        (pa.array(["007", "7", "007", "7"]).dictionary_encode(), ["007", "7", "007", "7"]),
        (pa.array([123456789012345678.0, 7.5, 7.0, 7.0]), [None, "7.5", "7", "7"]),
        (pa.array(["7", None, "8", "9"], pa.large_string()), ["7", None, "8", "9"]),
        (pa.array([16777216.0, 16777215.0, 9.0, 8.0], pa.float32()), [None, "16777215", "9", "8"]),
        (pa.array([2048, 2047, 9, 8], pa.int32()).cast(pa.float16()), [None, "2047", "9", "8"]),
        (pa.array(map(Decimal, ("12345", "7.5", "0", "100")), pa.decimal128(38, 10)), ["12345", "7.5", "0", "100"]),
    ],
)
def test_ids_of_parquet(tmp_path: Path, ids: pa.Array, expected: list[str | None]) -> None:
    table = pa.table({"image_key": list("abcd"), "patient_id": ids, "um_per_px": [0.5, float("nan"), None, 0.25]})
    pq.write_table(table, tmp_path / "slides.parquet")
    known = read_manifest(tmp_path / "slides.parquet", (), KEY)
    assert column(known, "patient_id") == patients(*expected)
    assert column(known, "um_per_px") == [0.5, None, None, 0.25]
    silent = [i for i, one in enumerate(expected, start=1) if one is None]
    lost = [r for r in known.remarks if r.startswith(("patient_id says nothing", "patient_id has lost"))]
    named = [r for r in lost if ", ".join(map(str, silent)) in r]
    assert len(named) == len(lost) == bool(silent)


def test_parquet_columns_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    dates = pa.array([20000], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"image_key": ["a"], "patient_id": dates}), tmp_path / "slides.parquet")
    with pytest.raises(ConfigError, match="the column patient_id has the type date32"):
        read_manifest(tmp_path / "slides.parquet", (), KEY)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_text_of_parquet_that_is_no_utf8_is_refused_unquoted(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "slides.parquet"
    foreign = pa.array([b"M\xfcller.jpg"], pa.binary()).cast(
        pa.large_binary() if kind == pa.large_string() else pa.binary()
    )
    text = pa.Array.from_buffers(kind, 1, foreign.buffers())
    pq.write_table(pa.table({"image_key": text}), path)
    for read_it in (lambda: read_manifest(path, (), KEY), lambda: manifest_keys(path)):
        with pytest.raises(ConfigError) as refused:
            read_it()
        assert str(refused.value) == f"the manifest {path} has text that is not UTF-8: write it again"


def test_a_scale_that_is_a_list_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_key": ["a"], "um_per_px": [[0.5, 0.25]]}), tmp_path / "slides.parquet")
    with pytest.raises(ConfigError, match=r"the column um_per_px has the type list<.*>; store it as a number"):
        read_manifest(tmp_path / "slides.parquet", (), KEY)


def test_further_columns_are_kept_as_they_are(tmp_path: Path) -> None:
    known = read(tmp_path, "image_key,Stain \na, NA\nb,\n", ("stain",))
    assert column(known, "meta_stain") == [" NA", None]
