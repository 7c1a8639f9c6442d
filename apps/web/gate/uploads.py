"""Images in a request: read as a stream, counted while they arrive, unpacked in memory, never written to disk."""

from __future__ import annotations

import asyncio
import io
import unicodedata
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from leukoflow.apps.web.gate.errors import Refused
from leukoflow.apps.web.gate.gate import gate_of
from leukoflow.apps.web.settings import UploadLimits
from leukoflow.archives.errors import ArchiveError, EntryError
from leukoflow.archives.zip_entry import ZipEntry, read_entry
from leukoflow.archives.zip_walk import ZipWalk
from leukoflow.sources.filenames import is_litter, no_picture
from leukoflow.sources.keys import image_key

_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_FIELDS, _FIELD_BYTES, _HEADER_BYTES = 32, 4096, 8192
UNSENT = "unsent"
"""Field of a form for what the page could not send: a part for each, with its name, and why as content."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One image. `name` is for display only and never becomes a path; `refusal` says why it is not even decoded."""

    name: str
    data: bytes
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """Content of a form with files. Each chosen file has an upload, if only one with a refusal."""

    uploads: tuple[Upload, ...]
    fields: tuple[tuple[str, str], ...]

    def all(self, name: str) -> tuple[str, ...]:
        """Return all values of a field."""
        return tuple(value for key, value in self.fields if key == name)

    def get(self, name: str, default: str = "") -> str:
        """Return the last value of a field."""
        return self.all(name)[-1] if self.all(name) else default


async def read_form(request: Request, limits: UploadLimits) -> Form:
    """Read a `multipart/form-data` request with images and archives of images.

    Raises Refused: 400 if the body is not such a form, 413 beyond a limit, 415 for another content type.
    """
    message = Message()
    message["content-type"] = request.headers.get("content-type", "")
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/form-data":
        raise Refused(415, "Send images as multipart/form-data.")
    if not boundary or len(boundary) > 70 or not boundary.isascii():
        raise Refused(400, "The form does not state the boundary between its parts.")
    reader, gate, received = _Reader(limits), gate_of(request), 0
    try:
        parser = MultipartParser(boundary.encode(), reader.callbacks())  # type: ignore[arg-type]
        async for chunk in request.stream():
            received += len(chunk)
            gate.receiving += len(chunk)
            if gate.receiving > limits.receiving_mb << 20:
                raise Refused(503, "Many images are arriving at the moment; try again in a few seconds.", 5)
            parser.write(chunk)
        parser.finalize()
        if not reader.ended:
            raise Refused(400, "The upload was cut off.")
        return await asyncio.to_thread(_unpacked, reader, limits)
    except FormParserError:
        raise Refused(400, "The upload is damaged or was cut off.") from None
    finally:
        gate.receiving -= received


