"""The audit log of an output folder: what was deleted or erased, when and by whom, each line bound to the one before.

Every entry carries the SHA-256 of the line before it and of itself, so that a line which was changed, left out, put
in or moved is found. Lines cut off at the end leave no trace in the log itself: `leukoflow verify` prints the digest of
the last line, to be kept somewhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from leukoflow.cluster.host import who
from leukoflow.core.errors import StorageError
from leukoflow.runs.layout import OutKey
from leukoflow.runs.progress import now
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage

NOTHING = "0" * 64
"""What the first line names as the digest of the line before it."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One line of the log."""

    number: int
    at: str
    who: str
    action: str
    run_id: str
    manifest_sha256: str | None  # None where the run had no manifest
    details: tuple[tuple[str, str], ...]
    previous: str  # SHA-256 of the line before


@dataclass(frozen=True, slots=True)
class AuditVerdict:
    """What looking through a log has found: `problems` is empty when nothing was tampered with."""

    entries: int
    head: str  # SHA-256 of the last line
    problems: tuple[str, ...]


def line_of(entry: AuditEntry) -> bytes:
    """Return a line of the log, with its own digest and without the line feed."""
    body = json.dumps(asdict(entry), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    seal = hashlib.sha256(body.encode()).hexdigest()
    return f'{body[:-1]},"sha256":"{seal}"}}'.encode()


def check_log(data: bytes, previous: str = NOTHING, before: int = 0) -> AuditVerdict:
    """Look through a log, or what follows its first `before` lines, of which the last has the digest `previous`."""
    problems: list[str] = []
    lines = data.split(b"\n")
    if lines[-1]:
        problems.append(f"line {len(lines)} is incomplete: something was cut off or added")
    else:
        lines.pop()
    for number, line in enumerate(lines, before + 1):
        entry = _entry(line)
        if entry is None or line_of(entry) != line:
            problems.append(f"line {number} was altered")
        elif entry.previous != previous or entry.number != number:
            problems.append(f"line {number} does not follow the line before it: lines were left out, put in or moved")
        previous = hashlib.sha256(line).hexdigest()
    return AuditVerdict(before + len(lines), previous, tuple(problems))


def _entry(line: bytes) -> AuditEntry | None:
    try:
        found: Any = json.loads(line)
        found.pop("sha256")
        return TypeAdapter(AuditEntry).validate_python(found)
    except (ValueError, AttributeError, KeyError, TypeError, ValidationError):
        return None


def verify_log(out: str, name: str = OutKey.AUDIT) -> AuditVerdict | None:
    """Look through a log of an output folder; None where there is none."""
    try:
        return check_log(open_storage(out).read(name))
    except (FileNotFoundError, NotADirectoryError):
        return None


def append(
    storage: Storage, action: str, run_id: str, manifest_sha256: str | None, details: Mapping[str, str] | None = None
) -> AuditEntry:
    """Add an entry; the caller holds the lock. Raises StorageError where the log was tampered with."""
    try:
        data = storage.read(OutKey.AUDIT)
    except FileNotFoundError:
        data = b""
    verdict = check_log(data)
    if verdict.problems:
        raise StorageError(
            f"{storage.uri(OutKey.AUDIT)} was tampered with ({verdict.problems[0]}), and nothing is done without a "
            "log: find out what happened, then move the file aside, and a new log is started"
        )
    entry = AuditEntry(
        number=verdict.entries + 1,
        at=now(),
        who=who(),
        action=action,
        run_id=run_id,
        manifest_sha256=manifest_sha256,
        details=tuple((details or {}).items()),
        previous=verdict.head,
    )
    storage.write(OutKey.AUDIT, data + line_of(entry) + b"\n")  # whole or not at all, so that no line is ever torn
    return entry
