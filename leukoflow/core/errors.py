"""One exception tree. Every message names the thing and the remedy, since it is what an operator reads at night."""

from __future__ import annotations

import traceback
from pathlib import Path


class LeukoflowError(Exception):
    """Base of all errors that leukoflow raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class SourceError(LeukoflowError):
    """The source as a whole cannot be used: absent, empty, of no known kind."""

    exit_code = 2


class ConfigError(LeukoflowError):
    """A setting is missing, contradictory or out of range."""


class PreflightError(LeukoflowError):
    """Something that the run needs is not there: disk, memory, write access, conditional writes, a resource."""


class RunConflictError(LeukoflowError):
    """The run id exists and is bound to another source, manifest, bundle or device, or to other settings."""


class BundleError(LeukoflowError):
    """A bundle is absent, incomplete, altered or of another schema version."""


class StorageError(LeukoflowError):
    """A read or write at the destination failed in a way that a retry of the run may mend."""


class ClusterError(LeukoflowError):
    """No Dask cluster, workers running other code, or a resource that no worker offers."""


class ShardError(LeukoflowError):
    """One shard failed for good; the message names the shard, the stage and the reason."""


class AttemptError(ShardError):
    """An attempt at a shard lost what it had computed, through no fault of the shard; another attempt is due."""


class ReconciliationError(LeukoflowError):
    """The totals do not balance: some member has no row, or more than one."""


class RunCancelledError(LeukoflowError):
    """The run was asked to stop, has drained what was running, and can be resumed."""

    exit_code = 130


class DeadlineError(RunCancelledError):
    """The run has reached its deadline, has handed over what is done, and stops there as its settings say."""


class NotFoundError(LeukoflowError):
    """What was asked for by key is not there, or not there any more."""


class RunNotFoundError(NotFoundError):
    """No run has this key; it may have been deleted meanwhile."""


class RequestError(LeukoflowError):
    """What was asked for makes no sense: a filter, a verdict, a format that there is not."""


class RunBusyError(LeukoflowError):
    """A patient is being erased from the run or corrected in it; the same request works when that is done."""


class MemberError(LeukoflowError):
    """One member of the source cannot be used; becomes a quarantined row whose `reason` is this message."""


def words_of(error: BaseException) -> str:
    """Return what may be passed on of an error: our own words; of others the kind, and of the system's the reason.

    What a library says may quote a line of a manifest, a value or a name, and with it a patient.
    """
    if isinstance(error, LeukoflowError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def place_of(error: BaseException) -> str:
    """Name an exception's type and where it was raised. Its message may name an image or a patient, and is left out."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    return f"{type(error).__name__} at {places}" if places else type(error).__name__


QUOTING = (ValueError, LookupError, TypeError)
"""Exceptions whose message may quote values: of Arrow, pydantic, csv, json and decoding all."""
