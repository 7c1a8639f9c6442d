"""A site: where slides arrive, where results go, when they are wanted, and how its nights are run. A TOML file each."""

from __future__ import annotations

import os
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, ValidationError, field_validator

from leukoflow.core.config import RunConfig, UrgentSettings, config_from, explain, read_toml
from leukoflow.core.errors import ConfigError
from leukoflow.core.method import Settings

SITE = "LEUKOFLOW_SITE"
"""Names the site file where nothing else does."""

_OF_THE_SITE = (
    "source", "out", "run_id", "manifest", "manifest_sha256", "selection", "reuse", "deadline", "at_deadline", "urgent",
)  # fmt: skip


class ArrivalSettings(Settings):
    """The signs that an item of the inbox has arrived whole."""

    settle_seconds: float = Field(300.0, ge=0, description="an item in which nothing changed for so long has arrived")
    complete: Literal["settled", "sentinel"] = Field(
        "settled", description="`settled`: a sentinel, or nothing has changed for settle_seconds; `sentinel`: only that"
    )
    sentinel: str = Field("_COMPLETE", min_length=1, description="file that says of its folder that it is complete")
    done_suffix: str = Field(".done", min_length=2, description="NAME.done says it of the file NAME beside it")
    partial: tuple[str, ...] = Field(
        (".*", "*.part", "*.partial", "*.filepart", "*.crdownload", "*.tmp"),
        description="patterns of files that are still being written; they are never taken",
    )

    @field_validator("sentinel", "done_suffix")
    @classmethod
    def _plain(cls, value: str) -> str:
        if "/" in value:
            raise ValueError("is the name of a file, or its ending, without a folder")
        return value


class RetentionSettings(Settings):
    """The runs that stay, as `leukoflow retention` has it."""

    keep_days: float = Field(90.0, ge=0, description="runs that were active within so many days stay")
    keep_last: int = Field(5, ge=0, description="so many finished runs stay, however old")


class Site(Settings):
    """A site file. Credentials are not in it: they come from where the store's own programs look for them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$", description="begins the ids of the site's runs")
    inbox: str
    out: str
    manifest: str | None = Field(None, description="what is expected: image_key is ITEM/path below the inbox")
    time_zone: str = "UTC"
    deadline: time | None = Field(None, description="local time at which results are wanted, such as 06:00")
    at_deadline: Literal["continue", "stop"] = "continue"
    arrival: ArrivalSettings = ArrivalSettings()
    urgent: UrgentSettings = UrgentSettings()
    retention: RetentionSettings = RetentionSettings()
    run: RunConfig

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"there is no time zone {value!r}; give one like Europe/Berlin") from None
        return value

    @field_validator("deadline")
    @classmethod
    def _local(cls, value: time | None) -> time | None:
        if value is not None and value.tzinfo is not None:
            raise ValueError("is a local time such as 06:00; its zone is time_zone")
        return value

    @property
    def zone(self) -> ZoneInfo:
        """The site's time zone."""
        return ZoneInfo(self.time_zone)

    def night_of(self, moment: datetime) -> date:
        """Return the date of the night that begins at a moment."""
        return moment.astimezone(self.zone).date()

    def next_deadline(self, moment: datetime) -> datetime | None:
        """Return the first deadline after a moment; None for a site without one."""
        if self.deadline is None:
            return None
        day = self.night_of(moment)
        today, tomorrow = (datetime.combine(d, self.deadline, self.zone) for d in (day, day + timedelta(days=1)))
        return today if today > moment else tomorrow


def load_site(file: str | Path | None = None) -> Site:
    """Read the site that `file` describes, by default the file that LEUKOFLOW_SITE names.

    Paths in it are relative to its folder. `LEUKOFLOW_...` variables win over its table `run`, as they do over a
    configuration file. Raises ConfigError naming each wrong setting.
    """
    file = file or os.environ.get(SITE)
    if not file:
        raise ConfigError(f"no site is named: give the path of a site file, or set {SITE} to it")
    table = read_toml(file)
    folder = Path(file).expanduser().absolute().parent
    for name in ("inbox", "out", "manifest"):
        if isinstance(table.get(name), str):
            table[name] = _absolute(table[name], folder)
    try:
        return Site(**table | {"run": _run_settings(table)})
    except ValidationError as error:
        raise ConfigError(f"site file {file}: {explain(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"site file {file}, table run: {error}") from None


def _run_settings(table: dict[str, Any]) -> RunConfig:
    run = table.get("run", {})
    if not isinstance(run, dict):
        raise ConfigError("it is a table: write [run] on a line of its own, and the settings below it")
    if wrong := [name for name in _OF_THE_SITE if name in run]:
        raise ConfigError(f"{', '.join(wrong)}: the site says it outside of [run]")
    return config_from(run, source=str(table.get("inbox", "?")), out=str(table.get("out", "?")))


def _absolute(path: str, folder: Path) -> str:
    return path.rstrip("/") if "://" in path else os.path.normpath(folder / Path(path).expanduser())
