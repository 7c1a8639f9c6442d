"""The stage before all others: measure the red cells of a shard's images, and pool those of the whole source.

Pooling needs every image, so it is done once, before the first shard is segmented; a run that is taken up again, a
shadow run and `rerun --verify` read what it left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq

from leukoflow.core.errors import MemberError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import PlanSummary, Shard
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.decoding.ingest import read_bytes
from leukoflow.tasks.imaging.magnification import Magnification, Reading, magnify, read_image
from leukoflow.tasks.inference.worker import decoder_of, guarded, opened_bundle, opened_reader, planned
from leukoflow.tasks.intake.plan_file import shards
from leukoflow.tasks.store.job import ShardJob
from leukoflow.tasks.store.scales import ImageRedCells, read_red_cells, write_red_cells, write_scales
from leukoflow.tasks.store.slides import slide_of

_READERS = 8

_UNSEEN = ImageRedCells(read_image(np.zeros(0, np.float32)), None)
"""Of an image that could not be read."""


def measure(job: ShardJob) -> None:
    """Measure the red cells of a shard's images and store them."""
    with guarded(job, "measure"):
        settings = opened_bundle(job.bundle, job.bundle_digest).spec.method.segment
        decoder = decoder_of(job.limits, settings.model_dump_json())
        culprits = {ordinal for ordinal, _ in job.culprits}
        found: list[ImageRedCells] = []
        with opened_reader(job) as reader:
            for member in planned(job.root, job.shard):
                found.append(_UNSEEN)
                if member.refusal is not None or member.ordinal in culprits:
                    continue
                try:
                    measured = decoder.measure(read_bytes(reader, member, job.limits))
                except MemberError:
                    continue  # the shard says why
                found[-1] = ImageRedCells(read_image(measured.red_cells), measured.um_per_px)
        write_red_cells(open_storage(job.root), job.shard, found)


def unmeasured_shards(storage: Storage, summary: PlanSummary) -> list[Shard]:
    """Return the shards whose red cells are not measured yet, in order."""
    done = {RunKey.shard_of_part(name) for name in storage.names(RunKey.RED_CELLS)}
    return [shard for shard in shards(summary) if shard.name not in done]


def give_up_measuring(storage: Storage, shard: Shard) -> None:
    """Store that nothing is known of a shard's images, which several workers died of."""
    write_red_cells(storage, shard, [_UNSEEN] * shard.count)


def settle_scales(storage: Storage, summary: PlanSummary) -> list[Magnification]:
    """Pool the red cells of all shards and write `scales.parquet`; return the magnification of every image.

    Raises FileNotFoundError where another process has done so meanwhile.
    """
    listed = list(shards(summary))
    seen = np.zeros(summary.members, np.int32)
    of_file: list[float | None] = [None] * summary.members

    def readings(pool: ThreadPoolExecutor) -> Iterator[Reading]:
        """Yield the readings in the plan's order; what is pooled is not kept."""
        for shard, found in zip(listed, pool.map(lambda shard: read_red_cells(storage, shard), listed), strict=True):
            for ordinal, one in enumerate(found, start=shard.first):
                seen[ordinal], of_file[ordinal] = len(one.reading.diameters), one.of_file
                yield one.reading

    with ThreadPoolExecutor(_READERS) as pool:
        magnifications = magnify(readings(pool), _groups(storage, listed))
    write_scales(storage, listed, seen, of_file, magnifications)
    storage.delete(RunKey.RED_CELLS)
    return magnifications


def _groups(storage: Storage, listed: Sequence[Shard]) -> list[str]:
    """Return the slide, or the folder, of every image."""
    groups = []
    with storage.open(RunKey.PLAN) as file:
        plan = pq.ParquetFile(file)
        for shard in listed:
            table = plan.read_row_group(shard.ordinal, columns=["slide_id", "image_key"])
            groups += [":".join(slide_of(row["slide_id"], row["image_key"])) for row in table.to_pylist()]
    return groups
