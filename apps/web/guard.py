"""The gate: who is asking, what they may do, and what no request may do.

`Gate` holds what the whole application shares. `Guard` is the outermost layer around every request: it says who asks
and from where, refuses unknown host names, forged requests and bodies that are too large, and adds security headers.
Handlers use the dependencies `viewer`, `reviewer`, `admin`, `diagnoser` and `exporter`, and the functions `sign_in`,
`sign_out`, `set_up`, `csrf_token`, `saw`, `limit`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import parse_qs, quote

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leukoflow.apps.web.accounts import AccountError, Accounts, Sessions, User
from leukoflow.apps.web.settings import ROLES, SCOPES_OF, WebSettings, is_loopback
from leukoflow.apps.web.trail import Trail
from leukoflow.core.errors import place_of

log = logging.getLogger("leukoflow.web")

API = "/api/"
_UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_SMALL_BODY = 256 << 10  # of any request that is no upload
_BODY_SECONDS = 30.0  # between two pieces of a body
_WHOLE_BODY_SECONDS = 600.0
_SETUP_MINUTES = 60
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; media-src 'self' blob:; worker-src 'self'; manifest-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; object-src 'none'"
)
_HEADERS = (
    (b"content-security-policy", _CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=(), payment=(), usb=()"),
)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking. `via` is `session`, `proxy` or `token`."""

    name: str
    role: str
    scopes: frozenset[str]
    via: str

    def may(self, scope: str) -> bool:
        """Whether something of that scope is allowed."""
        return scope in self.scopes


class Refused(HTTPException):
    """A request that is not answered; `detail` says why and what to do, for people."""

    def __init__(self, status: int, detail: str, retry_after: float | None = None) -> None:
        headers = None if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        super().__init__(status, detail, headers)


class SignInNeeded(Refused):
    """Nobody is signed in: people are led to the sign-in page."""

    def __init__(self) -> None:
        super().__init__(401, "Sign in first, or send a valid API token.")


class Bucket:
    """So many at once for each key, and one more after so many seconds; holds a bounded number of keys."""

    def __init__(self, burst: int, seconds: float, keys: int = 20_000) -> None:
        self._burst, self._seconds, self._keys = burst, seconds, keys
        self._level: dict[str, tuple[float, float]] = {}  # (what is left, when)

    def take(self, key: str, count: int = 1) -> float:
        """Seconds to wait; 0.0 when it was granted."""
        now = time.monotonic()
        left, at = self._level.pop(key, (float(self._burst), now))
        left = min(float(self._burst), left + (now - at) / self._seconds)
        if left >= min(count, self._burst):
            self._level[key] = (left - count, now)
            wait = 0.0
        else:
            self._level[key] = (left, now)
            wait = (min(count, self._burst) - left) * self._seconds
        while len(self._level) > self._keys:
            del self._level[next(iter(self._level))]  # that which was asked for least recently
        return wait

    def forget(self, key: str) -> None:
        """As if nothing had been taken."""
        self._level.pop(key, None)


class Gate:
    """What the gate knows: accounts, sessions, limits, log, and the way in on the first day."""

    def __init__(self, settings: WebSettings, accounts: Accounts | None = None) -> None:
        self.settings = settings
        self.accounts = accounts or Accounts(settings.users_file)
        self.sessions = Sessions(self.accounts, settings.idle_minutes * 60, settings.session_hours * 3600)
        self.trail = Trail(settings.audit_path())
        self.by_address = Bucket(*settings.rates.logins_by_address)
        self.by_name = Bucket(*settings.rates.logins_by_name)
        self.uploads = Bucket(*settings.rates.uploads)
        self.told = Bucket(1, 60.0)  # what an attacker repeats must not fill the log
        self.trusted: dict[tuple[str, str], None] = {}  # (name, address) that has signed in before
        self.hashing = asyncio.Semaphore(2)  # a password takes 64 MB to check
        self.receiving = 0  # bytes of uploads that are on their way in
        self.streams: dict[str, int] = {}  # live connections by person
        self._secret = secrets.token_bytes(32)
        self._setup = secrets.token_urlsafe(24)
        self._setup_until = time.monotonic() + _SETUP_MINUTES * 60

    def setup_link(self) -> str | None:
        """Address of the page that makes the first administrator; None where there are users, or a proxy knows them."""
        if self.settings.proxy.sign_in or not self.accounts.empty():
            return None
        scheme = "https" if self.settings.tls else "http"
        return f"{scheme}://127.0.0.1:{self.settings.port}{self.settings.root_path}/setup?key={self._setup}"

    def is_setup_key(self, key: str) -> bool:
        """Whether that is the key of the link, and its time is not over."""
        return hmac.compare_digest(key.encode(), self._setup.encode()) and time.monotonic() < self._setup_until

    def sealed(self, kind: str, value: str) -> str:
        """What only this server can make of a value."""
        return hmac.new(self._secret, f"{kind}\0{value}".encode(), hashlib.sha256).hexdigest()

    def remember(self, name: str, address: str) -> None:
        """Somebody has signed in from there, so strangers who try that name elsewhere cannot keep them out."""
        self.trusted[name.lower(), address] = None
        while len(self.trusted) > 20_000:
            del self.trusted[next(iter(self.trusted))]


