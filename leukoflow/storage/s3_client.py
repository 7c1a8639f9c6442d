"""The S3 client: one place for its settings and retries, and for what s3fs leaves open.

Importing this module takes a second, so it is done only where an `s3://` address turns up.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from typing import Any, Self, cast

import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from s3fs import S3FileSystem, core

from leukoflow.core.errors import StorageError
from leukoflow.core.reading import GuardedReader
from leukoflow.storage.s3_errors import ABSENT, code_of, endpoint, store_errors

ADDRESSING = "LEUKOFLOW_S3_ADDRESSING_STYLE"
ATTEMPTS = 6
"""Of each request, with pauses that double from about half a second: some fifteen seconds in all."""
ROUNDS = 5
"""How often all attempts are made for a request whose connections break, or for a body that breaks off: an outage of a
minute is waited for, and a longer one fails the shard, which is tried again."""
COPY_LIMIT = 1 << 30
"""Larger objects are copied in pieces, so that no single copy runs into the time limit of a request."""
COPY_PIECE = 256 << 20
_CREATOR = "leukoflow-creator"
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted", "409")
_REFUSED = ("PreconditionFailed", "412")
_BATCH = 16


# ---------------------------------------------------------------- the client


def environment() -> tuple[tuple[str, str], ...]:
    """Return what decides which store is meant and as whom; file systems are kept apart by it, and by the process."""
    named = ((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "LEUKOFLOW_S3_")))
    return (("pid", str(os.getpid())), *sorted(named))


def _config() -> dict[str, Any]:
    """Make botocore's settings; what the user has set by the usual variables stays."""
    retries: dict[str, Any] = {}
    if "AWS_RETRY_MODE" not in os.environ:
        # The other modes share a budget among all requests; in an outage it is spent within seconds, and they give up.
        retries["mode"] = "legacy"
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = ATTEMPTS
    settings: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 60, "retries": retries}
    if style := os.environ.get(ADDRESSING):
        if style not in ("path", "virtual", "auto"):
            raise StorageError(f"{ADDRESSING} is {style!r}: it must be path, virtual or auto")
        settings["s3"] = {"addressing_style": style}
    return settings


class _ShortAnswerError(HTTPClientError):  # type: ignore[misc]
    """An answer that is not what was asked for; the client library takes it for a broken connection and asks again."""

    fmt = "the answer has {found} bytes instead of {wanted}"


class _ExhaustedError(OSError):
    """All attempts at a request are spent; s3fs would take the original error for one to begin all over with."""


class ObjectStore(S3FileSystem):  # type: ignore[misc]
    """s3fs, made strict: short answers and failed deletions are errors, and failed copies leave no upload behind."""

    retries = ROUNDS

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        try:
            answer = await super()._call_s3(method, *akwarglist, **kwargs)
        except (HTTPClientError, NoConnectionError, ResponseParserError, TimeoutError) as error:
            raise _ExhaustedError(str(error)) from error
        if method == "get_object" and "ContentRange" in answer:
            first, _, last = answer["ContentRange"].removeprefix("bytes ").partition("/")[0].partition("-")
            wanted, found = int(last) - int(first) + 1, int(answer["ContentLength"])
            if wanted != found:
                raise _ShortAnswerError(found=found, wanted=wanted)
        return answer

    async def _bulk_delete(self, pathlist: list[str], **kwargs: Any) -> Any:
        if not pathlist:
            return []
        bucket = self.split_path(pathlist[0])[0]
        keys = [{"Key": self.split_path(path)[1]} for path in pathlist]
        answer = await self._call_s3("delete_objects", kwargs, Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        for error in answer.get("Errors", ()):
            if error.get("Code") not in ABSENT:
                raise ClientError({"Error": error}, "DeleteObjects")
        return pathlist

    async def _copy_managed(self, path1: str, path2: str, size: int, block: int = COPY_PIECE, **kwargs: Any) -> None:
        source = self._strip_protocol(path1)
        bucket, key, _ = self.split_path(path2)
        upload = (await self._call_s3("create_multipart_upload", Bucket=bucket, Key=key, **kwargs))["UploadId"]
        place = {"Bucket": bucket, "Key": key, "UploadId": upload}
        try:
            parts = []
            for number, start in enumerate(range(0, size, block), 1):
                piece = f"bytes={start}-{min(start + block, size) - 1}"
                done = await self._call_s3(
                    "upload_part_copy", PartNumber=number, CopySource=source, CopySourceRange=piece, **place
                )
                parts.append({"PartNumber": number, "ETag": done["CopyPartResult"]["ETag"]})
            await self._call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **place)
        except BaseException:
            await self._call_s3("abort_multipart_upload", **place)
            raise


