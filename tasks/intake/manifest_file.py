"""The file of a manifest: CSV as spreadsheets write it, or Parquet, whatever its encoding and delimiter.

What a line says never gets into a message, since it names patients: messages give line numbers and counts. What can
be read safely is read, with a remark where that is worth knowing; what cannot is refused with its lines.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leukoflow.core.counts import count_of
from leukoflow.core.errors import ConfigError
from leukoflow.tasks.intake.spelling import counted, tidied

PathLike: TypeAlias = str | os.PathLike[str]

KEY_COLUMN = "image_key"
CHUNK = 65536
"""Lines that are made Python objects at a time."""
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


def column_name(name: str) -> str:
    """Return a column's name, however a spreadsheet's header spells it."""
    return re.sub(r"[\s-]+", "_", tidied(name)).casefold()


@dataclass(slots=True)
class Sheet:
    """The wanted columns as they are written: strings, empty ones null; `um_per_px` of Parquet may be numbers."""

    columns: dict[str, pa.Array]
    lines: Sequence[int]
    unit: str
    remarks: list[str] = field(default_factory=list)

    def places(self, rows: Sequence[int]) -> str:
        """Return rows as people find them in the file."""
        return counted(self.unit, [self.lines[row] for row in rows])


def read_sheet(path: PathLike, known: Sequence[str] = (), metas: Sequence[str] = ()) -> Sheet:
    """Read the key of each line and, of the columns, those of `known` that are there and all of `metas`.

    Raises ConfigError where the file cannot be read, a column of `metas` is absent, or a line names no image.
    """
    sheet = _read(path, known, metas)
    _require_keys(path, sheet)
    return sheet


def _read(path: PathLike, known: Sequence[str], metas: Sequence[str]) -> Sheet:
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PAR1":
                file.seek(0)
                return _read_csv(path, file.read(), known, metas)
        return _read_parquet(path, known, metas)
    except OSError as error:
        raise ConfigError(f"the manifest {path} cannot be read: {error.strerror or type(error).__name__}") from None


def _places_of(path: PathLike, names: Sequence[str], known: Sequence[str], metas: Sequence[str]) -> dict[str, int]:
    """Find the place of each wanted column among those of the file."""
    there: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        there[column_name(name)].append(place)
    if KEY_COLUMN not in there:
        raise ConfigError(
            f"{path} has no column {KEY_COLUMN} among its {count_of(len(names), 'column')}: its first line "
            f"must name the columns, and "
            f"{KEY_COLUMN} the images"
        )
    if absent := [name for name in metas if column_name(name) not in there]:
        raise ConfigError(f"{path} lacks {', '.join(absent)}, which meta_columns asks for")
    wanted = [name for name in (KEY_COLUMN, *known, *metas) if column_name(name) in there]
    if twice := [name for name in wanted if len(there[column_name(name)]) > 1]:
        raise ConfigError(f"{path} has more than one column {', '.join(twice)}: keep one each")
    return {name: there[column_name(name)][0] for name in wanted}


def _read_csv(path: PathLike, data: bytes, known: Sequence[str], metas: Sequence[str]) -> Sheet:
    text = _Text(path, data)
    lines, skipped = iter(text), 0
    header = delimiter = ""
    for header in lines:
        skipped += 1
        if re.fullmatch(r"sep=[,;\t]", header.strip("\r\n").casefold()):
            delimiter = header[4]
        elif header.strip():
            break
    else:
        raise ConfigError(f"the manifest {path} is empty: name the images in a column {KEY_COLUMN}")
    delimiter = delimiter or _delimiter(header)
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    skipped -= 1
    rows = _csv_rows(path, reader, skipped)
    _, names = next(rows, (0, []))
    while names and not names[-1].strip():  # columns that a spreadsheet takes for used
        names.pop()
    places = _places_of(path, names, known, metas)
    numbers, wrong = array("q"), array("q")
    chunks: dict[str, list[pa.Array]] = {name: [] for name in places}
    pending: dict[str, list[str | None]] = {name: [] for name in places}

    def flush() -> None:
        for name, values in pending.items():
            chunks[name].append(pa.array(values, pa.string()))
            values.clear()

    first_wrong = 0
    for number, fields in rows:
        if len(fields) != len(names) and (len(fields) < len(names) or any(map(str.strip, fields[len(names) :]))):
            first_wrong = first_wrong or len(fields)
            wrong.append(number)
            continue
        numbers.append(number)
        for name, place in places.items():
            pending[name].append(fields[place] or None)
        if len(numbers) % CHUNK == 0:
            flush()
    if wrong:
        more = f" ({len(wrong):,} such lines)" if len(wrong) > 1 else ""
        raise ConfigError(
            f"{path}, line {wrong[0]} has {first_wrong} fields, the header names {len(names)}{more}; quote values that "
            f"contain {_DELIMITERS[delimiter]}"
        )
    flush()
    columns = {name: pa.chunked_array(parts, pa.string()).combine_chunks() for name, parts in chunks.items()}
    sheet = Sheet(columns, numbers, "line")
    if not numbers:
        sheet.remarks.append("the manifest has a header and no line: it says nothing of any image")
    if text.foreign:
        sheet.remarks.append(
            f"{len(text.foreign):,} of the manifest's lines read as Windows-1252, since they are not UTF-8: "
            f"{counted('line', text.foreign)}; save it as UTF-8"
        )
    return sheet


def _csv_rows(path: PathLike, reader: Any, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Yield rows that say anything, each with the number of the line that it begins on."""
    begins = skipped + 1
    try:
        for fields in reader:
            if any(map(str.strip, fields)):
                yield begins, fields
            begins = skipped + reader.line_num + 1
    except csv.Error:  # what it says may quote the line
        raise ConfigError(
            f"{path}, line {begins}: its quotation marks do not match; close each that is opened, and double those "
            "inside"
        ) from None


