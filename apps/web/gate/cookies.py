"""Cookies that no script can read and that no other site can make a browser send."""

from __future__ import annotations

from starlette.types import Scope


def session_cookie(scope: Scope) -> str:
    """Return the name of the session cookie; over TLS with the prefix that binds it to this host."""
    return "__Host-leukoflow" if scope["scheme"] == "https" else "leukoflow"


def set_cookie(scope: Scope, name: str, value: str, max_age: int | None) -> None:
    """Add a cookie to the response; without `max_age` (seconds) it ends with the browser."""
    cookie = f"{name}={value}; Path=/; HttpOnly; SameSite=Strict"
    cookie += "; Secure" if scope["scheme"] == "https" else ""
    cookie += f"; Max-Age={max_age}" if max_age is not None else ""
    scope["state"]["cookies"].append(cookie)
