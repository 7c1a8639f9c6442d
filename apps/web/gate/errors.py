"""Refusals of requests."""

from __future__ import annotations

from starlette.exceptions import HTTPException


class Refused(HTTPException):
    """A request that is refused; `detail` says why and what to do, in words for people."""

    def __init__(self, status: int, detail: str, retry_after: float | None = None) -> None:
        headers = None if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        super().__init__(status, detail, headers)


class SignInNeeded(Refused):
    """Nobody is signed in; people are redirected to the sign-in page."""

    def __init__(self) -> None:
        super().__init__(401, "Sign in first, or send a valid API token.")