@dataclass(slots=True)
class _Reader:
    """Collects the parts while they arrive; raises Refused at the first limit that is exceeded."""

    limits: UploadLimits
    parts: list[tuple[str, str | None, bytes]] = field(default_factory=list)  # field, file name, content
    ended: bool = False
    _name: bytes = b""
    _value: bytes = b""
    _headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    _content: bytearray = field(default_factory=bytearray)
    _field: str = ""
    _file: str | None = None
    _total: int = 0

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_name(data[start:end]),
            "on_header_value": lambda data, start, end: self._add_value(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._start_content,
            "on_part_data": lambda data, start, end: self._add(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._headers, self._name, self._value = [], b"", b""

    def _add_name(self, data: bytes) -> None:
        self._name += data
        self._check_headers()

    def _add_value(self, data: bytes) -> None:
        self._value += data
        self._check_headers()

    def _check_headers(self) -> None:
        if len(self._name) + len(self._value) > _HEADER_BYTES or len(self._headers) > 16:
            raise Refused(400, "A part of the form has headers that are too long.")

    def _end_header(self) -> None:
        self._headers.append((self._name.lower(), self._value))
        self._name, self._value = b"", b""

    def _start_content(self) -> None:
        message = Message()
        for header, value in self._headers:
            if header == b"content-disposition":
                message["content-disposition"] = value.decode("utf-8", "replace").replace("\r", " ").replace("\n", " ")
        try:
            name, kind = message.get_param("name", header="content-disposition"), message.get_content_disposition()
            self._file = message.get_filename()
        except (ValueError, LookupError, TypeError, AttributeError):  # parameters that contradict each other
            name, kind = None, None
        if kind != "form-data" or not isinstance(name, str):
            raise Refused(400, "A part of the form has no name.")
        self._field = name[:64]
        self._content = bytearray()
        files = sum(file is not None for _, file, _ in self.parts)
        if self._file is not None and files >= self.limits.files:
            raise Refused(413, f"One upload may have up to {self.limits.files} files; send the rest separately.")
        if self._file is None and len(self.parts) - files >= _FIELDS:
            raise Refused(400, "The form has too many fields.")

    def _add(self, data: bytes) -> None:
        self._content += data
        self._total += len(data)
        most = _FIELD_BYTES if self._file is None else self.limits.file_mb << 20
        if self._file is not None and self._content[:4] in _ZIP:
            most = self.limits.total_mb << 20
        if len(self._content) > most or self._total > self.limits.total_mb << 20:
            raise _too_large(self.limits)

    def _end(self) -> None:
        self.parts.append((self._field, self._file, bytes(self._content)))
        self._content = bytearray()

    def _finish(self) -> None:
        self.ended = True


def _unpacked(reader: _Reader, limits: UploadLimits) -> Form:
    uploads: list[Upload] = []
    fields = []
    budget = limits.total_mb << 20
    for name, file, content in reader.parts:
        if file is None:
            fields.append((name, content.decode("utf-8", "replace")))
        elif name == UNSENT:
            if file:
                uploads.append(Upload(shown_name(file), b"", _unsent(content, limits)))
        elif content[:4] in _ZIP:
            members = unpack(content, limits, limits.files - len(uploads), budget)
            budget -= sum(len(m.data) for m in members)
            if not members:
                uploads.append(Upload(shown_name(file), b"", "an archive without images"))
            uploads += [Upload(f"{shown_name(file)} / {m.name}", m.data, m.refusal) for m in members]
        elif content or file:  # browsers send an empty part if no file was chosen
            refusal = no_picture(file) if content else "empty: 0 bytes"
            uploads.append(Upload(shown_name(file), content if refusal is None else b"", refusal))
        if len(uploads) > limits.files:
            raise Refused(413, f"One upload may have up to {limits.files} images; send the rest separately.")
    return Form(tuple(uploads), tuple(fields))


def _unsent(content: bytes, limits: UploadLimits) -> str:
    """Return why a page did not send a chosen file."""
    return {
        b"folder": "a folder: open it and choose the images in it",
        b"large": f"larger than {limits.file_mb} MB",
    }.get(content, "the browser could not read it: copy it to this computer and choose it again")


def unpack(data: bytes, limits: UploadLimits, most: int, budget: int) -> list[Upload]:
    """Return the images of a zip archive; a member that cannot be used has a refusal instead of bytes.

    Raises Refused (413) if there are more than `most`, or more than `budget` bytes once unpacked.
    """
    file = io.BytesIO(data)
    found: list[Upload] = []
    walk = ZipWalk(file, len(data), repair=False)
    try:
        for seen, entry in enumerate(walk):
            if seen > 50 * limits.files:
                raise Refused(413, "The archive has too many entries.")
            key = image_key(entry.name)
            if entry.is_directory or is_litter(key):
                continue
            if len(found) >= most:
                raise Refused(413, f"One upload may have up to {limits.files} images; send the rest separately.")
            upload = _member(file, entry, shown_name(key), limits, budget)
            budget -= len(upload.data)
            found.append(upload)
    except ArchiveError as error:
        return [Upload("archive", b"", str(error))]
    if walk.truncated is not None:
        found.append(Upload("archive", b"", walk.truncated))
    return found


def _member(file: io.BytesIO, entry: ZipEntry, name: str, limits: UploadLimits, budget: int) -> Upload:
    if entry.refusal is not None:
        return Upload(name, b"", entry.refusal)
    if (why := no_picture(entry.name)) is not None:
        return Upload(name, b"", why)
    if entry.method not in (0, 8):
        return Upload(name, b"", "refused: its compression method is not supported; repack it with deflate")
    if entry.size > limits.file_mb << 20:
        return Upload(name, b"", f"refused: larger than {limits.file_mb} MB")
    if entry.size > limits.archive_ratio * max(entry.stored, 1) + 4096:
        return Upload(name, b"", "refused: it unpacks to far more data than an image of that size would")
    if entry.size > budget:
        raise _too_large(limits)
    try:
        content = read_entry(file, entry.offset, entry.method, entry.stored, entry.size, entry.crc)
    except EntryError as error:
        return Upload(name, b"", str(error))
    if content[:4] in _ZIP:
        return Upload(name, b"", "refused: an archive within an archive; unpack it first")
    return Upload(name, content) if content else Upload(name, b"", "empty: 0 bytes")


def shown_name(name: str) -> str:
    """Return a file name for display: its last 100 characters, invisible ones replaced."""
    clean = "".join(c if c.isprintable() and unicodedata.category(c) != "Cf" else "\ufffd" for c in name)
    clean = clean.strip()
    return clean if len(clean) <= 100 else "..." + clean[-97:]


def _too_large(limits: UploadLimits) -> Refused:
    return Refused(413, f"An image may be up to {limits.file_mb} MB, and one upload up to {limits.total_mb} MB in all.")
