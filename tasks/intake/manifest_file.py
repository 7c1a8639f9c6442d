"""Reading the manifest that a hospital sends with its images: CSV as spreadsheets write it, or Parquet.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leukoflow.core.counts import count_of
from leukoflow.core.errors import ConfigError
from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.tasks.intake.patient_key import PATIENT_KEY, pseudonym, require_good
from leukoflow.tasks.intake.spelling import counted, tidied

PathLike: TypeAlias = str | os.PathLike[str]

KEY_COLUMN = "image_key"
MANIFEST_COLUMNS = ("slide_id", "patient_id", "site", "scanner", "um_per_px")
META_PREFIX = "meta_"
_SHORTEST_PATIENT_ID = 4  # a shorter one is found inside keys by chance
_CHUNK = 65536
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")

_SAYS_NOTHING = frozenset(
    ("nan", "inf", "na", "n/a", "n.a.", "<na>", "nat", "none", "null", "nil", "undefined", "unknown", "unbekannt",
     "anonymous", "anonym", "-", "--", "?", "#n/a", "#value!", "#ref!", "#name?", "#div/0!", "#null!", "#num!")
)  # fmt: skip
"""What programs and people write for nothing, in lower case: as an id it would make one patient of many."""
_FORMULA = re.compile(r'="(.*)"')
_SCIENTIFIC = re.compile(r"[+-]?\d+([.,]\d+)?e[+-]\d+", re.IGNORECASE)
_WHOLE = re.compile(r"(\d{1,15})[.,]0")
_MONTH = "jan feb mar mär mrz apr may mai jun jul aug sep sept oct okt nov dec dez".replace(" ", "|")
_DATE = re.compile(
    r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d)?)?"
    r"|\d{1,2}[./-]\d{1,2}[./-]\d{4}( \d\d:\d\d(:\d\d)?)?|\d\d\.\d\d\.\d\d"
    rf"|\d{{1,2}}[-. ]+({_MONTH})\.?([-. ]+\d{{2,4}})?|({_MONTH})\.?[-. ]+\d{{2,4}}",
    re.IGNORECASE,
)
_CONSEQUENCE = {
    "patient_id": "these images have no patient",
    "slide_id": "these images are grouped by the folder that they lie in",
    "um_per_px": "these images have no scale of their own",
}


def manifest_schema(meta_columns: Sequence[str] = ()) -> pa.Schema:
    """What is known of images: `image_key`, the manifest's columns, and every configured extra one as `meta_<name>`."""
    return pa.schema([pa.field(KEY_COLUMN, pa.string(), nullable=False), *manifest_fields(meta_columns)])


