"""What handlers need from a request: its address, paths, CSRF token, upload limit and entry in the audit log."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from urllib.parse import quote

from fastapi import Request

from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.gate import gate_of
from leukoflow.apps.web.gate.principals import principal

API = "/api/"


def address_of(request: Request) -> str:
    """Return the address a request comes from, as reported by the trusted proxy."""
    return request.client.host if request.client else ""


def counted_address(address: str) -> str:
    """Return the address under which attempts are counted: the /64 network for IPv6, where machines have many."""
    try:
        known = ip_address(address)
    except ValueError:
        return address
    return str(ip_network((int(known), 64), strict=False)) if known.version == 6 else address


def path_of(request: Request, path: str) -> str:
    """Return a path of this application as browsers must request it, below the proxy's prefix."""
    return gate_of(request).settings.root_path + path


def safe_next(target: str | None) -> str:
    """Return the path to continue to after signing in; `/` for anything that might lead to another site."""
    if not target or len(target) > 512 or "//" in target or not re.fullmatch(r"/[A-Za-z0-9._~@%/-]*", target):
        return "/"
    return target


def login_path(request: Request) -> str:
    """Return the address of the sign-in page that leads back to this request."""
    here = request.scope["path"].removeprefix(gate_of(request).settings.root_path)
    target = safe_next(here) if request.method == "GET" else "/"
    return path_of(request, "/login" + (f"?next={quote(target)}" if target != "/" else ""))


def csrf_token(request: Request) -> str:
    """Return what a form must send back as `csrf` (its first field), or a script as `X-CSRF-Token`."""
    return str(request.scope["state"]["csrf"]())


def saw(request: Request, what: str, key: str = "", **details: str) -> None:
    """Record in the audit log what the principal saw or did. `key` is opaque, never a name."""
    who = principal(request)
    via = {"via": who.via} if who is not None else {"from": address_of(request)}
    gate_of(request).trail.add(who.name if who else "-", what, key, via | details)


def limit_uploads(request: Request, count: int = 1) -> None:
    """Count the principal's uploads. Raises Refused (429) if there were too many."""
    who = principal(request)
    if wait := gate_of(request).uploads.take(who.name if who else address_of(request), count):
        raise Refused(429, "Too many images at once; try again in a moment.", wait)
