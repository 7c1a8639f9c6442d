"""Sessions of signed-in browsers, in the server's memory."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass

from leukoflow.apps.web.gate.accounts import Accounts, User

_MAX_SESSIONS = 10_000


@dataclass(slots=True)
class Session:
    """One signed-in browser."""

    name: str
    generation: int
    created: float  # monotonic seconds
    seen: float


class Sessions:
    """Sessions by the digest of their id. Ids are random and change at every sign-in; only digests are kept."""

    def __init__(self, accounts: Accounts, idle_seconds: float, seconds: float) -> None:
        self._accounts = accounts
        self._idle, self._seconds = idle_seconds, seconds
        self._open: dict[str, Session] = {}

    def start(self, user: User) -> str:
        """Start a session; return its id."""
        now = time.monotonic()
        if len(self._open) >= _MAX_SESSIONS:
            self._sweep(now)
        if len(self._open) >= _MAX_SESSIONS:
            del self._open[min(self._open, key=lambda key: self._open[key].seen)]
        session_id = secrets.token_urlsafe(32)
        self._open[_digest(session_id)] = Session(user.name, user.generation, now, now)
        return session_id

    def find(self, session_id: str) -> User | None:
        """Return whose session it is, with the user's current role; None once it has ended."""
        key = _digest(session_id)
        session = self._open.get(key)
        if session is None:
            return None
        now = time.monotonic()
        user = self._accounts.user(session.name)
        if self._over(session, now) or user is None or user.disabled or user.generation != session.generation:
            self._open.pop(key, None)
            return None
        session.seen = now
        return user

    def end(self, session_id: str) -> None:
        """End one session."""
        self._open.pop(_digest(session_id), None)

    def _over(self, session: Session, now: float) -> bool:
        return now - session.seen > self._idle or now - session.created > self._seconds

    def _sweep(self, now: float) -> None:
        for key in [k for k, s in self._open.items() if self._over(s, now)]:
            del self._open[key]


def _digest(session_id: str) -> str:
    return hashlib.sha256(session_id.encode()).hexdigest()
