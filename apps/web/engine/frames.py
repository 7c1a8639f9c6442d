"""Messages between the web server, its fork server and the workers.

Typed JSON and raw arrays, never a pickle.

A frame is a header (kind, bytes of JSON, bytes of body), JSON of one of the records below, and a body. A worker has
handled pixels of hostile files, so the server checks everything that it sends: lengths are bounded, records are
validated, and shapes must account for every byte of the body.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from leukoflow.core.errors import LeukoflowError
from leukoflow.runs.records import ImageScale, Quality, Status
from leukoflow.runs.schema import CELLS
from leukoflow.tasks.inference.single import Examination, TileView

HEADER = struct.Struct("<BIQ")
MAX_WORDS, MAX_BODY = 4 << 20, 1 << 30

Count = Annotated[int, Field(ge=0, le=1 << 31)]


class FrameError(LeukoflowError):
    """What arrived is not a valid frame."""


@dataclass(frozen=True, slots=True)
class BundleCard:
    """A bundle as shown to people. `metrics` are sentences; `alpha` is the miss rate that its prediction sets allow."""

    name: str
    digest: str
    title: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    alpha: float


# --- to the worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    """Sent once. `limits` is JSON of LimitSettings; at most `kept` bundles stay loaded."""

    bundles: tuple[str, ...]
    limits: str
    kept: int
    threads: int
    memory_mb: int


@dataclass(frozen=True, slots=True)
class Order:
    """One image, whose bytes are the body."""

    number: int
    bundle: str
    um_per_px: float | None


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Nobody waits for this order any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Spawn:
    """Fork a worker that serves the descriptor sent along."""

    number: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill a worker and its decoder."""

    number: int


