"""Server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse

from leukoflow.apps.web.guard import Principal, Refused, gate_of

STREAMS_EACH = 8
"""Live views of one person at a time."""

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
"""How an operation that answers with events describes that."""


def event(name: str, data: Any) -> str:
    """One event."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def live(request: Request, who: Principal, events: AsyncIterator[str]) -> StreamingResponse:
    """A stream of events. Raises Refused (429) where somebody has many open already."""
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
                    return  # browsers connect again, and are asked again who they are
        finally:
            streams[who.name] -= 1
            if not streams[who.name]:
                del streams[who.name]

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(counted(), media_type="text/event-stream", headers=headers)
