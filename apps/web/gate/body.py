"""The body of a request, counted and timed while it is read, and the CSRF token in it."""

from __future__ import annotations

import asyncio
import re
import time
from urllib.parse import parse_qs

from starlette.types import Message, Receive

from leukoflow.apps.web.gate.errors import Refused

SMALL_BODY = 256 << 10  # of any request that is no upload
_BODY_SECONDS = 30.0  # between two pieces of a body
_WHOLE_BODY_SECONDS = 600.0


class Body:
    """A request's body: raises Refused once it is too large or too slow. What `peek` has read is received again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ahead: list[Message] = []
        self._count = 0
        self._complete = False
        self._started = time.monotonic()
        self.limit = SMALL_BODY

    async def receive(self) -> Message:
        """Return the next message, as an ASGI `receive` does."""
        return self._ahead.pop(0) if self._ahead else await self._next()

    async def _next(self) -> Message:
        if self._complete:  # what comes now is the end of the connection
            return await self._receive()
        if time.monotonic() - self._started > _WHOLE_BODY_SECONDS:
            raise Refused(408, "The request did not arrive in time; send it again.")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                message = await self._receive()
        except TimeoutError:
            raise Refused(408, "The request did not arrive in time; send it again.") from None
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        self._count += len(message.get("body", b""))
        if self._count > self.limit:
            raise too_large(self.limit)
        return message

    async def peek(self, size: int) -> bytes:
        """Return the first bytes; at least `size` of them, or all there are."""
        data = b""
        while len(data) < size:
            message = await self._next()
            self._ahead.append(message)
            data += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        return data


def too_large(most: int) -> Refused:
    """Return the refusal (413) of a body above `most` bytes."""
    size = f"{most >> 20} MB" if most >= 1 << 20 else f"{most >> 10} kB"
    return Refused(413, f"A request may be up to {size}; send fewer or smaller images at once.")


async def csrf_field(content_type: str, body: Body) -> str:
    """Return the CSRF token in a form: from any field of a plain form, from the first of one with files; else empty."""
    match content_type.partition(";")[0].strip().lower():
        case "application/x-www-form-urlencoded":
            data = await body.peek(SMALL_BODY)
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
