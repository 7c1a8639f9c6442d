"""An opened run, and what binds it: its id, and the settings that `run.json` keeps for those who take it up again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from pydantic import ValidationError

from leukoflow.core.codec import loads
from leukoflow.core.config import RunConfig, explain
from leukoflow.core.errors import ConfigError
from leukoflow.models.bundle import Bundle
from leukoflow.runs.layout import OutKey, RunKey
from leukoflow.runs.progress import RunBinding
from leukoflow.runs.records import PlanSummary, RunManifest, Source
from leukoflow.storage.base import Storage

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHADOW_ID = re.compile(_RUN_ID.pattern + r"-shadow-[0-9a-f]{8}")
_TAKEN = OutKey.RESERVED
"""What lies beside the runs of an output folder."""


@dataclass(frozen=True, slots=True)
class Run:
    """An opened run. `finished` is its manifest when there is nothing left to do."""

    config: RunConfig
    run_id: str
    root: str
    fingerprint: str
    source: Source
    summary: PlanSummary
    bundle: Bundle
    bundle_uri: str  # where workers find it
    device: str
    binding: RunBinding
    finished: RunManifest | None


def read_binding(storage: Storage) -> RunBinding | None:
    """Read `run.json` of a run; None where there is none."""
    try:
        return loads(RunBinding, storage.read(RunKey.BINDING), storage.uri(RunKey.BINDING))
    except (FileNotFoundError, NotADirectoryError):
        return None


def bound_config(binding: RunBinding) -> RunConfig:
    """Return the settings that a run was started with. Raises ConfigError, with the remedy, where it kept none."""
    if not binding.config:
        raise ConfigError(f"run {binding.run_id} was started by an older version; to take it up: {binding.command}")
    try:
        config = RunConfig.model_validate_json(binding.config)
    except ValidationError as error:
        raise ConfigError(f"run {binding.run_id}: {explain(error)}; to take it up: {binding.command}") from None
    # what it reuses may have been named only when it was taken up again
    return config.model_copy(update={"run_id": binding.run_id, "reuse": binding.reuse or config.reuse})


def check_run_id(run_id: str, shadow_of: str | None) -> None:
    """Raise ConfigError for an id that no run, or no shadow run, may have."""
    if not (_RUN_ID if shadow_of is None else _SHADOW_ID).fullmatch(run_id):
        raise ConfigError(
            f"run id {run_id!r} is not usable: letters, digits, '.', '_' and '-' only, a letter or digit first, at "
            "most 100"
        )
    if run_id in _TAKEN:
        raise ConfigError(f"run id {run_id!r} is not usable: the output folder keeps something else under that name")


def shadow_id(main: str, digest: str) -> str:
    """Return the id of the shadow run of run `main` with the bundle of a digest."""
    return f"{main}-shadow-{digest[:8]}"


def stem(uri: str) -> str:
    """Return a source's name without folders and endings, fit for a run id."""
    name = PurePosixPath(uri.rstrip("/")).name or "source"
    name = re.sub(r"(\.tar)?\.(zip|tar|gz|tgz|bz2|xz|zst)$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "source"
