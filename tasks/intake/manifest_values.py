"""Values of a manifest: ids and scales cleaned of what spreadsheets do to them, with a remark on whatever was lost."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.core.errors import ConfigError
from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.tasks.intake.manifest_file import CHUNK, KEY_COLUMN, PathLike, Sheet, rows_where
from leukoflow.tasks.intake.spelling import tidied

_SHORTEST_PATIENT_ID = 4  # a shorter one is found inside keys by chance

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


def _nothing(sheet: Sheet, name: str, rows: Sequence[int]) -> str:
    """Remark that a column says nothing in some rows, and what follows from that."""
    effect = _CONSEQUENCE.get(name, "it is taken as not given")
    return f"{name} says nothing (empty, NaN, NA, unknown or the like) in {sheet.places(rows)}: {effect}"


class Cleaner:
    """Makes values of what is written, with remarks on the sheet. Looks at each different value once."""

    def __init__(self, path: PathLike, sheet: Sheet) -> None:
        self.path, self.sheet = path, sheet

    def ids(self, name: str) -> pa.Array:
        """Return a column of ids or names: tidied; null where it says nothing or what it said is lost."""
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
        given = [value for value in values if value and value.casefold() not in _SAYS_NOTHING]
        if name.endswith("_id") and given and sum(map(bool, whole)) == len(given):
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
        if name == "patient_id" and given:
            blank = sorted([*blank, *rows_where(pc.is_null(indices))])
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
        """Remark on ids that a spreadsheet or a typist may have made two of: they stay apart."""
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
        """Return micrometres per pixel, float64, of a decimal comma or point; null where nothing is said.

        Raises ConfigError naming the lines of what is no scale.
        """
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
        """Remark on names of images that hold their patient's id: they are kept, and shown, as they are."""
        keys, count = self.sheet.columns[KEY_COLUMN], 0
        for start in range(0, len(keys), CHUNK):
            pairs = zip(keys.slice(start, CHUNK).to_pylist(), patients.slice(start, CHUNK).to_pylist(), strict=True)
            count += sum(p is not None and len(p) >= _SHORTEST_PATIENT_ID and p in key for key, p in pairs)
        if count:
            self.sheet.remarks.append(
                f"{count:,} image names contain their patient's id, and names are kept as they are: rename them"
            )


def _plain(value: str) -> str:
    """Return an id without what spreadsheets put around it to keep it a text."""
    value = tidied(value)
    if found := _FORMULA.fullmatch(value):
        value = tidied(found[1])
    return value[1:] if value.startswith("'") and value[1:2].isdigit() else value


def _lookalike(value: str) -> str:
    """Return the form that ids share which a spreadsheet or a typist may have made of one."""
    return value.removesuffix(".0").casefold().lstrip("0") or "0"


def _rows(indices: pa.Array, places: Any) -> list[int]:
    """Return the rows whose value is one of those at some places of the dictionary."""
    if not places:
        return []
    return rows_where(pc.fill_null(pc.is_in(indices, pa.array(sorted(places), indices.type)), False))


def _number(text: str) -> float | None:
    """Return a positive number, written with a decimal point or comma; None for anything else."""
    if re.fullmatch(r"\d*,\d+", text):
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 < value < float("inf") else None
