"""Read how far a run is from what it has committed: the same answer for a live, a killed and a finished run."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import psutil

from leukoflow.core.codec import loads
from leukoflow.core.errors import StorageError
from leukoflow.runs.layout import OutKey, RunKey, Stage
from leukoflow.runs.receipts import Counts, RunTotals
from leukoflow.runs.records import Marker, RunManifest, ShardReceipt
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage

State = Literal["running", "finished", "cancelled", "failed", "killed", "unknown"]
HEARTBEAT_SECONDS = 10.0
CLOCK_SECONDS = 30.0
"""How far apart clocks that tell of one process may be."""


@dataclass(frozen=True, slots=True)
class RunBinding:
    """`run.json`, written before anything else: what the run id stands for.

    It is written a second time once the source is planned, which gives it members, shards and the plan's digest.
    """

    run_id: str
    fingerprint: str
    source_uri: str
    members: int
    shards: int
    shard_size: int
    bundle: str
    bundle_digest: str
    device: str
    started_at: str
    command: str  # resumes the run
    plan_sha256: str = ""  # of plan.parquet as it was frozen
    reuse: str | None = None  # the run whose stages this one takes over; retention keeps it
    config: str = ""  # all settings, as canonical JSON
    bundle_reference: str = ""  # as it was asked for, where a registry said which bundle that is
    shadow_of: str | None = None  # the run that this one only accompanies: not the night's result
    patient_key_check: str = ""  # of the key that made its pseudonyms; empty without patients, and in older runs

    @property
    def is_planned(self) -> bool:
        """Whether its source was planned; before that it has nothing that could be lost."""
        return self.members > 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """`heartbeat.json`: who works on the run and when it last said so; `state` and `message` are the last word."""

    pid: int
    host: str
    at: str
    state: Literal["running", "cancelled", "failed", "finished"]
    message: str = ""
    dashboard: str = ""
    phase: str = ""  # what it does or waits for, as in "starting 2 workers"
    exit_code: int | None = None  # of the last word


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Totals of the shards that are committed."""

    run_id: str
    state: State
    message: str
    dashboard: str
    members: int
    counts: Counts  # of the shards that are committed
    shards: int
    shards_done: int
    started_at: str
    last_activity: str
    failed_shards: tuple[tuple[str, str], ...]  # (shard, what happened)
    command: str
    shadow_of: str | None = None
    phase: str = ""  # what a running run does or waits for, and a killed one did
    exit_code: int | None = None  # of a run that failed or was stopped

    @property
    def done(self) -> int:
        """Images that are accounted for."""
        return self.counts.accounted


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run is up to, without looking at its shards."""

    run_id: str
    state: State
    in_progress: bool  # or may be: a beat so fresh that its process cannot be ruled out, a run that has just started
    last_activity: str
    reuse: str | None
    shadow_of: str | None = None


BEGINNING_SECONDS = 3600.0
"""A run that has not said anything yet is taken to be starting for so long."""


def now() -> str:
    """Return the time in UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class ProgressReader:
    """Reads a run's progress again and again; markers that were read once are not read again."""

    def __init__(self, root: str) -> None:
        self.storage = open_storage(root)
        self._receipts: dict[str, ShardReceipt] = {}

    def read(self) -> RunProgress:
        """Return the progress as of now. Raises StorageError when there is no run at this root."""
        binding = self.binding()
        receipts = self.receipts()
        beat = self.heartbeat()
        failures = tuple(
            (RunKey.shard_of_json(name), self._failure(name)) for name in self.storage.names(RunKey.FAILURES)
        )
        state = self.state(beat)
        return RunProgress(
            run_id=binding.run_id,
            state=state,
            message=_words(state, beat),
            dashboard=beat.dashboard if beat else "",
            members=binding.members,
            counts=RunTotals.of(receipts).counts,
            shards=binding.shards,
            shards_done=len(receipts),
            started_at=binding.started_at,
            last_activity=beat.at if beat else binding.started_at,
            failed_shards=failures,
            command=binding.command,
            shadow_of=binding.shadow_of,
            phase=beat.phase if beat else "",
            exit_code=beat.exit_code if beat and state == beat.state else None,
        )

    def receipts(self) -> list[ShardReceipt]:
        """Return the receipts of the shards that are committed now, by the shards' names."""
        listed = self.storage.names(RunKey.markers(Stage.PREDICTIONS))
        for name in set(listed) - self._receipts.keys():
            try:
                marker = loads(Marker, self.storage.read(f"{RunKey.markers(Stage.PREDICTIONS)}/{name}"), name)
            except FileNotFoundError:
                continue
            if marker.receipt is not None:
                self._receipts[name] = marker.receipt
        return [self._receipts[name] for name in listed if name in self._receipts]

    def binding(self) -> RunBinding:
        """Read what the run id stands for. Raises StorageError when there is no run at this root."""
        try:
            return read_binding(self.storage)
        except (FileNotFoundError, NotADirectoryError):
            raise StorageError(
                f"{self.storage.root} holds no run (no run.json); list the runs with `leukoflow status OUT`"
            ) from None

    def manifest(self) -> RunManifest | None:
        """Read the finished run's manifest; None while there is none."""
        return read_manifest(self.storage)

    def _failure(self, name: str) -> str:
        try:
            return str(json.loads(self.storage.read(f"{RunKey.FAILURES}/{name}"))["message"])
        except (FileNotFoundError, ValueError, KeyError):
            return "cleared meanwhile"

    def heartbeat(self) -> Heartbeat | None:
        """Read the last sign of life; None while there is none."""
        try:
            return loads(Heartbeat, self.storage.read(RunKey.HEARTBEAT), RunKey.HEARTBEAT)
        except (FileNotFoundError, StorageError):
            return None

    def state(self, beat: Heartbeat | None) -> State:
        """Say what the run is up to, given its last sign of life."""
        if self.manifest() is not None:
            return "finished"
        if beat is None:
            return "unknown"
        if beat.state != "running":
            return "unknown" if beat.state == "finished" else beat.state
        if beat.host == socket.gethostname():
            return "running" if _alive(beat) else "killed"
        age = time.time() - datetime.fromisoformat(beat.at).timestamp()
        return "running" if age < 6 * HEARTBEAT_SECONDS else "killed"


