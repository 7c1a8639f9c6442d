"""Ingest: decoding in a disposable process; an image that ends it is blamed alone, and neighbours are unharmed."""

from __future__ import annotations

import io
import signal
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from encoded_pictures import SETTINGS, decode, encoded, jpeg, picture, png_header
from PIL import Image

from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import LeukoflowError
from leukoflow.sources.identify import identify
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader
from leukoflow.tasks.decoding.ingest import Decoded, Decoder, ingest

LIMITS = LimitSettings()


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(LIMITS, SETTINGS) as shared:
        yield shared


def test_the_child_gives_what_the_function_gives(decoder: Decoder) -> None:
    data = encoded(Image.fromarray(picture(640, 480)), "PNG")
    (out,) = decoder.decode([(data, 0.3)])
    assert out.rgb is not None
    np.testing.assert_array_equal(out.rgb, decode(data, 0.3))
    assert (out.source_width, out.source_height, out.reason) == (640, 480, None)
    assert len(out.sha256 or "") == 64


def test_reasons_and_remarks_come_through(decoder: Decoder) -> None:
    pages = encoded(Image.fromarray(picture()), "TIFF", save_all=True, append_images=[Image.fromarray(picture())])
    text, good = decoder.decode([(b"text", None), (pages, None)])
    assert (text.rgb, text.reason) == (None, "not an image: text")
    assert good.remarks == ("first of 2 pages",)


def test_one_child_serves_many_images(decoder: Decoder) -> None:
    decoder.decode_one(b"")
    before = decoder.starts
    assert all(out.rgb is not None for out in decoder.decode((jpeg(i), None) for i in range(20)))
    assert decoder.starts == before


TROUBLE = """
import os, signal, sys, time
from leukoflow.tasks.decoding import decode_child
original = decode_child.decode_image

def decode_image(data, *rest):
    if b"KILL-ME" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"KILL-ONCE" in data and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if b"SPIN" in data:
        while True:
            pass
    if b"SLEEP" in data:
        time.sleep(60)
    if b"EXIT" in data:
        os._exit(3)
    return original(data, *rest)

decode_child.decode_image = decode_image
decode_child.main()
"""


@pytest.fixture
def troubled(tmp_path: Path) -> Callable[..., Decoder]:
    """A decoder whose child misbehaves where an image's comment tells it to."""
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE)
    command = (sys.executable, str(script), str(tmp_path / "killed once"))
    return lambda **limits: Decoder(LimitSettings(**limits), SETTINGS, command)


def outcomes(decoder: Decoder, *comments: bytes) -> list[Decoded]:
    with decoder:
        return decoder.decode((jpeg(i, comment=comment), None) for i, comment in enumerate(comments))


def test_an_image_that_kills_the_child_is_blamed_alone(troubled: Callable[..., Decoder]) -> None:
    decoder = troubled()
    before, culprit, after = outcomes(decoder, b"good", b"KILL-ME", b"good")
    assert before.rgb is not None
    assert after.rgb is not None
    assert (culprit.rgb, culprit.reason) == (None, "decoding it kills the decoder (SIGSEGV)")
    assert len(culprit.sha256 or "") == 64
    assert decoder.starts == 3  # at first, to be sure, and for the next


def test_a_child_that_died_by_chance_blames_nobody(troubled: Callable[..., Decoder]) -> None:
    assert [out.reason for out in outcomes(troubled(), b"good", b"KILL-ONCE", b"good")] == [None] * 3


def test_an_image_that_ends_the_child_is_blamed(troubled: Callable[..., Decoder]) -> None:
    assert outcomes(troubled(), b"EXIT")[0].reason == "decoding it ends the decoder (exit code 3)"


@pytest.mark.slow
def test_cpu_time_is_limited(troubled: Callable[..., Decoder]) -> None:
    spinning, after = outcomes(troubled(decode_seconds=0.5), b"SPIN", b"good")
    assert spinning.reason == "decoding it takes too long: its CPU time is used up"
    assert after.rgb is not None


@pytest.mark.slow
def test_waiting_for_ever_is_limited(troubled: Callable[..., Decoder]) -> None:
    sleeping, after = outcomes(troubled(decode_seconds=0.3), b"SLEEP", b"good")
    assert sleeping.reason == "decoding it takes too long: the decoder does not answer"
    assert after.rgb is not None


@pytest.mark.slow
def test_memory_is_limited_and_the_next_image_is_served() -> None:
    big = encoded(Image.fromarray(np.zeros((8000, 8000, 3), np.uint8)), "PNG", compress_level=1)
    with Decoder(LimitSettings(decode_memory_mb=256), SETTINGS) as small:
        refused, after = small.decode([(big, None), (jpeg(), None)])
        unread = small.decode_one(b"\xff\xd8\xff" + bytes(300 << 20))
    assert "memory" in (refused.reason or "")
    assert after.rgb is not None
    assert unread.reason == "too large: its bytes need more memory than the limit allows"
    with Decoder(LimitSettings(decode_memory_mb=1024), SETTINGS) as enough:
        out = enough.decode_one(big)
    assert out.rgb is not None
    assert out.rgb.shape == (1750, 1750, 3)


