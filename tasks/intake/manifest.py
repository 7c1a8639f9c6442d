"""The manifest that a hospital sends with its images: slides, patients, sites, scanners and scales, by image key."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from leukoflow.core.errors import ConfigError
from leukoflow.tasks.intake.manifest_file import CHUNK, KEY_COLUMN, PathLike, Sheet, column_name, read_sheet
from leukoflow.tasks.intake.manifest_values import Cleaner
from leukoflow.tasks.intake.patient_key import PATIENT_KEY, pseudonym, require_good
from leukoflow.tasks.intake.spelling import counted

MANIFEST_COLUMNS = ("slide_id", "patient_id", "site", "scanner", "um_per_px")
META_PREFIX = "meta_"


def manifest_schema(meta_columns: Sequence[str] = ()) -> pa.Schema:
    """Return the schema of a manifest: `image_key`, known columns, and every configured extra one as `meta_<name>`."""
    return pa.schema([pa.field(KEY_COLUMN, pa.string(), nullable=False), *manifest_fields(meta_columns)])


def manifest_fields(meta_columns: Sequence[str]) -> list[pa.Field]:
    """Return the columns of `manifest_schema` without the key."""
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
        """Return the row of an image, else None. A leading `./`, as tar likes to write it, makes no difference."""
        row = self.rows.get(image_key)
        if row is None and image_key.startswith("./"):
            row = self.rows.get(image_key[2:])
        return row

    def places(self, rows: Sequence[int]) -> str:
        """Return rows as people find them in the file."""
        return counted(self.unit, [self.lines[row] for row in rows])


def read_manifest(path: PathLike, meta_columns: Sequence[str] = (), patient_key: bytes | None = None) -> Manifest:
    """Read a CSV (comma, semicolon or tab; UTF-8, UTF-16 or Windows-1252) or Parquet manifest.

    Columns nobody asked for are dropped. Ids that say nothing (empty, NaN, NA) or have lost digits are null, and
    remarks say where. Raises ConfigError naming the lines where a key is absent, images are named twice with
    different values, a scale is no positive number; also where a configured column is absent, patients are named and
    `patient_key` is None or can be guessed.
    """
    if clash := sorted({KEY_COLUMN, *MANIFEST_COLUMNS} & {column_name(name) for name in meta_columns}):
        raise ConfigError(f"meta_columns names {', '.join(clash)}, which every manifest may have: leave it out there")
    sheet = read_sheet(path, MANIFEST_COLUMNS, meta_columns)
    cleaner = Cleaner(path, sheet)
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
                f"{path} names patients, but there is no key to pseudonymise them: set {PATIENT_KEY} or the "
                "Prefect Secret block that holds it, or remove the column patient_id"
            )
        require_good(patient_key)
        cleaner.note_patients_in_keys(patients)
        columns["patient_id"] = _pseudonyms(patients, patient_key)
    schema = manifest_schema(meta_columns)
    arrays = [columns.get(f.name, pa.nulls(len(sheet.lines), f.type)) for f in schema]
    return _indexed(path, pa.table(arrays, schema=schema), sheet)


def manifest_keys(path: PathLike) -> list[str]:
    """Read which images a manifest names, and nothing else that it says. Raises ConfigError."""
    sheet = read_sheet(path)
    return list(dict.fromkeys(sheet.columns[KEY_COLUMN].to_pylist()))


def _pseudonyms(patients: pa.Array, key: bytes) -> pa.Array:
    encoded = patients.dictionary_encode()
    names = pa.array([pseudonym(patient, key) for patient in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)


def _indexed(path: PathLike, table: pa.Table, sheet: Sheet) -> Manifest:
    """Index rows by key; a line that repeats another word for word counts once."""
    rows: dict[str, int] = {}
    repeated: list[tuple[int, int]] = []
    row = 0
    for chunk in table[KEY_COLUMN].chunks:
        for start in range(0, len(chunk), CHUNK):
            for key in chunk.slice(start, CHUNK).to_pylist():
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
