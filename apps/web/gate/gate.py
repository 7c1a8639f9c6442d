"""What the application knows about access: accounts, sessions, limits, the audit log, and the first start."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time

from fastapi import Request

from leukoflow.apps.web.gate.accounts import Accounts
from leukoflow.apps.web.gate.rate_limit import Bucket
from leukoflow.apps.web.gate.sessions import Sessions
from leukoflow.apps.web.gate.trail import AuditTrail
from leukoflow.apps.web.settings import WebSettings

_SETUP_MINUTES = 60


class Gate:
    """State of access control, shared by all requests: accounts, sessions, limits, audit log, set-up key."""

    def __init__(self, settings: WebSettings, accounts: Accounts | None = None) -> None:
        self.settings = settings
        self.accounts = accounts or Accounts(settings.users_file)
        self.sessions = Sessions(self.accounts, settings.idle_minutes * 60, settings.session_hours * 3600)
        self.trail = AuditTrail(settings.audit_path())
        self.by_address = Bucket(*settings.rates.logins_by_address)
        self.by_name = Bucket(*settings.rates.logins_by_name)
        self.uploads = Bucket(*settings.rates.uploads)
        self.held_back_logged = Bucket(1, 60.0)  # what an attacker repeats must not fill the log
        self.trusted: dict[tuple[str, str], None] = {}  # (name, address) that has signed in before
        self.hashing = asyncio.Semaphore(2)  # a password takes 64 MB to check
        self.receiving = 0  # bytes of uploads that are on their way in
        self.streams: dict[str, int] = {}  # live connections by person
        self._secret = secrets.token_bytes(32)
        self._setup = secrets.token_urlsafe(24)
        self._setup_until = time.monotonic() + _SETUP_MINUTES * 60

    def setup_link(self) -> str | None:
        """Return the address that creates the first administrator; None if there are users or a proxy signs them in."""
        if self.settings.proxy.sign_in or not self.accounts.empty():
            return None
        scheme = "https" if self.settings.tls else "http"
        return f"{scheme}://127.0.0.1:{self.settings.port}{self.settings.root_path}/setup?key={self._setup}"

    def is_setup_key(self, key: str) -> bool:
        """Return whether this is the key of the set-up link, and it has not expired."""
        return hmac.compare_digest(key.encode(), self._setup.encode()) and time.monotonic() < self._setup_until

    def sealed(self, kind: str, value: str) -> str:
        """Return a keyed digest of a value, which only this server can make. Hexadecimal."""
        return hmac.new(self._secret, f"{kind}\0{value}".encode(), hashlib.sha256).hexdigest()

    def remember(self, name: str, address: str) -> None:
        """Record that a user signed in from an address, so that attempts from elsewhere cannot lock them out."""
        self.trusted[name.lower(), address] = None
        while len(self.trusted) > 20_000:
            del self.trusted[next(iter(self.trusted))]


def gate_of(request: Request) -> Gate:
    """Return the application's gate."""
    gate = request.app.state.gate
    assert isinstance(gate, Gate)
    return gate