def test_a_child_that_does_not_start_is_the_machines_fault_not_the_images() -> None:
    command = (sys.executable, "-c", "raise SystemExit('no libjpeg here')")
    with Decoder(LIMITS, SETTINGS, command) as broken, pytest.raises(LeukoflowError, match="no libjpeg here"):
        broken.decode_one(jpeg())


def test_the_child_ends_with_the_decoder_and_with_the_parent() -> None:
    before = set(psutil.Process().children())
    decoder = Decoder(LIMITS, SETTINGS)
    decoder.decode_one(b"")
    (child,) = set(psutil.Process().children()) - before
    decoder.close()
    assert not child.is_running()
    code = (
        "import os; from leukoflow.tasks.decoding.ingest import *; d = Decoder(LimitSettings(), SegmentSettings());"
        "d.decode_one(b'');"
        "print(d._children[0].pid); os.kill(os.getpid(), 9)"
    )
    run = psutil.Popen([sys.executable, "-c", code], stdout=-1)
    orphan = int(run.communicate()[0])
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while psutil.pid_exists(orphan) and psutil.Process(orphan).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.02)


def hostile_files() -> dict[str, bytes]:
    good = jpeg(7)
    return {
        "good1.jpg": good,
        "truncated.jpg": good[: len(good) // 2],
        "zero.jpg": b"",
        "text.jpg": b"Dear Dr Kim, the images follow.",
        "bomb.png": png_header(60000, 60000),
        "../../x.jpg": good,
        "/etc/x.jpg": good,
        "killer.jpg": jpeg(8, comment=b"KILL-ME"),
        "more.zip": b"PK\x05\x06" + bytes(18),
        "nested-under-another-name.jpg": b"PK\x03\x04" + bytes(26),
        "small.png": encoded(Image.fromarray(picture(20, 20)), "PNG"),
        "good2.jpg": good,
    }


EXPECTED = {
    "good1.jpg": None,
    "truncated.jpg": "truncated: the image's data ends early",
    "zero.jpg": "empty: 0 bytes",
    "text.jpg": "not an image: text",
    "bomb.png": "too large: 60,000 x 60,000 px",
    "../../x.jpg": None,
    "/etc/x.jpg": None,
    "killer.jpg": "decoding it kills the decoder (SIGSEGV)",
    "more.zip": "archive within the source",
    "nested-under-another-name.jpg": "not an image that is read: a zip archive",
    "small.png": "too small: 20 x 20 px",
    "good2.jpg": None,
}


def check(path: Path, decoder: Decoder, expected: dict[str, str | None]) -> None:
    source = identify(path)
    members = list(Listing(source))
    assert [m.image_key for m in members] == list(expected)
    with open_reader(source) as reader, decoder:
        found = list(ingest(reader, members, LIMITS, decoder))
    assert len(found) == len(members)
    reference = decode(hostile_files()["good1.jpg"])
    for (key, reason), out in zip(expected.items(), found, strict=True):
        if reason is None:
            assert out.reason is None, key
            assert out.rgb is not None
            np.testing.assert_array_equal(out.rgb, reference)
        else:
            assert (out.reason or "").startswith(reason), key
            assert out.rgb is None


def test_hostile_zip(tmp_path: Path, troubled: Callable[..., Decoder]) -> None:
    path = tmp_path / "hostile.zip"
    files = hostile_files()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("secret.jpg", files["good1.jpg"])
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("good2.jpg", files["good1.jpg"])
        archive.writestr("cafX.jpg", files["good1.jpg"])
    whole = bytearray(path.read_bytes()).replace(b"cafX", b"caf\xe9")
    whole[whole.rfind(b"secret.jpg") - 46 + 8] |= 1
    path.write_bytes(whole)
    more = {"secret.jpg": "encrypted", "good2.jpg#2": None, "caf%E9.jpg": None}
    before = sorted(p.name for p in tmp_path.parent.iterdir())
    check(path, troubled(), EXPECTED | more)
    assert sorted(p.name for p in tmp_path.parent.iterdir()) == before  # nothing appeared outside
    assert not Path("/etc/x.jpg").exists()


def test_hostile_tar(tmp_path: Path, troubled: Callable[..., Decoder]) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in hostile_files().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.jpg", tarfile.BLKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "good1.jpg"
            archive.addfile(info)
    more = {"link.jpg": "symbolic link", "hard.jpg": "hard link", "dev.jpg": "device"}
    check(path, troubled(), EXPECTED | more)


def test_members_beyond_the_limit_are_not_read(tmp_path: Path, decoder: Decoder) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    with (tmp_path / "in" / "big.jpg").open("wb") as file:
        file.truncate(3 << 20)  # sparse
    source = identify(tmp_path / "in")
    with open_reader(source) as reader:
        found = list(ingest(reader, list(Listing(source)), LimitSettings(max_member_mb=2), decoder))
    assert [out.reason for out in found] == [None, "too large: 3,145,728 bytes, the limit is 2,097,152"]


def test_real_fields(shared_data: Path, decoder: Decoder) -> None:
    source = identify(shared_data / "all_fields.zip")
    members = list(Listing(source))[::100]
    with open_reader(source) as reader:
        found = list(ingest(reader, members, LIMITS, decoder))
        for member, out in zip(members, found, strict=True):
            with Image.open(io.BytesIO(reader.read(member))) as image:
                np.testing.assert_array_equal(out.rgb, np.asarray(image.convert("RGB")))
