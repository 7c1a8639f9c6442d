"""Signing in and out, and the first administrator."""

from __future__ import annotations

import asyncio

from fastapi import Request

from leukoflow.apps.web.gate.accounts import AccountError, User
from leukoflow.apps.web.gate.cookies import session_cookie, set_cookie
from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.gate import gate_of
from leukoflow.apps.web.gate.principals import Principal, principal, principal_of
from leukoflow.apps.web.gate.request import address_of, counted_address
from leukoflow.apps.web.settings import is_loopback


async def sign_in(request: Request, name: str, password: str) -> Principal:
    """Check a password and start a session, whose cookie goes with the response. Raises Refused (401, 403, 429)."""
    gate, address = gate_of(request), address_of(request)
    if gate.settings.proxy.sign_in:
        raise Refused(403, "Users sign in through the reverse proxy here, not with a password.")
    known = gate.accounts.user(name) is not None
    slot = f"{name.lower()[:64]}@{address if (name.lower(), address) in gate.trusted else '*'}"
    if wait := max(gate.by_address.take(counted_address(address)), gate.by_name.take(slot)):
        if not gate.held_back_logged.take(counted_address(address)):
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
    begin_session(request, user)
    gate.trail.add(user.name, "sign-in", details={"from": address})
    return principal_of(user, "session")


async def set_up(request: Request, key: str, name: str, password: str) -> Principal:
    """Create the first administrator and sign them in. Raises Refused (403, 409, 422, 429)."""
    gate = gate_of(request)
    check_set_up(request, key)
    try:
        async with gate.hashing:
            user = await asyncio.to_thread(gate.accounts.add_first, name, password)
    except AccountError as error:
        raise Refused(422, f"{str(error)[:1].upper()}{str(error)[1:]}.") from None
    begin_session(request, user)
    gate.trail.add(user.name, "set-up", details={"from": address_of(request)})
    return principal_of(user, "session")


def check_set_up(request: Request, key: str) -> None:
    """Raise Refused unless this is the first start, requested from this machine with the key on the console."""
    gate = gate_of(request)
    if wait := gate.by_address.take(counted_address(address_of(request))):
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
    """End the session of the principal, or with `everywhere` all their sessions."""
    gate, who = gate_of(request), principal(request)
    state = request.scope["state"]
    if state["session_id"]:
        gate.sessions.end(state["session_id"])
    if who is not None and who.via != "token":
        if everywhere and gate.accounts.user(who.name) is not None:
            gate.accounts.end_sessions(who.name)
        gate.trail.add(who.name, "sign-out everywhere" if everywhere else "sign-out")
    set_cookie(request.scope, session_cookie(request.scope), "", 0)


def begin_session(request: Request, user: User) -> None:
    """Start a session under a new id; the id that the browser sent is invalid from now on."""
    gate, state = gate_of(request), request.scope["state"]
    if state["session_id"]:
        gate.sessions.end(state["session_id"])
    session_id = gate.sessions.start(user)
    state["session_id"], state["principal"] = session_id, principal_of(user, "session")
    set_cookie(request.scope, session_cookie(request.scope), session_id, None)