@cache  # one that is dropped is not closed
def filesystem(whose: tuple[tuple[str, str], ...], asynchronous: bool = False) -> ObjectStore:
    """Return this process's file system for `environment()`: never made before a fork, never with cached listings."""
    if NoConnectionError not in core.S3_RETRYABLE_ERRORS:  # s3fs knows broken connections, and none that is refused
        core.add_retryable_error(NoConnectionError)
    return ObjectStore(
        use_listings_cache=False,
        skip_instance_cache=True,
        default_block_size=8 << 20,
        max_concurrency=1,  # else whole objects are fetched in pieces, whose failures are not retried
        config_kwargs=_config(),
        asynchronous=asynchronous,
    )


# ---------------------------------------------------------------- whether it answers


def probe(uri: str) -> None:
    """Make one request, answered or given up within seconds. Raises StorageError where nothing can be done there.

    A listing is asked for, since an answer to it says what is wrong, which one to HEAD does not.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    with store_errors(uri):
        try:
            _prober(environment()).list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (500, 502, 503, 504):
                return  # a bad moment, which those who come after are patient with
            if code_of(error) in ABSENT:  # of a bucket that is absent a store says NoSuchBucket
                raise StorageError(
                    f"{uri}: {endpoint()} does not answer as an S3 store does; correct AWS_ENDPOINT_URL"
                ) from error
            raise


@lru_cache(maxsize=8)
def _prober(whose: tuple[tuple[str, str], ...]) -> Any:
    settings = {**_config(), "connect_timeout": 5, "read_timeout": 20}
    settings["retries"] = {"mode": "legacy", "total_max_attempts": 3}
    return botocore.session.Session().create_client("s3", config=Config(**settings))


# ---------------------------------------------------------------- files


def guarded(file: Any, uri: str) -> GuardedReader:
    """Open a file on a store for reading; its errors come as StorageError."""
    return GuardedReader(file, lambda: store_errors(uri))


class StoreWriter:
    """A file on a store, opened for writing: published when it is closed, and discarded when anything goes wrong."""

    def __init__(self, file: Any, uri: str) -> None:
        self._file = file
        self._uri = uri

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._discard()
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        """Append `data`; return the number of bytes."""
        with self._all_or_nothing():
            return cast(int, self._file.write(data))

    def close(self) -> None:
        """Publish what was written."""
        if not self._file.closed:
            with self._all_or_nothing():
                self._file.close()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            with store_errors(self._uri):
                yield
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        self._file.closed = True  # else the garbage collector would close it, which publishes half of it
        with suppress(Exception):  # an upload that cannot be aborted now is aborted at the end of the run
            self._file.discard()


# ---------------------------------------------------------------- verbs


def run(store: ObjectStore, function: Callable[..., Any], *args: Any) -> Any:
    """Run a coroutine function on the file system's loop."""
    return sync(store.loop, function, *args)


def read(store: ObjectStore, bucket: str, key: str, **conditions: Any) -> bytes:
    """Read a whole object. Connections that break off in the middle of it are made again."""

    async def whole(body: Any) -> bytes:
        return cast(bytes, await body.read())

    return cast(bytes, run(store, _fetch, store, bucket, key, whole, conditions))


def digest(store: ObjectStore, bucket: str, key: str, piece: int) -> tuple[int, str]:
    """Return bytes and SHA-256 of an object, read with one request in pieces of `piece` bytes."""

    async def passing(body: Any) -> tuple[int, str]:
        found, size = hashlib.sha256(), 0
        while data := await body.read(piece):
            found.update(data)
            size += len(data)
        return size, found.hexdigest()

    return cast("tuple[int, str]", run(store, _fetch, store, bucket, key, passing, {}))


