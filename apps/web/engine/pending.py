"""One image on its way through the engine, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from leukoflow.apps.web.engine.frames import BundleCard
from leukoflow.core.errors import LeukoflowError, place_of
from leukoflow.runs.records import Status
from leukoflow.tasks.inference.single import Examination

if TYPE_CHECKING:
    from leukoflow.apps.web.engine.worker import Worker

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class PendingImage:
    """An image that somebody waits for: in the queue, or in the hands of `worker`."""

    number: int
    who: str
    data: bytes
    card: BundleCard
    um_per_px: float | None
    on_stage: Callable[[str], None] | None
    answer: asyncio.Future[Examination]
    started: float = field(default_factory=time.monotonic)
    tries: int = 0
    worker: Worker | None = None


def report_stage(image: PendingImage, stage: str) -> None:
    """Call the listener of an image, whose errors are logged only."""
    if image.on_stage is None:
        return
    try:
        image.on_stage(stage)
    except Exception as error:  # a listener must not harm what it watches
        _log.error("a listener failed: %s", place_of(error))


def settle(image: PendingImage, said: Examination | LeukoflowError) -> None:
    """Answer the caller, unless it has gone: with a diagnosis, or by raising an error."""
    if image.answer.done():
        return
    if isinstance(said, LeukoflowError):
        image.answer.set_exception(said)
    else:
        image.answer.set_result(said)


def quarantined(data: bytes, card: BundleCard, reason: str) -> Examination:
    """Return a diagnosis without an answer, for an image that no worker has finished."""
    return Examination(
        sha256=hashlib.sha256(data).hexdigest(), bundle=card.name, bundle_digest=card.digest,
        status=Status.QUARANTINED, reason=reason, label=None, probabilities=(), prediction_set=(), ood=None,
        width_px=0, height_px=0, quality=None, remarks=(), cells=None, tiles=(), seconds=(),
    )  # fmt: skip