# --- for handlers ----------------------------------------------------------------------------------------------------


def gate_of(request: Request) -> Gate:
    """The application's gate."""
    gate = request.app.state.gate
    assert isinstance(gate, Gate)
    return gate


def principal(request: Request) -> Principal | None:
    """Who is asking; None for nobody who is signed in."""
    found = request.scope["state"].get("principal")
    return found if isinstance(found, Principal) else None


def allowed(scope: str) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency that lets in who may do something of that scope."""

    async def check(request: Request) -> Principal:
        who = principal(request)
        if who is None:
            raise SignInNeeded
        if not who.may(scope):
            gate_of(request).trail.add(who.name, "refused", details={"scope": scope})
            raise Refused(403, f"Your role or token does not allow you to {_WORDS[scope]}; ask an administrator.")
        return who

    return check


_WORDS = {
    "read": "look at runs",
    "diagnose": "have images diagnosed",
    "review": "review",
    "export": "export",
    "admin": "open Admin",
}
viewer = allowed("read")
diagnoser = allowed("diagnose")
reviewer = allowed("review")
exporter = allowed("export")
admin = allowed("admin")


def csrf_token(request: Request) -> str:
    """What a form must send back as `csrf` (in its first field), or a script as `X-CSRF-Token`."""
    return str(request.scope["state"]["csrf"]())


def saw(request: Request, what: str, key: str = "", **details: str) -> None:
    """Writes to the log that whoever asks saw or did something. `key` is opaque, never a name."""
    who = principal(request)
    via = {"via": who.via} if who is not None else {"from": address_of(request)}
    gate_of(request).trail.add(who.name if who else "-", what, key, via | details)


def limit(request: Request, count: int = 1) -> None:
    """Counts uploads of whoever asks. Raises Refused (429) where there were too many."""
    who = principal(request)
    if wait := gate_of(request).uploads.take(who.name if who else address_of(request), count):
        raise Refused(429, "Too many images at once; try again in a moment.", wait)


def address_of(request: Request) -> str:
    """Where a request comes from, as the trusted proxy says."""
    return request.client.host if request.client else ""


def _place(address: str) -> str:
    """An address as it is counted: of IPv6 the network of a house, since each machine in it has many addresses."""
    try:
        known = ip_address(address)
    except ValueError:
        return address
    return str(ip_network((int(known), 64), strict=False)) if known.version == 6 else address


def path_of(request: Request, path: str) -> str:
    """A path of this application as browsers must ask for it, below the proxy's prefix."""
    return gate_of(request).settings.root_path + path


def safe_next(target: str | None) -> str:
    """A path of this application to go on to; `/` for anything that might lead elsewhere."""
    if not target or len(target) > 512 or "//" in target or not re.fullmatch(r"/[A-Za-z0-9._~@%/-]*", target):
        return "/"
    return target


async def sign_in(request: Request, name: str, password: str) -> Principal:
    """Checks a password and begins a session, whose cookie goes with the response. Raises Refused (401, 429)."""
    gate, address = gate_of(request), address_of(request)
    if gate.settings.proxy.sign_in:
        raise Refused(403, "Users sign in through the reverse proxy here, not with a password.")
    known = gate.accounts.user(name) is not None
    slot = f"{name.lower()[:64]}@{address if (name.lower(), address) in gate.trusted else '*'}"
    if wait := max(gate.by_address.take(_place(address)), gate.by_name.take(slot)):
        if not gate.told.take(_place(address)):
            gate.trail.add(name if known else "-", "sign-in held back", details={"from": address})
        raise Refused(429, "Too many attempts; wait a moment and try again.", wait)
    async with gate.hashing:
        user = await asyncio.to_thread(gate.accounts.check_password, name, password)
    if user is None:
        # What is typed as a name may be a password: only names that exist are written down.
        gate.trail.add(name if known else "-", "sign-in failed", details={"from": address})
        raise Refused(401, "The name or the password is wrong.")
    gate.by_name.forget(slot)
    gate.remember(user.name, address)
    _begin(request, user)
    gate.trail.add(user.name, "sign-in", details={"from": address})
    return _of_user(user, "session")