async def _fetch(
    store: ObjectStore, bucket: str, key: str, take: Callable[..., Any], conditions: dict[str, Any]
) -> Any:
    for left in reversed(range(ROUNDS)):
        answer = await store._call_s3("get_object", Bucket=bucket, Key=key, **conditions)
        try:
            async with answer["Body"] as body:
                return await take(body)
        except Exception as error:
            broken = isinstance(error, HTTPClientError | TimeoutError | ConnectionError)
            if not left or not (broken or "aiohttp" in type(error).__module__):
                raise
            await asyncio.sleep(0.2)
    raise AssertionError


def create(store: ObjectStore, bucket: str, key: str, data: bytes) -> bool:
    """Write an object only if there is none; False when somebody was first.

    A request whose answer was lost is repeated, and the repetition finds the key taken, perhaps by ourselves. So each
    call leaves a mark of its own on what it writes, and looks whose mark the object bears.
    """
    mark = uuid.uuid4().hex

    async def attempt() -> bool | None:
        try:
            await store._call_s3(
                "put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={_CREATOR: mark}
            )
        except Exception as error:
            code = code_of(error)
            if code in _CONFLICTS:
                return None
            if code not in _REFUSED and not isinstance(error, FileExistsError):
                raise
        else:
            return True
        try:
            found = await store._call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None  # deleted in between
        return bool(found.get("Metadata", {}).get(_CREATOR) == mark)

    async def insist() -> bool:
        for pause in range(10):
            granted = await attempt()
            if granted is not None:
                return granted
            await asyncio.sleep(0.05 * 2**pause if pause < 6 else 3.0)
        raise StorageError(f"s3://{bucket}/{key}: another writer keeps it busy; run the same command again")

    return cast(bool, run(store, insist))


def pages(store: ObjectStore, bucket: str, prefix: str, delimiter: str = "", size: int = 1000) -> Iterator[Any]:
    """Yield the store's listing below a prefix, page by page."""
    more: dict[str, str] = {"Delimiter": delimiter} if delimiter else {}
    while True:
        page = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=size, **more)
        yield page
        if not page.get("IsTruncated"):
            return
        more["ContinuationToken"] = page["NextContinuationToken"]


def delete(store: ObjectStore, bucket: str, key: str) -> None:
    """Remove an object and everything below it. Listings may lag, so look again until nothing is found."""
    if key:
        store.call_s3("delete_object", Bucket=bucket, Key=key)
    for _ in range(5):
        gone = True
        for page in pages(store, bucket, f"{key}/" if key else ""):
            found = [f"{bucket}/{item['Key']}" for item in page.get("Contents", ())]
            if found:
                gone = False
                run(store, store._bulk_delete, found)
        if gone:
            return


def copy(store: ObjectStore, pairs: Iterable[tuple[str, str, int]]) -> None:
    """Copy (bucket/key, bucket/key, bytes) inside the store, several at once; an absent source is passed over."""
    listed = list(pairs)

    async def one(source: str, target: str, size: int) -> None:
        try:
            if size > COPY_LIMIT:
                await store._copy_managed(source, target, size)
            else:
                await store._copy_basic(source, target)
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                raise

    async def all_of(batch: list[tuple[str, str, int]]) -> None:
        done = await asyncio.gather(*(one(*pair) for pair in batch), return_exceptions=True)
        for failure in (d for d in done if isinstance(d, BaseException)):
            raise failure

    for start in range(0, len(listed), _BATCH):
        run(store, all_of, listed[start : start + _BATCH])


def uploads(store: ObjectStore, bucket: str, prefix: str) -> list[tuple[str, str]]:
    """List (key, upload id) of multipart uploads below a prefix that were neither finished nor aborted."""
    found: list[tuple[str, str]] = []
    more: dict[str, str] = {}
    while True:
        page = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **more)
        found += [(u["Key"], u["UploadId"]) for u in page.get("Uploads", ()) if u["Key"].startswith(prefix)]
        if not page.get("IsTruncated"):
            return found
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def abort(store: ObjectStore, bucket: str, prefix: str) -> int:
    """Abort the uploads below a prefix and return how many there were."""
    found = uploads(store, bucket, prefix)
    for key, upload in found:
        try:
            store.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        except FileNotFoundError:
            continue  # finished or aborted meanwhile
    return len(found)
