"""Exports as rows, one for each field: CSV for spreadsheets, Parquet for everything else."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.runs.records import CLASSES, read_reason
from leukoflow.tasks.review.cautions import notice_of, scale_guessed
from leukoflow.tasks.review.columns import PROBABILITIES
from leukoflow.tasks.review.frame import Ints
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.verdict_record import Standing
from leukoflow.tasks.review.wording import RESEARCH_USE, SCALE_CAUTION

ROWS = 4096
EXPORTED = (
    "run_id", "image_key", "slide_id", "patient_id", "site", "scanner", "status", "reason", "caution", "label",
    "confidence", *PROBABILITIES, "prediction_set", "ood_score", "n_cells", "bundle_digest", "reviewed_label",
    "reviewed_by", "reviewed_at", "flagged", "comment", "notice",
)  # fmt: skip


def exported_schema() -> pa.Schema:
    """Return the columns of CSV and Parquet exports: those of `predictions/` that are for people, and what people said.

    `label`, `confidence` and `prediction_set` are empty where the model abstained: there is no answer. `caution` is
    what must be read before an answer to a picture whose scale is a guess, and empty otherwise.
    """
    types = {
        **dict.fromkeys(("confidence", "ood_score", *PROBABILITIES), pa.float64()),
        "prediction_set": pa.list_(pa.string()),
        "n_cells": pa.int32(),
        "reviewed_at": pa.timestamp("ms", "UTC"),
        "flagged": pa.bool_(),
    }
    return pa.schema([pa.field(name, types.get(name, pa.string())) for name in EXPORTED])


def tables(what: Sequence[tuple[RunTable, Ints]]) -> Iterator[pa.Table]:
    """Yield rows of several runs as tables of `exported_schema`, at most `ROWS` rows at a time."""
    for table, rows in what:
        for start in range(0, len(rows), ROWS):
            yield _rows(table, rows[start : start + ROWS])


def _rows(table: RunTable, rows: Ints) -> pa.Table:
    frame, schema = table.frame, exported_schema()
    places = pa.array(rows)
    keys = frame.keys.take(places).to_pylist()
    said = [table.reviews.standings.get(("image", key), Standing()) for key in keys]
    decisions = [s.decision for s in said]
    answered = frame.answer[rows] >= 0  # what the model leaned to where it abstained is no answer, and stays here
    confidence = np.where(answered, frame.p[rows].max(1, initial=-np.inf), np.nan)
    sets = frame.column("prediction_set").take(places).to_pylist()
    given: dict[str, Any] = {
        "run_id": [table.run_id] * len(rows),
        "reason": [read_reason(r) for r in frame.column("reason").take(places).to_pylist()],
        "caution": [SCALE_CAUTION if guessed else None for guessed in scale_guessed(table, rows)],
        "label": [CLASSES[code] if code >= 0 else None for code in frame.answer[rows].tolist()],
        "prediction_set": [found if given_ else None for found, given_ in zip(sets, answered.tolist(), strict=True)],
        "confidence": pa.array(confidence, pa.float64(), from_pandas=True),
        "bundle_digest": [table.bundle[1]] * len(rows),
        "reviewed_label": [d.said if d else None for d in decisions],
        "reviewed_by": [d.who if d else None for d in decisions],
        "reviewed_at": [datetime.fromisoformat(d.at) if d else None for d in decisions],
        "flagged": [s.flagged for s in said],
        "comment": [s.comment for s in said],
        "notice": [notice_of(table)] * len(rows),
    }
    arrays = []
    for field in schema:
        if field.name not in given:
            arrays.append(frame.column(field.name).take(places).combine_chunks().cast(field.type))
            continue
        values = given[field.name]
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.table(arrays, schema=schema)


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What makes a spreadsheet take a text for a formula, full-width forms included."""


def safe_text(value: str) -> str:
    """Return a text that no spreadsheet calculates: one that begins like a formula gets an apostrophe in front."""
    return f"'{value}" if value.lstrip(" ").startswith(_FORMULA) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds")
    if isinstance(value, list):
        return safe_text(" ".join(value))
    return safe_text(value) if isinstance(value, str) else str(value)


def write_csv(tables: Iterable[pa.Table]) -> Iterator[bytes]:
    """Write RFC 4180 in UTF-8 with a byte order mark, without which spreadsheets take it for something else."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\r\n")
    writer.writerow(EXPORTED)
    yield b"\xef\xbb\xbf" + sink.getvalue().encode()
    for table in tables:
        sink.seek(0)
        sink.truncate()
        columns = [table[name].to_pylist() for name in EXPORTED]
        writer.writerows([_cell(value) for value in row] for row in zip(*columns, strict=True))
        yield sink.getvalue().encode("utf-8", "backslashreplace")


class _Pipe(io.RawIOBase):
    """Takes what is written, and hands it out: a file for a writer that wants one."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def write(self, data: Any) -> int:
        self.waiting += data
        self.at += len(data)
        return len(data)

    def taken(self) -> bytes:
        found = bytes(self.waiting)
        self.waiting.clear()
        return found


def write_parquet(tables: Iterable[pa.Table]) -> Iterator[bytes]:
    """Write one Parquet file, in pieces as row groups are complete."""
    schema = exported_schema().with_metadata({"leukoflow.notice": RESEARCH_USE})
    pipe = _Pipe()
    with pq.ParquetWriter(pipe, schema, compression="zstd", use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))
            if data := pipe.taken():
                yield data
    yield pipe.taken()
