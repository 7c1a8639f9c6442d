"""Audit log of the web application, who saw and did what: each line holds the digest of the one before.

Lines are appended under a lock, so several servers may write one file. Keys are the opaque ones of the URLs; the
log names users, but no slide, patient or file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from leukoflow.core.errors import StorageError
from leukoflow.runs.progress import now
from leukoflow.tasks.upkeep.audit import NOTHING, AuditEntry, AuditVerdict, check_log, line_of

_ROLL_AT = 32 << 20  # bytes; a server verifies the whole file when it starts


class AuditTrail:
    """The log in one file on the local disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._size, self._number, self._head = 0, 0, NOTHING  # of what was verified
        self._stamp = (-1, -1)

    def add(self, who: str, action: str, key: str = "", details: Mapping[str, str] | None = None) -> AuditEntry:
        """Append a line. Raises StorageError if it cannot be written or the log was tampered with."""
        with self._lock, self._opened() as descriptor:
            self._verify_new(descriptor)
            if self._size > _ROLL_AT:
                full = self._roll()
                with self._opened() as fresh:
                    self._verify_new(fresh)
                    self._append(fresh, "-", "continues", "", full)
                    return self._append(fresh, who, action, key, details or {})
            return self._append(descriptor, who, action, key, details or {})

    def _roll(self) -> dict[str, str]:
        """Rename a full file; return what binds the next one to it."""
        aside = self.path.with_name(f"{self.path.stem}-{now()[:19].replace(':', '')}-{self._head[:8]}.jsonl")
        self.path.rename(aside)
        return {"file": aside.name, "last": self._head}

    def _append(self, descriptor: int, who: str, action: str, key: str, details: Mapping[str, str]) -> AuditEntry:
        entry = AuditEntry(self._number + 1, now(), who, action, key, None, tuple(details.items()), self._head)
        line = line_of(entry)
        data = line + b"\n"
        if os.write(descriptor, data) != len(data):
            os.ftruncate(descriptor, self._size)
            raise StorageError(f"{self.path} cannot be written: the disk is full")
        self._size, self._number = self._size + len(data), entry.number
        self._head, self._stamp = hashlib.sha256(line).hexdigest(), _stamp(descriptor)
        return entry

    def check(self) -> AuditVerdict:
        """Verify the whole log."""
        try:
            return check_log(self.path.read_bytes())
        except FileNotFoundError:
            return AuditVerdict(0, NOTHING, ())

    def last(self, count: int) -> list[AuditEntry]:
        """Return the newest entries, newest first."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1024 * (count + 1)))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        found = []
        for line in reversed(lines):
            try:
                entry = json.loads(line)
                entry.pop("sha256")
                entry["details"] = tuple((str(k), str(v)) for k, v in entry["details"])
                found.append(AuditEntry(**entry))
            except (ValueError, KeyError, TypeError):
                continue  # the first one read may be cut off
            if len(found) == count:
                break
        return found

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not self._is_current(descriptor):  # full, and renamed by another server in the meantime
                os.close(descriptor)
                descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return self.path.stat().st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            return False

    def _verify_new(self, descriptor: int) -> None:
        """Verify what is new: everything in another file, or in one that changed without growing."""
        stamp, size = _stamp(descriptor), os.fstat(descriptor).st_size
        if stamp == self._stamp and size == self._size:
            return
        if stamp[0] != self._stamp[0] or size <= self._size:
            self._size, self._number, self._head = 0, 0, NOTHING
        data = b""
        os.lseek(descriptor, self._size, os.SEEK_SET)
        while chunk := os.read(descriptor, 1 << 20):
            data += chunk
        checked = check_log(data, self._head, self._number)
        if checked.problems:
            self._stamp = (-1, -1)
            raise StorageError(
                f"{self.path} was tampered with ({checked.problems[0]}), and nobody is served without a log: find out "
                "what happened, then move the file aside, and a new log is started"
            )
        self._size, self._stamp = self._size + len(data), stamp
        self._number, self._head = checked.entries, checked.head


def _stamp(descriptor: int) -> tuple[int, int]:
    info = os.fstat(descriptor)
    return info.st_ino, info.st_mtime_ns
