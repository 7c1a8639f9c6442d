"""What the report of a run shows of its tables: one pass over the predictions, and the ranking of the slides.

Tables are streamed part by part and only the best candidates are kept, so memory does not grow with the run.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leukoflow.core.method import SegmentSettings
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import RunManifest, read_reason
from leukoflow.storage.base import Storage
from leukoflow.tasks.review.wording import Scale
from leukoflow.tasks.store.slides import patients_in_disagreement
from leukoflow.tasks.store.tables import shard_name, table_files

FIELDS_SHOWN = 12
"""Fields with outlines in each of the two galleries."""
KEYS_SHOWN = 50
SLIDES_SHOWN = 50
LOWEST, BINS = 0.25, 15
"""The histogram of highest probabilities: from a guess among four to 1."""

_SLIDES_KEPT = 200
_COLUMNS = (
    "image_key", "slide_id", "status", "reason", "label", "confidence", "prob_benign", "prob_early", "prob_pre",
    "prob_pro", "prediction_set", "n_cells", "shard", "zarr_index", "n_tiles", "um_per_px", "width_px", "height_px",
    "um_per_px_source",
)  # fmt: skip

Row = dict[str, Any]
Heap = list[tuple[float, str, Row]]


@dataclass(slots=True)
class Survey:
    """What one pass over the predictions keeps. `settings` say which picture's scale is a guess.

    `histogram` int64 [BINS, 2] counts predicted and abstained fields.
    """

    settings: SegmentSettings
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros((BINS, 2), np.int64))
    labels: Counter[str] = field(default_factory=Counter)  # of predicted fields
    without: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # status -> first (key, reason)
    suspicious: dict[str, Heap] = field(default_factory=dict)  # slide -> its most suspicious fields
    uncertain: Heap = field(default_factory=list)  # the least certain fields
    guessed: Counter[str] = field(default_factory=Counter)  # status -> without a scale, of another size than trained on

    @property
    def least_certain(self) -> list[Row]:
        """Rows of the least certain fields, the least certain one first."""
        return [row for _, _, row in sorted(self.uncertain, key=lambda c: (-c[0], c[1]))]


def part_keys(manifest: RunManifest | None, folder: str, shards: Iterable[str]) -> dict[str, str]:
    """Map each shard to the file that holds its rows of a table: one of its own, or a merged one."""
    keys = {shard: RunKey.part(folder, shard) for shard in shards}
    for file in table_files(manifest.parts if manifest else (), folder):
        keys |= {shard_name(ordinal): file.key for ordinal in file.shards}
    return keys


def survey_predictions(storage: Storage, keys: Iterable[str], settings: SegmentSettings) -> Survey:
    """Read the predictions in these files once, and keep what the report shows of them."""
    survey = Survey(settings)
    for key in dict.fromkeys(keys):
        try:
            with storage.open(key) as file:
                reader = pq.ParquetFile(file)
                columns = [name for name in _COLUMNS if name in set(reader.schema_arrow.names)]
                for batch in reader.iter_batches(batch_size=1024, columns=columns):
                    for row in batch.to_pylist():
                        _take(survey, row)
        except FileNotFoundError:
            continue  # committed, but not moved to its place yet
    return survey


def _take(survey: Survey, row: Row) -> None:
    status, key = row["status"], row["image_key"]
    if status != "predicted":
        listed = survey.without.setdefault(status, [])
        if len(listed) < KEYS_SHOWN:
            listed.append((key, read_reason(row["reason"]) or ""))
    if status in ("predicted", "abstained"):
        size = (row["width_px"], row["height_px"], row["um_per_px"])
        guessed = Scale(*size, survey.settings, row.get("um_per_px_source")).guessed
        survey.guessed[status] += guessed
    if row["label"] is None:
        return
    place = min(BINS - 1, max(0, int((row["confidence"] - LOWEST) / (1 - LOWEST) * BINS)))
    survey.histogram[place, 0 if status == "predicted" else 1] += 1
    if status == "predicted":
        survey.labels[row["label"]] += 1
    if row["zarr_index"] is None:
        return
    _keep(survey.uncertain, (-row["confidence"], key, row), FIELDS_SHOWN)
    if status != "predicted":
        return
    malignant = row["prob_early"] + row["prob_pre"] + row["prob_pro"]
    _keep(survey.suspicious.setdefault(_slide_of(row), []), (malignant, key, row), FIELDS_SHOWN)
    if len(survey.suspicious) > 2 * _SLIDES_KEPT:
        best = heapq.nlargest(_SLIDES_KEPT, survey.suspicious.items(), key=lambda item: max(c[0] for c in item[1]))
        survey.suspicious = dict(best)


def _keep(heap: Heap, item: tuple[float, str, Row], size: int) -> None:
    """Keep the `size` items of highest score; the key decides ties, and is unique, so rows are never compared."""
    if len(heap) < size:
        heapq.heappush(heap, item)
    elif item[:2] > heap[0][:2]:
        heapq.heapreplace(heap, item)


def _slide_of(row: Row) -> str:
    return row["slide_id"] or row["image_key"].rpartition("/")[0] or "."


def read_slides(storage: Storage, key: str) -> list[Row]:
    """Read the most urgent slides of a ranking; an empty list where there is none.

    An unfinished run has a ranking only if it handed one over at its deadline.
    """
    try:
        with storage.open(key) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=SLIDES_SHOWN):
                return list(batch.to_pylist())
    except FileNotFoundError:
        pass
    return []


def read_disagreements(storage: Storage, key: str) -> dict[str, str]:
    """Find the patients whose slides have different labels, over all slides of a ranking, with a remark on each."""
    try:
        with storage.open(key) as file:
            table = pq.read_table(file, columns=["patient_id", "slide_id", "label", "n_predicted"])
    except FileNotFoundError:
        return {}
    return patients_in_disagreement(table.to_pylist())


def most_suspicious(survey: Survey, slides: Sequence[Row]) -> list[Row]:
    """Choose the best field of each slide, slides by urgency; then their second best, until there are enough."""
    ranks = {s["slide_id"]: s["rank"] for s in slides}
    ordered = sorted(
        (sorted(heap, key=lambda c: (-c[0], c[1])) for heap in survey.suspicious.values()),
        key=lambda fields: (ranks.get(_slide_of(fields[0][2]), math.inf), -fields[0][0], fields[0][1]),
    )
    chosen: list[Row] = []
    for depth in range(FIELDS_SHOWN):
        chosen += [fields[depth][2] for fields in ordered if len(fields) > depth]
        if len(chosen) >= FIELDS_SHOWN:
            break
    return chosen[:FIELDS_SHOWN]