def read_progress(root: str) -> RunProgress:
    """Look at a run's progress once."""
    return ProgressReader(root).read()


def read_state(root: str) -> RunState:
    """Say what a run is up to. Raises StorageError when there is no run at this root, or its records are damaged."""
    reader = ProgressReader(root)
    binding = reader.binding()
    beat, manifest = reader.heartbeat(), reader.manifest()
    state = reader.state(beat)
    last = manifest.finished_at if manifest else beat.at if beat else binding.started_at
    try:
        age = time.time() - datetime.fromisoformat(last).timestamp()
    except (ValueError, TypeError):
        raise StorageError(f"{root}: its records are damaged, {last!r} is not a time") from None
    fresh = beat is not None and beat.state == "running" and age < 6 * HEARTBEAT_SECONDS
    beginning = beat is None and manifest is None and age < BEGINNING_SECONDS
    return RunState(
        run_id=binding.run_id,
        state=state,
        in_progress=manifest is None and (state == "running" or fresh or beginning),
        last_activity=last,
        reuse=binding.reuse,
        shadow_of=binding.shadow_of,
    )


def read_binding(storage: Storage) -> RunBinding:
    """Read `run.json`. Raises FileNotFoundError where there is none, StorageError where it is damaged."""
    return loads(RunBinding, storage.read(RunKey.BINDING), storage.uri(RunKey.BINDING))


def read_manifest(storage: Storage) -> RunManifest | None:
    """Read the manifest of a finished run; None while there is none."""
    try:
        data = storage.read(RunKey.MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return loads(RunManifest, data, storage.uri(RunKey.MANIFEST))


def list_runs(out: str) -> list[str]:
    """List the run ids below an output folder or prefix."""
    storage = open_storage(out)
    found = []
    for name in storage.names(""):
        try:
            storage.read(OutKey.of_run(name, RunKey.BINDING))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, OSError):
            continue
        found.append(name)
    return found


def _words(state: State, beat: Heartbeat | None) -> str:
    """Say what a state means: the run's own last word, or what its silence means."""
    if beat is None:
        return "" if state == "finished" else "it has never given a sign of life, or its heartbeat.json is damaged"
    if state != "killed":
        return beat.message
    doing = f" while {beat.phase}" if beat.phase else ""
    return f"it stopped{doing}, without a last word: process {beat.pid} on {beat.host} is gone"


def _alive(beat: Heartbeat) -> bool:
    """Say whether the process of this machine that wrote a beat lives; a younger one of the same number is another."""
    try:
        born = float(psutil.Process(beat.pid).create_time())
        return born < datetime.fromisoformat(beat.at).timestamp() + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, ValueError):
        return True
