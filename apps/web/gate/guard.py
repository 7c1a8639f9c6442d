"""The outermost layer around every request.

Finds out who is asking and from where; refuses unknown host names, forged requests and bodies that are too large; adds
security headers, cookies and a line in the access log. No handler can forget any of it.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any

from fastapi import Request
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leukoflow.apps.web.gate.body import SMALL_BODY, Body, csrf_field, too_large
from leukoflow.apps.web.gate.cookies import session_cookie, set_cookie
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.gate import Gate
from leukoflow.apps.web.gate.principals import Principal, principal_of
from leukoflow.apps.web.gate.request import API
from leukoflow.apps.web.settings import ROLES, SCOPES_OF, WebSettings
from leukoflow.core.errors import place_of

log = logging.getLogger("leukoflow.web")
_UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; media-src 'self' blob:; worker-src 'self'; manifest-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; object-src 'none'"
)
SECURITY_HEADERS = (
    (b"content-security-policy", _CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=(), payment=(), usb=()"),
)
Failed = Callable[[Request, Exception], Awaitable[Any]]


class Guard:
    """ASGI middleware. `failed` answers an exception; `uploads` are the paths that take large bodies."""

    def __init__(self, app: ASGIApp, gate: Gate, failed: Failed, uploads: frozenset[str]) -> None:
        self._app, self._gate, self._failed, self._uploads = app, gate, failed, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        answer = _Answer(scope, send)
        body = Body(receive)
        try:
            self._identify(scope)
            body.limit = self._limit(scope)
            _check_length(scope, body.limit)
            await self._check_forgery(scope, body)
            await self._app(scope, body.receive, answer.send)
        except Exception as error:
            if answer.status:
                log.error("%s", place_of(error))
                # Too late for another answer; the server logs what is raised here, so it must not repeat the words.
                raise RuntimeError("an answer broke off") from None
            try:
                response = await self._failed(Request(scope, body.receive), error)
            except Exception as second:  # the page that explains errors has one itself
                log.error("%s", place_of(second))
                response = PlainTextResponse("Something went wrong here; the server's log says where.", 500)
            await response(scope, body.receive, answer.send)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or ("/static" if "/static/" in scope["path"] else "unmatched")
            log.info("%s %s %d %.0f ms", scope["method"], path, answer.status, 1000 * (time.perf_counter() - started))

    def _identify(self, scope: Scope) -> None:
        """Fill the request's state: who is asking, from where, for which path."""
        settings, headers = self._gate.settings, headers_of(scope)
        state = scope.setdefault("state", {})
        state |= {"principal": None, "session_id": "", "cookies": [], "csrf": lambda: self._csrf(scope)}
        peer = scope["client"][0] if scope.get("client") else ""
        trusted = state["trusted"] = _within(peer, settings)
        state["proxied"] = trusted and "x-forwarded-for" in headers  # else it comes from the proxy's own machine
        if trusted:
            if headers.get("x-forwarded-proto") in ("http", "https"):
                scope["scheme"] = headers["x-forwarded-proto"]
            client = headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
            scope["client"] = (client if _is_address(client) else peer, 0)
        root = settings.root_path
        if root:  # a proxy may hand the prefix on or take it off
            if scope["path"] == root:
                scope["path"] = root + "/"
            elif not scope["path"].startswith(root + "/"):
                scope["path"] = root + scope["path"]
            scope["root_path"] = root
        cookies = cookie_parser(headers.get("cookie", ""))
        state["anonymous"] = cookies.get("leukoflow_visit", "")
        state["session_id"] = cookies.get(session_cookie(scope), "")
        self._check_host(headers.get("host", ""))
        state["principal"] = self._who(scope, headers)

    def _who(self, scope: Scope, headers: dict[str, str]) -> Principal | None:
        gate, state, settings = self._gate, scope["state"], self._gate.settings
        kind, _, text = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            found = gate.accounts.check_token(text.strip())
            return None if found is None else Principal(found[0].name, found[0].role, found[1], "token")
        if settings.proxy.sign_in:
            if not state["trusted"]:
                return None
            return _named_by_proxy(settings, headers)
        user = gate.sessions.find(state["session_id"]) if state["session_id"] else None
        return None if user is None else principal_of(user, "session")

    def _check_host(self, host: str) -> None:
        name = host.lower()
        name = name[: name.rfind("]") + 1] if name.startswith("[") else name.partition(":")[0]
        settings = self._gate.settings
        own = () if settings.host in ("0.0.0.0", "::") else (settings.host, f"[{settings.host}]")
        if name in ("localhost", "127.0.0.1", "[::1]", *own, *settings.names):
            return
        raise Refused(400, "This server does not answer to this host name; add it with `leukoflow serve --name`.")

    def _limit(self, scope: Scope) -> int:
        path = scope["path"].removeprefix(self._gate.settings.root_path)
        if path in self._uploads and scope["state"]["principal"] is not None:
            return (self._gate.settings.uploads.total_mb << 20) + (1 << 20)
        return SMALL_BODY

    def _csrf(self, scope: Scope) -> str:
        state = scope["state"]
        who = state["principal"]
        if who is not None and who.via == "proxy":
            return self._gate.sealed("proxy", who.name)
        if who is not None and who.via == "session":
            return self._gate.sealed("session", state["session_id"])
        if not state["anonymous"]:
            state["anonymous"] = secrets.token_urlsafe(24)
            set_cookie(scope, "leukoflow_visit", state["anonymous"], None)
        return self._gate.sealed("visit", state["anonymous"])

    async def _check_forgery(self, scope: Scope, body: Body) -> None:
        """Refuse an unsafe request that a page of another site may have made a browser send."""
        if scope["method"] not in _UNSAFE:
            return
        who, headers = scope["state"]["principal"], headers_of(scope)
        path = scope["path"].removeprefix(self._gate.settings.root_path)
        if who is not None and who.via == "token":
            return  # no browser adds a token by itself
        if who is None and path.startswith(API):
            return  # without a principal it is refused there anyway
        if headers.get("sec-fetch-site") == "cross-site":
            raise Refused(403, "This request came from a page of another site.")
        given = headers.get("x-csrf-token") or await csrf_field(headers.get("content-type", ""), body)
        if not hmac.compare_digest(given.encode(), self._csrf(scope).encode()):
            if who is not None:
                self._gate.trail.add(who.name, "forged request refused", details={"from": scope["client"][0]})
            raise Refused(403, "This page has expired: load it again.")


