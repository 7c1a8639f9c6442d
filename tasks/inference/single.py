"""Diagnose one image: what a run does with a member, without a run.

The chain is that of a run (`chain.py`), and so are the results; only the shapes of the networks' batches are
smaller, since fifteen blank fields beside the one that somebody waits for would cost as much as it does.
`benchmarks/bench_web.py parity` measures that no label differs.

Importing this module costs no torch: a web server that only shows diagnoses stays small.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import ShardError
from leukoflow.core.geometry import field_geometry
from leukoflow.core.method import MethodSettings, SegmentSettings
from leukoflow.runs.records import CLASSES, ImageScale, Quality, Status
from leukoflow.tasks.decoding.ingest import Decoded, Decoder, Measured, too_large
from leukoflow.tasks.imaging.magnification import magnify_alone, read_image
from leukoflow.tasks.imaging.scale import settle_scale, stated_scale

if TYPE_CHECKING:
    from torch import nn

    from leukoflow.models.bundle import Bundle
    from leukoflow.tasks.imaging.classify import ImageDiagnosis
    from leukoflow.tasks.inference.blocks import Block
    from leukoflow.tasks.inference.chain import BlockDiagnosis, Networks
    from leukoflow.tasks.store.facts import Fact

STAGES = ("decode", "normalize", "segment", "extract", "classify")
"""What `announce` is called with, in this order; a refused or rejected image ends early."""

MAX_VIEWS = 64
"""Tiles of one image that are handed out as pictures: 30 MB. All tiles are diagnosed."""

TIE = 2e-5
"""Logits of two classes nearer than this are all but equal: ten times what shapes and threads were seen to change."""

SHAPES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Batches of fields and of cells have the smallest of these sizes that holds them, and at most the bundle's."""


@dataclass(frozen=True, slots=True)
class TileView:
    """Pictures and cells of one tile, cut to what it shows of the image: H and W are `field_px` at most.

    `original` and `normalized` uint8 [H, W, 3]; `semantic` uint8 [H, W] (0 background, 1 cytoplasm, 2 nucleus); `cells`
    uint16 [H, W] (0 background, else `cell_id`); `to_source` float32 [2, 3], tile pixel centre (x, y) to source pixel.
    Of its m cells: `cell_ids` int32 [m]; `field_x`, `field_y` float32 [m], centroids in the tile's pixels; `maps`
    float16 [m, C, g, g], activation maps over windows of `window_px` around the centroids, all zeros where the image
    was not diagnosed.
    """

    original: NDArray[np.uint8]
    normalized: NDArray[np.uint8]
    semantic: NDArray[np.uint8]
    cells: NDArray[np.uint16]
    to_source: NDArray[np.float32]
    cell_ids: NDArray[np.int32]
    field_x: NDArray[np.float32]
    field_y: NDArray[np.float32]
    maps: NDArray[np.float16]
    window_px: int


@dataclass(frozen=True, slots=True)
class Examination:
    """What one bundle says of one image.

    `reason` says why there is no answer, as in a run; `probabilities` and `prediction_set` are empty where nothing was
    diagnosed. `width_px` and `height_px` are the upright source's, 0 where it could not be decoded. `cells` has the
    rows of `runs.schema.CELLS` in the order of `cell_id`; `run_id` and `image_key` are "", `zarr_index` the tile;
    None where nothing was diagnosed. `tiles` are at the model's scale; a rejected image has them too, without cells.
    `seconds` are (stage, wall seconds). `scale` is the one in use, its `um_per_px` also where it is an assumption.
    """

    sha256: str
    bundle: str
    bundle_digest: str
    status: Status
    reason: str | None
    label: str | None
    probabilities: tuple[float, ...]
    prediction_set: tuple[str, ...]
    ood: float | None
    width_px: int
    height_px: int
    quality: Quality | None
    remarks: tuple[str, ...]
    cells: pa.Table | None
    tiles: tuple[TileView, ...]
    seconds: tuple[tuple[str, float], ...]
    scale: ImageScale = field(default_factory=ImageScale)


@dataclass(frozen=True, slots=True)
class Models:
    """The networks of a bundle, and the name under which it was opened; `digest` is the bundle's."""

    name: str
    digest: str
    networks: Networks

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return self.networks.bundle


def load_models(name: str, device: str = "cpu") -> Models:
    """Open the bundle of that name or place and load its networks. Raises BundleError."""
    from leukoflow.models.bundle import load_bundle
    from leukoflow.tasks.inference.chain import load_networks

    bundle = load_bundle(name)
    networks = load_networks(bundle, device)
    if networks.segmenter is not None:
        batch = bundle.spec.method.features.field_batch
        networks = replace(networks, segmenter=careful(networks.segmenter, batch))
    return Models(name, bundle.digest, networks)