def _delimiter(header: str) -> str:
    """Return what separates a header's names: the one under which it names the images, else the most frequent one."""

    def fitness(delimiter: str) -> tuple[bool, int]:
        names = [column_name(name.strip('"')) for name in header.split(delimiter)]
        return KEY_COLUMN in names, header.count(delimiter)

    return max(_DELIMITERS, key=fitness)


class _Text:
    """The lines of a text file, whatever wrote it. `foreign` are those that are no UTF-8, as far as was read."""

    def __init__(self, path: PathLike, data: bytes) -> None:
        self.path, self.foreign = path, array("q")
        if data.startswith(_WORKBOOKS):
            raise ConfigError(f"the manifest {path} is a workbook of a spreadsheet: save it as CSV (UTF-8)")
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            data = self._from_utf16(data, "utf-16")
        elif data[1:2] == b"\0":
            data = self._from_utf16(data, "utf-16-le")
        elif data[:1] == b"\0":
            data = self._from_utf16(data, "utf-16-be")
        self.data = data.removeprefix(codecs.BOM_UTF8)
        if (at := self.data.find(b"\0")) >= 0:
            number = sum(1 for _ in _LINE.finditer(self.data[:at] + b"."))
            raise ConfigError(
                f"{path}, line {number} contains zero bytes: it is not text; save it as CSV (UTF-8) again"
            )

    def _from_utf16(self, data: bytes, encoding: str) -> bytes:
        try:
            return data.decode(encoding).encode()
        except UnicodeError:
            raise ConfigError(f"the manifest {self.path} looks like UTF-16 and is damaged: save it as UTF-8") from None

    def __iter__(self) -> Iterator[str]:
        for number, found in enumerate(_LINE.finditer(self.data), start=1):
            line = found[0]
            try:
                yield line.decode()
            except UnicodeDecodeError:
                self.foreign.append(number)
                yield self._windows(line, number)

    def _windows(self, line: bytes, number: int) -> str:
        try:
            return line.decode("cp1252")
        except UnicodeDecodeError:
            raise ConfigError(
                f"{self.path}, line {number} is neither UTF-8 nor Windows-1252: save the manifest as UTF-8"
            ) from None


def _read_parquet(path: PathLike, known: Sequence[str], metas: Sequence[str]) -> Sheet:
    try:
        names = pq.read_schema(path).names
        places = _places_of(path, names, known, metas)
        table = pq.read_table(path, columns=[names[place] for place in places.values()])
        columns = {name: table[names[place]].combine_chunks() for name, place in places.items()}
    except pa.ArrowException:  # what it says may quote values
        raise ConfigError(f"the manifest {path} is a damaged Parquet file: write it again") from None
    sheet = Sheet({}, range(1, len(table) + 1), "row")
    try:
        for column in columns.values():
            column.validate(full=True)
    except pa.ArrowException:
        raise ConfigError(f"the manifest {path} has text that is not UTF-8: write it again") from None
    for name, column in columns.items():
        sheet.columns[name] = column if name == "um_per_px" else _as_text(path, sheet, name, column)
    return sheet


def _as_text(path: PathLike, sheet: Sheet, name: str, column: pa.Array) -> pa.Array:
    """Return a column of Parquet as strings, whole numbers without a decimal point."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_floating(kind):
        exact = 2 ** {16: 11, 32: 24}.get(kind.bit_width, 53)  # beyond it, two whole numbers may be one
        values = column.cast(pa.float64()).to_pylist()
        return pa.array([None if value is None else _digits(value, exact) for value in values], pa.string())
    if pa.types.is_decimal(kind):
        plain = [None if v is None else f"{v:f}" for v in column.to_pylist()]
        return pa.array([v.rstrip("0").rstrip(".") if v and "." in v else v for v in plain], pa.string())
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        or pa.types.is_integer(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)
    ):  # fmt: skip
        raise ConfigError(f"{path}: the column {name} has the type {kind}; store it as text")
    texts = column.cast(pa.string())
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _digits(value: float, exact: int) -> str:
    """Write a number as an id: without a decimal point, and in scientific notation where it has lost digits."""
    if abs(value) >= exact:
        return f"{value:e}"
    return str(int(value)) if value.is_integer() else str(value)


def _require_keys(path: PathLike, sheet: Sheet) -> None:
    keys = sheet.columns[KEY_COLUMN]
    blank = pc.or_kleene(pc.is_null(keys), pc.equal(pc.utf8_trim_whitespace(keys), ""))
    if rows := rows_where(blank):
        raise ConfigError(f"{path}, {sheet.places(rows)}: no {KEY_COLUMN}; name the image or take the line out")


def rows_where(mask: pa.Array) -> list[int]:
    """Return the rows where a mask is true."""
    return [int(row) for row in pc.indices_nonzero(mask).to_pylist()]
