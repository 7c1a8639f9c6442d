"""The fields of a run as arrays, so that filtering, sorting and grouping them costs milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from leukoflow.runs.records import Status
from leukoflow.tasks.review.columns import PROBABILITIES
from leukoflow.tasks.review.keys import NO_FOLDER
from leukoflow.tasks.store.slides import MALIGNANT

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

STATUSES = tuple(str(s) for s in Status)
PREDICTED, ABSTAINED, REJECTED, QUARANTINED = range(4)
COLUMNS = (
    "slide_id", "patient_id", "site", "scanner", "status", "reason", *PROBABILITIES, "prediction_set", "ood_score",
    "n_cells",
)  # fmt: skip
"""Columns of the predictions that are read when a run is opened. The others are read when something asks for them."""


def entropy(probabilities: Floats) -> Floats:
    """Return the entropy of each row of probabilities [n, 4], 0 (certain) to 1 (a guess); NaN stays."""
    p = np.clip(probabilities, 1e-12, 1.0)
    out: Floats = -(p * np.log(p)).sum(1) / math.log(probabilities.shape[1])
    return np.clip(out, 0.0, 1.0)


def finite_or_none(value: float) -> float | None:
    """Return a number, or None where it is none."""
    return float(value) if np.isfinite(value) else None


def encode(values: pa.ChunkedArray) -> tuple[Ints, list[Any]]:
    """Return the code of each value [n], -1 for null, and what the codes stand for, in the order of appearance."""
    encoded = values.combine_chunks().dictionary_encode()
    codes = np.asarray(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    return codes, encoded.dictionary.to_pylist()


def encode_slides(ids: pa.ChunkedArray, keys: Callable[[], pa.ChunkedArray]) -> tuple[Ints, list[str]]:
    """Return the code of each image's slide [n], and grouping and name of each slide, joined by a colon.

    `keys` gives the image keys, which are needed where the manifest names no slide: there the folder stands for it.
    """
    codes, names = encode(ids)
    named = [f"manifest:{name}" for name in names]
    if not ids.null_count:
        return codes, named
    alone = codes < 0
    folders = pc.replace_substring_regex(keys().filter(pa.array(alone)), r"^[^/]*$", "")  # at the top: no folder
    folders = pc.replace_substring_regex(folders, r"/[^/]*$", "")
    more, names = encode(folders)
    codes = codes.copy()
    codes[alone] = more + len(named)
    return codes, [*named, *(f"folder:{name or NO_FOLDER}" for name in names)]


def _places(values: pa.ChunkedArray, names: Sequence[str]) -> Ints:
    """Return the place of each value in `names` [n], -1 for null and for what is not there."""
    places = pc.index_in(values, pa.array(names, pa.string()))
    return np.asarray(pc.fill_null(places, -1).to_numpy(), np.int64)


def _floats(values: pa.ChunkedArray) -> Floats:
    return np.asarray(pc.cast(values, pa.float64()).to_numpy(), np.float64)


class Frame:
    """Rows of the predictions as arrays. n fields, in the order of the plan; missing columns are nulls.

    `later` reads a column that is not in the table, in the order of its rows.
    """

    def __init__(self, table: pa.Table, ordinals: Ints, later: Callable[[str], pa.ChunkedArray]) -> None:
        table = table.combine_chunks()
        self.table = table
        self._later = later
        self._more: dict[str, pa.ChunkedArray] = {}
        self.ordinals = ordinals
        self.status = _places(table["status"], STATUSES)
        self.p = np.stack([_floats(table[name]) for name in PROBABILITIES], 1) if len(table) else np.zeros((0, 4))
        known: Mask = np.asarray(np.isfinite(self.p).all(1), np.bool_)
        self.label: Ints = np.where(known, np.where(known[:, None], self.p, 0.0).argmax(1), -1)
        self.malignant: Floats = self.p[:, MALIGNANT].sum(1)
        # `label` is the likeliest class also of abstained fields; `answer` is none where the model abstained.
        self.answer: Ints = np.where(self.status == PREDICTED, self.label, -1)
        self.predicted: Mask = (self.status == PREDICTED) & np.isfinite(self.malignant)
        self.diagnosed: Mask = (self.status == PREDICTED) | (self.status == ABSTAINED)
        self.cells = np.asarray(pc.fill_null(table["n_cells"], 0).to_numpy(), np.int64)
        sets = pc.fill_null(pc.list_value_length(table["prediction_set"]), 0).to_numpy()
        self.ambiguous: Mask = self.diagnosed & ((self.status == ABSTAINED) | (np.asarray(sets) > 1))
        self.patient, self.patients = encode(table["patient_id"])
        self.site, self.sites = encode(table["site"])
        self.scanner, self.scanners = encode(table["scanner"])

    def __len__(self) -> int:
        """Return the number of fields."""
        return len(self.table)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of `predictions/`, read now where it is not held."""
        if name in self.table.column_names:
            return self.table[name]
        if name not in self._more:
            self._more[name] = pa.chunked_array([self._later(name).combine_chunks()])
        return self._more[name]

    @property
    def keys(self) -> pa.ChunkedArray:
        """Image keys."""
        return self.column("image_key")

    @cached_property
    def _slides(self) -> tuple[Ints, list[str]]:
        return encode_slides(self.table["slide_id"], lambda: self.keys)

    @property
    def slide(self) -> Ints:
        """Code of each field's slide [n]."""
        return self._slides[0]

    @property
    def slides(self) -> list[str]:
        """Grouping and name of each slide, joined by a colon."""
        return self._slides[1]

    @cached_property
    def entropy(self) -> Floats:
        """Of each field [n], NaN without probabilities."""
        return entropy(self.p) if len(self) else np.zeros(0)

    @cached_property
    def urgency(self) -> Floats:
        """Malignant probability of each field, one half where it was not predicted [n]."""
        return np.asarray(np.where(self.predicted, self.malignant, 0.5), np.float64)
