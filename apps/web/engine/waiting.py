"""Awaiting frames, processes that start, and the first of several events."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from leukoflow.apps.web.engine.errors import DeathError
from leukoflow.apps.web.engine.frames import HEADER, Frame, header_of, record_of

T = TypeVar("T")
_START_SECONDS = 600.0  # importing torch from a cold disk, on a machine that does other things
END_SECONDS = 10.0
"""Time that a process has to end by itself."""


async def read_frame(reader: asyncio.StreamReader) -> tuple[Frame, bytes]:
    """Return the next record and its body. Raises FrameError, and IncompleteReadError at the end."""
    kind, words, size = header_of(await reader.readexactly(HEADER.size))
    record = record_of(kind, await reader.readexactly(words))
    return record, await reader.readexactly(size) if size else b""


async def within_start_time(future: asyncio.Future[T]) -> T:
    """Await what a starting process reports. Raises DeathError if it takes too long."""
    try:
        async with asyncio.timeout(_START_SECONDS):
            return await asyncio.shield(future)
    except TimeoutError:
        raise DeathError(f"no answer within {_START_SECONDS:.0f} s") from None


def fail(future: asyncio.Future[Any], error: Exception) -> None:
    """Set a future's exception, unless it is done."""
    if not future.done():
        future.set_exception(error)
        future.exception()  # else asyncio complains where nobody awaits it


async def wait_for_first(*events: asyncio.Event) -> None:
    """Wait for the first of several events."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