# --- from the worker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """The bundles could be opened."""

    cards: tuple[BundleCard, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The first bundle is loaded and warm."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker has ended; `words` say how."""

    number: int
    words: str


@dataclass(frozen=True, slots=True)
class Stage:
    """An order has reached a stage."""

    number: int
    stage: str


@dataclass(frozen=True, slots=True)
class Failure:
    """An order, or the start (number 0), failed. `kind` is bundle, memory, withdrawn or error."""

    number: int
    kind: str
    words: str


@dataclass(frozen=True, slots=True)
class TileShape:
    """Shapes of a tile's arrays."""

    height: Count
    width: Count
    cells: Count
    grid: Count
    window_px: Count


@dataclass(frozen=True, slots=True)
class Answer:
    """A diagnosis without its arrays, which are the body: tile by tile, then the columns of the cells."""

    number: int
    sha256: str
    bundle: str
    bundle_digest: str
    status: Status
    reason: str | None
    label: str | None
    probabilities: tuple[float, ...]
    prediction_set: tuple[str, ...]
    ood: float | None
    width_px: Count
    height_px: Count
    quality: Quality | None
    remarks: tuple[str, ...]
    seconds: tuple[tuple[str, float], ...]
    cells: Count | None
    tiles: tuple[TileShape, ...]
    scale: ImageScale


Buffer = bytes | memoryview
Frame = Setup | Order | Withdrawn | Spawn | Kill | Hello | Ready | Ended | Stage | Failure | Answer
KINDS: tuple[type[Any], ...] = (
    Setup, Order, Withdrawn, Spawn, Kill, Hello, Ready, Ended, Stage, Failure, Answer
)  # fmt: skip
_ADAPTERS: dict[int, TypeAdapter[Any]] = {}


def header_of(head: bytes) -> tuple[int, int, int]:
    """Return kind, bytes of JSON and bytes of body. Raises FrameError if they are out of bounds."""
    kind, words, body = HEADER.unpack(head)
    if kind >= len(KINDS) or words > MAX_WORDS or body > MAX_BODY:
        raise FrameError(f"no frame: kind {kind}, {words:,} and {body:,} bytes")
    return kind, words, body


def record_of(kind: int, words: bytes) -> Frame:
    """Return the record in a frame's JSON. Raises FrameError."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(KINDS[kind])
    try:
        found: Frame = _ADAPTERS[kind].validate_json(words)
    except (ValidationError, RecursionError) as error:
        raise FrameError(f"a frame of kind {KINDS[kind].__name__} does not fit: {type(error).__name__}") from None
    return found


def frame(record: Frame, *body: Buffer) -> list[Buffer]:
    """Return a frame as pieces to be written one after the other."""
    words = json.dumps(asdict(record), ensure_ascii=True).encode()
    kind = KINDS.index(type(record))
    return [HEADER.pack(kind, len(words), sum(len(piece) for piece in body)) + words, *body]


# --- diagnoses --------------------------------------------------------------------------------------------------------

_NAMES = ("run_id", "image_key")
_COLUMNS: tuple[pa.Field, ...] = tuple(field for field in CELLS if field.name not in _NAMES)
"""Columns of the cells that are sent; run and image are "" throughout. Null is sent as NaN."""


def _dtype(column: pa.Field) -> Any:
    """Return the dtype in which a column is sent."""
    return np.uint8 if column.type == pa.bool_() else column.type.to_pandas_dtype()


def diagnosis_frame(number: int, diagnosis: Examination) -> list[Buffer]:
    """Return a diagnosis as pieces to be written."""
    body: list[NDArray[Any]] = []
    shapes = []
    for tile in diagnosis.tiles:
        height, width = tile.semantic.shape
        shapes.append(TileShape(height, width, len(tile.cell_ids), tile.maps.shape[-1], tile.window_px))
        body += [np.ascontiguousarray(getattr(tile, name), dtype) for name, dtype, _ in _tile_arrays(shapes[-1])]
    if diagnosis.cells is not None:
        body += [np.ascontiguousarray(diagnosis.cells[c.name].to_numpy(), _dtype(c)) for c in _COLUMNS]
    answer = Answer(
        number, diagnosis.sha256, diagnosis.bundle, diagnosis.bundle_digest, diagnosis.status, diagnosis.reason,
        diagnosis.label, diagnosis.probabilities, diagnosis.prediction_set, diagnosis.ood, diagnosis.width_px,
        diagnosis.height_px, diagnosis.quality, diagnosis.remarks, diagnosis.seconds,
        None if diagnosis.cells is None else len(diagnosis.cells), tuple(shapes), diagnosis.scale,
    )  # fmt: skip
    return frame(answer, *(array.reshape(-1).view(np.uint8).data for array in body))


def diagnosis_of(answer: Answer, body: bytes | bytearray) -> Examination:
    """Return the diagnosis that arrived. Raises FrameError unless its shapes account for every byte."""
    take = _Pieces(body)
    tiles = []
    for shape in answer.tiles:
        arrays = {name: take(dtype, sizes) for name, dtype, sizes in _tile_arrays(shape)}
        tiles.append(TileView(**arrays, window_px=shape.window_px))
    cells = None
    if answer.cells is not None:
        columns = {}
        for column in _COLUMNS:
            values = take(_dtype(column), (answer.cells,))
            flags = column.type == pa.bool_()
            unknown = np.isnan(values) if column.nullable else None
            columns[column.name] = pa.array(values.astype(np.bool_) if flags else values, column.type, mask=unknown)
        for name in _NAMES:  # only now that the number has been checked
            columns[name] = pa.array([""] * answer.cells, pa.string())
        cells = pa.Table.from_arrays([columns[f.name] for f in CELLS], schema=CELLS)
    take.finish()
    return Examination(
        answer.sha256, answer.bundle, answer.bundle_digest, answer.status, answer.reason, answer.label,
        answer.probabilities, answer.prediction_set, answer.ood, answer.width_px, answer.height_px, answer.quality,
        answer.remarks, cells, tuple(tiles), answer.seconds, answer.scale,
    )  # fmt: skip


def _tile_arrays(shape: TileShape) -> tuple[tuple[str, type[Any], tuple[int, ...]], ...]:
    """Return name, dtype and shape of the arrays sent of a tile, in order."""
    plane, m = (shape.height, shape.width), shape.cells
    return (
        ("original", np.uint8, (*plane, 3)),
        ("normalized", np.uint8, (*plane, 3)),
        ("semantic", np.uint8, plane),
        ("cells", np.uint16, plane),
        ("to_source", np.float32, (2, 3)),
        ("cell_ids", np.int32, (m,)),
        ("field_x", np.float32, (m,)),
        ("field_y", np.float32, (m,)),
        ("maps", np.float16, (m, 4, shape.grid, shape.grid)),
    )


class _Pieces:
    """Cuts a body into arrays, which share its memory."""

    def __init__(self, body: bytes | bytearray) -> None:
        self._body, self._at = body, 0

    def __call__(self, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        count = math.prod(shape)
        end = self._at + count * np.dtype(dtype).itemsize
        if end > len(self._body):
            raise FrameError("a diagnosis's arrays end early")
        out = np.frombuffer(self._body, dtype, count, self._at).reshape(shape)
        self._at = end
        return out if out.flags.aligned else out.copy()

    def finish(self) -> None:
        if self._at != len(self._body):
            raise FrameError("a diagnosis has more bytes than its arrays take")
