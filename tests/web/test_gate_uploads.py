"""Images that are sent: archives, sizes, forms, and what is answered."""

from __future__ import annotations

import logging
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gate_world import World, archive, picture, token_in, world
from harness import ROOT

from leukoflow.apps.web.settings import Rates, UploadLimits
from leukoflow.runs.records import Status

DIAGNOSES = "/api/v1/diagnoses"
FIELD = b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nx'


def test_zip_bomb(tmp_path: Path) -> None:
    place = world(tmp_path, uploads=UploadLimits(file_mb=2, total_mb=4, files=20))
    bomb = archive({"zeros.png": b"\0" * (2 << 20)})
    many = archive({f"{i}.png": bytes([i]) * 10 + picture() for i in range(30)})
    nested = archive({"inner.zip": archive({"a.png": picture()}), "ok.png": picture()})
    flat = archive({f"{i}.png": b"\0" * 4096 + bytes(range(256)) * 4000 for i in range(6)}, zipfile.ZIP_STORED)
    # One member's data named by many entries, and one that states less than it unpacks to.
    with place:
        program = place.program("vera", "diagnose")

        def send(data: bytes) -> tuple[int, list[str]]:
            answer = program.post(DIAGNOSES, files={"file": ("x.zip", data)})
            return answer.status_code, [i["error"] or "" for i in answer.json().get("items", [])]

        status, errors = send(bomb)
        assert status == 200
        assert "far more" in errors[0]
        assert send(many)[0] == 413
        status, errors = send(nested)
        assert status == 200
        assert sorted(map(bool, errors)) == [False, True]
        assert "archive within an archive" in "".join(errors)
        assert send(flat)[0] == 413
        status, errors = send(overlapping(2 << 20, 200))
        assert status in (200, 413)
        status, errors = send(understated())
        assert status == 200
        assert "unpacks to more" in errors[0]
        assert send(b"PK\x03\x04" + b"\0" * 100)[0] == 200
        litter = {"a/": b"", "__MACOSX/._a": b"x", "@eaDir/ok.png": b"x", "ok.png.part": b"x"}
        assert send(archive({**litter, "ok.png": picture()}))[1] == [""]
        assert "thumbnail of a MIRAX slide" in send(archive({"a.mrxs": picture()}))[1][0]
    assert len(place.engine.seen) == 2


def overlapping(size: int, entries: int) -> bytes:
    """A zip whose central directory names the same data many times, each a well-compressed member (Fifield's bomb)."""
    data = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw = data.compress(b"\0" * size) + data.flush()
    crc = zlib.crc32(b"\0" * size)
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(raw), size, 5, 0) + b"a.png" + raw
    central = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, crc, len(raw), size, 5, 0, 0, 0, 0, 0, 0)
        + b"a.png"
        for _ in range(entries)
    )
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, entries, entries, len(central), len(local), 0)
    return local + central + end


def understated() -> bytes:
    """A member that states ten bytes and unpacks to a million."""
    whole = archive({"a.png": bytes(range(256)) * 4000})
    at = whole.index(b"PK\x01\x02")
    size = struct.pack("<L", 10)
    return whole[:22] + size + whole[26 : at + 24] + size + whole[at + 28 :]


