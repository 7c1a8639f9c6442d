"""Server-sent events, bounded per person."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse

from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.gate import gate_of
from leukoflow.apps.web.gate.principals import Principal

STREAMS_EACH = 8
"""Streams that one person may have open."""

STREAM_SECONDS = 900.0
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events; `data` is JSON.",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "required": ["event", "data"],
                    "properties": {"event": {"enum": ["progress", "done"]}, "data": {"type": "string"}},
                }
            }
        },
    }
}
"""Response of an operation that answers with events, in the OpenAPI document."""


def event(name: str, data: Any) -> str:
    """Return one event as text."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def live(request: Request, who: Principal, events: AsyncIterator[str]) -> StreamingResponse:
    """Return a stream of events. Raises Refused (429) if the person has too many open."""
    streams = gate_of(request).streams
    if streams.get(who.name, 0) >= STREAMS_EACH:
        raise Refused(429, "Too many live views are open; close one of them.", 10)

    async def counted() -> AsyncIterator[str]:
        streams[who.name] = streams.get(who.name, 0) + 1
        until = time.monotonic() + STREAM_SECONDS
        try:
            async for text in events:
                yield text
                if time.monotonic() > until:
                    return  # browsers reconnect, and are authenticated again
        finally:
            streams[who.name] -= 1
            if not streams[who.name]:
                del streams[who.name]

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(counted(), media_type="text/event-stream", headers=headers)
