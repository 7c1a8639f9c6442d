"""Forecast whether a run meets its deadline at the present rate, and hand over what there is when it does not."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.runs.layout import RunKey, Stage
from leukoflow.runs.progress import ProgressReader, RunProgress, now
from leukoflow.runs.schema import SLIDES
from leukoflow.storage.base import Storage
from leukoflow.tasks.publish.ranking import RANKED, rank_slides
from leukoflow.tasks.report.run_report import build_report
from leukoflow.tasks.store.slides import slide_of

PARTIAL_SLIDES = SLIDES.append(pa.field("n_planned", pa.int32(), nullable=False))
"""As SLIDES, over the images that are done so far, and how many images of the slide there are in all."""

LABEL = b"leukoflow.partial"
"""Metadata of `partial/slides.parquet`: in words, how much of the run it is made from."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The speed of a session: images and seconds since its first shard was done."""

    images: int
    seconds: float

    @property
    def rate(self) -> float:
        """Images per second; 0 while nothing can be said."""
        return self.images / self.seconds if self.images and self.seconds > 0 else 0.0


def lateness(progress: RunProgress, pace: Pace, deadline: datetime, moment: datetime) -> timedelta | None:
    """Return how long after its deadline a run will end at this pace; negative before it, None while unknown."""
    if pace.rate == 0.0:
        return None
    return moment + timedelta(seconds=(progress.members - progress.done) / pace.rate) - deadline


def hand_over(root: str) -> RunProgress:
    """Write `partial/slides.parquet` and `partial/report.html` from what the run at `root` has committed."""
    reader = ProgressReader(root)
    storage = reader.storage
    progress = reader.read()
    ranked = rank_slides(_committed_rows(storage))
    planned = _planned(storage)
    keys = zip(ranked["grouping"].to_pylist(), ranked["slide_id"].to_pylist(), strict=True)
    table = ranked.append_column(PARTIAL_SLIDES.field("n_planned"), pa.array([planned[k] for k in keys], pa.int32()))
    words = f"{progress.done} of {progress.members} images of run {progress.run_id}, as of {now()}; not a final result"
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({LABEL: words}), sink, compression="zstd", use_dictionary=False)
    storage.write(RunKey.PARTIAL_SLIDES, sink.getvalue())
    storage.write(RunKey.PARTIAL_REPORT, build_report(root, None).encode())
    return progress


def _committed_rows(storage: Storage) -> Iterator[dict[str, Any]]:
    for name in storage.names(RunKey.markers(Stage.PREDICTIONS)):
        shard = RunKey.shard_of_json(name)
        try:
            with storage.open(RunKey.part(RunKey.PREDICTIONS, shard)) as file:
                yield from pq.read_table(file, columns=list(RANKED)).to_pylist()
        except FileNotFoundError:
            continue  # committed, but not moved to its place yet


def _planned(storage: Storage) -> Counter[tuple[str, str]]:
    """Count the images of each slide in the plan."""
    found: Counter[tuple[str, str]] = Counter()
    with storage.open(RunKey.PLAN) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=["slide_id", "image_key"]):
            found.update(slide_of(row["slide_id"], row["image_key"]) for row in batch.to_pylist())
    return found
