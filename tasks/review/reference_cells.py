"""Cells of a class to compare with: from fields that the model was sure of, or that a reviewer has labelled so."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from leukoflow.core.errors import LeukoflowError, NotFoundError, RequestError
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.pixels import Pixels, shared_decoder
from leukoflow.tasks.review.runs import list_runs, open_run_table
from leukoflow.tasks.review.table import RunTable

REFERENCE_CONFIDENCE = 0.9
REFERENCE_PX = 72
_TRIES = 4  # fields that are looked at for one cell, since pixels may be gone
CAPTION = (
    "{label}, as the model sees it: the cell that weighed most in a field it was sure of ({confidence:.0%}). No expert "
    "has confirmed it."
)
CONFIRMED = "{label}: the cell that weighed most in a field that a reviewer has labelled so."


@dataclass(frozen=True, slots=True)
class ReferenceCell:
    """A cell to compare with: from a field that the model was sure of. Nobody but the model has said what it is.

    `picture` uint8 [h, w, 3], at the model's scale.
    """

    run_key: str
    ordinal: int
    cell_id: int
    label: str
    confidence: float
    attention: float
    picture: NDArray[np.uint8]
    caption: str


def reference_cells(out: str, run_key: str, label: str, n: int = 6) -> tuple[ReferenceCell, ...]:
    """Find cells of a class to compare others with: from this run, or the latest finished one that has some.

    They are the cells of highest attention in fields that were predicted confidently, each of another slide as far as
    there are, fields that a reviewer has labelled so first. Fewer than `n`, or none, where there are no more. Raises
    RequestError for an unknown label, RunNotFoundError.
    """
    if label not in CLASSES or not 1 <= n <= 24:
        raise RequestError(f"reference cells are of one of {', '.join(CLASSES)}, 1 to 24 of them")
    found = _references(open_run_table(out, run_key), label, n)
    if found:
        return found
    for line in list_runs(out):
        if line.run_key == run_key or line.state != "finished" or line.shadow_of is not None:
            continue
        try:
            found = _references(open_run_table(out, line.run_key), label, n)
        except LeukoflowError:
            continue
        if found:
            return found
    return ()


_kept: OrderedDict[tuple[str, ...], tuple[ReferenceCell, ...]] = OrderedDict()
_KEPT = 64


def _references(table: RunTable, label: str, n: int) -> tuple[ReferenceCell, ...]:
    about = (table.out, table.run_key, table.stamp, table.reviews.verdicts.head, label, str(n))
    if about in _kept:
        return _kept[about]
    decoder = shared_decoder(table.bundle[0])
    found: list[ReferenceCell] = []
    with ExitStack() as stack:
        pixels = Pixels(table.storage, table.bundle[0], stack, decoder)
        if not pixels.there:
            return ()
        for ordinal, confirmed in _candidates(table, label, n * _TRIES):
            cell = _reference(table, pixels, ordinal, label, confirmed)
            if cell is not None:
                found.append(cell)
            if len(found) == n:
                break
    _kept[about] = tuple(found)
    while len(_kept) > _KEPT:
        _kept.popitem(last=False)
    return tuple(found)


def _candidates(table: RunTable, label: str, n: int) -> list[tuple[int, bool]]:
    """Return ordinals of fields, and whether a reviewer has labelled them so."""
    frame = table.frame
    place = CLASSES.index(label)
    said = {
        target[1]: s.decision.said
        for target, s in table.reviews.standings.items()
        if target[0] == "image" and s.decision is not None
    }
    confirmed = [key for key, what in said.items() if what == label]
    rows: list[tuple[int, bool]] = []
    if confirmed:
        places = pc.index_in(pa.array(confirmed, pa.string()), frame.keys.combine_chunks()).to_pylist()
        rows += [(int(r), True) for r in sorted(p for p in places if p is not None) if frame.diagnosed[r]]
    sure = frame.predicted & (frame.label == place) & (frame.p.max(1, initial=0.0) >= REFERENCE_CONFIDENCE)
    sure &= (frame.cells > 0) & ~table.reviews.reviewed
    candidates = np.flatnonzero(sure)
    ordered = candidates[np.argsort(-frame.p[candidates, place], kind="stable")]
    _, firsts = np.unique(frame.slide[ordered], return_index=True)
    each = np.zeros(len(ordered), np.bool_)
    each[firsts] = True
    rows += [(int(r), False) for r in np.concatenate([ordered[each], ordered[~each]])[:n]]
    return [(int(frame.ordinals[r]), known) for r, known in rows[:n]]


def _reference(table: RunTable, pixels: Pixels, ordinal: int, label: str, confirmed: bool) -> ReferenceCell | None:
    """Cut out the cell of most attention of a field; None where its pixels are gone or it has no cell."""
    try:
        row, cells = table.stored_row(ordinal), table.cells(ordinal)
    except NotFoundError:
        return None
    decoded, _ = pixels.image(row)
    if decoded is None or decoded.rgb is None or not len(cells):
        return None
    inside = np.flatnonzero(~np.asarray(cells["touches_border"].to_numpy(zero_copy_only=False), np.bool_))
    attention = cells["attention"].to_numpy()
    pool = inside if len(inside) else np.arange(len(cells))
    best = int(pool[np.argmax(attention[pool])])
    scale = decoded.rgb.shape[1] / decoded.source_width
    x = (cells["centroid_x_px"][best].as_py() + 0.5) * scale - 0.5
    y = (cells["centroid_y_px"][best].as_py() + 0.5) * scale - 0.5
    half = REFERENCE_PX // 2
    padded = cv2.copyMakeBorder(decoded.rgb, half, half, half, half, cv2.BORDER_REFLECT_101)
    left, top = round(x), round(y)
    picture = np.ascontiguousarray(padded[top : top + REFERENCE_PX, left : left + REFERENCE_PX], dtype=np.uint8)
    confidence = float(row["confidence"])
    return ReferenceCell(
        run_key=table.run_key,
        ordinal=ordinal,
        cell_id=int(cells["cell_id"][best].as_py()),
        label=label,
        confidence=confidence,
        attention=float(attention[best]),
        picture=picture,
        caption=(CONFIRMED if confirmed else CAPTION).format(label=label, confidence=confidence),
    )
