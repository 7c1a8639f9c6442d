"""Gather what became of the last nights: the facts of all runs of an output folder by night.

A night here is looked back at: `Night` is what the runs that began in it have come to. A site's night as it happens,
which takes from an inbox, is `flows/site_night.py`.

Reads manifests, markers and each run's drift summary; no pixels, no names of images, no patients. Works while a run is
on its way and on runs that were stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta, tzinfo
from typing import Any

import numpy as np
import pyarrow as pa

from leukoflow.core.errors import LeukoflowError, words_of
from leukoflow.models.bundle import load_bundle
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import ProgressReader, list_runs, now, read_manifest
from leukoflow.runs.receipts import Counts, RunTotals, StageTiming
from leukoflow.runs.records import RunManifest, read_reasons
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.monitor.drift import (
    ACT,
    CHANCE,
    MIN_FIELDS,
    MIN_SLIDES,
    WATCH,
    Drift,
    DriftFacts,
    Level,
    compare,
    facts_bytes,
    find_reference,
    run_facts,
    stored_facts,
)
from leukoflow.tasks.store.tables import answered_labels, table_files

STATUSES = ("predicted", "abstained", "rejected", "quarantined")
WEEK = timedelta(days=7)
GROUPS_SHOWN = 40
LEVELS: tuple[Level, ...] = ("few", "none", "watch", "act")
"""What a comparison may call for, least first."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run, finished or not: `members` is what was planned, `counts` what is committed."""

    run_id: str
    night: date
    state: str
    started_at: str
    finished_at: str | None
    members: int
    counts: Counts
    truncated: bool
    reasons: tuple[tuple[str, int], ...]
    timings: tuple[StageTiming, ...]
    processed: int
    processing_seconds: float
    failed_shards: int
    bundle: str
    bundle_digest: str

    @property
    def done(self) -> int:
        """Members that are accounted for."""
        return self.counts.accounted


@dataclass(frozen=True, slots=True)
class GroupDrift:
    """How the fields of a night, or those of one of its sites or scanners, compare."""

    kind: str  # "all", "site" or "scanner"
    name: str
    against: str  # "reference" or "week"
    drifts: tuple[Drift, ...]


@dataclass(frozen=True, slots=True)
class Night:
    """The runs that began between one noon and the next; named after the day on which the night begins."""

    night: date
    runs: tuple[RunFacts, ...]
    drift: tuple[GroupDrift, ...]

    @property
    def counts(self) -> Counts:
        """Return what became of the images of all runs."""
        return sum((run.counts for run in self.runs), Counts())

    def total(self, name: str) -> int:
        """Sum one of the runs' numbers: `members`, `done`, `processed`, a status, or `missing`."""
        if name in (*STATUSES, "missing"):
            return int(getattr(self.counts, name))
        return sum(getattr(run, name) for run in self.runs)

    def share(self, name: str) -> float | None:
        """Share of a status among what is accounted for."""
        done = self.total("done")
        return self.total(name) / done if done else None

    @property
    def labels(self) -> tuple[int, ...]:
        """Predicted fields of each label."""
        return self.counts.labels

    @property
    def images_per_second(self) -> float | None:
        """Of the sessions that finished the runs."""
        seconds = sum(run.processing_seconds for run in self.runs)
        return self.total("processed") / seconds if seconds else None

    @property
    def balanced(self) -> bool:
        """Whether every member that was handed over is accounted for, and every run has said so."""
        return self.total("done") == self.total("members") and all(run.state == "finished" for run in self.runs)

    def drifts(self, against: str, kind: str = "all") -> tuple[Drift, ...]:
        """Return the night's drifts, all fields together unless `kind` says otherwise."""
        return tuple(d for g in self.drift if g.against == against and g.kind == kind for d in g.drifts)

    @property
    def level(self) -> Level:
        """What the night calls for: the highest level of all fields, and of every site and scanner."""
        return max((d.level for g in self.drift for d in g.drifts), key=LEVELS.index, default="few")

    @property
    def comparisons(self) -> tuple[int, int]:
        """How many quantities could be judged, and how many there were to compare."""
        levels = [d.level for g in self.drift for d in g.drifts]
        return sum(level != "few" for level in levels), len(levels)


@dataclass(frozen=True, slots=True)
class Nights:
    """Everything that the page shows; nights in order."""

    out: str
    made_at: str
    reference: str | None  # where it lies
    reference_runs: tuple[str, ...]
    reference_bundle: str | None
    nights: tuple[Night, ...]
    notes: tuple[str, ...]


