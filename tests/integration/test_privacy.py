"""What a run leaves holds no name from columns or metadata, and names of images only where people look for them."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import smears, until, write_folder
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from leukoflow.core.config import load_config
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.monitor.metrics import RunsCollector, exposition
from leukoflow.tasks.monitor.nights import gather, nights_json
from leukoflow.tasks.report.nights_report import nights_page

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

NEVER = {
    "patient": "Ottoline-Harkness",
    "column": "Barnabas-Thistlewood",
    "birth": "19470223-Birthday",
    "header": "Column-of-Evadne-Pym",
    "exif": "Cosimo-Featherstone",
    "xmp": "Dorothea-Wynyard",
    "iptc": "Erasmus-Pettigrew",
    "comment": "Fenella-Crabtree",
    "png": "Gideon-Ollerenshaw",
    "ztxt": "Hermione-Sproat",
    "tiff": "Ignatius-Larkspur",
    "dicom": "Jocasta-Merriweather",
    "zip": "Kenelm-Applegarth",
    "member": "Lavinia-Bosworth",
    "text": "Mortimer-Quillfeather",
}
"""Names that come in through columns and metadata."""

KEYS = ("Nathaniel-Umbrage", "Ophelia-Rookwood", "Percival-Gaunt", "Quentin-Sedgewick")
"""Names that images and folders have."""


def jpeg(field: Image.Image) -> bytes:
    """EXIF, XMP, IPTC in a Photoshop block, and a comment."""
    exif = Image.Exif()
    exif[0x013B], exif[0x010E] = NEVER["exif"], f"smear of {NEVER['exif']}"
    sink = io.BytesIO()
    field.save(sink, "JPEG", quality=93, exif=exif, comment=NEVER["comment"])
    xmp = f"<x:xmpmeta><dc:creator>{NEVER['xmp']}</dc:creator></x:xmpmeta>".encode()
    caption = NEVER["iptc"].encode()
    iptc = b"\x1c\x02\x50" + struct.pack(">H", len(caption)) + caption
    resource = b"8BIM\x04\x04\x00\x00" + struct.pack(">I", len(iptc)) + iptc + b"\0" * (len(iptc) % 2)
    blocks = (
        (b"\xff\xe1", b"http://ns.adobe.com/xap/1.0/\0" + xmp),
        (b"\xff\xed", b"Photoshop 3.0\0" + resource),
    )
    inserted = b"".join(marker + struct.pack(">H", len(body) + 2) + body for marker, body in blocks)
    data = sink.getvalue()
    return data[:2] + inserted + data[2:]


def png(field: Image.Image) -> bytes:
    info = PngInfo()
    info.add_text("Author", NEVER["png"])
    info.add_text("Description", NEVER["ztxt"], zip=True)
    sink = io.BytesIO()
    field.save(sink, "PNG", pnginfo=info)
    return sink.getvalue()


def tiff(field: Image.Image) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[315] = NEVER["tiff"], NEVER["tiff"]
    sink = io.BytesIO()
    field.save(sink, "TIFF", tiffinfo=tags)
    return sink.getvalue()


def dicom() -> bytes:
    """The head of a DICOM file: preamble, magic, and the patient's name."""
    name = NEVER["dicom"].encode()
    name += b" " * (len(name) % 2)
    return b"\0" * 128 + b"DICM" + struct.pack("<HH2sH", 0x0010, 0x0010, b"PN", len(name)) + name


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    fields = list(smears(tmp_path_factory.mktemp("private"), 16, seed=8).values())
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in fields]
    return {
        f"{KEYS[0]}/{KEYS[1]}-exif.jpg": jpeg(images[0]),
        f"{KEYS[0]}/{KEYS[1]}.png": png(images[1]),
        f"{KEYS[0]}/{KEYS[2]}.tif": tiff(images[2]),
        f"{KEYS[0]}/{KEYS[2]}-cut.jpg": jpeg(images[3])[:900],
        f"{KEYS[0]}/{KEYS[2]}-cut.tif": tiff(images[4])[:400],
        f"{KEYS[0]}/{KEYS[2]}-cut.png": png(images[5])[:300],
        f"{KEYS[3]}.dcm": dicom(),
        f"{KEYS[3]}.txt": f"notes about {NEVER['text']}".encode(),
        **{f"{KEYS[3]}-{i}.jpg": data for i, data in enumerate(fields[6:])},
    }


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = f"handed over by {NEVER['zip']}".encode()
        for name, data in members.items():
            entry = zipfile.ZipInfo(name)
            entry.comment = NEVER["member"].encode()
            archive.writestr(entry, data)
    return path


