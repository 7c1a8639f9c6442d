"""Users with passwords, and API tokens.

Both lie in one JSON file that only its owner may read; passwords as argon2id, tokens as SHA-256 of a random secret. The
command line and the server may change it at the same time: changes happen under a lock and replace the file atomically,
and a server notices them with the next request.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from pydantic import TypeAdapter, ValidationError

from leukoflow.apps.web.settings import ROLES, SCOPES, SCOPES_OF
from leukoflow.core.errors import ConfigError, LeukoflowError
from leukoflow.runs.progress import now

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
MIN_PASSWORD = 12
MAX_PASSWORD = 256
TOKEN = re.compile(r"lkf_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


class AccountError(LeukoflowError):
    """A user, token or password that cannot be created or changed; the message is for people."""


@dataclass(frozen=True, slots=True)
class User:
    """One person. `generation` grows whenever all sessions of that person must end."""

    name: str
    role: str
    password: str  # argon2id, encoded
    disabled: bool = False
    generation: int = 0
    created: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """A key for programs. Only its digest is kept."""

    id: str
    owner: str
    label: str
    sha256: str
    scopes: tuple[str, ...]
    created: str
    expires: str  # ISO 8601, UTC

    def expired(self, now: datetime) -> bool:
        """Return whether it has expired at `now`."""
        return datetime.fromisoformat(self.expires) <= now


@dataclass(frozen=True, slots=True)
class Book:
    """The users file's content."""

    users: tuple[User, ...] = ()
    tokens: tuple[Token, ...] = ()
    version: int = 1