# --- gathering -------------------------------------------------------------------------------------------------------


def night_of(started_at: str, zone: tzinfo | None = None) -> date:
    """Return the day on which the night of a moment begins: from noon to noon, in `zone` or this machine's time."""
    return (datetime.fromisoformat(started_at).astimezone(zone) - timedelta(hours=12)).date()


def gather(
    out: str,
    nights: int = 30,
    baseline: str | None = None,
    zone: tzinfo | None = None,
    report: Callable[[str], None] = lambda run_id: None,
) -> Nights:
    """Gather the facts of the last nights on which something ran; `report` is called with each run that is read.

    A finished run's drift summary is kept beside it, so that the next call need not read its tables again. A run that
    cannot be read becomes a note. Raises ConfigError where `baseline` names no reference.
    """
    notes: list[str] = []
    started: dict[str, str] = {}
    for run_id in list_runs(out):
        try:
            binding = ProgressReader(f"{out.rstrip('/')}/{run_id}").binding()
            if binding.shadow_of is not None:  # it saw what another run has reported
                continue
            started[run_id] = binding.started_at
            night_of(started[run_id], zone)
        except (LeukoflowError, ValueError) as error:
            started.pop(run_id, None)
            notes.append(f"run {run_id} cannot be read ({type(error).__name__}) and is left out")
    shown = sorted({night_of(at, zone) for at in started.values()})[-nights:]
    found: list[tuple[RunFacts, DriftFacts | None]] = []
    for run_id, at in sorted(started.items(), key=lambda item: (item[1], item[0])):
        if not shown or night_of(at, zone) < shown[0] - WEEK:
            continue
        report(run_id)
        root = f"{out.rstrip('/')}/{run_id}"
        try:
            facts = read_run(root, zone)
            found.append((facts, _drift_facts(root, facts, notes)))
        except (LeukoflowError, OSError, ValueError) as error:
            notes.append(f"run {run_id} cannot be read ({type(error).__name__}) and is left out")
    reference = find_reference(out, bundle_dir(found[-1][0].bundle) if found else out, baseline)
    if reference is None:
        notes.append(
            "there is no drift reference: choose a night that somebody has looked at and found good, then run "
            "`leukoflow drift reference OUT RUN_ID`; until then nights are only compared with the week before them"
        )
    return Nights(
        out=out,
        made_at=now(),
        reference=reference and reference[1],
        reference_runs=reference[0].runs if reference else (),
        reference_bundle=reference[0].bundle_digest if reference else None,
        nights=tuple(_night(day, found, reference and reference[0]) for day in shown),
        notes=tuple(notes),
    )


def read_run(root: str, zone: tzinfo | None = None) -> RunFacts:
    """Read a run's numbers from its manifest, or while there is none from its markers. Raises StorageError."""
    reader = ProgressReader(root)
    binding, manifest = reader.binding(), reader.manifest()
    if manifest is not None:
        return _from_manifest(manifest, night_of(binding.started_at, zone), _labels(reader.storage, manifest))
    progress = reader.read()
    totals = RunTotals.of(reader.receipts())
    counts = totals.counts
    if sum(counts.labels) != counts.predicted:  # of schema 1, which counted abstained fields as well
        keys = (RunKey.part(RunKey.PREDICTIONS, shard) for shard, _ in totals.shards)
        counts = replace(counts, labels=_counted(reader.storage, keys))
    return RunFacts(
        run_id=binding.run_id,
        night=night_of(binding.started_at, zone),
        state=progress.state,
        started_at=binding.started_at,
        finished_at=None,
        members=progress.members,
        counts=counts,
        truncated=False,
        reasons=read_reasons(totals.reasons.most_common()),
        timings=totals.timings,
        processed=0,
        processing_seconds=0.0,
        failed_shards=len(progress.failed_shards),
        bundle=binding.bundle,
        bundle_digest=binding.bundle_digest,
    )


def _labels(storage: Storage, m: RunManifest) -> tuple[int, int, int, int]:
    """Return the labels of the predicted fields alone, whichever version of leukoflow has counted them."""
    if m.schema_version >= 2:
        return m.labels
    return _counted(storage, (f.key for f in table_files(m.parts, RunKey.PREDICTIONS)))


def _counted(storage: Storage, keys: Iterable[str]) -> tuple[int, int, int, int]:
    """Count the labels of the predicted fields from the tables themselves; zeros where these cannot be read."""
    try:
        return answered_labels(storage, keys)
    except (LeukoflowError, OSError, pa.ArrowException):
        return (0, 0, 0, 0)


