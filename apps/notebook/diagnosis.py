"""One image diagnosed from Python: what a run would write about it, and its pictures."""

from __future__ import annotations

import atexit
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from leukoflow.apps.notebook import words
from leukoflow.core.errors import LeukoflowError, RequestError
from leukoflow.core.extras import how_to_install
from leukoflow.runs.records import CLASSES, Status
from leukoflow.tasks.inference.single import Examination, TileView, examine, load_models
from leukoflow.tasks.review.wording import Scale

if TYPE_CHECKING:
    from leukoflow.tasks.decoding.ingest import Decoder
    from leukoflow.tasks.inference.single import Models

_one_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True)
class Mask:
    """Segmentation of one tile of an image.

    `semantic` uint8 [H, W]: 0 background, 1 cytoplasm, 2 nucleus. `cells` uint16 [H, W]: 0 background, else the
    `cell_id` of the table. `to_source` float32 [2, 3]: affine map from a mask pixel's centre (x, y) to source pixels.
    """

    semantic: NDArray[np.uint8]
    cells: NDArray[np.uint16]
    to_source: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one bundle says of one image. A notebook shows it with its cells outlined.

    `um_per_px` is the scale in use and `um_per_px_source` how it is known: `manifest` (stated), `metadata` (of the
    file), `ruler` (measured on red cells) or `assumed`, with which there is no answer; None where nothing was decoded.
    `label` and `prediction_set` are empty where the model gave no answer; `reason` says why in one line.
    `probabilities` are calibrated for answers; of an abstained image they are no answer. `cells` has a row for each
    cell (columns as in a run's `cells/`, docs/data-format.md).
    """

    status: str
    label: str | None
    probabilities: dict[str, float]
    prediction_set: tuple[str, ...]
    reason: str | None
    cells: pa.Table
    um_per_px: float | None
    um_per_px_source: str | None
    bundle: str
    bundle_digest: str
    sha256: str
    remarks: tuple[str, ...]
    tiles: tuple[TileView, ...]
    sentences: tuple[str, ...]

    @property
    def masks(self) -> tuple[Mask, ...]:
        """Masks of the tiles, in their order; of a large image, of those with most attention."""
        return tuple(Mask(tile.semantic, tile.cells, tile.to_source) for tile in self.tiles)

    @property
    def headline(self) -> str:
        """The result in one line."""
        return words.headline(self.status, self.label, None if self.label is None else self.probabilities[self.label])

    def __repr__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"<Diagnosis: {self.headline}{reason} {len(self.cells)} cells, bundle {self.bundle}. Research use only.>"

    def _repr_html_(self) -> str:
        from leukoflow.apps.notebook.pictures import field_html

        shown = self.probabilities if self.label is not None else {}
        return field_html(self.tiles, self.cells, self.headline, (*self.sentences, *self.remarks), shown)


def diagnose(
    image: str | Path | bytes | NDArray[np.uint8],
    um_per_px: float | None = None,
    bundle: str = "pocket",
    device: str = "cpu",
) -> Diagnosis:
    """Diagnose one image: what a run would write about it.

    The first call loads the bundle, which takes seconds; later ones take a fraction of a second. Bytes are decoded in
    a disposable process, so a hostile file harms nothing.

    Args:
        image: a path, an `s3://` address, a file's bytes, or pixels uint8 [H, W, 3] in sRGB.
        um_per_px: micrometres per pixel of the image; without it, the image's own red cells are measured, and where
            there are too few there is no answer.
        bundle: name, folder or `s3://` prefix of the bundle.
        device: `cpu` or `cuda`.

    Raises:
        RequestError: the pixels are not uint8 [H, W, 3], or the scale is not a positive number.
        BundleError: the bundle is not there or damaged.
        LeukoflowError: torch is not installed; the message says which extra brings it.
        FileNotFoundError: there is no such file.

    Examples:
        >>> from leukoflow.tasks.imaging.synthetic import render_field
        >>> import numpy as np
        >>> found = diagnose(render_field(np.random.default_rng(0), "Benign").rgb)
        >>> found.status in ("predicted", "abstained", "rejected"), len(found.masks)
        (True, 1)
    """
    from leukoflow.core.config import LimitSettings

    if um_per_px is not None and not um_per_px > 0:
        raise RequestError(f"um_per_px is {um_per_px}: give micrometres per pixel, such as 0.42, or None")
    data = _bytes_of(image)
    with _one_at_a_time:  # a decoder serves one image at a time
        models, decoder = _opened(bundle, device)
        found = examine(data, um_per_px, models, LimitSettings(), decoder, lambda stage: None)
    return _diagnosis(found, models)


def _bytes_of(image: str | Path | bytes | NDArray[np.uint8]) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise RequestError(
                f"pixels are {image.dtype} {list(image.shape)}: give uint8 [height, width, 3], red first"
            )
        from leukoflow.apps.web.drawing.layers import png

        return png(image)
    place = str(image)
    if "://" in place:
        from leukoflow.storage.opening import open_storage

        folder, _, name = place.rpartition("/")
        return open_storage(folder).read(name)
    return Path(place).expanduser().read_bytes()


@lru_cache(maxsize=2)
def _opened(bundle: str, device: str) -> tuple[Models, Decoder]:
    """Open a bundle and the decoder for it; both stay with this process."""
    from leukoflow.core.config import LimitSettings
    from leukoflow.tasks.decoding.ingest import Decoder

    try:
        models = load_models(bundle, device)
    except ModuleNotFoundError as error:
        raise LeukoflowError(how_to_install(error) or str(error)) from error
    decoder = Decoder(LimitSettings(), models.bundle.spec.method.segment)
    atexit.register(decoder.close)
    return models, decoder


def _diagnosis(found: Examination, models: Models) -> Diagnosis:
    answered = found.status is Status.PREDICTED
    spec = models.bundle.spec
    alpha = spec.calibration.alpha
    size = found.scale
    scale = Scale(found.width_px, found.height_px, size.known, spec.method.segment, str(size.source))
    empty = pa.table({"cell_id": pa.array([], pa.int32()), "attention": pa.array([], pa.float32())})
    return Diagnosis(
        status=str(found.status),
        label=found.label if answered else None,
        probabilities=dict(zip(CLASSES, found.probabilities, strict=False)),
        prediction_set=found.prediction_set if answered else (),
        reason=found.reason,
        cells=empty if found.cells is None else found.cells,
        um_per_px=size.um_per_px,
        um_per_px_source=None if size.um_per_px is None else str(size.source),
        bundle=found.bundle,
        bundle_digest=found.bundle_digest,
        sha256=found.sha256,
        remarks=found.remarks,
        tiles=found.tiles,
        sentences=words.sentences(
            found.status,
            found.reason,
            scale,
            found.prediction_set,
            found.probabilities,
            alpha,
            "notebook",
        ),
    )
