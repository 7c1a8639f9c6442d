"""The runs of an output folder: their list, and the opening of one of them. Nothing is stored for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa

from leukoflow.core.errors import LeukoflowError, RunBusyError, RunNotFoundError, words_of
from leukoflow.runs.layout import OutKey, RunKey
from leukoflow.runs.progress import list_runs as local_runs
from leukoflow.tasks.intake.plan_file import read_summary
from leukoflow.tasks.review.columns import translate_read_errors
from leukoflow.tasks.review.frame import STATUSES
from leukoflow.tasks.review.keys import run_key_of
from leukoflow.tasks.review.lines import RunLine
from leukoflow.tasks.review.loading import load_finished, load_in_progress
from leukoflow.tasks.review.run_cache import RunCache, cache_of
from leukoflow.tasks.review.table import RunTable

# --- the list --------------------------------------------------------------------------------------------------------


def list_runs(out: str) -> list[RunLine]:
    """Return all runs of an output folder or prefix, the newest first; a damaged one is listed as such."""
    cache = cache_of(out)
    names = _run_ids(cache)
    lines = cache.map_runs(lambda name: _line(cache, name), names)
    with cache.lock:
        cache.names = {run_key_of(name): name for name in names}
    for gone in set(cache.lines) - set(names):
        cache.forget(gone)
    return sorted((line for line in lines if line is not None), key=lambda r: (r.started_at, r.run_id), reverse=True)


def _run_ids(cache: RunCache) -> list[str]:
    """List run ids below the output folder or prefix; those that are known already are not looked into again."""
    if cache.storage.is_local:
        return local_runs(cache.out)
    found = cache.storage.names("")
    there = cache.map_runs(
        lambda name: name in cache.lines or cache.storage.exists(OutKey.of_run(name, RunKey.BINDING)), found
    )
    return [name for name, is_run in zip(found, there, strict=True) if is_run]


def _line(cache: RunCache, run_id: str) -> RunLine | None:
    """Return one run in the list; None where it was deleted meanwhile."""
    run = cache.storage.child(run_id)
    try:
        try:
            stamp = run.stamp(RunKey.MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return _line_in_progress(cache, run_id)
        kept = cache.lines.get(run_id)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        line = _line_of_manifest(run_id, json.loads(run.read(RunKey.MANIFEST)))
        cache.lines[run_id] = (stamp, line)
        return line
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (LeukoflowError, ValueError, KeyError, TypeError, AttributeError) as error:
        return _line_of_damaged(run_id, words_of(error))


def _line_of_damaged(run_id: str, message: str) -> RunLine:
    return RunLine(
        run_key=run_key_of(run_id),
        run_id=run_id,
        state="damaged",
        started_at="",
        finished_at=None,
        source_kind="",
        members=0,
        done=0,
        predicted=0,
        abstained=0,
        rejected=0,
        quarantined=0,
        missing=0,
        bundle="",
        bundle_digest="",
        shadow_of=None,
        message=message,
        phase="",
    )


def _line_of_manifest(run_id: str, m: Mapping[str, Any]) -> RunLine:
    """Read a manifest, which is not checked against its schema: there may be hundreds of them."""
    predicted, abstained, rejected, quarantined = (int(m[name]) for name in STATUSES)
    return RunLine(
        run_key=run_key_of(run_id),
        run_id=run_id,
        state="finished",
        started_at=str(m["started_at"]),
        finished_at=str(m["finished_at"]),
        source_kind=str(m["source"]["kind"]),
        members=int(m["members"]),
        done=predicted + abstained + rejected + quarantined,
        predicted=predicted,
        abstained=abstained,
        rejected=rejected,
        quarantined=quarantined,
        missing=int(m["missing"]),
        bundle=str(m["bundle"]),
        bundle_digest=str(m["bundle_digest"]),
        shadow_of=m.get("shadow_of"),
        message="",
        phase="",
    )


def _line_in_progress(cache: RunCache, run_id: str) -> RunLine:
    reader = cache.progress_reader(run_id)
    with cache.lock_of(run_id):
        p = reader.read()
    binding = reader.binding()
    kind, missing = "", 0
    try:
        with reader.storage.open(RunKey.PLAN) as file:
            summary = read_summary(file)
        kind, missing = str(summary.source.kind), summary.missing
    except (FileNotFoundError, LeukoflowError, pa.ArrowException):
        pass  # it is being planned
    return RunLine(
        run_key=run_key_of(run_id),
        run_id=run_id,
        state=p.state,
        started_at=p.started_at,
        finished_at=None,
        source_kind=kind,
        members=p.members,
        done=p.done,
        predicted=p.counts.predicted,
        abstained=p.counts.abstained,
        rejected=p.counts.rejected,
        quarantined=p.counts.quarantined,
        missing=missing,
        bundle=binding.bundle,
        bundle_digest=binding.bundle_digest,
        shadow_of=p.shadow_of,
        message=p.message,
        phase=p.phase if p.state == "running" else "",
    )


# --- one run ---------------------------------------------------------------------------------------------------------


def open_run_table(out: str, run_key: str) -> RunTable:
    """Open a run, by its key.

    Raises RunNotFoundError, RunBusyError while a patient is erased or corrected, StorageError where it is damaged.
    """
    return open_run(cache_of(out), run_id_of(out, run_key))


def open_run_named(out: str, run_id: str) -> RunTable:
    """Open a run, by its id; else as `open_run_table`."""
    return open_run_table(out, run_key_of(run_id))


def run_id_of(out: str, run_key: str) -> str:
    """Return the id of the run with a key. Raises RunNotFoundError."""
    cache = cache_of(out)
    name = cache.names.get(run_key)
    if name is None:
        names = {run_key_of(found): found for found in _run_ids(cache)}
        with cache.lock:
            cache.names = names
        name = names.get(run_key)
    if name is None:
        raise RunNotFoundError("there is no such run (any more); the list of runs shows what there is")
    return name


def open_run(cache: RunCache, run_id: str) -> RunTable:
    """Open a run whose id is known, reading only what is not held; else as `open_run_table`."""
    run = cache.storage.child(run_id)
    with cache.lock_of(run_id):
        with translate_read_errors(run_id):
            if run.exists(RunKey.INTENT):
                raise RunBusyError(f"run {run_id} is being changed just now; look again in a minute")
            if not run.exists(RunKey.BINDING):
                cache.forget(run_id)
                raise FileNotFoundError
            snapshot = cache.snapshots.get(run_id)
            try:
                stamp = run.stamp(RunKey.MANIFEST)
            except (FileNotFoundError, NotADirectoryError):
                snapshot = load_in_progress(run, run_id, cache.progress_reader(run_id), snapshot)
            else:
                if snapshot is None or snapshot.stamp != stamp:
                    snapshot = load_finished(run, run_id, stamp)
            verdicts = cache.verdict_reader(run_id).read()
        cache.keep(run_id, snapshot)
        return RunTable(cache.out, run_id, snapshot, verdicts)


def warm(out: str, runs: int = 1) -> None:
    """Read the newest finished runs ahead, so that nobody waits for that; errors are left to the one who opens them."""
    newest = [line for line in list_runs(out) if line.state == "finished" and line.shadow_of is None]
    for line in newest[:runs]:
        with suppress(LeukoflowError):
            open_run_table(out, line.run_key)
