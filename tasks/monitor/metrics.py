"""Figures for Prometheus, made from what runs have committed: the same for a running, a killed and a finished run.

No metric has a label that names a run, a source, an image or a patient: the history of the nights is Prometheus' own.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from leukoflow.core.errors import ConfigError, LeukoflowError
from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.progress import ProgressReader, RunBinding, list_runs
from leukoflow.runs.receipts import Counts
from leukoflow.runs.records import CLASSES
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.monitor.drift import Drift, compare, facts_from, find_reference
from leukoflow.tasks.monitor.nights import LEVELS, STATUSES, RunFacts, bundle_dir, read_run

FRESH_SECONDS = 10.0
"""Scrapes within so many seconds get the same figures, so that several scrapers read the storage once."""

STATES = ("running", "finished", "cancelled", "failed", "killed", "unknown")
SHARES = ("abstained", "rejected", "quarantined")


@dataclass(frozen=True, slots=True)
class Metric:
    """Name, help and label of one family of gauges."""

    name: str
    help: str
    label: str | None = None


METRICS = {
    m.name: m
    for m in (
        Metric("leukoflow_runs", "Runs in the output folder by state.", "state"),
        Metric("leukoflow_members", "Images of all runs in the output folder by what became of them.", "status"),
        Metric(
            "leukoflow_running_members", "Images of runs in progress; open ones are not accounted for yet.", "status"
        ),
        Metric("leukoflow_running_shards", "Shards of runs in progress: done, failed, open.", "state"),
        Metric("leukoflow_running_images_per_second", "Pace of runs in progress since they were taken up."),
        Metric("leukoflow_running_deadline_margin_seconds", "Time that is left at this pace before the deadline."),
        Metric("leukoflow_last_run_members", "Images of the run that finished last, by what became of them.", "status"),
        Metric(
            "leukoflow_last_run_share", "Share of a status among the images of the run that finished last.", "status"
        ),
        Metric("leukoflow_last_run_labels", "Predicted images of each label in the run that finished last.", "label"),
        Metric(
            "leukoflow_last_run_stage_seconds", "Worker seconds of each stage of the run that finished last.", "stage"
        ),
        Metric("leukoflow_last_run_images_per_second", "Pace of the session that finished the last run."),
        Metric("leukoflow_last_run_duration_seconds", "From the beginning of the last finished run to its end."),
        Metric("leukoflow_last_run_balanced", "Whether each image of the last finished run has exactly one row."),
        Metric("leukoflow_last_run_drift_psi", "Population stability index against the reference.", "quantity"),
        Metric("leukoflow_last_run_drift_excess", "The index above what chance gives.", "quantity"),
        Metric(
            "leukoflow_last_run_drift_level", "What drift calls for: -1 too few, 0 none, 1 watch, 2 act.", "quantity"
        ),
        Metric("leukoflow_last_success_timestamp_seconds", "When a run finished last."),
        Metric("leukoflow_last_activity_timestamp_seconds", "When a run gave its last sign of life."),
        Metric("leukoflow_unreadable_runs", "Runs whose records cannot be read."),
        Metric("leukoflow_collect_seconds", "How long it took to read all of this."),
    )
}
"""Everything that is exported, by name."""


class RunsCollector(Collector):
    """Reads the runs of an output folder whenever Prometheus asks; finished runs are read once.

    `only` restricts it to one run, as the flow that works on it does; `deadline` is that run's.
    """

    def __init__(self, out: str, only: str | None = None, deadline: datetime | None = None) -> None:
        self.out = out.rstrip("/")
        self.only = only
        self.deadline = deadline
        self._began = time.time()
        self._lock = threading.Lock()
        self._at = 0.0
        self._families: list[GaugeMetricFamily] = []
        self._finished: dict[str, tuple[str, RunFacts]] = {}  # run -> stamp of its manifest, facts
        self._shadows: dict[str, bool] = {}
        self._readers: dict[str, ProgressReader] = {}
        self._first: dict[str, tuple[float, int]] = {}  # run in progress -> when it was seen first, and its images then
        self._drift: tuple[tuple[str, ...], tuple[Drift, ...]] = ((), ())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the figures as of now, or of a few seconds ago."""
        with self._lock:
            if time.monotonic() - self._at > FRESH_SECONDS or not self._families:
                self._families = list(self._read())
                self._at = time.monotonic()
            yield from self._families

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Return the names alone, so that registering does not read the storage."""
        return [_family(m) for m in METRICS.values()]

    def _read(self) -> Iterator[GaugeMetricFamily]:
        started = time.perf_counter()
        runs: list[RunFacts] = []
        activity: list[float] = []
        unreadable = 0
        running = [0.0] * 3  # images accounted for since first seen, seconds since, images that are open
        shards = Counter[str]()
        for run_id in [self.only] if self.only else list_runs(self.out):
            try:
                if not self.only and self._is_shadow(run_id):
                    continue
                facts, last = self._run(run_id)
                runs.append(facts)
                activity.append(_seconds(last))
                if facts.state == "running":
                    self._follow(run_id, facts, running, shards)
            except (LeukoflowError, OSError, ValueError):
                unreadable += 1
        states = Counter(r.state for r in runs)
        yield _gauge("leukoflow_runs", {s: states[s] for s in STATES})
        yield _gauge("leukoflow_members", _by_status(sum((r.counts for r in runs), Counts())))
        live = [r for r in runs if r.state == "running"]
        members = _by_status(sum((r.counts for r in live), Counts()))
        yield _gauge("leukoflow_running_members", members | {"open": sum(r.members - r.done for r in live)})
        yield _gauge("leukoflow_running_shards", {s: shards[s] for s in ("done", "failed", "open")})
        done, seconds, left = running
        rate = done / seconds if seconds else 0.0
        yield _gauge("leukoflow_running_images_per_second", rate if live else None)
        margin = None
        if live and rate and self.deadline is not None:
            margin = self.deadline.timestamp() - time.time() - left / rate
        yield _gauge("leukoflow_running_deadline_margin_seconds", margin)
        finished = [r for r in runs if r.finished_at is not None]
        yield from self._last(max(finished, key=lambda r: _seconds(r.finished_at or ""), default=None))
        yield _gauge("leukoflow_last_activity_timestamp_seconds", max(activity, default=None))
        yield _gauge("leukoflow_unreadable_runs", unreadable)
        yield _gauge("leukoflow_collect_seconds", time.perf_counter() - started)

    def _is_shadow(self, run_id: str) -> bool:
        """Tell whether a run only accompanies another one, whose images would count twice."""
        if run_id not in self._shadows:
            binding = ProgressReader(f"{self.out}/{run_id}").binding()
            self._shadows[run_id] = binding.shadow_of is not None
        return self._shadows[run_id]

    def _run(self, run_id: str) -> tuple[RunFacts, str]:
        """Return a run's facts and its last sign of life."""
        root = f"{self.out}/{run_id}"
        try:
            stamp = open_storage(root).stamp(RunKey.MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            stamp = ""
        if stamp and self._finished.get(run_id, ("",))[0] == stamp:
            facts = self._finished[run_id][1]
            return facts, facts.finished_at or facts.started_at
        facts = read_run(root)
        if facts.finished_at is not None:
            self._finished[run_id] = (stamp, facts)
            return facts, facts.finished_at
        beat = ProgressReader(root).heartbeat()
        return facts, beat.at if beat else facts.started_at

    def _follow(self, run_id: str, facts: RunFacts, running: list[float], shards: Counter[str]) -> None:
        reader = self._readers.setdefault(run_id, ProgressReader(f"{self.out}/{run_id}"))
        binding: RunBinding = reader.binding()
        done = len(reader.storage.names(RunKey.markers(Stage.PREDICTIONS)))
        shards.update(done=done, failed=facts.failed_shards, open=binding.shards - done - facts.failed_shards)
        at, before = self._first.setdefault(run_id, (time.time(), facts.done))
        running[0] += facts.done - before
        running[1] = max(running[1], time.time() - at)
        running[2] += facts.members - facts.done

    def _last(self, run: RunFacts | None) -> Iterator[GaugeMetricFamily]:
        names = [n for n in METRICS if n.startswith("leukoflow_last_run_")]
        if run is None:
            yield from (_gauge(n, None) for n in (*names, "leukoflow_last_success_timestamp_seconds"))
            return
        end = _seconds(run.finished_at or "")
        values: dict[str, dict[str, float]] = {
            "leukoflow_last_run_members": _by_status(run.counts) | {"missing": run.counts.missing},
            "leukoflow_last_run_share": {s: getattr(run.counts, s) / run.done if run.done else 0.0 for s in SHARES},
            "leukoflow_last_run_labels": dict(zip(CLASSES, run.counts.labels, strict=True)),
            "leukoflow_last_run_stage_seconds": {t.stage: t.seconds for t in run.timings},
        }
        for name, value in values.items():
            yield _gauge(name, value)
        seconds = run.processing_seconds
        yield _gauge("leukoflow_last_run_images_per_second", run.processed / seconds if seconds else None)
        yield _gauge("leukoflow_last_run_duration_seconds", end - _seconds(run.started_at))
        yield _gauge("leukoflow_last_run_balanced", float(run.done == run.members))
        drifts = [d for d in self._drifts(run) if d.psi is not None and d.excess is not None]
        yield _gauge("leukoflow_last_run_drift_psi", {d.quantity: d.psi or 0.0 for d in drifts})
        yield _gauge("leukoflow_last_run_drift_excess", {d.quantity: d.excess or 0.0 for d in drifts})
        levels = {d.quantity: LEVELS.index(d.level) - 1.0 for d in self._drifts(run)}
        yield _gauge("leukoflow_last_run_drift_level", levels)
        yield _gauge("leukoflow_last_success_timestamp_seconds", end)

    def _drifts(self, run: RunFacts) -> tuple[Drift, ...]:
        """Compare with the reference, from the run's own summary; tables are never read for a scrape."""
        try:
            found = find_reference(self.out, bundle_dir(run.bundle))
            storage = open_storage(f"{self.out}/{run.run_id}")
            if found is None:
                return ()
            key = (run.run_id, storage.stamp(RunKey.DRIFT), found[1], found[0].made_at)
            if self._drift[0] != key:
                mine = facts_from(storage.read(RunKey.DRIFT), RunKey.DRIFT)
                other = mine.bundle_digest != found[0].bundle_digest
                self._drift = (key, compare(mine.counts(), found[0].counts(), image_only=other))
        except (LeukoflowError, OSError):
            return ()
        return self._drift[1]


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _by_status(counts: Counts) -> dict[str, float]:
    return {status: getattr(counts, status) for status in STATUSES}


def _family(metric: Metric) -> GaugeMetricFamily:
    return GaugeMetricFamily(metric.name, metric.help, labels=[metric.label] if metric.label else [])


def _gauge(name: str, value: float | dict[str, float] | None) -> GaugeMetricFamily:
    """Make a family with its values; one that is not known has none, so that nobody takes a gap for zero."""
    metric = METRICS[name]
    family = _family(metric)
    if isinstance(value, dict):
        for label, one in value.items():
            family.add_metric([label], one)
    elif value is not None:
        family.add_metric([], value)
    return family


def exposition(collector: Collector) -> bytes:
    """Return the figures once, in Prometheus' text format."""
    return generate_latest(_registry(collector))


def _registry(collector: Collector) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return registry


@contextmanager
def metrics_endpoint(collector: Collector, port: int, address: str = "127.0.0.1") -> Iterator[int]:
    """Serve a collector's figures over HTTP while the block runs; give the port, a free one for 0.

    Raises ConfigError where the port is taken.
    """
    try:
        server, thread = start_http_server(port, addr=address, registry=_registry(collector))
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served at {address}:{port} ({error.strerror}); choose another port"
        ) from None
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