async def set_up(request: Request, key: str, name: str, password: str) -> Principal:
    """Makes the first administrator and signs them in. Raises Refused (403, 409, 422, 429)."""
    gate = gate_of(request)
    may_set_up(request, key)
    try:
        async with gate.hashing:
            user = await asyncio.to_thread(gate.accounts.add_first, name, password)
    except AccountError as error:
        raise Refused(422, f"{str(error)[:1].upper()}{str(error)[1:]}.") from None
    _begin(request, user)
    gate.trail.add(user.name, "set-up", details={"from": address_of(request)})
    return _of_user(user, "session")


def may_set_up(request: Request, key: str) -> None:
    """Raises Refused unless it is the first start, asked for from this machine with the key on the console."""
    gate = gate_of(request)
    if wait := gate.by_address.take(_place(address_of(request))):
        raise Refused(429, "Too many attempts; wait a moment and try again.", wait)
    if gate.setup_link() is None:
        raise Refused(409, "This server has already been set up: sign in.")
    if request.scope["state"]["proxied"] or not is_loopback(address_of(request)):
        raise Refused(
            403, "The first administrator is created on the server itself: `leukoflow users add NAME --role admin`."
        )
    if not gate.is_setup_key(key):
        raise Refused(403, "This link is wrong or has expired: start `leukoflow serve` again for a new one.")


def sign_out(request: Request, everywhere: bool = False) -> None:
    """Ends the session of whoever asks, or all of theirs."""
    gate, who = gate_of(request), principal(request)
    state = request.scope["state"]
    if state["session_id"]:
        gate.sessions.end(state["session_id"])
    if who is not None and who.via != "token":
        if everywhere and gate.accounts.user(who.name) is not None:
            gate.accounts.end_sessions(who.name)
        gate.trail.add(who.name, "sign-out everywhere" if everywhere else "sign-out")
    _set_cookie(request.scope, _cookie_name(request.scope), "", 0)


def _begin(request: Request, user: User) -> None:
    """A session under a new id; whatever id the browser came with is worth nothing from now on."""
    gate, state = gate_of(request), request.scope["state"]
    if state["session_id"]:
        gate.sessions.end(state["session_id"])
    session_id = gate.sessions.begin(user)
    state["session_id"], state["principal"] = session_id, _of_user(user, "session")
    _set_cookie(request.scope, _cookie_name(request.scope), session_id, None)


def _of_user(user: User, via: str) -> Principal:
    return Principal(user.name, user.role, SCOPES_OF[user.role], via)


# --- around every request --------------------------------------------------------------------------------------------

Failed = Callable[[Request, Exception], Awaitable[Any]]


class Guard:
    """The outermost layer. `failed` makes the answer to an exception; `uploads` are paths that take large bodies."""

    def __init__(self, app: ASGIApp, gate: Gate, failed: Failed, uploads: frozenset[str]) -> None:
        self._app, self._gate, self._failed, self._uploads = app, gate, failed, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        answer = _Answer(scope, send)
        body = _Body(receive)
        try:
            self._look(scope)
            body.limit = self._limit(scope)
            _check_length(scope, body.limit)
            await self._check_forgery(scope, body)
            await self._app(scope, body.receive, answer.send)
        except Exception as error:
            if answer.status:
                log.error("%s", place_of(error))
                # Too late for another answer; the server writes down what is raised here, so it has no words of it.
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
            log.info("%s %s %d %.0f ms", scope["method"], path, answer.status, 1000 * (time.perf_counter() - begun))

    def _look(self, scope: Scope) -> None:
        """Finds out who asks, from where, and for what."""
        settings, headers = self._gate.settings, _headers(scope)
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
        state["session_id"] = cookies.get(_cookie_name(scope), "")
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
        return None if user is None else _of_user(user, "session")

    def _check_host(self, host: str) -> None:
        name = host.lower()
        name = name[: name.rfind("]") + 1] if name.startswith("[") else name.partition(":")[0]
        settings = self._gate.settings
        own = () if settings.host in ("0.0.0.0", "::") else (settings.host, f"[{settings.host}]")
        if name in ("localhost", "127.0.0.1", "[::1]", *own, *settings.names):
            return
        raise Refused(400, "This server does not answer to that host name; `leukoflow serve --name` adds one.")

    def _limit(self, scope: Scope) -> int:
        path = scope["path"].removeprefix(self._gate.settings.root_path)
        if path in self._uploads and scope["state"]["principal"] is not None:
            return (self._gate.settings.uploads.total_mb << 20) + (1 << 20)
        return _SMALL_BODY

    def _csrf(self, scope: Scope) -> str:
        state = scope["state"]
        who = state["principal"]
        if who is not None and who.via == "proxy":
            return self._gate.sealed("proxy", who.name)
        if who is not None and who.via == "session":
            return self._gate.sealed("session", state["session_id"])
        if not state["anonymous"]:
            state["anonymous"] = secrets.token_urlsafe(24)
            _set_cookie(scope, "leukoflow_visit", state["anonymous"], None)
        return self._gate.sealed("visit", state["anonymous"])

    async def _check_forgery(self, scope: Scope, body: _Body) -> None:
        """Refuses an unsafe request that a page of another site may have made a browser send."""
        if scope["method"] not in _UNSAFE:
            return
        who, headers = scope["state"]["principal"], _headers(scope)
        path = scope["path"].removeprefix(self._gate.settings.root_path)
        if who is not None and who.via == "token":
            return  # no browser adds a token by itself
        if who is None and path.startswith(API):
            return  # nobody's request is refused there anyway
        if headers.get("sec-fetch-site") == "cross-site":
            raise Refused(403, "This request came from a page of another site.")
        given = headers.get("x-csrf-token") or await _csrf_field(headers.get("content-type", ""), body)
        if not hmac.compare_digest(given.encode(), self._csrf(scope).encode()):
            if who is not None:
                self._gate.trail.add(who.name, "forged request refused", details={"from": scope["client"][0]})
            raise Refused(403, "This page has expired: load it again.")