def warm(models: Models) -> None:
    """Examine a drawn field, and pass blanks of the common shapes through: the first pass of each is slow."""
    from leukoflow.tasks.imaging.extract import explain_batch
    from leukoflow.tasks.imaging.synthetic import render_field

    features = models.bundle.spec.method.features
    drawn = render_field(np.random.default_rng(0), CLASSES[0]).rgb
    height, width = drawn.shape[:2]
    _examined(Decoded(drawn, None, width, height, ""), ImageScale(), models, _Clock(lambda stage: None))
    networks = models.networks
    assert networks.readout is not None
    for size in [s for s in SHAPES if s <= features.cell_batch]:
        crops = np.zeros((size, features.cell_px, features.cell_px, 3), np.uint8)
        explain_batch(networks.hybrid, networks.readout, crops, crops[..., 0], networks.device)


def careful(segmenter: nn.Module, batch: int) -> nn.Module:
    """Wrap the segmenter for small batches, to name every pixel's class as in a batch of the bundle's own shape.

    Other shapes give other last digits, and where two classes are all but equal, these decide. A field with such a
    pixel, one in many, is passed through once more in the full shape.
    """
    from torch import Tensor, channels_last, nn, zeros

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.segmenter = segmenter

        def forward(self, rgb: Tensor) -> Tensor:
            logits: Tensor = self.segmenter(rgb)
            count = len(rgb)
            best = logits.topk(2, dim=1).values
            if count >= batch or float((best[:, 0] - best[:, 1]).min()) > TIE:
                return logits
            padded = zeros((batch, *rgb.shape[1:]), dtype=rgb.dtype, device=rgb.device).to(memory_format=channels_last)
            padded[:count] = rgb
            whole: Tensor = self.segmenter(padded)[:count]
            return whole

    return Careful()


def shape_for(count: int, most: int) -> int:
    """Return the size of the batches for `count` fields or cells where the bundle's own are of `most`."""
    return min(most, next((s for s in SHAPES if s >= count), most))


def examine(
    data: bytes,
    um_per_px: float | None,
    models: Models,
    limits: LimitSettings,
    decoder: Decoder,
    announce: Callable[[str], None],
) -> Examination:
    """Diagnose one image: everything that a run would write about it, and its pictures.

    Args:
        data: the image file's bytes, untrusted; only the decoder's disposable process looks into them.
        um_per_px: micrometres per source pixel as stated; without them the image's own red cells are measured.
        models: of one bundle.
        limits: on bytes; those on pixels, time and memory are the decoder's.
        decoder: made with the settings of this bundle (`models.bundle.spec.method.segment`).
        announce: called with each of `STAGES` as it starts; what it raises ends the examination.

    Raises:
        LeukoflowError: the decoding process does not start on this machine. Never on account of the bytes.
    """
    clock = _Clock(announce)
    with clock("decode"):
        if (reason := too_large(len(data), limits)) is not None:
            scale, image = stated_scale(um_per_px), Decoded(None, reason, 0, 0, hashlib.sha256(data).hexdigest())
        else:
            scale = _scale_of(decoder.measure(data), um_per_px, models.bundle.spec.method.segment)
            image = decoder.decode_one(data, scale.um_per_px)
    return _examined(image, scale, models, clock)


def _scale_of(measured: Measured, stated: float | None, settings: SegmentSettings) -> ImageScale:
    """Settle the scale of an image that stands alone."""
    return settle_scale(stated, measured.um_per_px, magnify_alone(read_image(measured.red_cells)), settings)


def _examined(image: Decoded, scale: ImageScale, models: Models, clock: _Clock) -> Examination:
    """Do all that follows decoding."""
    from leukoflow.tasks.inference.blocks import prepare_block, prepare_image
    from leukoflow.tasks.inference.chain import diagnose_block
    from leukoflow.tasks.inference.rows import cell_rows

    method, um_per_px = models.bundle.spec.method, scale.um_per_px
    if image.rgb is None:
        return _diagnosis(models, image, scale, prepare_image(0, image, um_per_px, method).fact, None, clock)
    with clock("normalize"):
        ready = prepare_image(0, image, um_per_px, method)
        block = prepare_block([ready], method, shape=shape_for)
        if ready.fact.status is not None:
            pictures = _undiagnosed(image.rgb, um_per_px, image, models)
    if ready.fact.status is not None:
        return _diagnosis(models, image, scale, ready.fact, None, clock, tiles=pictures)
    try:
        found = diagnose_block(block, models.networks, shape_for, clock)
    except ShardError as error:  # more cells than can be numbered
        crowded = replace(ready.fact, status=Status.QUARANTINED, reason=str(error))
        return _diagnosis(models, image, scale, crowded, None, clock)
    with clock("classify"):
        (diagnosed,), cells, n = found.images, found.cells, len(block.tiles)
        rows = cell_rows(cells.table, cells.offsets, [""] * n, [diagnosed], block.to_source, [scale.known] * n)
        chosen = _most_attended(diagnosed.attention, cells.offsets)
        views = tuple(_view(image.rgb, block, t, found, method) for t in chosen)
    return _diagnosis(models, image, scale, ready.fact, diagnosed, clock, cells=rows, tiles=views, n_tiles=n)