class Accounts:
    """Users and tokens of one file."""

    def __init__(self, path: Path, hasher: PasswordHasher | None = None) -> None:
        self.path = path
        self._hasher = hasher or PasswordHasher()
        self._lock = threading.Lock()
        self._known: tuple[tuple[int, int, int], Book] | None = None
        self._nobody = ""  # hash that no password matches, for names that do not exist

    # --- reading

    def book(self) -> Book:
        """Return the file's content, read again only once it was replaced. Raises ConfigError if it is damaged."""
        try:
            info = self.path.stat()
        except FileNotFoundError:
            return Book()
        except OSError as error:
            raise ConfigError(f"the users file {self.path} cannot be read: {error.strerror}") from None
        identity = (info.st_ino, info.st_mtime_ns, info.st_size)
        with self._lock:
            if self._known is not None and self._known[0] == identity:
                return self._known[1]
            book = self._read()
            self._known = (identity, book)
            return book

    def _read(self) -> Book:
        try:
            if self.path.stat().st_mode & 0o077:
                raise ConfigError(f"the users file {self.path} can be read by others: chmod 600 {self.path}")
            return TypeAdapter(Book).validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return Book()
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"the users file {self.path} cannot be read ({type(error).__name__}); put back a copy, or move it "
                "aside and start again with `leukoflow users add`"
            ) from None

    def user(self, name: str) -> User | None:
        """Return the user with this name, in any case; None if there is none."""
        return next((u for u in self.book().users if u.name.lower() == name.lower()), None)

    def empty(self) -> bool:
        """Return whether there are no users yet."""
        return not self.book().users

    # --- changing

    def check_new(self, name: str, role: str) -> None:
        """Raise AccountError if no user with this name and role can be added."""
        if not NAME.fullmatch(name):
            raise AccountError("a name has up to 64 letters, digits, dots, hyphens, underscores or @")
        _check_role(role)
        if any(u.name.lower() == name.lower() for u in self.book().users):
            raise AccountError(f"user {name} already exists")

    def check_known(self, name: str) -> None:
        """Raise AccountError if there is no user with this name."""
        if self.user(name) is None:
            raise AccountError(f"there is no user {name}")

    def add(self, name: str, role: str, password: str) -> User:
        """Add a user. Raises AccountError."""
        self.check_new(name, role)
        user = User(name, role, self.hashed(name, password), created=now())

        def change(book: Book) -> Book:
            if any(u.name.lower() == name.lower() for u in book.users):
                raise AccountError(f"user {name} already exists")
            return replace(book, users=(*book.users, user))

        self._change(change)
        return user

    def add_first(self, name: str, password: str) -> User:
        """Add the first administrator. Raises AccountError if there are users already."""
        if not NAME.fullmatch(name):
            raise AccountError("a name has up to 64 letters, digits, dots, hyphens, underscores or @")
        user = User(name, "admin", self.hashed(name, password), created=now())

        def change(book: Book) -> Book:
            if book.users:
                raise AccountError("there are already users: sign in, or ask an administrator")
            return replace(book, users=(user,))

        self._change(change)
        return user

    def set_password(self, name: str, password: str) -> None:
        """Set a password and end all sessions of the user. Raises AccountError."""
        encoded = self.hashed(name, password)
        self._change_user(name, lambda u: replace(u, password=encoded, generation=u.generation + 1))

    def set_role(self, name: str, role: str) -> None:
        """Change a role, effective immediately. Raises AccountError, also if no administrator would be left."""
        _check_role(role)
        self._change_user(name, lambda u: replace(u, role=role))

    def set_disabled(self, name: str, disabled: bool) -> None:
        """Disable or enable a user; sessions end, and tokens are refused meanwhile."""
        self._change_user(name, lambda u: replace(u, disabled=disabled, generation=u.generation + 1))

    def end_sessions(self, name: str) -> None:
        """End all sessions of a user."""
        self._change_user(name, lambda u: replace(u, generation=u.generation + 1))

    def add_token(self, owner: str, label: str, scopes: tuple[str, ...], days: float) -> tuple[Token, str]:
        """Create a token; return it and its text, which is not kept. Raises AccountError."""
        user = self.user(owner)
        if user is None:
            raise AccountError(f"there is no user {owner}")
        if unknown := sorted(set(scopes) - set(SCOPES)):
            raise AccountError(f"there is no scope {unknown[0]!r}; there are {', '.join(SCOPES)}")
        if not scopes:
            raise AccountError(f"a token needs at least one scope of {', '.join(SCOPES)}")
        if above := sorted(set(scopes) - SCOPES_OF[user.role]):
            raise AccountError(f"{user.name} has the role {user.role}, which does not include the scope {above[0]}")
        if not 0 < days <= 3660:
            raise AccountError("a token must be valid for more than 0 and at most 3,660 days")
        secret = secrets.token_urlsafe(32)
        now = datetime.now(UTC)
        token = Token(
            id=secrets.token_hex(6),
            owner=user.name,
            label=label.strip()[:80],
            sha256=hashlib.sha256(secret.encode()).hexdigest(),
            scopes=tuple(s for s in SCOPES if s in scopes),
            created=now.isoformat(timespec="seconds"),
            expires=(now + timedelta(days=days)).isoformat(timespec="seconds"),
        )
        self._change(lambda book: replace(book, tokens=(*book.tokens, token)))
        return token, f"lkf_{token.id}_{secret}"

    def revoke_token(self, token_id: str) -> None:
        """Delete a token. Raises AccountError if there is none with this id."""

        def change(book: Book) -> Book:
            left = tuple(t for t in book.tokens if t.id != token_id)
            if len(left) == len(book.tokens):
                raise AccountError(f"there is no token {token_id}")
            return replace(book, tokens=left)

        self._change(change)

    def _change_user(self, name: str, change: Callable[[User], User]) -> None:
        def changed(book: Book) -> Book:
            if not any(u.name.lower() == name.lower() for u in book.users):
                raise AccountError(f"there is no user {name}")
            users = tuple(change(u) if u.name.lower() == name.lower() else u for u in book.users)
            had = any(u.role == "admin" and not u.disabled for u in book.users)
            if had and not any(u.role == "admin" and not u.disabled for u in users):
                raise AccountError("this is the last administrator: make somebody else an administrator first")
            return replace(book, users=users)

        self._change(changed)

    def _change(self, change: Callable[[Book], Book]) -> None:
        with self._exclusive():
            book = change(self._read())
            draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as sink:
                    json.dump(asdict(book), sink, indent=1)
                    sink.flush()
                    os.fsync(sink.fileno())
                draft.replace(self.path)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    # --- passwords and tokens

    def hashed(self, name: str, password: str) -> str:
        """Return the argon2id hash of a password. Raises AccountError that says what is wrong with it."""
        if len(password) < MIN_PASSWORD:
            raise AccountError(f"a password needs {MIN_PASSWORD} characters or more; several unrelated words work well")
        if len(password) > MAX_PASSWORD:
            raise AccountError(f"a password may have at most {MAX_PASSWORD} characters")
        if len(set(password)) < 5 or name.lower() in password.lower() or "leukoflow" in password.lower():
            raise AccountError("this password is too easy to guess: choose several words, without your name")
        return self._hasher.hash(password)

    def check_password(self, name: str, password: str) -> User | None:
        """Return the enabled user with this name and password, else None; takes as long if the name does not exist."""
        user = self.user(name) if NAME.fullmatch(name) else None
        if not self._nobody:
            self._nobody = self._hasher.hash(secrets.token_urlsafe(24))
        try:
            self._hasher.verify(user.password if user else self._nobody, password[: MAX_PASSWORD + 1])
        except (Argon2Error, InvalidHashError):
            return None
        return user if user is not None and not user.disabled else None

    def check_token(self, text: str) -> tuple[User, frozenset[str]] | None:
        """Return a token's owner and scopes; None if it is unknown or expired, or its owner disabled."""
        found = TOKEN.fullmatch(text)
        if found is None:
            return None
        book = self.book()
        token = next((t for t in book.tokens if t.id == found[1]), None)
        digest = hashlib.sha256(found[2].encode()).hexdigest()
        if token is None or not hmac.compare_digest(token.sha256, digest) or token.expired(datetime.now(UTC)):
            return None
        user = next((u for u in book.users if u.name == token.owner), None)
        if user is None or user.disabled:
            return None
        return user, frozenset(token.scopes) & SCOPES_OF[user.role]


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise AccountError(f"there is no role {role!r}; there are {', '.join(ROLES)}")


def shown(token: Token) -> dict[str, Any]:
    """Return a token's fields without its digest."""
    return {k: v for k, v in asdict(token).items() if k != "sha256"}
