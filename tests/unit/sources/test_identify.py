"""Identifying: sources are recognised by their content, and what cannot be used is refused."""

from __future__ import annotations

import errno
import gzip
import os
import re
from pathlib import Path

import pytest
from made_up_sources import FILES, JPEG, saved, zip_of

from leukoflow.core.errors import SourceError, StorageError
from leukoflow.runs.records import SourceKind
from leukoflow.sources.identify import identify
from leukoflow.sources.survey import is_archive


def test_identity_follows_the_content(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(JPEG)
    before = identify(tmp_path / "in").identity
    assert identify(tmp_path / "in").identity == before
    (tmp_path / "in" / "b.jpg").write_bytes(JPEG)
    with_b = identify(tmp_path / "in").identity
    os.utime(tmp_path / "in" / "b.jpg", ns=(1, 1))
    assert len({before, with_b, identify(tmp_path / "in").identity}) == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"Dear colleague, the images follow by post.", "neither a zip or tar archive nor"),
        (gzip.compress(b"just text", mtime=0), "holds no tar archive"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        saved(tmp_path, data)


def test_absent_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        identify(tmp_path / "nothing.zip")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(SourceError, match="holds no files"):
        identify(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smears.zip/inner", "Not a directory; check the path of the source, and whether it is mounted"),
        ("x" * 300, "File name too long; check the path of the source, and whether it is mounted"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "smears.zip").write_bytes(zip_of(FILES))
    with pytest.raises(SourceError, match=re.escape(f"{tmp_path / name} cannot be read: {words}")) as refused:
        identify(tmp_path / name)
    assert refused.value.__cause__ is None
    assert not is_archive(str(tmp_path / name), "inner")


def test_a_share_that_fails_may_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr("leukoflow.sources.identify.os.stat", fail)
    with pytest.raises(SourceError, match=r"a\.zip cannot be read: Stale file handle; check the path") as refused:
        identify("/share/a.zip")
    assert isinstance(refused.value.__cause__, StorageError)


def test_a_jpeg_2000_is_a_source_of_its_own(tmp_path: Path) -> None:
    for magic in (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"):
        assert identify(saved(tmp_path, magic + bytes(600), "x.jp2").uri).kind is SourceKind.IMAGE