def test_oversized_pixels_are_left_to_the_decoder_with_its_limits(place: World) -> None:
    """An image of 60,000 x 60,000 px in a few kilobytes reaches no decoder of the server's own process."""
    ihdr = struct.pack(">2L5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">L", len(ihdr)) + b"IHDR" + ihdr + struct.pack(">L", zlib.crc32(b"IHDR" + ihdr))
    huge = b"\x89PNG\r\n\x1a\n" + chunk
    with place:
        answer = place.program("vera", "diagnose").post(DIAGNOSES, files={"file": ("huge.png", huge)})
    assert answer.status_code == 200
    assert place.engine.seen == [("vera", huge)]
    for module in ("app", "gate/guard", "gate/body", "gate/uploads", "engine/engine", "engine/jobs", "api/diagnoses"):
        source = (ROOT / "apps" / "web" / f"{module}.py").read_text()
        assert not re.search(r"\bPIL\b|\bcv2\b", source), "only the engine's children decode what was uploaded"


def test_body_limits_hold_while_the_body_arrives(tmp_path: Path) -> None:
    place = world(tmp_path, uploads=UploadLimits(file_mb=1, total_mb=2, files=3))
    program = place.program("vera", "diagnose", "read")
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        while sent < 64 << 20:
            sent += 1 << 16
            yield b"\xff" * (1 << 16)

    with place:
        kind = {"content-type": "multipart/form-data; boundary=B"}
        assert program.post(DIAGNOSES, content=endless(), headers=kind).status_code == 413
        too_long = kind | {"content-length": str(1 << 40)}
        assert program.post(DIAGNOSES, content=b"", headers=too_long).status_code == 413
        assert program.post(DIAGNOSES, files={"file": ("a.png", b"\xff" * ((1 << 20) + 1))}).status_code == 413
        several = [("file", (f"{i}.png", picture())) for i in range(4)]
        assert program.post(DIAGNOSES, files=several).status_code == 413
        fields = {f"field{i}": "x" for i in range(40)}
        assert program.post(DIAGNOSES, data=fields, files=several[:1]).status_code == 400
        assert program.post(DIAGNOSES, data={"a": "x" * 5000}, files=several[:1]).status_code == 413
    # Everything else takes small bodies only, from strangers too.
    assert place.browser().post("/login", content=b"x" * (1 << 20)).status_code == 413
    assert place.browser().post(DIAGNOSES, content=b"x" * (1 << 20)).status_code == 413
    search = "/api/v1/runs/0123456789abcdef/search"
    assert program.post(search, content=b"x" * (1 << 20)).status_code == 413
    assert place.engine.seen == []
    assert place.gate.receiving == 0


def test_every_file_that_is_sent_has_an_answer(tmp_path: Path) -> None:
    place = world(tmp_path)
    program = place.program("vera", "diagnose", "read")
    sent = [
        ("file", ("a.png", picture())),
        ("file", ("hollow.png", b"")),
        ("file", ("bare.zip", archive({}))),
        ("file", ("litter.zip", archive({"__MACOSX/._a.png": b"x", ".DS_Store": b"x"}))),
        ("unsent", ("slides", b"folder")),
        ("unsent", ("huge.tif", b"large")),
        ("unsent", ("away.png", b"unreadable")),
        ("unsent", ("odd.png", b"<b>whatever</b>")),
    ]
    with place:
        items = program.post(DIAGNOSES, files=sent).json()["items"]
    assert [i["name"] for i in items] == [name for _, (name, _) in sent]
    assert [i["error"] for i in items] == [
        None,
        "empty: 0 bytes",
        "an archive without images",
        "an archive without images",
        "a folder: open it and choose the images in it",
        "larger than 64 MB",
        *["the browser could not read it: copy it to this computer and choose it again"] * 2,
    ]
    assert len(place.engine.seen) == 1


def test_an_abstention_has_no_answer_in_the_api_nor_on_the_bench(tmp_path: Path) -> None:
    place = world(tmp_path)
    whole = place.engine.examine

    async def unsure(data: bytes, **given: Any) -> Any:
        found = await whole(data, **given)
        return replace(found, status=Status.ABSTAINED, reason="ambiguous: 0.5 < 0.53", width_px=2592)

    place.engine.examine = unsure  # type: ignore[method-assign]
    program = place.program("vera", "diagnose", "read")
    browser = place.browser("vera")
    with place:
        (item,) = program.post(DIAGNOSES, files={"file": ("a.png", picture())}).json()["items"]
        shown = [item[name] for name in ("status", "label", "confidence", "prediction_set")]
        assert shown == ["abstained", None, None, []]
        assert item["probabilities"]["Early"] == 0.7
        pages = {}
        for scale in ("", "0.2"):
            form = {"csrf": token_in(browser.get("/bench").text), "um_per_px": scale}
            where = browser.post("/bench", data=form, files={"file": ("a.png", picture())}).headers["location"]
            for _ in range(100):
                page = browser.get(f"{where}/0")
                if page.status_code == 200:
                    break
            pages[scale] = page.text
            exported = browser.get(f"{where}/0/export.json").json()
            assert (exported["label"], exported["confidence"], exported["prediction_set"]) == (None, None, [])
    for page in pages.values():
        assert "No answer" in page
        assert "Had it answered" not in page
        assert "Prediction set:" not in page
        assert "of 100 answers" not in page
    assert "The likeliest cause is the missing scale" in pages[""]
    assert "Enter the scale" in pages[""]
    assert "missing scale" not in pages["0.2"]


def test_an_answer_of_unknown_scale_is_cautioned_against_on_the_bench(tmp_path: Path) -> None:
    place = world(tmp_path)
    whole = place.engine.examine

    async def small(data: bytes, **given: Any) -> Any:
        return replace(await whole(data, **given), width_px=112, height_px=112)

    place.engine.examine = small  # type: ignore[method-assign]
    browser = place.browser("vera")
    pages = {}
    with place:
        for scale in ("", "0.2"):
            form = {"csrf": token_in(browser.get("/bench").text), "um_per_px": scale}
            where = browser.post("/bench", data=form, files={"file": ("a.png", picture())}).headers["location"]
            for _ in range(100):
                page = browser.get(f"{where}/0")
                if page.status_code == 200:
                    break
            card = browser.get(where).text
            pages[scale] = page.text
            exported = browser.get(f"{where}/0/export.json").json()
            assert ("Do not rely on this answer" in card) == (scale == "")
            assert (exported["caution"] is not None) == (scale == "")
    assert pages[""].index("Do not rely on this answer") < pages[""].index("Early Pre-B: of 100 answers")
    assert "Do not rely" not in pages["0.2"]


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("image/png", b"x", 415),
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"--B--", 400),
        ("multipart/form-data; boundary=" + "B" * 200, b"--B--", 400),
        ("multipart/form-data; boundary=B", b"", 400),
        ("multipart/form-data; boundary=B", b"garbage", 400),
        ("multipart/form-data; boundary=B", b"--B\r\n\r\nx\r\n--B--\r\n", 400),
        ("multipart/form-data; boundary=B", FIELD, 400),
        ("multipart/form-data; boundary=B", FIELD + b"\r\n--B--\r\n", 422),
        ("multipart/form-data; boundary=B", b"--B\r\nX: " + b"y" * 9000 + b"\r\n\r\nx\r\n--B--\r\n", 400),
        ("multipart/form-data; boundary=\xe4", b"", 400),
    ],
)  # fmt: skip
def test_forms_that_are_none(sender: tuple[World, object], kind: str, body: bytes, status: int) -> None:
    _, program = sender
    headers = {"content-type": kind.encode("latin-1")}
    assert program.post(DIAGNOSES, content=body, headers=headers).status_code == status  # type: ignore[attr-defined]


def test_uploads_are_counted_by_person(tmp_path: Path) -> None:
    place = world(tmp_path, rates=replace(Rates(), uploads=(5, 60.0)))
    vera, rita = place.program("vera", "diagnose"), place.program("rita", "diagnose")
    with place:
        files = [("file", (f"{i}.png", picture())) for i in range(4)]
        assert vera.post(DIAGNOSES, files=files).status_code == 200
        refused = vera.post(DIAGNOSES, files=files)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert rita.post(DIAGNOSES, files=files).status_code == 200


def test_a_fault_of_the_engine_names_nothing(place: World, caplog: pytest.LogCaptureFixture) -> None:
    place.engine.error = RuntimeError("patient Jane Doe, /srv/secret/path")
    with place, caplog.at_level(logging.DEBUG):
        answer = place.program("vera", "diagnose").post(DIAGNOSES, files={"file": ("a.png", picture())})
    assert answer.status_code == 200
    assert "bug in the program" in answer.json()["items"][0]["error"]
    for text in (answer.text, place.log(), caplog.text):
        assert "Jane Doe" not in text
        assert "secret" not in text
    assert "RuntimeError at gate_world.py" in caplog.text
