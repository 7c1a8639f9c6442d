"""Settings of `leukoflow serve`: addresses, accounts, limits. Plain values, checked once at start."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import ConfigError
from leukoflow.runs.layout import OutKey

ROLES = ("viewer", "reviewer", "admin")
"""Each includes the rights of the ones before it."""

SCOPES = ("read", "diagnose", "review", "export", "admin")
SCOPES_OF = {
    "viewer": frozenset({"read", "diagnose"}),
    "reviewer": frozenset({"read", "diagnose", "review", "export"}),
    "admin": frozenset(SCOPES),
}
"""Scopes of a role. A token has those that it was created with and its owner's role still has."""

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Bounds on one upload. Pixels are bounded by `LimitSettings` when an image is decoded."""

    file_mb: int = 64  # one image, as uploaded or unpacked
    files: int = 64  # in one upload, members of archives included
    total_mb: int = 128  # one upload, as sent and as unpacked
    receiving_mb: int = 512  # all uploads that are arriving at a time
    archive_ratio: float = 200.0  # unpacked to stored bytes of a member
    jobs_mb: int = 512  # of all results held in memory for all people
    jobs_each: int = 8  # results held for one person
    job_minutes: float = 30.0  # how long results stay


@dataclass(frozen=True, slots=True)
class Rates:
    """Token buckets: (burst, seconds until one more)."""

    logins_by_address: tuple[int, float] = (20, 6.0)
    logins_by_name: tuple[int, float] = (8, 30.0)
    uploads: tuple[int, float] = (120, 0.5)


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """A reverse proxy in front. Its headers about client and scheme are trusted only from `addresses`."""

    addresses: tuple[IPv4Network | IPv6Network, ...] = ()
    sign_in: bool = False  # whether it signs people in and names them in headers
    name_header: str = "x-forwarded-user"
    groups_header: str = "x-forwarded-groups"
    roles: tuple[tuple[str, str], ...] = ()  # (group, role); the highest role counts


@dataclass(frozen=True, slots=True)
class WebSettings:
    """All settings of the web application. `users_file` must lie outside `out`."""

    out: str
    users_file: Path
    host: str = "127.0.0.1"
    port: int = 8400
    bundles: tuple[str, ...] = ("pocket",)
    names: tuple[str, ...] = ()  # host names that people type, beside the loopback ones
    root_path: str = ""  # path below which a reverse proxy serves this
    tls: bool = False
    proxy: ProxySettings = field(default_factory=ProxySettings)
    idle_minutes: float = 30.0  # a session ends after so long without a request
    session_hours: float = 12.0  # and after so long in any case
    uploads: UploadLimits = field(default_factory=UploadLimits)
    rates: Rates = field(default_factory=Rates)
    limits: LimitSettings = field(default_factory=LimitSettings)
    workers: int = 1  # processes that diagnose
    audit_file: Path | None = None  # default: OUT/web-audit.jsonl, for a store beside the users file

    def audit_path(self) -> Path:
        """Return the path of the audit log."""
        if self.audit_file is not None:
            return self.audit_file
        if self.out.startswith("s3://"):
            return self.users_file.with_name(OutKey.WEB_AUDIT)
        return Path(self.out) / OutKey.WEB_AUDIT


def default_users_file() -> Path:
    """Return `LEUKOFLOW_WEB_USERS`, else a path below the user's state directory."""
    if chosen := os.environ.get("LEUKOFLOW_WEB_USERS"):
        return Path(chosen).expanduser().absolute()
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser().absolute() / "leukoflow" / "web" / "users.json"


def checked_users_file(file: Path | None, out: str | None) -> Path:
    """Return the users file as an absolute path. Raises ConfigError if it lies among the results."""
    path = default_users_file() if file is None else file.expanduser().absolute()
    if out is not None and not out.startswith("s3://") and path.resolve().is_relative_to(Path(out).resolve()):
        raise ConfigError(f"the users file {path} lies among the results in {out}; choose another place with --users")
    return path


def networks(addresses: tuple[str, ...]) -> tuple[IPv4Network | IPv6Network, ...]:
    """Parse addresses or networks (10.0.0.0/8). Raises ConfigError that names the one that is neither."""
    found = []
    for text in addresses:
        try:
            found.append(ip_network(text, strict=False))
        except ValueError:
            raise ConfigError(f"--proxy-from {text}: it must be an address or a network, as in 10.0.0.7") from None
    return tuple(found)


def checked_root_path(path: str) -> str:
    """Return `/name`, or empty. Raises ConfigError."""
    path = path.rstrip("/")
    if path and not re.fullmatch(r"(/[A-Za-z0-9_-]+)+", path):
        raise ConfigError(f"--root-path {path}: it must look like /leukoflow")
    return path


def checked_host_name(name: str) -> str:
    """Return a host name or an address in lower case. Raises ConfigError."""
    if not is_host(name):
        raise ConfigError(f"--name {name}: it must be a host name without scheme, port or path")
    return name.lower()


def is_host(name: str) -> bool:
    """Return whether this is a host name or an address (IPv6 in brackets or not)."""
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return len(name) <= 253 and _HOST_NAME.fullmatch(name) is not None
    return True


def is_loopback(address: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
