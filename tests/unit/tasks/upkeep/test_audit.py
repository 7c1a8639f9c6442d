"""The audit log: whatever is done to it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from leukoflow.core.errors import StorageError
from leukoflow.runs.layout import OutKey
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.upkeep.audit import NOTHING, append, check_log, verify_log


@pytest.fixture
def log(tmp_path: Path) -> bytes:
    storage = open_storage(str(tmp_path))
    for i in range(4):
        append(storage, "delete", f"rün-{i}", f"{i}" * 64 if i else None, {"why": "finished", "bytes": str(i)})
    return (tmp_path / OutKey.AUDIT).read_bytes()


def test_a_log_follows_line_by_line(log: bytes, tmp_path: Path) -> None:
    found = verify_log(str(tmp_path))
    assert found is not None
    assert (found.entries, found.problems) == (4, ())
    assert len(found.head) == 64
    assert check_log(b"").head == NOTHING
    assert verify_log(str(tmp_path / "nowhere")) is None


@pytest.mark.slow
def test_every_bit_counts(log: bytes) -> None:
    for position in range(len(log)):
        data = bytearray(log)
        data[position] ^= 1
        assert check_log(bytes(data)).problems, position


def test_lines_cannot_be_left_out_put_in_or_moved(log: bytes) -> None:
    lines = log.splitlines(keepends=True)
    for order in ([0, 2, 3], [1, 2, 3], [0, 2, 1, 3], [0, 1, 1, 2, 3], [0, 0, 1, 2, 3], [3, 2, 1, 0]):
        assert check_log(b"".join(lines[i] for i in order)).problems, order
    for junk in (b"{}\n", b"\n", b"\xff\n", b"[]\n", b"1\n", b"not json"):
        assert check_log(log + junk).problems, junk
    cut = check_log(b"".join(lines[:3]))  # the end leaves no trace, which is what the head is for
    assert cut.problems == ()
    assert cut.head != check_log(log).head


def test_nothing_is_added_to_a_log_that_was_tampered_with(log: bytes, tmp_path: Path) -> None:
    (tmp_path / OutKey.AUDIT).write_bytes(log.replace(b"finished", b"abandoned"))
    with pytest.raises(StorageError, match=r"tampered with \(line 1 was altered\).*move the file aside"):
        append(open_storage(str(tmp_path)), "delete", "x", None)
