"""Find the pseudonyms by which runs know a patient, and the runs that were made with another patient key."""

from __future__ import annotations

import re
from collections.abc import Sequence

from leukoflow.core.errors import ConfigError
from leukoflow.runs.layout import OutKey, RunKey
from leukoflow.runs.progress import list_runs, read_binding
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.patient_key import PATIENT_KEY, check_value, pseudonyms

_PSEUDONYM = re.compile(r"p_[0-9a-f]{32}")


def patient_names(patient: str, key: bytes | None) -> tuple[str, ...]:
    """Return the pseudonyms of a patient, given as such or as in the manifest. Raises ConfigError without the key.

    There are two where blanks were typed around the id: runs of older versions took them for a part of it.
    """
    if _PSEUDONYM.fullmatch(patient):
        return (patient,)
    if not key:
        raise ConfigError(
            f"patients are known by pseudonyms here, and there is no key to find this one's: set {PATIENT_KEY} "
            "to the key of those runs, or give the pseudonym (p_...) itself"
        )
    return pseudonyms(patient, key)


def patient_name(patient: str, key: bytes | None) -> str:
    """Return the pseudonym of a patient, given as such or as in the manifest. Raises ConfigError without the key."""
    return patient_names(patient, key)[0]


def runs_of_other_keys(out: str, patient: str, key: bytes | None, runs: Sequence[str] | None = None) -> tuple[str, ...]:
    """List runs (by default of all) whose patients have pseudonyms by another key: this patient is not found there.

    Empty where the patient is given as a pseudonym. Runs of older versions do not say what key they were made with.
    Raises ConfigError where every run that says it says another one.
    """
    if key is None or _PSEUDONYM.fullmatch(patient):
        return ()
    storage, checks = open_storage(out), {}
    for name in list_runs(out) if runs is None else runs:
        if storage.exists(OutKey.of_run(name, RunKey.BINDING)):
            run = storage.child(name)
            checks[name] = read_binding(run).patient_key_check
    others = tuple(name for name, check in checks.items() if check not in ("", check_value(key)))
    if others and not any(check == check_value(key) for check in checks.values()):
        raise ConfigError(
            f"{PATIENT_KEY} holds another key than the one that made the pseudonyms of {_named(others)}, so nobody "
            "would be found there: set it to the key of those runs, or give the pseudonym (p_...) itself"
        )
    return others


def other_keys_in_words(others: Sequence[str]) -> str:
    """Say what is to be done about runs in which a patient could not be looked for."""
    return (
        f"not looked for in {_named(others)}: made with another patient key. Set {PATIENT_KEY} to that one, and give "
        "the same command again"
    )


def _named(runs: Sequence[str]) -> str:
    more = f" and {len(runs) - 3} more runs" if len(runs) > 3 else ""
    return ", ".join(runs[:3]) + more