def manifest_fields(meta_columns: Sequence[str]) -> list[pa.Field]:
    """The columns of `manifest_schema` without the key."""
    names = [*MANIFEST_COLUMNS, *(META_PREFIX + name for name in meta_columns)]
    return [pa.field(name, pa.float64() if name == "um_per_px" else pa.string()) for name in names]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of images beforehand: `table` as `manifest_schema` has it, `rows` from image key to its row.

    Patients are pseudonyms already. `lines` are the rows' places in the file, counted in `unit`s; `remarks` say what
    was made of it, without its content.
    """

    table: pa.Table
    rows: Mapping[str, int]
    lines: Sequence[int]
    unit: str = "line"
    remarks: tuple[str, ...] = ()

    def row_of(self, image_key: str) -> int | None:
        """Row of an image. A leading `./`, as tar likes to write it, makes no difference."""
        row = self.rows.get(image_key)
        if row is None and image_key.startswith("./"):
            row = self.rows.get(image_key[2:])
        return row

    def places(self, rows: Sequence[int]) -> str:
        """Rows as people find them in the file."""
        return counted(self.unit, [self.lines[row] for row in rows])


def read_manifest(path: PathLike, meta_columns: Sequence[str] = (), patient_key: bytes | None = None) -> Manifest:
    """Read a CSV (comma, semicolon or tab; UTF-8, UTF-16 or Windows-1252) or Parquet manifest.

    Columns nobody asked for are dropped. Ids that say nothing (empty, NaN, NA) or have lost digits are null, and
    remarks say where. Raises ConfigError naming the lines where a key is absent, images are named twice with
    different values, a scale is no positive number; also where a configured column is absent, patients are named and
    `patient_key` is None or can be guessed.
    """
    if clash := sorted({KEY_COLUMN, *MANIFEST_COLUMNS} & {_column(name) for name in meta_columns}):
        raise ConfigError(f"meta_columns names {', '.join(clash)}, which every manifest may have: leave it out there")
    sheet = _read(path, meta_columns)
    _require_keys(path, sheet)
    cleaner = _Cleaner(path, sheet)
    columns: dict[str, pa.Array] = {KEY_COLUMN: sheet.columns[KEY_COLUMN]}
    for name in ("slide_id", "patient_id", "site", "scanner"):
        if name in sheet.columns:
            columns[name] = cleaner.ids(name)
    if "um_per_px" in sheet.columns:
        columns["um_per_px"] = cleaner.scales()
    columns |= {META_PREFIX + name: sheet.columns[name] for name in meta_columns}
    patients = columns.get("patient_id")
    if patients is not None and patients.null_count < len(patients):
        if not patient_key:
            raise ConfigError(
                f"{path} names patients, and there is no key to pseudonymise them: set {PATIENT_KEY} or the "
                "Prefect Secret block that holds it, or take the column patient_id out"
            )
        require_good(patient_key)
        cleaner.note_patients_in_keys(patients)
        columns["patient_id"] = _pseudonyms(patients, patient_key)
    schema = manifest_schema(meta_columns)
    arrays = [columns.get(f.name, pa.nulls(len(sheet.lines), f.type)) for f in schema]
    return _indexed(path, pa.table(arrays, schema=schema), sheet)


def manifest_keys(path: PathLike) -> list[str]:
    """The images that a manifest names; what else it says is not looked at. Raises ConfigError."""
    sheet = _read(path, (), only_keys=True)
    _require_keys(path, sheet)
    return list(dict.fromkeys(sheet.columns[KEY_COLUMN].to_pylist()))


def _pseudonyms(patients: pa.Array, key: bytes) -> pa.Array:
    encoded = patients.dictionary_encode()
    names = pa.array([pseudonym(patient, key) for patient in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)


def _column(name: str) -> str:
    """A column's name, however a spreadsheet's header spells it."""
    return re.sub(r"[\s-]+", "_", tidied(name)).casefold()


# ---------------------------------------------------------------- the file


@dataclass(slots=True)
class _Sheet:
    """The wanted columns as they are written: strings, empty ones null; `um_per_px` of Parquet may be numbers."""

    columns: dict[str, pa.Array]
    lines: Sequence[int]
    unit: str
    remarks: list[str] = field(default_factory=list)

    def places(self, rows: Sequence[int]) -> str:
        return counted(self.unit, [self.lines[row] for row in rows])


def _read(path: PathLike, meta_columns: Sequence[str], only_keys: bool = False) -> _Sheet:
    known = () if only_keys else MANIFEST_COLUMNS
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PAR1":
                file.seek(0)
                return _read_csv(path, file.read(), known, meta_columns)
        return _read_parquet(path, known, meta_columns)
    except OSError as error:
        raise ConfigError(f"the manifest {path} cannot be read: {error.strerror or type(error).__name__}") from None


def _places_of(path: PathLike, names: Sequence[str], known: Sequence[str], metas: Sequence[str]) -> dict[str, int]:
    """From the name of a wanted column to its place among those of the file."""
    there: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        there[_column(name)].append(place)
    if KEY_COLUMN not in there:
        raise ConfigError(
            f"{path} has no column {KEY_COLUMN} among its {count_of(len(names), 'column')}: its first line "
            f"must name the columns, and "
            f"{KEY_COLUMN} the images"
        )
    if absent := [name for name in metas if _column(name) not in there]:
        raise ConfigError(f"{path} lacks {', '.join(absent)}, which meta_columns asks for")
    wanted = [name for name in (KEY_COLUMN, *known, *metas) if _column(name) in there]
    if twice := [name for name in wanted if len(there[_column(name)]) > 1]:
        raise ConfigError(f"{path} has more than one column {', '.join(twice)}: keep one each")
    return {name: there[_column(name)][0] for name in wanted}


def _read_csv(path: PathLike, data: bytes, known: Sequence[str], metas: Sequence[str]) -> _Sheet:
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
        if len(numbers) % _CHUNK == 0:
            flush()
    if wrong:
        more = f" ({len(wrong):,} such lines)" if len(wrong) > 1 else ""
        raise ConfigError(
            f"{path}, line {wrong[0]} has {first_wrong} fields, the header names {len(names)}{more}; quote values that "
            f"contain {_DELIMITERS[delimiter]}"
        )
    flush()
    columns = {name: pa.chunked_array(parts, pa.string()).combine_chunks() for name, parts in chunks.items()}
    sheet = _Sheet(columns, numbers, "line")
    if not numbers:
        sheet.remarks.append("the manifest has a header and no line: it says nothing of any image")
    if text.foreign:
        sheet.remarks.append(
            f"{len(text.foreign):,} of the manifest's lines read as Windows-1252, since they are not UTF-8: "
            f"{counted('line', text.foreign)}; save it as UTF-8"
        )
    return sheet


def _csv_rows(path: PathLike, reader: Any, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Rows that say anything, each with the number of the line that it begins on."""
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
    """What separates the names of a header: the one under which it names the images, else the most frequent one."""

    def fitness(delimiter: str) -> tuple[bool, int]:
        names = [_column(name.strip('"')) for name in header.split(delimiter)]
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
            raise ConfigError(f"{path}, line {number} has zero bytes: it is no text; save it as CSV (UTF-8) again")

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


