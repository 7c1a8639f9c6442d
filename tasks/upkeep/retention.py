"""Retention: which runs of an output folder may go, and letting them go so that the audit log knows of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from leukoflow.core.errors import ConfigError, LeukoflowError, StorageError, words_of
from leukoflow.runs.layout import OutKey, RunKey
from leukoflow.runs.lock import held
from leukoflow.runs.progress import RunState, list_runs, read_state
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.upkeep.audit import append


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run as retention looks at it. `hindrance` says why it is not to be touched, whatever the policy."""

    run_id: str
    state: str
    last_activity: datetime | None
    reuse: str | None
    hindrance: str | None = None
    shadow_of: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to become of a run, and why."""

    run_id: str
    delete: bool
    why: str
    state: str
    age_days: float | None
    files: int = 0
    bytes: int = 0


# --- pure ------------------------------------------------------------------------------------------------------------


def decide(runs: Sequence[Candidate], keep_days: float, keep_last: int, moment: datetime) -> tuple[Decision, ...]:
    """Decide what becomes of every run, those that reuse others before these, else the oldest first.

    Kept are: what is in progress or cannot be read; what was active within `keep_days`; the `keep_last` finished runs
    that ended last; and whatever a run that is kept takes over stages from. A shadow run stays and goes with the run
    that it accompanies: it is none of the last ones, and keeps that run only while it is in progress.
    """
    names = {run.run_id for run in runs}
    shadows = {r.run_id: r.shadow_of for r in runs if r.shadow_of is not None and r.shadow_of in names}
    finished = [r for r in runs if r.state == "finished" and r.last_activity is not None and r.shadow_of is None]
    last = {r.run_id for r in sorted(finished, key=lambda r: (r.last_activity, r.run_id), reverse=True)[:keep_last]}
    kept: dict[str, str] = {}
    for run in runs:
        if run.hindrance is not None:
            kept[run.run_id] = run.hindrance
        elif run.run_id in shadows:
            continue
        elif run.last_activity is None or _days(run, moment) < keep_days:
            kept[run.run_id] = f"active within {keep_days:g} days"
        elif run.run_id in last:
            kept[run.run_id] = f"one of the last {keep_last} finished runs"
    reuse = {run.run_id: run.reuse for run in runs}
    waiting = list(kept)
    while waiting:
        user = waiting.pop()
        used = reuse.get(user)
        if used is not None and used in reuse and used not in kept:
            kept[used] = f"run {user} reuses it"
            waiting.append(used)
    for shadow, main in shadows.items():
        if main in kept and shadow not in kept:
            kept[shadow] = f"it accompanies run {main}, which stays"
    found = [
        Decision(
            run_id=run.run_id,
            delete=run.run_id not in kept,
            why=kept.get(run.run_id) or _why_not(run, shadows.get(run.run_id), moment),
            state=run.state,
            age_days=None if run.last_activity is None else _days(run, moment),
        )
        for run in sorted(runs, key=lambda r: (r.last_activity or moment, r.run_id))
    ]
    return tuple(sorted(found, key=lambda d: _depth(d.run_id, reuse)))


def _why_not(run: Candidate, main: str | None, moment: datetime) -> str:
    if main is not None:
        return f"it accompanies run {main}, which goes"
    return f"{run.state}, not active for {_days(run, moment):.0f} days"


def _days(run: Candidate, moment: datetime) -> float:
    return 0.0 if run.last_activity is None else (moment - run.last_activity).total_seconds() / 86400


def _depth(run_id: str, reuse: dict[str, str | None]) -> int:
    """Return minus the length of the chain of runs that this one builds on: users come before what they use."""
    seen = {run_id}
    current = reuse.get(run_id)
    while current is not None and current in reuse and current not in seen:
        seen.add(current)
        current = reuse[current]
    return -len(seen)


# --- an output folder ------------------------------------------------------------------------------------------------


def candidates(out: str) -> list[Candidate]:
    """List all runs of an output folder. Raises ConfigError when there is none."""
    names = list_runs(out)
    if not names:
        raise ConfigError(f"{out} holds no run; retention needs the folder or prefix that was given to `run --out`")
    return [look(out, name) for name in names]


def look(out: str, run_id: str) -> Candidate:
    """Look at one run, as it is now."""
    storage = open_storage(out)
    if storage.is_local and os.path.islink(storage.uri(run_id)):
        return Candidate(run_id, "?", None, None, "it is a link to another place; delete it by hand")
    try:
        state = read_state(storage.uri(run_id))
    except LeukoflowError as error:
        return Candidate(
            run_id, "damaged", None, None, f"its records cannot be read ({words_of(error)}); look into it by hand"
        )
    return Candidate(
        run_id=run_id,
        state=state.state,
        last_activity=_moment(state),
        reuse=state.reuse,
        hindrance=_hindrance(storage, run_id, state),
        shadow_of=state.shadow_of,
    )


def _moment(state: RunState) -> datetime:
    found = datetime.fromisoformat(state.last_activity)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _hindrance(storage: Storage, run_id: str, state: RunState) -> str | None:
    if state.in_progress:
        return "in progress"
    lock = OutKey.of_run(run_id, RunKey.LOCK)
    if storage.exists(lock):
        return f"being compacted, or a compaction was cut off: {storage.uri(lock)}"
    return None


def plan_retention(out: str, keep_days: float, keep_last: int) -> tuple[Decision, ...]:
    """Plan what retention would do now, with the bytes of what would go."""
    storage = open_storage(out)
    decided = decide(candidates(out), keep_days, keep_last, datetime.now(UTC))
    measured = []
    for decision in decided:
        files, size = storage.usage(decision.run_id) if decision.delete else (0, 0)
        measured.append(replace(decision, files=files, bytes=size))
    return tuple(measured)


def retain(
    out: str, keep_days: float, keep_last: int, report: Callable[[Decision], None] = lambda decision: None
) -> tuple[Decision, ...]:
    """Delete what the policy lets go, and return what became of every run.

    The audit log has an entry before and after each deletion. A run is looked at again right before it goes. Cut off in
    between, the next call goes on where this one was.
    """
    storage = open_storage(out)
    with held(storage, OutKey.AUDIT_LOCK, "retention"):
        done = []
        for decision in plan_retention(out, keep_days, keep_last):
            final = decision
            if decision.delete:
                now = look(out, decision.run_id)
                if now.hindrance is None and now.state == decision.state:
                    _delete(storage, decision)
                else:
                    final = replace(decision, delete=False, why=now.hindrance or f"it is {now.state} by now")
                report(final)
            done.append(final)
        return tuple(done)


def _delete(storage: Storage, decision: Decision) -> None:
    """Delete a run: the manifest first, so that nobody trusts what is left; `run.json` last, so that it is found."""
    run_id = decision.run_id
    try:
        sha256 = hashlib.sha256(storage.read(OutKey.of_run(run_id, RunKey.MANIFEST))).hexdigest()
    except FileNotFoundError:
        sha256 = None
    details = {"why": decision.why, "state": decision.state}
    details |= {"files": str(decision.files), "bytes": str(decision.bytes)}
    append(storage, "delete", run_id, sha256, details)
    for name in [RunKey.MANIFEST, *(n for n in storage.names(run_id) if n not in (RunKey.MANIFEST, RunKey.BINDING))]:
        storage.delete(f"{run_id}/{name}")
    if left := [n for n in storage.names(run_id) if n != RunKey.BINDING]:
        raise StorageError(
            f"{storage.uri(run_id)} could not be deleted completely ({', '.join(left)} stayed): check the permissions, "
            "then run the same command again"
        )
    storage.abort_uploads(run_id)
    storage.delete(OutKey.of_run(run_id, RunKey.BINDING))
    storage.delete(run_id)
    append(storage, "deleted", run_id, sha256)
