"""The file of a source that is an archive or an image, opened only while it is the one that was identified."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from leukoflow.archives.compression import compression_of
from leukoflow.archives.streams import ByteStream, CompressedStream, PlainStream
from leukoflow.core.errors import SourceError
from leukoflow.core.reading import GuardedReader
from leukoflow.runs.records import Source, SourceKind
from leukoflow.sources.local import file_identity, reading_errors
from leukoflow.sources.s3 import filesystem, object_identity, open_object, s3_client


@contextmanager
def open_source(source: Source) -> Iterator[BinaryIO]:
    """Open the source's file, after making sure that it is still the one that was identified."""
    if source.uri.startswith("s3://"):
        try:
            with s3_client().store_errors(source.uri):
                file = open_object(filesystem(), source.uri)
                identity = object_identity(file.details)
        except FileNotFoundError:
            raise SourceError(f"{source.uri} has gone since it was planned: put it back or start a new run") from None
    else:
        try:
            file = GuardedReader(open(source.uri, "rb"), lambda: reading_errors(source.uri))  # noqa: SIM115 - closed below
        except OSError as error:
            raise SourceError(f"{source.uri} cannot be read: {error.strerror}") from error
        identity = file_identity(os.fstat(file.fileno()))
    with file:
        if identity != source.identity:
            raise SourceError(f"{source.uri} has changed since it was planned: start a new run for the new content")
        yield cast(BinaryIO, file)


def tar_stream(source: Source, file: BinaryIO) -> ByteStream:
    """Make the stream that a walk through a tar archive reads from, unpacked where it is compressed."""
    if source.kind is SourceKind.TAR:
        return PlainStream(file, source.size_bytes)
    compression = compression_of(file.read(8))
    file.seek(0)
    return CompressedStream(file, compression or "gz")
