"""Keys of names made at random: unique, reversible where names are UTF-8, and of a folder never an absolute path."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from urllib.parse import unquote_to_bytes

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leukoflow.archives.zip_names import Separators, decode_name
from leukoflow.sources.identify import identify
from leukoflow.sources.keys import UniqueKeys, image_key, locator_of
from leukoflow.sources.listing import Listing
from leukoflow.sources.reading import open_reader

few = settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
fewer = settings(few, max_examples=25)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
alike = st.text("ab#23", min_size=1, max_size=4)
parts = st.binary(min_size=1, max_size=6).map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_"))
paths = st.lists(parts, min_size=1, max_size=3).map(b"/".join)


@few
@given(name=texts)
def test_a_name_that_is_utf8_is_its_own_key(name: str) -> None:
    assert image_key(name.encode()) == image_key(name) == name


@few
@given(name=st.binary(min_size=1, max_size=20))
def test_a_key_is_text_and_a_locator_is_reversible_whatever_the_bytes(name: bytes) -> None:
    assert image_key(name).encode()
    assert unquote_to_bytes(locator_of(name)) == name


@few
@given(name=st.binary(min_size=1, max_size=20), utf8=st.booleans(), host=st.sampled_from([0, 3, 10]), data=st.data())
def test_a_key_of_a_zip_member_is_text_whatever_the_bytes(
    name: bytes, utf8: bool, host: int, data: st.DataObject
) -> None:
    separators = data.draw(st.builds(Separators, st.booleans(), st.booleans()))
    key = image_key(decode_name(name, 0x800 if utf8 else 0, b"", host, separators))
    assert key.encode()
    assert key


@few
@given(names=st.lists(alike, max_size=20))
def test_keys_are_unique_and_begin_with_their_names(names: list[str]) -> None:
    unique = UniqueKeys()
    keys = [unique.add(name) for name in names]
    assert len(set(keys)) == len(keys)
    for name, key in zip(names, keys, strict=True):
        assert key.startswith(name)
        assert key[len(name) :] == "" or key[len(name) :][0] == "#"


@fewer
@given(names=st.lists(alike | texts.filter(lambda name: name.strip("/\\\0") == name != ""), min_size=1, max_size=6))
def test_members_of_a_zip_with_repeated_names_have_keys_of_their_own(names: list[str]) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for i, name in enumerate(names):
            info = zipfile.ZipInfo("x")
            info.filename = name  # set afterwards, it is taken as it is
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Duplicate name")
                archive.writestr(info, b"%d" % i)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.zip"
        path.write_bytes(sink.getvalue())
        source = identify(path)
        listing = Listing(source)
        members = list(listing)
        with open_reader(source) as reader:
            found = [reader.read(m) for m in members if m.refusal is None]
    assert len({m.image_key for m in members}) == len(members) == len(names) - listing.ignored
    assert len(set(found)) == len(found)


@fewer
@given(names=st.sets(paths, min_size=1, max_size=6))
def test_keys_of_a_folder_are_unique_relative_and_lead_to_their_files(names: set[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, written = os.fsencode(folder), set()
        for name in names:
            if any(piece in (b".", b"..") for piece in name.split(b"/")):
                continue
            try:
                os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
                with open(os.path.join(root, name), "wb") as file:
                    file.write(name)
                written.add(name)
            except (FileExistsError, IsADirectoryError, NotADirectoryError):
                continue  # a file where another name has a folder
        if not written:
            return
        source = identify(folder)
        listing = Listing(source)
        members = list(listing)
        assert len({m.image_key for m in members}) == len(members) == len(written) - listing.ignored
        with open_reader(source) as reader:
            for member in members:
                assert not os.path.isabs(member.image_key)
                name = unquote_to_bytes(member.locator)
                if member.refusal is None:
                    assert reader.read(member) == name
                assert name in written
