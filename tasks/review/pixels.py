"""Pixels of a run's images, read again from the source through the disposable decoder.

They are held against the digest that the run noted: an image that is gone or has changed is not shown.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leukoflow.core.config import LimitSettings, RunConfig
from leukoflow.core.errors import LeukoflowError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Member, ScaleSource, SourceKind
from leukoflow.sources.reading import open_reader
from leukoflow.storage.base import Storage
from leukoflow.tasks.decoding.ingest import Decoded, Decoder
from leukoflow.tasks.intake.plan_file import read_shard, read_summary
from leukoflow.tasks.review.bundle_settings import segment_settings


def _decoded_at(row: Mapping[str, Any]) -> float | None:
    """Return the micrometres per pixel that an image of a run was decoded with, None where they were assumed."""
    assumed = row.get("um_per_px_source") == str(ScaleSource.ASSUMED)
    return None if assumed else row["um_per_px"]


class Pixels:
    """The images of a run, read again through the disposable decoder; `note` says why where none can be had."""

    def __init__(self, storage: Storage, bundle: str, stack: ExitStack, decoder: Decoder | None = None) -> None:
        self.note = ""
        self._plan: pq.ParquetFile | None = None
        self._reader: Any = None
        self._decoder = decoder
        try:
            source = read_summary(stack.enter_context(storage.open(RunKey.PLAN))).source
            if source.kind is SourceKind.COMPRESSED_TAR:
                self.note = "The source is a compressed archive, which is not unpacked again: only masks are shown."
                return
            self._plan = pq.ParquetFile(stack.enter_context(storage.open(RunKey.PLAN)))
            self._reader = stack.enter_context(open_reader(source))
            if decoder is None:
                self._decoder = stack.enter_context(Decoder(default_limits(), segment_settings(bundle)))
        except (LeukoflowError, OSError, pa.ArrowException) as error:
            self._reader = None
            self.note = f"The source can no longer be read, so only masks are shown ({error})."

    @property
    def there(self) -> bool:
        """Whether the source can be read at all."""
        return self._reader is not None

    def image(self, row: Mapping[str, Any]) -> tuple[Decoded | None, str]:
        """Return the decoded image of a row of the predictions; None with the reason where it cannot be had."""
        if self._reader is None or self._decoder is None:
            return None, self.note
        try:
            decoded = self._decoder.decode_one(self._reader.read(self._member(row)), _decoded_at(row))
        except (LeukoflowError, OSError) as error:
            return None, f"the image can no longer be read ({error}); only the mask is shown"
        if decoded.rgb is None:
            return None, f"the image can no longer be read ({decoded.reason}); only the mask is shown"
        known = row.get("member_sha256")
        if known is not None and decoded.sha256 != known:
            return None, "the image is not the one that the run saw: the source has changed; only the mask is shown"
        return decoded, ""

    def photo(
        self, row: Mapping[str, Any], shape: tuple[int, ...], affine: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8] | None, str]:
        """Return the pixels under a mask, uint8 [H, W, 3], white beyond the image; None with the reason."""
        decoded, remark = self.image(row)
        if decoded is None:
            return None, remark
        piece = cut(decoded, shape, affine)
        if piece is None:
            return None, "the image's scale no longer fits its mask; only the mask is shown"
        out = np.full((*shape[:2], 3), 255, np.uint8)
        out[: piece.shape[0], : piece.shape[1]] = piece
        return out, ""

    def _member(self, row: Mapping[str, Any]) -> Member:
        assert self._plan is not None
        for member in read_shard(self._plan, int(row["shard"])):
            if member.image_key == row["image_key"]:
                return member
        raise LeukoflowError("the plan does not list it")


def corner(affine: NDArray[np.float64]) -> tuple[int, int]:
    """Return where a tile begins in its scaled image (x, y), from its affine map [2, 3] to source pixels."""
    x, y = (round((affine[i, 2] + 0.5) / affine[i, i] - 0.5) for i in (0, 1))
    return int(x), int(y)


def cut(
    decoded: Decoded, shape: tuple[int, ...], affine: NDArray[np.float64], picture: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8] | None:
    """Cut out what a tile shows of its image, or of a `picture` of it: uint8 [h, w, 3]; None where scales differ."""
    assert decoded.rgb is not None
    shown = decoded.rgb if picture is None else picture
    x, y = corner(affine)
    piece = shown[y : y + shape[0], x : x + shape[1]]
    if piece.size == 0 or abs(shown.shape[1] - decoded.source_width / affine[0, 0]) > 1:
        return None
    return piece


def default_limits() -> LimitSettings:
    """Return the limits of decoding that a run has by default."""
    found: LimitSettings = RunConfig.model_fields["limits"].default
    return found


_decoders: dict[str, Decoder] = {}
_decoders_lock = threading.Lock()


def shared_decoder(bundle: str) -> Decoder:
    """Return the decoder that this process keeps for a geometry: starting its child costs more than an image."""
    settings = segment_settings(bundle)
    with _decoders_lock:
        key = settings.model_dump_json()
        if key not in _decoders:
            _decoders[key] = Decoder(default_limits(), settings)
            atexit.register(_decoders[key].close)
        return _decoders[key]
