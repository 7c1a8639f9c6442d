"""What a change to finished runs is: which images it concerns, what it changes of them, and how it comes into force.

`tasks/upkeep/erase.py` and `tasks/upkeep/correct.py` are the two kinds; `tasks/upkeep/amend.py` carries them out.
"""

from __future__ import annotations

import hashlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from leukoflow.core.errors import StorageError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import FileRef

_KEPT_CELL_COLUMNS = ("run_id", "image_key", "cell_id", "zarr_index")
_ROWS_ARE = {
    (RunKey.MASKS, "semantic"): "tiles",
    (RunKey.MASKS, "cells"): "tiles",
    (RunKey.MASKS, "cell_table"): "cells",
    (RunKey.FEATURES, "hybrid"): "tiles",
    (RunKey.FEATURES, "cells"): "cells",
    (RunKey.ACTIVATIONS, "maps"): "cells",
}
_GEOMETRY = ("to_source", "cell_offsets")
"""Arrays that say where things lie, and nothing of the image."""


@dataclass(frozen=True, slots=True)
class Intent:
    """`amend.json`: what was written aside and is to come into force."""

    done: str  # the word for the audit log when it is: `erased`, `corrected`
    prefix: str
    parts: tuple[FileRef, ...]
    books: tuple[FileRef, ...]  # tables, markers, run.json; the manifest is the last
    stale: tuple[str, ...]  # files that have no successor


@dataclass(frozen=True, slots=True)
class Amended:
    """What a change does, or has done, to one run."""

    run_id: str
    images: int
    missing: int  # rows of missing.parquet
    files: int  # rewritten
    manifest_before: str
    manifest_after: str | None  # None when nothing was changed


class Amendment(ABC):
    """What changes of the images that are concerned, and which these are."""

    doing: str
    """Word for the audit log before a run is changed, and in its lock: `erase`, `correct`."""
    done: str
    """Word for the audit log afterwards."""
    blanks = False
    """Whether the images' cells, masks, features and activation maps become zeros."""

    @abstractmethod
    def concerned(self, table: pa.Table) -> pa.ChunkedArray:
        """Say which rows are concerned, of a table that has `patient_id` and `slide_id`."""

    @abstractmethod
    def changed(self, table: pa.Table) -> pa.Table:
        """Return the same rows of a table that has `patient_id`; those that are concerned changed."""

    @abstractmethod
    def key(self, key: str) -> str:
        """Return the content address of a part that was changed, given that of the part before."""

    @abstractmethod
    def details(self) -> dict[str, str]:
        """Return what the audit log says of it; neither patients nor slides by name."""


def salted(name: str) -> str:
    """Return a salt, and the SHA-256 of salt and name: only people who know the name can find it in the log."""
    salt = secrets.token_hex(8)
    return f"{salt}:{hashlib.sha256((salt + name).encode()).hexdigest()}"


def blank_cells(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Return the same rows of `cells/`; those of the images say nothing but that there was a cell."""
    theirs = pc.is_in(table["image_key"], pa.array(keys, pa.string()))
    for i, field in enumerate(table.schema):
        if field.name not in _KEPT_CELL_COLUMNS:
            nothing = pa.scalar(False if pa.types.is_boolean(field.type) else 0, field.type)
            table = table.set_column(i, field, pc.if_else(theirs, nothing, table[field.name]))
    return table


def rows_of(top: str, name: str, length: int, tiles: int, cells: int) -> str | None:
    """Say whether an array's rows are tiles or cells; None where they say nothing of an image. Raises StorageError."""
    if name in _GEOMETRY or name.endswith("_offsets"):
        return None
    if known := _ROWS_ARE.get((top, name)):
        return known
    if (length == tiles) != (length == cells):
        return "tiles" if length == tiles else "cells"
    raise StorageError(
        f"{top}: it is not known what the rows of the array {name} are, so the patient cannot be erased from them; "
        "erase with the version of leukoflow that made the run"
    )
