"""What people say of predictions: verdicts, kept beside them and never in their place.

`OUT/RUN_ID/verdicts/00001.parquet`, `00002.parquet` ... are created only if absent, so several servers may write at the
same time, and nothing is ever replaced. Each file names the digest of the one before it, over digests of its rows and
not over its bytes: so a patient's rows can be erased later, and the chain still holds. `00001.json` seals the bytes.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from leukoflow.core.codec import loads
from leukoflow.core.errors import LeukoflowError, RequestError, RunBusyError, RunNotFoundError, StorageError, words_of
from leukoflow.runs.layout import RunKey
from leukoflow.runs.lock import LockHolder
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.review.verdict_file import (
    FOLDER,
    Entry,
    Seal,
    decode,
    encode,
    key_of,
    make_seal,
    row_digest,
    row_of,
    verdict_of,
)
from leukoflow.tasks.review.verdict_record import NOTHING, Target, Verdict, Verdicts, check_verdict
from leukoflow.tasks.store.tables import in_order

_NAME = re.compile(r"([0-9]{5,})\.(parquet|json)")
_LOCK = RunKey.LOCK  # erasing holds it as well
_ERASING = "erase"


def add(out: str, verdict: Verdict) -> int:
    """Add one verdict to its run; return the number of its file."""
    return add_all(out, (verdict,))


def add_all(out: str, verdicts: Sequence[Verdict]) -> int:
    """Add verdicts on one run in one file, all or none; return its number.

    Raises RequestError for what is no verdict, RunNotFoundError where there is no such run (any more), RunBusyError
    while a patient is erased from it, StorageError where the destination does not take it.
    """
    if not verdicts or len({v.run_id for v in verdicts}) != 1:
        raise RequestError("verdicts are added to one run at a time, one at least")
    for verdict in verdicts:
        check_verdict(verdict)
    run_id = verdicts[0].run_id
    run = open_storage(out).child(run_id)
    _check_open(run, run_id)
    rows = [row_of(v) for v in verdicts]
    digests = tuple(map(row_digest, rows))
    while True:
        number, previous = _next(run)
        entry = Entry(number, previous, digests)
        data = encode(entry, rows)
        if run.create(key_of(number), data):
            break
    run.create(key_of(number, "json"), make_seal(data, entry))
    if not run.exists(RunKey.BINDING):  # deleted in this very moment; nothing may stay behind
        run.delete(FOLDER)
        run.prune(FOLDER)
        raise RunNotFoundError(f"run {run_id} was deleted meanwhile; the verdict was not kept")
    return number


def _check_open(run: Storage, run_id: str) -> None:
    """Raise RunNotFoundError or RunBusyError for a run that takes no verdict now."""
    if not _is_name(run_id) or not run.exists(RunKey.BINDING):
        raise RunNotFoundError(f"there is no run {run_id} (any more)")
    busy = run.exists(RunKey.INTENT)
    if not busy:
        with suppress(FileNotFoundError, NotADirectoryError, StorageError):
            busy = loads(LockHolder, run.read(_LOCK), run.uri(_LOCK)).purpose == _ERASING
    if busy:
        raise RunBusyError(f"run {run_id} is being changed just now; give the verdict again in a minute")


def _is_name(run_id: str) -> bool:
    return bool(run_id) and run_id not in (".", "..") and "/" not in run_id and "\\" not in run_id


def _numbers(run: Storage) -> dict[int, set[str]]:
    """Return the numbers that are there, with the kinds of their files."""
    found: dict[int, set[str]] = {}
    for name in run.names(FOLDER):
        if match := _NAME.fullmatch(name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def _next(run: Storage) -> tuple[int, str]:
    """Return the next free number, and the digest of the entry before it; a listing may lag, so it is only a start."""
    found = _numbers(run)
    last = max(found, default=0)
    while run.exists(key_of(last + 1)):
        last += 1
    if not last:
        return 1, NOTHING
    try:
        data = run.read(key_of(last))
        entry, _ = decode(data, run.uri(key_of(last)))
    except (FileNotFoundError, StorageError):  # lost or damaged, which verify reports; its seal keeps the chain
        return last + 1, loads(Seal, run.read(key_of(last, "json")), run.uri(key_of(last, "json"))).entry
    if "json" not in found.get(last, ()):  # its writer is about to, or was cut off
        run.create(key_of(last, "json"), make_seal(data, entry))
    return last + 1, entry.digest


class VerdictReader:
    """Reads the verdicts of a run again and again; files that were read once are not read again."""

    def __init__(self, run: Storage) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._stamp: str | None = None
        self._read: dict[int, tuple[Entry, tuple[Verdict, ...]] | None] = {}  # None for what cannot be read
        self._last = Verdicts()

    def read(self) -> Verdicts:
        """Return all verdicts as of now; empty where there are none."""
        with self._lock:
            return self._now()

    def _now(self) -> Verdicts:
        stamp = self._manifest()
        if stamp != self._stamp:  # erasing writes another manifest, and only erasing changes a file
            self._stamp, self._read, self._last = stamp, {}, Verdicts()
        numbers = sorted(n for n, kinds in _numbers(self.run).items() if "parquet" in kinds)
        new = [n for n in numbers if self._read.get(n) is None]
        if not new and numbers == sorted(self._read):
            return self._last
        self._read = {n: self._read.get(n) for n in numbers}
        self._read |= dict(zip(new, in_order(self._one, new), strict=True))
        good = [found for found in self._read.values() if found is not None]
        self._last = Verdicts(
            given=tuple(v for _, verdicts in good for v in verdicts),
            damaged=len(self._read) - len(good),
            head=good[-1][0].digest if good else NOTHING,
        )
        return self._last

    def _manifest(self) -> str:
        try:
            return self.run.stamp(RunKey.MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def _one(self, number: int) -> tuple[Entry, tuple[Verdict, ...]] | None:
        try:
            entry, rows = decode(self.run.read(key_of(number)), self.run.uri(key_of(number)))
            return entry, tuple(map(verdict_of, rows))
        except (FileNotFoundError, LeukoflowError, ValueError, TypeError, AttributeError):
            return None


def read(out: str, run_id: str) -> Verdicts:
    """Read the verdicts of one run, in their order; empty where there are none. Raises RunNotFoundError."""
    run = open_storage(out).child(run_id)
    if not _is_name(run_id) or not run.exists(RunKey.BINDING):
        raise RunNotFoundError(f"there is no run {run_id} (any more)")
    return VerdictReader(run).read()


# --- verifying and erasing -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checked:
    """What looking through the verdicts of a run has found. `problems` are (file, what is wrong)."""

    verdicts: int = 0
    head: str = NOTHING
    problems: tuple[tuple[str, str], ...] = field(default=())


def check_run(run: Storage, run_id: str) -> Checked:
    """Look through all verdicts of a run: a verdict that was altered, lost, put in or moved is found.

    Somebody who can rewrite the whole chain leaves no trace in it: keep `head` somewhere else.
    """
    kinds = _numbers(run)
    problems = [
        (f"{FOLDER}/{n}", "added: it is no file of verdicts") for n in run.names(FOLDER) if not _NAME.fullmatch(n)
    ]
    previous: str | None = NOTHING
    verdicts = 0
    last = max(kinds, default=0)
    numbers = range(1, last + 1)

    def both(number: int) -> tuple[bytes | None, bytes | None]:
        found: list[bytes | None] = []
        for kind in ("parquet", "json"):
            try:
                found.append(run.read(key_of(number, kind)))
            except FileNotFoundError:
                found.append(None)
        return found[0], found[1]

    for number, (data, sealed) in zip(numbers, in_order(both, numbers), strict=True):
        seal = None
        if sealed is not None:
            try:
                seal = loads(Seal, sealed, key_of(number, "json"))
            except StorageError:
                problems.append((key_of(number, "json"), "altered: it is no seal"))
        elif number < last:
            problems.append((key_of(number, "json"), "missing"))
        if data is None:
            problems.append((key_of(number), "missing"))
            previous = seal.entry if seal is not None else None
            continue
        entry, rows, wrong = _look(data, run_id, number, previous, seal)
        if wrong is not None:
            problems.append((key_of(number), wrong))
        verdicts += rows
        previous = entry.digest if entry is not None else seal.entry if seal is not None else None
    return Checked(verdicts, previous or NOTHING, tuple(problems))


def _look(
    data: bytes, run_id: str, number: int, previous: str | None, seal: Seal | None
) -> tuple[Entry | None, int, str | None]:
    """Return a file's entry, the number of its rows, and what is wrong with it."""
    if seal is not None and (len(data), hashlib.sha256(data).hexdigest()) != (seal.size, seal.sha256):
        return None, 0, "altered: its bytes are not those that were sealed"
    try:
        entry, rows = decode(data, key_of(number))
        digests = [row_digest(row) for row in rows]
    except (StorageError, AttributeError, TypeError) as error:
        return None, 0, f"damaged: {words_of(error)}"
    kept = [digest for i, digest in enumerate(entry.rows) if i not in entry.erased]
    if digests != kept:
        return entry, len(rows), "altered: its rows are not those that were written"
    if entry.number != number or (seal is not None and (seal.number, seal.entry) != (number, entry.digest)):
        return entry, len(rows), "it belongs to another number: files were put in or moved"
    if previous is not None and entry.previous != previous:
        return entry, len(rows), "it does not follow the file before it: files were left out, put in or moved"
    if any(row["run_id"] != run_id for row in rows):
        return entry, len(rows), "it belongs to another run"
    return entry, len(rows), None


def without(run: Storage, targets: Iterable[Target]) -> Iterator[tuple[str, bytes]]:
    """Yield (key, new bytes) of the files that say something of these fields and slides, without what they say.

    The numbers and the chain stay. Raises StorageError where a file cannot be read.
    """
    gone = set(targets)
    for number, kinds in sorted(_numbers(run).items()):
        if "parquet" not in kinds:
            continue
        entry, rows = decode(run.read(key_of(number)), run.uri(key_of(number)))
        kept = [row for row in rows if verdict_of(row).target not in gone]
        if len(kept) == len(rows):
            continue
        digests = {row_digest(row) for row in kept}
        erased = tuple(i for i, digest in enumerate(entry.rows) if digest not in digests)
        entry = replace(entry, erased=erased)
        data = encode(entry, kept)
        yield key_of(number), data
        yield key_of(number, "json"), make_seal(data, entry)