def _read_parquet(path: PathLike, known: Sequence[str], metas: Sequence[str]) -> _Sheet:
    try:
        names = pq.read_schema(path).names
        places = _places_of(path, names, known, metas)
        table = pq.read_table(path, columns=[names[place] for place in places.values()])
        columns = {name: table[names[place]].combine_chunks() for name, place in places.items()}
    except pa.ArrowException:  # what it says may quote values
        raise ConfigError(f"the manifest {path} is a damaged Parquet file: write it again") from None
    sheet = _Sheet({}, range(1, len(table) + 1), "row")
    try:
        for column in columns.values():
            column.validate(full=True)
    except pa.ArrowException:
        raise ConfigError(f"the manifest {path} has text that is no UTF-8: write it again") from None
    for name, column in columns.items():
        sheet.columns[name] = column if name == "um_per_px" else _as_text(path, sheet, name, column)
    return sheet


def _as_text(path: PathLike, sheet: _Sheet, name: str, column: pa.Array) -> pa.Array:
    """A column of Parquet as strings, whole numbers without a decimal point."""
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
    """A number as an id: without a decimal point, and in scientific notation where it has lost digits."""
    if abs(value) >= exact:
        return f"{value:e}"
    return str(int(value)) if value.is_integer() else str(value)


def _require_keys(path: PathLike, sheet: _Sheet) -> None:
    keys = sheet.columns[KEY_COLUMN]
    blank = pc.or_kleene(pc.is_null(keys), pc.equal(pc.utf8_trim_whitespace(keys), ""))
    if rows := _true(blank):
        raise ConfigError(f"{path}, {sheet.places(rows)}: no {KEY_COLUMN}; name the image or take the line out")


def _true(mask: pa.Array) -> list[int]:
    return [int(row) for row in pc.indices_nonzero(mask).to_pylist()]