def write_manifest(path: Path, members: dict[str, bytes]) -> Path:
    head = f"image_key,patient_id,slide_id,site,scanner,patient_name,birth_date,{NEVER['header']}"
    rows = [
        f"{key},{NEVER['patient']},slide-{i % 3},Site-A,Scanner-1,{NEVER['column']},{NEVER['birth']},x"
        for i, key in enumerate([*members, "absent.jpg"])
    ]
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def left(
    screen: Any, members: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, bytes]]:
    """OUT with a run of a zip, one of a folder from which an image went, one that failed; and what else there is."""
    folder = tmp_path_factory.mktemp("privacy")
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEUKOFLOW_PATIENT_KEY", "a key that only these tests have")
        manifest = write_manifest(folder / "slides.csv", members)
        settings = {"manifest": str(manifest), "alerts": {"quarantined_share": 0.1}, "metrics_port": 0}
        state = screen(write_archive(folder / "night.zip", members), out, "zip", **settings)
        assert state.is_completed(), state.message
        broken = folder / "broken.csv"
        row = f"{next(iter(members))},{NEVER['column']},{NEVER['patient']}, {NEVER['birth']}"
        broken.write_text(f"image_key,slide_id,patient_id\n{row}\n")
        state = screen(folder / "night.zip", out, "refused", manifest=str(broken))
        assert state.is_failed()
        assert "line 2 has 4 fields, the header names 3; quote values that contain commas" in str(state.message)
        source = write_folder(folder / "night", members)
        open_run(load_config(source=str(source), out=str(out), run_id="gone", bundle=bundle_of(out), shard_size=16))
        (source / KEYS[0] / f"{KEYS[2]}.tif").unlink()
        screen(source, out, "gone")
        failing = write_archive(folder / "other.zip", members)
        open_run(load_config(source=str(failing), out=str(out), run_id="fails", bundle=bundle_of(out), shard_size=16))
        (out / "fails" / "predictions").write_text("in the way")  # where the table of the shard is to go
        state = screen(failing, out, "fails", limits={"shard_retries": 1, "retry_delay_seconds": 0.1})
        assert not state.is_completed()
    elsewhere = {
        "metrics": exposition(RunsCollector(str(out))),
        "nights.html": nights_page(gather(str(out))).encode(),
        "nights.json": nights_json(gather(str(out))),
    }
    return out, elsewhere | prefect_text()


def bundle_of(out: Path) -> str:
    return str(json.loads((out / "zip" / "run.json").read_text())["bundle"])


def prefect_text() -> dict[str, bytes]:
    """Every value in the databases of the Prefect server: runs, parameters, states, logs, artifacts, events."""
    home = Path(os.environ["PREFECT_HOME"])
    database = home / "prefect.db"

    def complete() -> str:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            text = "\n".join(connection.iterdump())
        sent = all(f"screening, run {name}" in text for name in ("zip", "gone", "fails"))
        return text if sent and "leukoflow.run.quarantined-too-many" in text and "accounted for" in text else ""

    text = until(complete, 60, "Prefect has stored logs and events")
    logs = {p.name: p.read_bytes() for p in home.rglob("*.log")}
    return logs | {"the Prefect database": text.encode()}


def strings(column: Any) -> Iterator[str]:
    for value in column.to_pylist():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str):
                yield one


def text_of(path: Path) -> bytes:
    """The bytes of a file, and of a table its strings and metadata as well."""
    data = path.read_bytes()
    if path.suffix != ".parquet":
        return data
    table = pq.read_table(path)
    words = [w for column in table.columns for w in strings(column)]
    words += [str(table.schema.metadata), *table.column_names]
    return data + "\n".join(words).encode()


def test_names_from_columns_and_metadata_are_nowhere(left: tuple[Path, dict[str, bytes]]) -> None:
    out, elsewhere = left
    seen = 0
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        found = text_of(path)
        seen += 1
        assert not [k for k, name in NEVER.items() if name.encode() in found], path
    assert seen > 60
    for place, found in elsewhere.items():
        assert not [k for k, name in NEVER.items() if name.encode() in found], place


def test_names_of_images_are_only_in_tables_and_the_report(left: tuple[Path, dict[str, bytes]]) -> None:
    out, elsewhere = left
    inside = set()
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if any(name.encode() in text_of(path) for name in KEYS):
            assert path.suffix == ".parquet" or path.name == "report.html", path
            inside.add(path.name)
    assert {"plan.parquet", "report.html", "part-00000.parquet"} <= inside
    for place, found in elsewhere.items():
        assert not [name for name in KEYS if name.encode() in found], (place, _around(found))


def _around(found: bytes) -> bytes:
    at = min(i for name in KEYS if (i := found.find(name.encode())) >= 0)
    return found[max(0, at - 200) : at + 200]


def test_the_search_would_find_what_it_looks_for(
    left: tuple[Path, dict[str, bytes]], members: dict[str, bytes]
) -> None:
    """The names do come in: each is in what was handed over, the database has the runs, and tables are unpacked."""
    out, elsewhere = left
    packed = b"".join(members.values())
    for name in ("exif", "xmp", "iptc", "comment", "png", "tiff", "dicom", "text"):
        assert NEVER[name].encode() in packed, name
    assert b"nightly-summary" in elsewhere["the Prefect database"]
    assert f"File: `{out / 'zip' / 'report.html'}`".encode() in elsewhere["the Prefect database"]
    assert b"leukoflow.run.finished" in elsewhere["the Prefect database"]
    assert b"failed" in elsewhere["the Prefect database"]
    table = pa.concat_tables(pq.read_table(p) for p in (out / "zip" / "predictions").iterdir())
    assert len(table) == len(members)
    assert set(table["patient_id"].to_pylist()) != {None}
    assert (out / "fails" / "failures" / "00000.json").is_file()
    lines = [json.loads(line) for p in (out / "zip" / "logs").glob("*.jsonl") for line in p.read_text().splitlines()]
    assert {line["stage"] for line in lines} >= {"prepare", "segment", "extract", "classify"}
    assert any(line["message"].startswith("metrics: http://127.0.0.1:") for line in lines)
