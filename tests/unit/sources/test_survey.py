"""Surveys of an inbox."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from made_up_sources import JPEG

from leukoflow.core.errors import StorageError
from leukoflow.sources.survey import survey, unaltered


def test_a_file_that_cannot_be_examined_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "miller.jpg").write_bytes(JPEG)
    (entry,) = survey(str(tmp_path))

    def fail(path: bytes) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr("leukoflow.sources.survey.os.lstat", fail)
    with pytest.raises(StorageError, match=r"a file in .* cannot be examined") as raised:
        unaltered(str(tmp_path), entry)
    assert "miller" not in str(raised.value)


def test_an_inbox_sees_unfinished_files_but_no_other_litter(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "a/y.jpg.part", "a/@eaDir/x.jpg", "a/@eaDir/y.jpg.part", "a/Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    assert [entry.key for entry in survey(str(tmp_path))] == ["a/x.jpg", "a/y.jpg.part"]
