"""The run's own log, on a disk that is full."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from leukoflow.runlog import _LogFile


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_loses_lines_and_raises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    handler = _LogFile("/dev/full")
    handler.emit(logging.makeLogRecord({"msg": "short, so that closing finds it unwritten"}))
    handler.close()
    assert capsys.readouterr() == ("", "")
