"""Every byte of a tar archive is part of a row or is named: joined, cut, compressed and odd archives."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_archives import (
    BODY,
    COMPRESSORS,
    FILES,
    TAR,
    block_of,
    contents,
    listed,
    noise,
    padded,
    part,
    rows,
    tar_info,
    tar_of,
    zip_of,
)

from leukoflow.archives.streams import CompressedStream
from leukoflow.core.errors import SourceError
from leukoflow.sources.identify import identify
from leukoflow.sources.listing import Listing


def test_a_volume_label_is_no_member(tmp_path: Path) -> None:
    source, members, listing = listed(tmp_path, block_of("night", 0, b"V") + TAR)
    assert contents(source, members) == FILES
    assert rows(members) == dict.fromkeys(FILES)
    assert (listing.truncated, listing.remarks) == (None, ("the tar archive has a volume label, which is no file",))


def test_a_later_volume_lacks_the_beginning_of_its_first_file(tmp_path: Path) -> None:
    source, members, listing = listed(tmp_path, block_of("s/big.jpg", 700, b"M") + padded(noise(8, 700)) + TAR)
    assert contents(source, members) == FILES
    assert rows(members)["s/big.jpg"] == (
        "continued from another volume: unpack all volumes together (tar --multi-volume), hand over the images"
    )
    assert listing.truncated == "the tar archive is a later volume of several: its first file begins in another one"


def test_a_sparse_file_with_a_long_map_costs_no_neighbour(tmp_path: Path) -> None:
    header = block_of("s/sparse.jpg", 1024, b"S", {482: b"\1"})
    maps = (bytes([48]) * 504 + b"\1" + bytes(7)) + (bytes([48]) * 504 + bytes(8))
    source, members, listing = listed(tmp_path, header + maps + noise(3, 1024) + TAR)
    assert contents(source, members) == FILES
    assert rows(members)["s/sparse.jpg"] == "sparse file: repack the archive without --sparse"
    assert listing.truncated is None


def test_sparse_files_of_pax_keep_their_names(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tar_info("GNUSparseFile.0/x.jpg", 100)
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s/x.jpg"}
        archive.addfile(info, io.BytesIO(noise(1, 100)))
    _, members, _ = listed(tmp_path, buffer.getvalue())
    assert rows(members) == {"s/x.jpg": "sparse file: repack the archive without --sparse"}


def test_rubbish_behind_the_end_of_a_tar_is_a_remark(tmp_path: Path) -> None:
    source, members, listing = listed(tmp_path, TAR + noise(1, 2222))
    assert contents(source, members) == FILES
    assert listing.truncated is None
    at = len(TAR)
    assert listing.remarks == (f"bytes {at:,} to {at + 2221:,} behind the end of the tar archive belong to no file",)


@pytest.mark.parametrize(
    "behind", [noise(1, 20_000), zip_of(FILES), gzip.compress(TAR), noise(2, 600) + bytes(1024)], ids=len
)
def test_what_may_be_files_behind_the_end_of_a_tar_is_no_rubbish(tmp_path: Path, behind: bytes) -> None:
    """The last is what is left of a member whose header and first data were overwritten with zeros."""
    source, members, listing = listed(tmp_path, TAR + padded(behind))
    assert contents(source, members) == FILES
    assert f"bytes {len(TAR):,} to " in (listing.truncated or "")


def test_tar_members_behind_an_end_mark_and_out_of_step_are_found(tmp_path: Path) -> None:
    first, second = tar_of(part(FILES, 0, 1)), tar_of(part(FILES, 2, 3))
    source, members, listing = listed(tmp_path, first + second)
    assert contents(source, members) == FILES
    assert listing.truncated is None
    assert "more files follow behind an end mark" in listing.remarks[0]
    source, members, listing = listed(tmp_path, first + noise(4, 100) + second)
    assert contents(source, members) == FILES
    at = len(first)
    assert listing.truncated == (
        f"the tar archive is damaged at byte {at:,}: bytes {at:,} to {at + 99:,} belong to no file that can be read"
    )


def test_bytes_that_are_lost_within_a_tar_cost_one_member(tmp_path: Path) -> None:
    source, members, listing = listed(tmp_path, BODY[:700] + BODY[800:] + bytes(1024), "x.tar")
    assert list(rows(members)) == ["s/0.jpg", "s/2.jpg", "s/3.jpg"]
    assert listing.truncated is not None
    assert contents(source, members)["s/3.jpg"] == FILES["s/3.jpg"]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_follows_compressed_data(tmp_path: Path, name: str) -> None:
    packed = COMPRESSORS[name](TAR)
    at = len(packed)
    _, members, listing = listed(tmp_path, packed + b"TRAILER junk")
    assert rows(members) == dict.fromkeys(FILES)
    assert listing.truncated is None
    assert listing.remarks == (f"12 bytes behind the compressed data, from byte {at:,}, belong to no file",)
    for behind in (noise(1, 20_000), zip_of(FILES)):
        _, members, listing = listed(tmp_path, packed + behind)
        assert rows(members) == dict.fromkeys(FILES)
        assert f"bytes {at:,} to {at + len(behind) - 1:,} behind its compressed data" in (listing.truncated or "")
    second = COMPRESSORS[name](tar_of({"t.jpg": noise(7)}))
    _, members, listing = listed(tmp_path, packed + bytes(1 << 19) + second)
    assert list(rows(members)) == [*FILES, "t.jpg"]
    assert listing.truncated is None


def test_a_gzip_checksum_that_does_not_match_is_a_remark(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(TAR))
    packed[-6] ^= 1
    _, members, listing = listed(tmp_path, bytes(packed))
    assert rows(members) == dict.fromkeys(FILES)
    assert listing.truncated is None
    assert listing.remarks == (
        "the checksum of its gzip data does not match: some of its files may be damaged without a trace",
    )


def test_zstd_frames_to_be_skipped_and_large_windows(tmp_path: Path) -> None:
    skipped = struct.pack("<2L", 0x184D2A5D, 5) + b"hello"
    _, members, listing = listed(tmp_path, skipped + zstandard.compress(TAR) + skipped)
    assert rows(members) == dict.fromkeys(FILES)
    assert (listing.truncated, listing.remarks) == (None, ())

    def long(window: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(window_log=window, write_content_size=False)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return compressor.compress(TAR) + compressor.flush()

    _, members, listing = listed(tmp_path, long(28))
    assert rows(members) == dict.fromkeys(FILES)
    head = bytearray(long(28))
    head[5] = 21 << 3  # what --long=31 states
    with pytest.raises(SourceError, match="window of 2,048 MiB is larger than 256 MiB"):
        listed(tmp_path, bytes(head))
    packed = zstandard.compress(TAR)
    stream = CompressedStream(io.BytesIO(packed[:-3]), "zst")
    stream.read(1 << 20)
    assert stream.damage == "the compressed data is cut off"


def test_xz_with_a_dictionary_beyond_the_limit_is_named(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    packed = bytearray(lzma.compress(TAR, filters=filters))
    packed[16] = 38  # the property of LZMA2 that means 2 GiB
    packed[20:24] = zlib.crc32(packed[12:20]).to_bytes(4, "little")
    with pytest.raises(SourceError, match="its xz dictionary needs more than 512 MiB"):
        listed(tmp_path, bytes(packed))


def test_zeros_are_no_archive(tmp_path: Path) -> None:
    for data in (bytes(4096), bytes(10_240), gzip.compress(bytes(10_240))):
        with pytest.raises(SourceError, match=r"source\.zip is all zeros, not an archive"):
            listed(tmp_path, data)
    source, members, listing = listed(tmp_path, bytes(4096) + zip_of(FILES))
    assert contents(source, members) == FILES
    assert listing.truncated is None


def test_an_archive_behind_an_image_is_named(tmp_path: Path) -> None:
    image = b"\xff\xd8\xff" + noise(1)
    _, members, listing = listed(tmp_path, image + zip_of(FILES), "x.jpg")
    assert [m.image_key for m in members] == ["x.jpg"]
    assert "behind the image lies a zip archive with 4 files" in (listing.truncated or "")
    _, _, listing = listed(tmp_path, image, "x.jpg")
    assert listing.truncated is None


def test_archives_of_other_kinds_are_named(tmp_path: Path) -> None:
    for data, words in ((b"Rar!\x1a\x07\x01\x00", "a RAR archive"), (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive")):
        with pytest.raises(
            SourceError, match=rf"source\.zip is {words}, which is not supported: hand it over as a zip"
        ):
            listed(tmp_path, data + noise(1))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=st.lists(
        st.tuples(st.lists(st.integers(1, 1500), min_size=1, max_size=4), st.integers(0, 1500)), min_size=1, max_size=3
    ),
    cut=st.floats(0.2, 1.0),
    compress=st.booleans(),
)
def test_whatever_tars_are_joined_and_cut_is_a_row_or_is_named(
    pieces: list[tuple[list[int], int]], cut: float, compress: bool
) -> None:
    whole, present, inside, serial = b"", [], [], 0
    for sizes, behind in pieces:
        files = {f"{serial + i}.jpg": noise(serial + i, size) for i, size in enumerate(sizes)}
        serial += len(sizes)
        begin = len(whole)
        for i, data in enumerate(files.values()):
            end = begin + sum(512 - -size // 512 * 512 for size in sizes[: i + 1])
            present.append((end, data))
        inside.append((begin, present[-1][0] + 512))
        whole += tar_of(files) + noise(1000 + behind, behind)
    size = max(int(len(whole) * cut), 512 + pieces[0][0][0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        path.write_bytes(gzip.compress(whole[:size], 1) if compress else whole[:size])
        listing = Listing(identify(path))
        members = list(listing)
    got = Counter(m.size_bytes for m in members if m.refusal is None)
    assert not Counter(len(data) for end, data in present if end <= size) - got
    assert not got - Counter(len(data) for _, data in present)
    if any(begin < size < end for begin, end in inside):  # a header that is cut off may pass for rubbish
        assert listing.truncated is not None or any("belong to no file" in remark for remark in listing.remarks)
    if any(behind for _, behind in pieces[:-1]) and size == len(whole):
        assert listing.truncated is not None
    if pieces[-1][1] and size == len(whole):
        assert listing.truncated is not None or any("belong to no file" in remark for remark in listing.remarks)
    if len(pieces) == 1 and not pieces[0][1] and size == len(whole):
        assert (listing.truncated, listing.remarks) == (None, ())
