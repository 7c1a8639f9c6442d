"""What must be read before an answer: the notice of research use, shadow runs, and pictures whose scale is a guess."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from leukoflow.tasks.review.bundle_settings import segment_settings
from leukoflow.tasks.review.frame import Ints
from leukoflow.tasks.review.lines import FieldLine, PatientLine, SlideLine
from leukoflow.tasks.review.table import RunTable
from leukoflow.tasks.review.wording import RESEARCH_USE, SHADOW, Scale, answered_scale_note, sentence

_SIZES = ("width_px", "height_px", "um_per_px", "um_per_px_source")


def notice_of(table: RunTable) -> str:
    """Return what stands beside everything that leaves a run."""
    return RESEARCH_USE if table.shadow_of is None else f"{SHADOW} {RESEARCH_USE}"


def scale_guessed(table: RunTable, rows: Ints) -> list[bool]:
    """Tell of each of these rows whether its field was answered although its scale is a guess."""
    settings, answered = segment_settings(table.bundle[0]), table.frame.answer[rows] >= 0
    sizes = [table.frame.column(name).take(pa.array(rows)).to_pylist() for name in _SIZES]
    return [
        said and Scale(width, height, um_per_px, settings, source).guessed
        for said, width, height, um_per_px, source in zip(answered.tolist(), *sizes, strict=True)
    ]


def guessed_fields(table: RunTable, lines: Iterable[FieldLine]) -> frozenset[int]:
    """Tell which of these fields, by ordinal, were answered although their scale is a guess."""
    ordinals = [line.ordinal for line in lines]
    rows = np.searchsorted(table.frame.ordinals, np.asarray(ordinals, np.int64))
    return frozenset(o for o, guessed in zip(ordinals, scale_guessed(table, rows), strict=True) if guessed)


def scale_caution(table: RunTable, line: SlideLine | PatientLine) -> str:
    """Say where answers were given to pictures whose scale is a guess, as a sentence; empty where none was."""
    rows = _rows_of(table, line)
    answered = rows[table.frame.answer[rows] >= 0]
    note = answered_scale_note(sum(scale_guessed(table, answered)), len(answered), segment_settings(table.bundle[0]))
    return sentence(note)


def _rows_of(table: RunTable, line: SlideLine | PatientLine) -> Ints:
    if isinstance(line, SlideLine):
        return table.rows_of(slide_key=line.slide_key)
    return table.rows_of(patient_key=line.patient_key)