class _Clock:
    """Wall seconds of each stage; a stage that goes on after a pause is announced once."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.announce = announce
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if stage not in self.seconds:
            self.announce(stage)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def _diagnosis(
    models: Models,
    image: Decoded,
    scale: ImageScale,
    fact: Fact,
    diagnosed: ImageDiagnosis | None,
    clock: _Clock,
    cells: pa.Table | None = None,
    tiles: tuple[TileView, ...] = (),
    n_tiles: int = 0,
) -> Examination:
    """Gather what is said of an image."""
    from leukoflow.tasks.inference.rows import outcome, used_um_per_px

    found = outcome(fact, diagnosed, models.bundle.spec.classes, scale)
    remarks = (*image.remarks, *([scale.remark] if scale.remark else []))
    if n_tiles > len(tiles):
        remarks = (*remarks, f"pictures of the {len(tiles)} of {n_tiles} tiles that were attended to most")
    assert image.sha256 is not None
    return Examination(
        sha256=image.sha256,
        bundle=models.name,
        bundle_digest=models.digest,
        status=found.status,
        reason=found.reason,
        label=found.label,
        probabilities=found.probabilities,
        prediction_set=found.prediction_set,
        ood=found.ood,
        width_px=fact.width or 0,
        height_px=fact.height or 0,
        quality=fact.quality,
        remarks=remarks,
        cells=cells,
        tiles=tiles,
        seconds=tuple(clock.seconds.items()),
        scale=replace(scale, um_per_px=used_um_per_px(scale, fact, models.bundle.spec.method.segment)),
    )


def _most_attended(attention: NDArray[np.float32], offsets: NDArray[np.int64]) -> list[int]:
    """Choose the tiles of which pictures are handed out, in their order."""
    n = len(offsets) - 1
    if n <= MAX_VIEWS:
        return list(range(n))
    weight = [float(attention[a:b].sum()) for a, b in pairwise(offsets.tolist())]
    return sorted(np.argsort(-np.array(weight), kind="stable")[:MAX_VIEWS].tolist())


def _view(rgb: NDArray[np.uint8], block: Block, t: int, found: BlockDiagnosis, method: MethodSettings) -> TileView:
    """Show tile t with its cells."""
    x, y = block.origins[t].tolist()
    width, height = block.extents[t].tolist()
    table, own = found.cells.table, found.cells.rows(t)
    return TileView(
        original=rgb[y : y + height, x : x + width].copy(),
        normalized=block.tiles[t, :height, :width].copy(),
        semantic=found.semantic[t, :height, :width].copy(),
        cells=found.cells.labels[t, :height, :width].copy(),
        to_source=block.to_source[t],
        cell_ids=table.cell_id[own],
        field_x=table.field_x[own],
        field_y=table.field_y[own],
        maps=found.maps[own],
        window_px=method.features.cell_window_px,
    )


def _undiagnosed(
    rgb: NDArray[np.uint8], um_per_px: float | None, image: Decoded, models: Models
) -> tuple[TileView, ...]:
    """Show an image that quality rejects, so that people see why: without cells."""
    from leukoflow.tasks.imaging.extract import blank_maps
    from leukoflow.tasks.imaging.normalize import normalize

    method = models.bundle.spec.method
    side = method.segment.field_px
    geometry = field_geometry(image.source_width, image.source_height, um_per_px, method.segment)
    normal = normalize(rgb, method.normalize)
    views = []
    for (x, y), affine in list(zip(geometry.origins, geometry.to_source(), strict=True))[:MAX_VIEWS]:
        piece = rgb[y : y + side, x : x + side]
        views.append(
            TileView(
                original=piece.copy(),
                normalized=normal[y : y + side, x : x + side].copy(),
                semantic=np.zeros(piece.shape[:2], np.uint8),
                cells=np.zeros(piece.shape[:2], np.uint16),
                to_source=affine,
                cell_ids=np.zeros(0, np.int32),
                field_x=np.zeros(0, np.float32),
                field_y=np.zeros(0, np.float32),
                maps=blank_maps(0, method.features.cell_px, len(models.bundle.spec.classes)),
                window_px=method.features.cell_window_px,
            )
        )
    return tuple(views)
