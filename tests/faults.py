"""A proxy in front of an HTTP service that makes its bad days: throttling, cut connections, lost answers, outages.

Which request meets which fault is drawn from the seed, the request's method and address, and how often it came before,
so it does not depend on how requests of several processes happen to interleave.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

KINDS = (
    "error",  # 500, nothing was done
    "throttle",  # 503 SlowDown, nothing was done
    "slow",  # the answer takes its time
    "cut_request",  # the connection goes while the request's body is being sent; nothing was done
    "cut_response",  # it is done, and the connection goes in the middle of the answer
    "truncate",  # it is done, and the answer ends early as if it were whole: for answers to ranged reads only
    "lost",  # it is done, and the connection goes without any answer
    "late",  # 500 at once, and it is done a little later all the same
    "stale",  # a listing as it was when it was last asked for
)
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class Request:
    """One request as the client sent it; `body` as it went over the wire."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k.lower() == name), None)

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {k: v[0] for k, v in parse_qs(urlsplit(self.target).query, keep_blank_values=True).items()}

    @property
    def listing(self) -> bool:
        return self.method == "GET" and "list-type" in self.query


@dataclass(frozen=True)
class Answer:
    """What the service said: status line and headers as they came, and the body."""

    status: int
    head: tuple[str, ...]
    body: bytes

    def header(self, name: str) -> str | None:
        for line in self.head[1:]:
            key, _, value = line.partition(":")
            if key.strip().lower() == name:
                return value.strip()
        return None


@dataclass(frozen=True)
class Seen:
    """One line of the proxy's log; `fault` is None where none was made."""

    method: str
    target: str
    status: int | None
    fault: str | None


@dataclass(frozen=True)
class Faults:
    """How bad a day it is: `rate` of the requests that `only` admits meet one of `kinds`."""

    rate: float = 0.0
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    seconds: float = 0.2  # how slow is slow, and how late is late
    only: Callable[[Request], bool] | None = None


