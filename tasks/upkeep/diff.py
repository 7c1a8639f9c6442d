"""What differs between two finished runs: image by image, slide by slide, and in what the runs were made with.

Both runs are read as streams. Where they list the same images in the same order they are merged as they come; else they
are joined by image key, and what is left by content, through a scratch database on disk. Memory grows with the number
of slides, not of images.
"""

from __future__ import annotations

import csv
import json
import shlex
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from leukoflow.core.codec import loads
from leukoflow.core.config import RunConfig
from leukoflow.core.errors import ConfigError, StorageError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import RunBinding
from leukoflow.runs.records import RunManifest, Status, read_reason
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.commands import run_words
from leukoflow.tasks.store.tables import BATCH_ROWS, finished, regroup, stream, table_files

COLUMNS = (
    "image_key", "member_sha256", "slide_id", "status", "reason", "label", "confidence", "prediction_set",
)  # fmt: skip
ABSENT = "absent"
EXAMPLES = 3

Kind = Literal["changed", "only in A", "only in B"]
Pair = tuple["Outcome | None", "Outcome | None"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run says of one image."""

    image_key: str
    member_sha256: str | None
    slide: str  # of the manifest, else the folder
    status: str
    reason: str | None
    label: str | None
    confidence: float | None
    prediction_set: tuple[str, ...] | None

    @property
    def verdict(self) -> str:
        """The label of a predicted image, the status of any other."""
        return self.label if self.status == Status.PREDICTED and self.label else self.status


@dataclass(frozen=True, slots=True)
class ImageChange:
    """One image that differs; `fields` names in what, and is empty when one of the runs does not have it."""

    slide: str
    image_key: str
    change: Kind
    fields: tuple[str, ...]
    before: Outcome | None
    after: Outcome | None

    @property
    def moved(self) -> bool:
        """Whether label or status differ, not only the numbers beside them."""
        return verdict(self.before) != verdict(self.after)


@dataclass(frozen=True, slots=True)
class SlideChange:
    """One slide on which something differs."""

    slide: str
    images: int  # in either run
    moved: int  # another label or status, or only in one run
    changed: int  # anything differs, `moved` included
    transitions: tuple[tuple[str, str, int], ...]  # (verdict in A, verdict in B, images), most frequent first
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunDiff:
    """The comparison of two runs as a whole; single images went to the caller as they were found."""

    run_a: str
    run_b: str
    same_order: bool  # both list the same images in the same order
    images: int  # in either run
    changed: int  # in both, and different
    only_a: int
    only_b: int
    fields: tuple[tuple[str, int], ...]  # in what changed images differ, and how many
    transitions: tuple[tuple[str, str, int], ...]  # all images, unchanged ones included
    slides: tuple[SlideChange, ...]  # those that changed, most changed first
    setup: tuple[tuple[str, str, str], ...]  # (what, in A, in B): bundle, settings, software

    @property
    def same(self) -> bool:
        """Whether every image has the same outcome in both runs."""
        return not (self.changed or self.only_a or self.only_b)


# --- pure ------------------------------------------------------------------------------------------------------------


def verdict(outcome: Outcome | None) -> str:
    """Return an outcome in one word."""
    return ABSENT if outcome is None else outcome.verdict


def outcome_of(row: dict[str, Any]) -> Outcome:
    """Make an outcome from a row of `predictions/`."""
    chosen = row["prediction_set"]
    return Outcome(
        image_key=row["image_key"],
        member_sha256=row["member_sha256"],
        slide=row["slide_id"] if row["slide_id"] is not None else row["image_key"].rpartition("/")[0] or ".",
        status=row["status"],
        reason=read_reason(row["reason"]),
        label=row["label"],
        confidence=row["confidence"],
        prediction_set=None if chosen is None else tuple(chosen),
    )


def differences(a: Outcome, b: Outcome, tolerance: float = 0.0) -> tuple[str, ...]:
    """Name the fields in which two outcomes differ; confidences may differ by the tolerance."""
    found = [
        name
        for name in ("image_key", "member_sha256", "slide", "status", "label", "prediction_set", "reason")
        if getattr(a, name) != getattr(b, name)
    ]
    if a.confidence is None or b.confidence is None:
        close = a.confidence == b.confidence
    else:
        close = abs(a.confidence - b.confidence) <= tolerance
    return tuple(found if close else [*found, "confidence"])


def change_of(a: Outcome | None, b: Outcome | None, tolerance: float = 0.0) -> ImageChange | None:
    """Say how an image differs, None where it does not."""
    if a is None or b is None:
        known = a or b
        assert known is not None
        return ImageChange(known.slide, known.image_key, "only in A" if b is None else "only in B", (), a, b)
    if fields := differences(a, b, tolerance):
        return ImageChange(b.slide, b.image_key, "changed", fields, a, b)
    return None


def setup_differences(
    a: RunManifest, b: RunManifest, command_a: str = "", command_b: str = ""
) -> tuple[tuple[str, str, str], ...]:
    """Say in what the two runs were made differently: source, bundle, settings, software."""
    rows = [
        (name, str(getattr(a, name)), str(getattr(b, name)))
        for name in ("bundle", "bundle_digest", "device", "shard_size", "schema_version", "missing", "ignored")
    ]
    rows += [
        ("source", a.source.uri, b.source.uri),
        ("source identity", a.source.identity, b.source.identity),
        ("source truncated", a.source_truncated or "no", b.source_truncated or "no"),
    ]
    options_a, options_b = _options(command_a), _options(command_b)
    for name in dict.fromkeys([*options_a, *options_b]):
        rows.append((name, options_a.get(name, "not given"), options_b.get(name, "not given")))
    if a.fingerprint != b.fingerprint:
        rows.append(("fingerprint", a.fingerprint, b.fingerprint))
    software_a, software_b = dict(a.software), dict(b.software)
    for name in dict.fromkeys([*software_a, *software_b]):
        rows.append((name, software_a.get(name, "absent"), software_b.get(name, "absent")))
    return tuple(row for row in rows if row[1] != row[2])


_LEFT_OUT = ("--out", "--run-id", "--bundle", "--shard-size", "--device", "--workers")
"""Options that the manifest tells, or that are no matter of the outcome."""


def _options(command: str) -> dict[str, str]:
    """Return the options of the command that made a run, without those that are left out."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that never ends: somebody has edited it
        return {}
    return {name: value for name, value in pairwise(words) if name.startswith("--") and name not in _LEFT_OUT}


@dataclass(slots=True)
class _SlideCount:
    images: int = 0
    changed: int = 0
    moved: int = 0
    transitions: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Tally:
    """Running sums over all images."""

    images: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    transitions: Counter[tuple[str, str]] = field(default_factory=Counter)
    slides: dict[str, _SlideCount] = field(default_factory=dict)

    def add(self, a: Outcome | None, b: Outcome | None, change: ImageChange | None) -> None:
        self.images += 1
        step = verdict(a), verdict(b)
        self.transitions[step] += 1
        known = b or a
        assert known is not None
        slide = self.slides.setdefault(known.slide, _SlideCount())
        slide.images += 1
        if change is None:
            return
        self.kinds[change.change] += 1
        self.fields.update(change.fields)
        slide.changed += 1
        if change.moved:
            slide.moved += 1
            slide.transitions[step] += 1
            if len(slide.examples) < EXAMPLES:
                slide.examples.append(change.image_key)

    def changed_slides(self) -> tuple[SlideChange, ...]:
        """List the slides that differ, those with most changed labels or statuses first, then by other changes."""
        found = [
            SlideChange(name, s.images, s.moved, s.changed, _ordered(s.transitions), tuple(s.examples))
            for name, s in self.slides.items()
            if s.changed
        ]
        return tuple(sorted(found, key=lambda s: (-s.moved, -s.changed, s.slide)))


def _ordered(counts: Counter[tuple[str, str]]) -> tuple[tuple[str, str, int], ...]:
    return tuple((a, b, n) for (a, b), n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# --- two runs --------------------------------------------------------------------------------------------------------


def diff_runs(
    root_a: str, root_b: str, sink: Callable[[ImageChange], None] = lambda change: None, tolerance: float = 0.0
) -> RunDiff:
    """Compare two finished runs; every image that differs is handed to `sink` as soon as it is found.

    Raises StorageError where one of them is no finished run, or a part cannot be read.
    """
    storage_a, a = finished(root_a)
    storage_b, b = finished(root_b)
    ordered = same_order(storage_a, a, storage_b, b)
    tally = _Tally()
    rows_a, rows_b = outcomes(storage_a, a), outcomes(storage_b, b)
    with nullcontext(zip_longest(rows_a, rows_b)) if ordered else joined(rows_a, rows_b) as pairs:
        for before, after in pairs:
            change = change_of(before, after, tolerance)
            tally.add(before, after, change)
            if change is not None:
                sink(change)
    return RunDiff(
        run_a=storage_a.root,
        run_b=storage_b.root,
        same_order=ordered,
        images=tally.images,
        changed=tally.kinds["changed"],
        only_a=tally.kinds["only in A"],
        only_b=tally.kinds["only in B"],
        fields=tuple(tally.fields.most_common()),
        transitions=_ordered(tally.transitions),
        slides=tally.changed_slides(),
        setup=setup_differences(a, b, _command(storage_a), _command(storage_b)),
    )


def outcomes(storage: Storage, manifest: RunManifest) -> Iterator[Outcome]:
    """Yield the outcomes of a run in plan order."""
    for table in stream(storage, (f.key for f in table_files(manifest.parts, RunKey.PREDICTIONS)), COLUMNS):
        yield from map(outcome_of, table.to_pylist())


def same_order(storage_a: Storage, a: RunManifest, storage_b: Storage, b: RunManifest) -> bool:
    """Tell whether both runs list the same image keys in the same order."""
    if a.members != b.members:
        return False
    digests = [{key: sha256 for key, _, sha256 in m.tables}.get(RunKey.PLAN) for m in (a, b)]
    if digests[0] is not None and digests[0] == digests[1]:
        return True
    counts = [min(BATCH_ROWS, a.members - first) for first in range(0, a.members, BATCH_ROWS)]
    cut = [regroup(_keys(storage, m), counts) for storage, m in ((storage_a, a), (storage_b, b))]
    return all(
        x is not None and y is not None and x["image_key"].combine_chunks().equals(y["image_key"].combine_chunks())
        for x, y in zip(*cut, strict=True)
    )


def _keys(storage: Storage, manifest: RunManifest) -> Iterator[Any]:
    return stream(storage, (f.key for f in table_files(manifest.parts, RunKey.PREDICTIONS)), ["image_key"])


def _command(storage: Storage) -> str:
    try:
        binding = loads(RunBinding, storage.read(RunKey.BINDING), RunKey.BINDING)
    except (FileNotFoundError, StorageError):
        return ""
    try:  # the command itself may only name the run
        config = RunConfig.model_validate_json(binding.config)
    except ValidationError:
        return binding.command
    if config.selection or config.shadow_of is not None:
        return binding.command
    return shlex.join(run_words(config.model_copy(update={"reuse": binding.reuse}), binding.run_id, binding.bundle))


@contextmanager
def joined(a: Iterator[Outcome], b: Iterator[Outcome]) -> Iterator[Iterator[Pair]]:
    """Pair by image key; of those left over by content, in order; then what only one of them has."""
    with tempfile.TemporaryDirectory(prefix="leukoflow-diff-") as scratch:
        base = sqlite3.connect(Path(scratch) / "join.sqlite", isolation_level=None)
        try:
            yield _join(base, a, b)
        finally:
            base.close()


def _join(base: sqlite3.Connection, a: Iterator[Outcome], b: Iterator[Outcome]) -> Iterator[Pair]:
    base.execute("PRAGMA journal_mode = OFF")
    base.execute("PRAGMA synchronous = OFF")
    for name in ("a", "b"):
        base.execute(f"CREATE TABLE {name} (seq INTEGER PRIMARY KEY, image_key TEXT, sha256 TEXT, row TEXT)")
    base.execute("BEGIN")
    base.executemany("INSERT INTO a VALUES (?, ?, ?, ?)", _stored(a))
    base.execute("CREATE INDEX a_key ON a (image_key)")
    base.execute("CREATE INDEX a_sha ON a (sha256)")
    for row in _stored(b):
        if (mine := _taken(base, "image_key", row[1])) is not None:
            yield mine, _restored(row[3])
        else:
            base.execute("INSERT INTO b VALUES (?, ?, ?, ?)", row)
    for sha256, stored in base.execute("SELECT sha256, row FROM b ORDER BY seq"):
        yield (None if sha256 is None else _taken(base, "sha256", sha256)), _restored(stored)
    for (stored,) in base.execute("SELECT row FROM a ORDER BY seq"):
        yield _restored(stored), None


def _taken(base: sqlite3.Connection, column: str, value: str) -> Outcome | None:
    """Take the first row of A that has the value out of it."""
    found = base.execute(f"SELECT seq, row FROM a WHERE {column} = ? ORDER BY seq LIMIT 1", (value,)).fetchone()
    if found is None:
        return None
    base.execute("DELETE FROM a WHERE seq = ?", (found[0],))
    return _restored(found[1])


def _stored(outcomes: Iterator[Outcome]) -> Iterator[tuple[int, str, str | None, str]]:
    for i, outcome in enumerate(outcomes):
        yield i, outcome.image_key, outcome.member_sha256, json.dumps(asdict(outcome))


def _restored(stored: str) -> Outcome:
    row = json.loads(stored)
    chosen = row.pop("prediction_set")
    return Outcome(**row, prediction_set=None if chosen is None else tuple(chosen))


# --- files -----------------------------------------------------------------------------------------------------------

_COMPARED = ("image_key", "status", "label", "confidence", "prediction_set", "reason", "member_sha256")


class ChangeFiles:
    """Writes changes to CSV and JSON as they are found; the files appear whole when all is done.

    The CSV has a line for every image that differs. The JSON has the same under `images`, and the rest as `summary`.
    """

    def __init__(self, csv_file: Path | None, json_file: Path | None) -> None:
        self._targets = [path for path in (csv_file, json_file) if path is not None]
        self._csv, self._json = csv_file, json_file
        self._open: dict[Path, Any] = {}
        self._first = True
        self._writer: Any = None

    def __enter__(self) -> ChangeFiles:
        for path in self._targets:
            try:
                self._open[path] = _draft(path).open("w", encoding="utf-8", newline="")
            except OSError as error:
                self.__exit__(error)
                raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another place") from None
        if self._csv is not None:
            self._writer = csv.writer(self._open[self._csv])
            head = ["slide", "image_key", "change", "fields"]
            self._writer.writerow([*head, *(f"{name}_{run}" for name in _COMPARED for run in ("a", "b"))])
        if self._json is not None:
            self._open[self._json].write('{"images": [')
        return self

    def add(self, change: ImageChange) -> None:
        """Write one image."""
        if self._writer is not None:
            cells = [_plain(run, name) for name in _COMPARED for run in (change.before, change.after)]
            self._writer.writerow([change.slide, change.image_key, change.change, " ".join(change.fields), *cells])
        if self._json is not None:
            text = json.dumps(asdict(change), ensure_ascii=False)
            self._open[self._json].write(("\n" if self._first else ",\n") + text)
            self._first = False

    def finish(self, found: RunDiff) -> None:
        """Complete the files and put them in their places."""
        if self._json is not None:
            text = json.dumps({**asdict(found), "same": found.same}, ensure_ascii=False, indent=1)
            self._open[self._json].write(f'\n], "summary": {text}}}\n')
        for path, file in self._open.items():
            file.close()
            _draft(path).replace(path)

    def __exit__(self, *error: object) -> None:
        for path, file in self._open.items():
            file.close()
            _draft(path).unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _plain(outcome: Outcome | None, name: str) -> Any:
    if outcome is None:
        return ""
    value = getattr(outcome, name)
    return "|".join(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
