"""Change what the finished runs of an output folder say of a patient: erase one, correct one.

All of a run's new files are written aside first; then a note of intent is left, with which a change that was cut off
can be finished by the same command, and the files come into force, the manifest last. `tasks/upkeep/erase.py` and
`tasks/upkeep/correct.py` say what changes, `tasks/upkeep/draft.py` writes it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import ConfigError, LeukoflowError, StorageError, words_of
from leukoflow.runs.layout import OutKey, RunKey
from leukoflow.runs.lock import held
from leukoflow.runs.progress import list_runs, read_binding, read_manifest, read_state
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.patient_key import PATIENT_KEY, check_value
from leukoflow.tasks.upkeep.amendment import Amended, Amendment, Intent
from leukoflow.tasks.upkeep.audit import append
from leukoflow.tasks.upkeep.draft import Draft


def amend_runs(out: str, amendment: Amendment, dry_run: bool = False, key: bytes | None = None) -> tuple[Amended, ...]:
    """Change all runs of an output folder; return what was done to those that are concerned.

    `key` is the one that made the pseudonyms of the amendment, where that is known. Raises StorageError before anything
    is changed where a run that may be concerned is not finished or damaged, ConfigError where one has another key.
    """
    check = check_value(key) if key else ""
    storage = open_storage(out)
    names = list_runs(out)
    if not names:
        raise ConfigError(
            f"{out} holds no run; {amendment.doing} needs the folder or prefix that was given to `run --out`"
        )
    if dry_run:
        return tuple(e for e in (_look(storage.child(n), n, amendment, check) for n in names) if e is not None)
    with held(storage, OutKey.AUDIT_LOCK, amendment.doing):
        for name in names:
            run = storage.child(name)
            if run.exists(RunKey.INTENT):
                done = loads(Intent, run.read(RunKey.INTENT), run.uri(RunKey.INTENT)).done
                _apply(run)
                after = _sha256(run.read(RunKey.MANIFEST))
                append(storage, done, name, after, {"why": "a change that was cut off is finished"})
            run.sweep_attempts("amend")
        found = [e for e in (_look(storage.child(n), n, amendment, check) for n in names) if e is not None]
        changed = []
        for amended in found:
            details = {**amendment.details(), "images": str(amended.images)}
            run = storage.child(amended.run_id)
            with held(run, RunKey.LOCK, amendment.doing):
                append(storage, amendment.doing, amended.run_id, amended.manifest_before, details)
                files = _amend(run, amendment)
                after = _sha256(run.read(RunKey.MANIFEST))
                append(storage, amendment.done, amended.run_id, after, details)
            changed.append(replace(amended, files=files, manifest_after=after))
        return tuple(changed)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _look(run: Storage, name: str, amendment: Amendment, check: str) -> Amended | None:
    """Say how a run is concerned; None where it is not. Raises StorageError where that is not known."""
    try:
        state = read_state(run.root)
        with run.open(RunKey.PLAN) as file:
            images = _count(pq.ParquetFile(file), amendment)
        missing = 0
        if run.exists(RunKey.MISSING):
            with run.open(RunKey.MISSING) as file:
                missing = _count(pq.ParquetFile(file), amendment)
        theirs = read_binding(run).patient_key_check
    except (LeukoflowError, OSError, pa.ArrowException) as error:
        raise StorageError(
            f"run {name} cannot be searched for the patient ({words_of(error)}); repair or delete it first. "
            "Nothing was changed"
        ) from None
    if not images and not missing:
        return None
    if check and theirs not in ("", check):
        raise ConfigError(
            f"run {name} is affected, but its pseudonyms were made with another patient key: set {PATIENT_KEY} to "
            "that one, or give pseudonyms (p_...). Nothing was changed"
        )
    if state.state != "finished":
        raise StorageError(
            f"run {name} knows the patient and is not finished ({state.state}): give its command "
            "again (leukoflow status), or delete it. Nothing "
            "was changed"
        )
    return Amended(name, images, missing, 0, _sha256(run.read(RunKey.MANIFEST)), None)


def _count(table: pq.ParquetFile, amendment: Amendment) -> int:
    batches = table.iter_batches(columns=["patient_id", "slide_id"])
    return sum(pc.sum(amendment.concerned(pa.Table.from_batches([b]))).as_py() or 0 for b in batches)


# --- a run -----------------------------------------------------------------------------------------------------------


def _amend(run: Storage, amendment: Amendment) -> int:
    """Write everything aside, leave the note, and bring it into force; return the number of files rewritten."""
    manifest = read_manifest(run)
    assert manifest is not None
    draft = Draft(run, manifest, RunKey.new_attempt("amend"), amendment)
    intent = draft.write()
    run.write(RunKey.INTENT, dumps(intent))
    _apply(run)
    return len(intent.parts) + len(intent.books)


def _apply(run: Storage) -> None:
    """Bring what was written aside into force; doing it again after a crash is harmless."""
    intent = loads(Intent, run.read(RunKey.INTENT), run.uri(RunKey.INTENT))
    run.promote(intent.prefix, intent.parts)
    for key in intent.stale:
        run.delete(key)
    if not run.intact(intent.parts):
        raise StorageError(f"{run.root}: changed parts could not be put in place; run the same command again")
    for key, _, _ in intent.books:
        run.write(key, run.read(f"{intent.prefix}/{key}"))
    run.delete(RunKey.REPORT)  # it shows slides and pixels; `leukoflow report` builds it again
    run.delete(RunKey.INTENT)
    run.sweep_attempts("moving")  # what a crash has left there is what was to be changed
    run.sweep_attempts("amend")