def _indexed(path: PathLike, table: pa.Table, sheet: _Sheet) -> Manifest:
    """Rows by key; a line that repeats another word for word counts once."""
    rows: dict[str, int] = {}
    repeated: list[tuple[int, int]] = []
    row = 0
    for chunk in table[KEY_COLUMN].chunks:
        for start in range(0, len(chunk), _CHUNK):
            for key in chunk.slice(start, _CHUNK).to_pylist():
                if (first := rows.setdefault(key, row)) != row:
                    repeated.append((first, row))
                row += 1
    if not repeated:
        return Manifest(table.combine_chunks(), rows, sheet.lines, sheet.unit, tuple(sheet.remarks))
    ours, theirs = (table.take(pa.array(side, pa.int64())).to_pylist() for side in zip(*repeated, strict=True))
    apart = [pair for pair, one, other in zip(repeated, ours, theirs, strict=True) if one != other]
    if apart:
        more = f" ({len(apart) - 1:,} more such lines)" if len(apart) > 1 else ""
        raise ConfigError(
            f"{path} has more than one line for an image, with different values: {sheet.places(apart[0])}{more}; keep "
            "one for each image"
        )
    extra = [second for _, second in repeated]
    sheet.remarks.append(f"repeated word for word in the manifest, and counted once: {sheet.places(extra)}")
    kept = sorted(rows.values())
    places = {row: place for place, row in enumerate(kept)}
    return Manifest(
        table.take(pa.array(kept, pa.int64())).combine_chunks(),
        {key: places[row] for key, row in rows.items()},
        array("q", (sheet.lines[row] for row in kept)),
        sheet.unit,
        tuple(sheet.remarks),
    )


# ---------------------------------------------------------------- values


def _nothing(sheet: _Sheet, name: str, rows: Sequence[int]) -> str:
    effect = _CONSEQUENCE.get(name, "it is taken as not given")
    return f"{name} says nothing (empty, NaN, NA, unknown or the like) in {sheet.places(rows)}: {effect}"


