"""Keys: names are data, whatever their bytes are, and each member has a key of its own."""

from __future__ import annotations

import os
from pathlib import Path

from made_up_sources import contents, listed, saved, tar_of, zip_of

from leukoflow.sources.identify import identify
from leukoflow.sources.keys import UniqueKeys, image_key


def test_keys_of_names_that_are_no_utf8() -> None:
    assert image_key(b"caf\xe9/\xff.jpg") == "caf%E9/%FF.jpg"
    assert image_key("Fäden/血.jpg".encode()) == "Fäden/血.jpg"
    assert image_key(b"100%.jpg") == "100%.jpg"


def test_repeated_names_get_the_smallest_unused_number() -> None:
    keys = UniqueKeys()
    names = ["a", "a", "b", "a#3", "a", "a", "a#3"]
    assert [keys.add(name) for name in names] == ["a", "a#2", "b", "a#3", "a#4", "a#5", "a#3#2"]


def test_names_are_data_in_every_kind_of_archive(tmp_path: Path) -> None:
    names = ["../../x.jpg", "/etc/x.jpg", "a/../b.jpg", "C:\\x.jpg", "new\nline.jpg"]
    files = {name: b"" if name.endswith("/") else b"1" for name in names}
    for i, data in enumerate((zip_of(files), tar_of(files))):
        source = saved(tmp_path, data, f"names{i}")
        members, _ = listed(source)
        assert [m.image_key for m in members] == names
        assert set(contents(source, members).values()) == {b"1"}


def test_zip_names_of_old_tools(tmp_path: Path) -> None:
    raw = zip_of({"xxxx.jpg": b"1", "d+e.jpg": b"2"})
    raw = raw.replace(b"xxxx.jpg", b"caf\xe9.jpg")
    at = raw.rfind(b"PK\x01\x02")
    raw = raw[:at] + raw[at:].replace(b"d+e.jpg", b"d\\e.jpg")  # second entry: from a FAT system
    raw = raw[: at + 5] + b"\0" + raw[at + 6 :]
    members, _ = listed(saved(tmp_path, raw))
    assert [m.image_key for m in members] == ["caf%E9.jpg", "d/e.jpg"]


def test_directory_names_that_are_no_utf8_can_be_read(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/in"
    os.mkdir(folder)
    for name in (b"caf\xe9.jpg", b"caf%E9.jpg"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(name)
    source = identify(tmp_path / "in")
    members, _ = listed(source)
    assert [m.image_key for m in members] == ["caf%E9.jpg", "caf%E9.jpg#2"]
    assert list(contents(source, members).values()) == [b"caf%E9.jpg", b"caf\xe9.jpg"]