class _Answer:
    """Sends the response, with security headers and cookies added."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", []))
            present = {name.lower() for name, _ in headers}
            headers += [pair for pair in SECURITY_HEADERS if pair[0] not in present]
            if b"cache-control" not in present:
                headers.append((b"cache-control", b"no-store"))
            if self._scope["scheme"] == "https":
                headers.append((b"strict-transport-security", b"max-age=31536000"))
            headers += [(b"set-cookie", c.encode()) for c in self._scope.get("state", {}).get("cookies", ())]
            message = {**message, "headers": headers}
        await self._send(message)


def headers_of(scope: Scope) -> dict[str, str]:
    """Return the headers by lower-case name; of a repeated one the last, which the proxy added, counts."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _within(peer: str, settings: WebSettings) -> bool:
    return _is_address(peer) and any(ip_address(peer) in network for network in settings.proxy.addresses)


def _named_by_proxy(settings: WebSettings, headers: dict[str, str]) -> Principal | None:
    proxy = settings.proxy
    name = headers.get(proxy.name_header, "").strip()
    if not name or len(name) > 128 or not name.isprintable():
        return None
    groups = {g.strip() for g in headers.get(proxy.groups_header, "").split(",")}
    roles = [role for group, role in proxy.roles if group in groups]
    if not roles:
        return Principal(name, "", frozenset(), "proxy")  # known, and allowed nothing
    role = max(roles, key=ROLES.index)
    return Principal(name, role, SCOPES_OF[role], "proxy")


def _check_length(scope: Scope, most: int) -> None:
    text = headers_of(scope).get("content-length", "0")
    if not text.isdecimal():
        raise Refused(400, "The length of the request is not a number.")
    if int(text) > most:
        raise too_large(most)