class _Cleaner:
    """Makes values of what is written, with remarks on the sheet. Looks at each different value once."""

    def __init__(self, path: PathLike, sheet: _Sheet) -> None:
        self.path, self.sheet = path, sheet

    def ids(self, name: str) -> pa.Array:
        """A column of ids or names: tidied; null where it says nothing or what it said is lost."""
        encoded = self.sheet.columns[name].dictionary_encode()
        written = encoded.dictionary.to_pylist()
        values = [_plain(value) for value in written]
        dressed = {place for place, value in enumerate(values) if value and value != written[place]}
        if name.endswith("_id") and dressed:
            self.sheet.remarks.append(
                f"{name} has blanks, quotation marks or invisible characters around it in "
                f"{self.sheet.places(_rows(encoded.indices, dressed))}: they are left out"
            )
        whole = [_WHOLE.fullmatch(value) for value in values]
        told = [value for value in values if value and value.casefold() not in _SAYS_NOTHING]
        if name.endswith("_id") and told and sum(map(bool, whole)) == len(told):
            values = [found[1] if found else value for found, value in zip(whole, values, strict=True)]
            self.sheet.remarks.append(
                f"every {name} of the manifest ends with .0, as programs write numbers with gaps: it is left out"
            )
        unusable: dict[str, set[int]] = defaultdict(set)
        for place, value in enumerate(values):
            if not value or value.casefold() in _SAYS_NOTHING:
                unusable["nothing"].add(place)
            elif name.endswith("_id") and _SCIENTIFIC.fullmatch(value):
                unusable["digits"].add(place)
            elif name.endswith("_id") and _DATE.fullmatch(value):
                unusable["date"].add(place)
        indices = encoded.indices
        effect = _CONSEQUENCE.get(name, "")
        blank = _rows(indices, unusable["nothing"])
        if name == "patient_id" and told:
            blank = sorted([*blank, *_true(pc.is_null(indices))])
        if blank:
            self.sheet.remarks.append(_nothing(self.sheet, name, blank))
        if rows := _rows(indices, unusable["digits"]):
            self.sheet.remarks.append(
                f"{name} has lost its digits to a spreadsheet, as in 1.2E+11, in {self.sheet.places(rows)}: {effect}; "
                "format the column as text and export it again"
            )
        if rows := _rows(indices, unusable["date"]):
            kept = name != "patient_id"
            self.sheet.remarks.append(
                f"{name} is a date in {self.sheet.places(rows)}, which spreadsheets make of other ids: "
                f"{'it is kept as it is' if kept else effect}; if it was an id, format the column as text and export "
                "it again"
            )
            if kept:
                unusable.pop("date")
        lost = set().union(*unusable.values())
        kept_values = [None if place in lost else value for place, value in enumerate(values)]
        self._note_lookalikes(name, indices, kept_values)
        return pa.array(kept_values, pa.string()).take(indices)

    def _note_lookalikes(self, name: str, indices: pa.Array, values: Sequence[str | None]) -> None:
        """Remarks on ids that a spreadsheet or a typist may have made two of: they stay apart."""
        if not name.endswith("_id"):
            return
        alike: dict[str, set[str]] = defaultdict(set)
        for value in values:
            if value is not None:
                alike[_lookalike(value)].add(value)
        if not any(len(forms) > 1 for forms in alike.values()):
            return
        places = {p for p, value in enumerate(values) if value is not None and len(alike[_lookalike(value)]) > 1}
        self.sheet.remarks.append(
            f"{name} differs only in leading zeros, a trailing .0 or upper and lower case in "
            f"{self.sheet.places(_rows(indices, places))}: they are treated as different; spell them alike if they are "
            "the same"
        )

    def scales(self) -> pa.Array:
        """Micrometres per pixel, a decimal comma or point; null where nothing is said. Raises ConfigError."""
        column = self.sheet.columns["um_per_px"]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        try:
            encoded = (column.cast(pa.string()) if pa.types.is_string_view(column.type) else column).dictionary_encode()
        except pa.ArrowNotImplementedError:
            kind = column.type
            raise ConfigError(f"{self.path}: the column um_per_px has the type {kind}; store it as a number") from None
        values: list[float | None] = []
        wrong, beyond, blank = set(), set(), set()
        for place, written in enumerate(encoded.dictionary.to_pylist()):
            text = tidied(str(written))
            if not text or text.casefold() in _SAYS_NOTHING:
                blank.add(place)
                values.append(None)
                continue
            value = _number(text)
            values.append(value)
            if value is None:
                wrong.add(place)
            elif not MIN_UM_PER_PX <= value <= MAX_UM_PER_PX:
                beyond.add(place)
        if rows := _rows(encoded.indices, wrong):
            raise ConfigError(
                f"{self.path}, {self.sheet.places(rows)}: um_per_px is not a positive number like 0.42; correct it, or "
                "leave it empty"
            )
        if rows := _rows(encoded.indices, beyond):
            raise ConfigError(
                f"{self.path}, {self.sheet.places(rows)}: um_per_px is not between {MIN_UM_PER_PX:g} and "
                f"{MAX_UM_PER_PX:g}; is it in micrometres per pixel, like 0.42? Correct it, or leave it empty"
            )
        if rows := _rows(encoded.indices, blank):
            self.sheet.remarks.append(_nothing(self.sheet, "um_per_px", rows))
        return pa.array(values, pa.float64()).take(encoded.indices)

    def note_patients_in_keys(self, patients: pa.Array) -> None:
        """Remarks on names of images that hold their patient's id: they are kept, and shown, as they are."""
        keys, count = self.sheet.columns[KEY_COLUMN], 0
        for start in range(0, len(keys), _CHUNK):
            pairs = zip(keys.slice(start, _CHUNK).to_pylist(), patients.slice(start, _CHUNK).to_pylist(), strict=True)
            count += sum(p is not None and len(p) >= _SHORTEST_PATIENT_ID and p in key for key, p in pairs)
        if count:
            self.sheet.remarks.append(
                f"{count:,} image names contain their patient's id, and names are kept as they are: rename them"
            )


def _plain(value: str) -> str:
    """An id without what spreadsheets put around it to keep it a text."""
    value = tidied(value)
    if found := _FORMULA.fullmatch(value):
        value = tidied(found[1])
    return value[1:] if value.startswith("'") and value[1:2].isdigit() else value


def _lookalike(value: str) -> str:
    return value.removesuffix(".0").casefold().lstrip("0") or "0"


def _rows(indices: pa.Array, places: Any) -> list[int]:
    """Rows whose value is one of those at some places of the dictionary."""
    if not places:
        return []
    return _true(pc.fill_null(pc.is_in(indices, pa.array(sorted(places), indices.type)), False))


def _number(text: str) -> float | None:
    """A positive number, with a decimal point or comma; None for anything else."""
    if re.fullmatch(r"\d*,\d+", text):
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 < value < float("inf") else None