@dataclass
class FaultyProxy:
    """Listens on a free port of the loopback address and passes on to `upstream` (http://host:port)."""

    upstream: str
    faults: Faults = field(default_factory=Faults)
    down: str | None = None  # an outage: "refuse" closes connections, "503" answers so, "hang" says nothing
    says: Callable[[Request], Answer | None] | None = None  # an answer of the test's own, in place of the service's
    log: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faulty-proxy", daemon=True)
        self._times: Counter[tuple[str, str]] = Counter()
        self._listings: dict[str, Answer] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    # --- for tests

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, **changes: object) -> None:
        """Other weather from now on: the fields of `Faults`."""
        self.faults = dataclasses.replace(self.faults, **changes)  # type: ignore[arg-type]

    @contextmanager
    def outage(self, how: str = "refuse") -> Iterator[None]:
        """Nothing gets through while the block lasts; connections that are open break."""
        self.down = how
        self._loop.call_soon_threadsafe(self._break)
        try:
            yield
        finally:
            self.down = None
            self._loop.call_soon_threadsafe(self._break)

    def made(self) -> Counter[str]:
        """How often each fault was made."""
        return Counter(seen.fault for seen in list(self.log) if seen.fault is not None)

    # --- the server

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=_HEAD_BYTES)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        self._break()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _break(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, EOFError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False when the connection is over."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        headers = tuple((k, v.strip()) for k, _, v in (line.partition(":") for line in head[1:] if line))
        bare = Request(method, target, headers, b"")
        if self.down is not None:
            return await self._refuse(bare, writer)
        fault = self._draw(bare)
        if (bare.header("expect") or "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault == "cut_request":
            length = int(bare.header("content-length") or 0)
            await reader.read(max(1, length // 2)) if length else None
            return self._cut(bare, writer, fault)
        request = dataclasses.replace(bare, body=await _body(bare, reader))
        if self.says is not None and (own := self.says(request)) is not None:
            return await self._answer(request, writer, own, "said")
        if fault in ("error", "throttle", "late"):
            if fault == "late":
                self._later(request)
            words = ("SlowDown", 503) if fault == "throttle" else ("InternalError", 500)
            return await self._answer(request, writer, failure(*words), fault)
        if fault == "slow":
            await asyncio.sleep(self.faults.seconds)
        old = self._listings.get(target) if request.listing else None
        if fault == "stale" and old is not None:
            return await self._answer(request, writer, old, fault)
        answer = await self._forward(request)
        if request.listing:
            self._listings[target] = answer
        if fault == "lost" or (fault == "cut_response" and not answer.body):
            return self._cut(request, writer, fault, answer.status)
        if fault == "cut_response":
            writer.write(_head(answer, len(answer.body)) + answer.body[: len(answer.body) // 2])
            await writer.drain()
            return self._cut(request, writer, fault, answer.status)
        if fault == "truncate" and answer.status == 206 and len(answer.body) > 1:
            answer = dataclasses.replace(answer, body=answer.body[: len(answer.body) // 2])
            return await self._answer(request, writer, answer, fault)
        return await self._answer(request, writer, answer, fault if fault == "slow" else None)

    def _draw(self, request: Request) -> str | None:
        self._times[request.method, request.target] += 1
        faults = self.faults
        if not faults.rate or (faults.only is not None and not faults.only(request)):
            return None
        lot = f"{faults.seed} {request.method} {request.target} {self._times[request.method, request.target]}"
        number = int.from_bytes(hashlib.sha256(lot.encode()).digest()[:8], "big") / 2**64
        return faults.kinds[int(number / faults.rate * len(faults.kinds))] if number < faults.rate else None

    async def _refuse(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        if self.down == "hang":
            await asyncio.sleep(3600)
        if self.down == "503":
            writer.write(_head(failure("ServiceUnavailable", 503), 0, close=True))
            await writer.drain()
        return self._cut(request, writer, "outage")

    def _cut(self, request: Request, writer: asyncio.StreamWriter, fault: str, status: int | None = None) -> bool:
        self.log.append(Seen(request.method, request.target, status, fault))
        writer.transport.abort()
        return False

    async def _answer(self, request: Request, writer: asyncio.StreamWriter, answer: Answer, fault: str | None) -> bool:
        self.log.append(Seen(request.method, request.target, answer.status, fault))
        length = len(answer.body)
        if request.method == "HEAD":
            length = int(answer.header("content-length") or 0)
        writer.write(_head(answer, length) + (b"" if request.method == "HEAD" else answer.body))
        await writer.drain()
        return True

    def _later(self, request: Request) -> None:
        async def deliver() -> None:
            await asyncio.sleep(self.faults.seconds)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._forward(request)

        self._loop.create_task(deliver())

    async def _forward(self, request: Request) -> Answer:
        parts = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=_HEAD_BYTES)
        try:
            lines = [f"{request.method} {request.target} HTTP/1.1"]
            lines += [f"{k}: {v}" for k, v in request.headers if k.lower() not in ("connection", "expect")]
            writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + request.body)
            await writer.drain()
            head = ["HTTP/1.1 100 "]
            while head[0].split(" ")[1] == "100":
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
            answer = Answer(int(head[0].split(" ")[1]), tuple(head), b"")
            if request.method == "HEAD" or answer.status in (204, 304):
                return answer
            if "chunked" in (answer.header("transfer-encoding") or "").lower():
                body = b"".join([piece async for piece in _chunks(reader)])
            elif (length := answer.header("content-length")) is not None:
                body = await reader.readexactly(int(length))
            else:
                body = await reader.read()
            return dataclasses.replace(answer, body=body)
        finally:
            writer.close()


async def _body(request: Request, reader: asyncio.StreamReader) -> bytes:
    """The body with its framing, so that it can be passed on as it is."""
    if "chunked" not in (request.header("transfer-encoding") or "").lower():
        return await reader.readexactly(int(request.header("content-length") or 0))
    raw = b""
    while True:
        line = await reader.readline()
        size = int(line.split(b";")[0], 16)
        raw += line + await reader.readexactly(size + 2)
        if size == 0:
            return raw


async def _chunks(reader: asyncio.StreamReader):  # type: ignore[no-untyped-def]
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readline()
    await reader.readline()


def _head(answer: Answer, length: int, close: bool = False) -> bytes:
    dropped = ("content-length", "transfer-encoding", "connection")
    lines = [answer.head[0].replace("HTTP/1.0", "HTTP/1.1")]
    lines += [line for line in answer.head[1:] if line.partition(":")[0].strip().lower() not in dropped]
    if answer.status not in (204, 304):
        lines.append(f"Content-Length: {length}")
    if close:
        lines.append("Connection: close")
    return ("\r\n".join([*lines, "", ""])).encode("latin-1")


def failure(code: str, status: int) -> Answer:
    """An error as S3 words it."""
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>made by a test</Message></Error>"
    return Answer(status, (f"HTTP/1.1 {status} {code}", "Content-Type: application/xml"), body.encode())


# --- a store to put it in front of


@contextmanager
def moto_server() -> Iterator[str]:
    """The address of an S3 API over HTTP, on a free port of this machine; an empty one.

    All servers of a process share what they hold, so what earlier ones were given is forgotten first.
    """
    from moto.moto_api._internal.models import moto_api_backend
    from moto.server import ThreadedMotoServer

    moto_api_backend.reset()

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def s3_account(endpoint: str) -> dict[str, str]:
    """What the environment of everybody who talks to a store of the tests holds."""
    return {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


def fetched(client: Any, prefix: str, target: Path) -> Path:
    """What lies on the store, past our code."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix=f"{prefix}/"):
        for item in page.get("Contents", ()):
            file = target / item["Key"].removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(client.get_object(Bucket="lab", Key=item["Key"])["Body"].read())
    return target


def unfinished(client: Any) -> list[str]:
    return [upload["Key"] for upload in client.list_multipart_uploads(Bucket="lab").get("Uploads", ())]


def keys_of(direct: Any, prefix: str) -> list[str]:
    return [item["Key"] for item in direct.list_objects_v2(Bucket="lab", Prefix=prefix).get("Contents", ())]
