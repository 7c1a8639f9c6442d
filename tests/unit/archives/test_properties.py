"""Archives of random members, as the standard library writes them: what is there is found, whole or cut off."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable

import zstandard
from harness import Pipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leukoflow.archives.errors import ArchiveError, EntryError
from leukoflow.archives.streams import ByteStream, CompressedStream, PlainStream
from leukoflow.archives.tar_walk import TarWalk
from leukoflow.archives.zip_entry import read_entry
from leukoflow.archives.zip_walk import ZipWalk

few = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

names = st.lists(
    st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1, max_size=12),
    min_size=1,
    max_size=2,
).map("/".join)
contents = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda piece, count: piece * count, st.binary(min_size=1, max_size=7), st.integers(1, 300)),
)
files = st.dictionaries(names, contents, max_size=5)
damage = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20)


def cut(data: bytes, share: float) -> bytes:
    return data[: round(len(data) * share)]


def damaged(data: bytes, places: list[tuple[float, int]]) -> bytes:
    out = bytearray(data)
    for share, value in places:
        out[int(len(out) * share)] = value
    return bytes(out)


# ---------------------------------------------------------------- zip archives

methods = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])


def zip_of(members: dict[str, bytes], method: int, streamed: bool, zip64: bool) -> bytes:
    sink: Pipe | io.BytesIO = Pipe() if streamed else io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=zip64) as member:
                member.write(data)
    return bytes(sink.data if isinstance(sink, Pipe) else sink.getvalue())


def ends_of_members(archive: bytes) -> dict[str, int]:
    """Where each member's data, and what follows them of it, end."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        found = opened.infolist()
        borders = [*[info.header_offset for info in found], opened.start_dir]
    return {info.filename: stop for info, stop in zip(found, borders[1:], strict=True)}


def walked_zip(data: bytes, repair: bool = True) -> tuple[list[tuple[str, bytes | None]], str | None]:
    """Name and bytes of each entry, None where there is a reason instead; and why the archive is incomplete."""
    file = io.BytesIO(data)
    walk = ZipWalk(file, len(data), repair)
    found: list[tuple[str, bytes | None]] = []
    for entry in list(walk):
        assert 0 <= entry.offset <= len(data)
        try:
            content = read_entry(file, entry.offset, entry.method, entry.stored, entry.size, entry.crc)
        except EntryError as error:
            assert str(error)  # noqa: PT017
            found.append((entry.name, None))
        else:
            found.append((entry.name, None if entry.refusal else content))
    return found, walk.truncated


@few
@given(members=files, method=methods, streamed=st.booleans(), zip64=st.booleans(), repair=st.booleans())
def test_a_whole_zip_has_its_members_in_order(
    members: dict[str, bytes], method: int, streamed: bool, zip64: bool, repair: bool
) -> None:
    assert walked_zip(zip_of(members, method, streamed, zip64), repair) == (list(members.items()), None)


@few
@given(members=files, method=methods, streamed=st.booleans(), zip64=st.booleans(), share=st.floats(0, 1))
def test_a_zip_that_is_cut_off_has_every_member_that_is_wholly_there_once(
    members: dict[str, bytes], method: int, streamed: bool, zip64: bool, share: float
) -> None:
    whole = zip_of(members, method, streamed, zip64)
    data = cut(whole, share)
    found, truncated = walked_zip(data)
    listed = Counter(name for name, _ in found)
    for name, end in ends_of_members(whole).items():
        if end <= len(data):
            assert listed[name] == 1
            assert dict(found)[name] in (members[name], None if streamed else members[name])
    assert not [name for name, content in found if content is not None and content != members.get(name)]
    assert (truncated is None) == (len(data) == len(whole))


@few
@given(members=files, method=methods, streamed=st.booleans(), places=damage, repair=st.booleans())
def test_a_damaged_zip_ends_in_entries_or_in_a_documented_error(
    members: dict[str, bytes], method: int, streamed: bool, places: list[tuple[float, int]], repair: bool
) -> None:
    try:
        found, _ = walked_zip(damaged(zip_of(members, method, streamed, False), places), repair)
    except ArchiveError as error:
        assert str(error)  # noqa: PT017
    else:
        assert len(found) < 100


# ---------------------------------------------------------------- tar archives

forms = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, 1), "bz2": bz2.compress, "xz": lambda data: lzma.compress(data, preset=0),
    "zst": zstandard.compress,
}  # fmt: skip


def tar_of(members: dict[str, bytes], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name if form == tarfile.USTAR_FORMAT else name * 6)  # long names need a header each
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def spans_of_members(archive: bytes) -> dict[bytes, tuple[int, int]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return {m.name.encode(): (m.offset_data, m.size) for m in opened.getmembers()}


def walked_tar(stream: ByteStream) -> tuple[list[tuple[bytes, bytes | None]], str | None]:
    """Name and bytes of each entry, None where not all of them are there; and why the archive is incomplete."""
    found: list[tuple[bytes, bytes | None]] = []
    walk = TarWalk(stream)
    for entry in walk:
        content = stream.read(entry.size) if entry.size < 1 << 20 else b""
        found.append((entry.name, content if len(content) == entry.size and entry.refusal is None else None))
    return found, walk.truncated


@few
@given(members=files, form=forms, share=st.floats(0, 1))
def test_a_tar_that_is_cut_off_has_every_member_that_is_wholly_there_once(
    members: dict[str, bytes], form: int, share: float
) -> None:
    whole = tar_of(members, form)
    data = cut(whole, share)
    found, truncated = walked_tar(PlainStream(io.BytesIO(data), len(data)))
    listed = Counter(name for name, _ in found)
    for (name, (start, size)), content in zip(spans_of_members(whole).items(), members.values(), strict=True):
        if start + size <= len(data):
            assert listed[name] == 1
            assert dict(found)[name] == content
        else:
            assert dict(found).get(name) is None
    if len(data) == len(whole):
        assert (len(found), truncated) == (len(members), None)


@few
@given(members=files, form=forms, compression=st.sampled_from(sorted(COMPRESSORS)), share=st.floats(0, 1))
def test_a_compressed_tar_that_is_cut_off_gives_its_first_members(
    members: dict[str, bytes], form: int, compression: str, share: float
) -> None:
    whole = tar_of(members, form)
    packed = COMPRESSORS[compression](whole)
    data = cut(packed, share)
    found, truncated = walked_tar(CompressedStream(io.BytesIO(data), compression))
    expected = list(zip(spans_of_members(whole), members.values(), strict=True))
    good = [item for item in found if item[1] is not None]
    assert good == expected[: len(good)]
    assert len(found) - len(good) in (0, 1)
    if len(data) == len(packed):
        assert (good, truncated) == (expected, None)
    elif len(good) < len(expected):
        assert truncated is not None


@few
@given(members=files, form=forms, places=damage, compression=st.sampled_from([None, *sorted(COMPRESSORS)]))
def test_a_damaged_tar_ends_in_entries(
    members: dict[str, bytes], form: int, places: list[tuple[float, int]], compression: str | None
) -> None:
    data = tar_of(members, form)
    if compression is not None:
        data = COMPRESSORS[compression](data)
    data = damaged(data, places)
    file = io.BytesIO(data)
    found, _ = walked_tar(PlainStream(file, len(data)) if compression is None else CompressedStream(file, compression))
    assert len(found) < 100
