"""Commands about a run, spelled out so that they hold from any folder: to take it up again, to look at it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from leukoflow.core.config import RunConfig
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run

_SAID: dict[str, Any] = dict.fromkeys(
    (
        "source", "out", "run_id", "manifest", "manifest_sha256", "selection", "bundle", "bundles", "reuse",
        "shadow_of", "shard_size", "um_per_px", "device", "deadline", "at_deadline",
    ),
    True,
) | {"cluster": {"address", "workers"}}  # fmt: skip
"""Settings that an option of `run` says, or that no later run takes up: a deadline belongs to its night."""


def resume_command(config: RunConfig, run_id: str, bundle: str, planned: bool = False) -> str:
    """Say which command takes this run up again, from wherever it is given, with the bundle that it started with.

    What no option of `run` says is kept with the run, which `rerun` reads. Only once the run is planned, however: the
    manifest of one that is not may be about to be mended, and `rerun` goes by what it was.
    """
    if config.shadow_of is not None:
        words = ["leukoflow", "shadow", config.out, config.shadow_of, "--bundle", bundle]
    elif config.selection or (planned and _says_more(config)):
        words = ["leukoflow", "rerun", config.out, run_id]
    else:
        words = run_words(config, run_id, bundle)
    places = [config.source, config.out, config.manifest, config.bundles, config.drift_reference]
    if Path(bundle, "bundle.json").is_file():  # else it is the name of one that comes with the program
        places.append(bundle)
    here = f"cd {shlex.quote(os.getcwd())} && " if any(map(_is_relative, places)) else ""
    return here + shlex.join(words)


def command_about(run: Run, name: str) -> str:
    """Say how to give command `name` (`status`, `report`) about a run, from wherever it is given."""
    return shlex.join(["leukoflow", name, open_storage(run.config.out).root, run.run_id])


def _is_relative(place: str | None) -> bool:
    """Tell whether a place is another one when it is named in another folder."""
    return place is not None and "://" not in place and not Path(place).is_absolute()


def _says_more(config: RunConfig) -> bool:
    """Tell whether there are settings, other than the defaults, that no option of `run` says."""
    default = RunConfig.model_construct(source="", out="")
    return config.model_dump(exclude=_SAID) != default.model_dump(exclude=_SAID)


def run_words(config: RunConfig, run_id: str, bundle: str) -> list[str]:
    """Spell out the `run` command of these settings, as far as options say them."""
    words = ["leukoflow", "run", config.source, "--out", config.out, "--run-id", run_id]
    for option, value, default in (
        ("--manifest", config.manifest, None),
        ("--bundle", bundle, "pocket"),
        ("--reuse", config.reuse, None),
        ("--shard-size", config.shard_size, RunConfig.model_fields["shard_size"].default),
        ("--um-per-px", config.um_per_px, None),
        ("--device", config.device, "auto"),
        ("--cluster", config.cluster.address, "local"),
        ("--workers", config.cluster.workers, 0),
    ):
        if value != default:
            words += [option, str(value)]
    return words