class _Body:
    """A request's body, counted while it is read; what was looked at beforehand is handed on again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ahead: list[Message] = []
        self._count = 0
        self._complete = False
        self._begun = time.monotonic()
        self.limit = _SMALL_BODY

    async def receive(self) -> Message:
        return self._ahead.pop(0) if self._ahead else await self._next()

    async def _next(self) -> Message:
        if self._complete:  # whoever waits now waits for the end of the connection
            return await self._receive()
        if time.monotonic() - self._begun > _WHOLE_BODY_SECONDS:
            raise Refused(408, "The request did not arrive in time; send it again.")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                message = await self._receive()
        except TimeoutError:
            raise Refused(408, "The request did not arrive in time; send it again.") from None
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        self._count += len(message.get("body", b""))
        if self._count > self.limit:
            raise _too_large(self.limit)
        return message

    async def peek(self, size: int) -> bytes:
        """The first bytes; at least `size` of them, or all."""
        data = b""
        while len(data) < size:
            message = await self._next()
            self._ahead.append(message)
            data += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        return data


class _Answer:
    """The way out: headers and cookies are added to whatever is answered."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", []))
            present = {name.lower() for name, _ in headers}
            headers += [pair for pair in _HEADERS if pair[0] not in present]
            if b"cache-control" not in present:
                headers.append((b"cache-control", b"no-store"))
            if self._scope["scheme"] == "https":
                headers.append((b"strict-transport-security", b"max-age=31536000"))
            headers += [(b"set-cookie", c.encode()) for c in self._scope.get("state", {}).get("cookies", ())]
            message = {**message, "headers": headers}
        await self._send(message)


def _cookie_name(scope: Scope) -> str:
    return "__Host-leukoflow" if scope["scheme"] == "https" else "leukoflow"


def _set_cookie(scope: Scope, name: str, value: str, max_age: int | None) -> None:
    cookie = f"{name}={value}; Path=/; HttpOnly; SameSite=Strict"
    cookie += "; Secure" if scope["scheme"] == "https" else ""
    cookie += f"; Max-Age={max_age}" if max_age is not None else ""
    scope["state"]["cookies"].append(cookie)


def _headers(scope: Scope) -> dict[str, str]:
    """Headers with lower-case names; of a repeated one the last, which a proxy adds, counts."""
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
    text = _headers(scope).get("content-length", "0")
    if not text.isdecimal():
        raise Refused(400, "The length of the request is not a number.")
    if int(text) > most:
        raise _too_large(most)


def _too_large(most: int) -> Refused:
    size = f"{most >> 20} MB" if most >= 1 << 20 else f"{most >> 10} kB"
    return Refused(413, f"One request may have up to {size}; send fewer or smaller images at once.")


async def _csrf_field(content_type: str, body: _Body) -> str:
    """The token in a form's body: any field of an ordinary form, the first one of a form with files."""
    match content_type.partition(";")[0].strip().lower():
        case "application/x-www-form-urlencoded":
            data = await body.peek(_SMALL_BODY)
            try:
                return parse_qs(data.decode("ascii", "replace"), max_num_fields=200).get("csrf", [""])[0]
            except ValueError:
                return ""
        case "multipart/form-data":
            data = await body.peek(1024)
            found = re.match(
                rb'(?:\r\n)?--[^\r\n]{1,80}\r\nContent-Disposition: form-data; name="csrf"\r\n\r\n([0-9a-f]{64})\r\n',
                data,
                re.IGNORECASE,
            )
            return found[1].decode() if found else ""
    return ""


def login_path(request: Request) -> str:
    """Where somebody who is not signed in is led to, and from there back."""
    here = request.scope["path"].removeprefix(gate_of(request).settings.root_path)
    target = safe_next(here) if request.method == "GET" else "/"
    return path_of(request, "/login" + (f"?next={quote(target)}" if target != "/" else ""))