def _from_manifest(m: RunManifest, night: date, labels: tuple[int, int, int, int]) -> RunFacts:
    return RunFacts(
        run_id=m.run_id,
        night=night,
        state="finished",
        started_at=m.started_at,
        finished_at=m.finished_at,
        members=m.members,
        counts=replace(m.counts, labels=labels),
        truncated=m.source_truncated is not None,
        reasons=read_reasons(m.reasons),
        timings=m.timings,
        processed=m.processed,
        processing_seconds=m.processing_seconds,
        failed_shards=0,
        bundle=m.bundle,
        bundle_digest=m.bundle_digest,
    )


def _drift_facts(root: str, run: RunFacts, notes: list[str]) -> DriftFacts | None:
    """Read a run's drift summary; None, with a note, where its tables cannot be read."""
    storage = open_storage(root)
    manifest = read_manifest(storage)
    try:
        if manifest is None:
            return run_facts(root, run.run_id, None, run.bundle_digest)
        facts = stored_facts(root, manifest)
    except (LeukoflowError, OSError) as error:
        notes.append(f"run {run.run_id}: its drift is not known, since its tables cannot be read ({words_of(error)})")
        return None
    if not storage.exists(RunKey.DRIFT):
        with suppress(LeukoflowError, OSError):  # who may only read OUT still gets the page
            storage.write(RunKey.DRIFT, facts_bytes(facts))
    return facts


def bundle_dir(name: str) -> str:
    """Return where a bundle lies; a place without a reference where it is not on this machine."""
    try:
        return str(load_bundle(name).path)
    except LeukoflowError:
        return "/nonexistent"


def _night(day: date, found: Sequence[tuple[RunFacts, DriftFacts | None]], reference: DriftFacts | None) -> Night:
    tonight = [(run, facts) for run, facts in found if run.night == day]
    mine = [facts for _, facts in tonight if facts is not None]
    week = [f for run, f in found if f is not None and day - WEEK <= run.night < day]
    drift: tuple[GroupDrift, ...] = ()
    for against, others in (("reference", [reference] if reference else []), ("week", week)):
        if mine and others:
            drift += compare_groups(mine, others, against)
    return Night(day, tuple(run for run, _ in tonight), drift)


def compare_groups(mine: Sequence[DriftFacts], others: Sequence[DriftFacts], against: str) -> tuple[GroupDrift, ...]:
    """Compare all fields of some runs, then those of each site and scanner, against the same of others.

    A site that the others do not know is compared with all of them. Where bundles differ, only what does not depend on
    them is.
    """
    image_only = len({f.bundle_digest for f in (*mine, *others)}) > 1
    drift = []
    for kind, name in _kinds(mine):
        chosen = {} if kind == "all" else {kind: name}
        sample = np.concatenate([f.counts(**chosen) for f in mine])
        known = np.concatenate([f.counts(**chosen) for f in others])
        if not len(known):
            known = np.concatenate([f.counts() for f in others])
        drift.append(GroupDrift(kind, name, against, compare(sample, known, image_only)))
    return tuple(drift)


def _kinds(facts: Sequence[DriftFacts]) -> list[tuple[str, str]]:
    """List all fields, then every site and scanner that the fields name."""
    groups = [g for f in facts for g in f.groups]
    sites = sorted({g.site for g in groups if g.site})
    scanners = sorted({g.scanner for g in groups if g.scanner})
    return [("all", "all fields"), *(("site", s) for s in sites), *(("scanner", s) for s in scanners)][:GROUPS_SHOWN]


def nights_json(found: Nights) -> bytes:
    """Return the same facts for programs, UTF-8 JSON."""
    body: dict[str, Any] = asdict(found) | {
        "thresholds": {"watch": WATCH, "act": ACT, "chance": CHANCE, "fields": MIN_FIELDS, "slides": MIN_SLIDES}
    }
    for night, shown in zip(body["nights"], found.nights, strict=True):
        night["runs"] = [_flat(run) for run in night["runs"]]
        night["level"], night["balanced"] = shown.level, shown.balanced
        night["images_per_second"] = shown.images_per_second
        night["judged"], night["comparisons"] = shown.comparisons
    return (json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=str) + "\n").encode()


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run as `nights.json` has it: its counts are fields among the others, and cells are left out."""
    flat: dict[str, Any] = {}
    for name, value in run.items():
        if name == "counts":
            flat |= {counted: value[counted] for counted in (*STATUSES, "missing")}
        else:
            flat[name] = value
        if name == "truncated":
            flat["labels"] = run["counts"]["labels"]
    return flat
