"""What a shard's chain computes, without where it reads and writes: images to tiles, cells, features and rows.

Everything here is a pure function of its arguments. `shard.py` makes a run of it, `single.py` one answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from leukoflow.core.errors import ShardError
from leukoflow.core.geometry import FieldGeometry, field_geometry
from leukoflow.core.method import FeatureSettings, MethodSettings, SegmentSettings
from leukoflow.models.attention_unet import segment_batch
from leukoflow.models.hybrid_cn_nas import HybridCNNas, Readout
from leukoflow.runs.records import CLASSES, Quality, StageTiming, Status
from leukoflow.runs.schema import CELLS
from leukoflow.tasks.decoding.ingest import Decoded
from leukoflow.tasks.imaging.classify import Verdict
from leukoflow.tasks.imaging.extract import blank_maps, explain_padded, extract_padded, field_means
from leukoflow.tasks.imaging.normalize import normalize
from leukoflow.tasks.imaging.quality import assess
from leukoflow.tasks.imaging.segment import (
    CellTable,
    cell_table,
    concatenate,
    crop_cells,
    crop_masks,
    own_cells,
    pseudo_semantic,
    single_cells,
    square_micrometres,
)


@dataclass(frozen=True, slots=True)
class Fact:
    """What ingest and quality found out about one member."""

    ordinal: int
    status: Status | None  # None while the member goes on to the model
    reason: str | None
    sha256: str | None
    width: int | None
    height: int | None
    quality: Quality | None
    n_tiles: int
    zarr_index: int | None


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive members of a shard with their normalised tiles.

    `tiles` uint8 [t, S, S, 3]; `batches` lists, per inference batch, the tile of each slot or -1 for a blank one;
    `owners` int32 [t] is the member's ordinal; `origins` int32 [t, 2] and `cores` int32 [t, 4] place a tile in its
    scaled image, of which it shows `extents` int32 [t, 2] (width, height), the rest being mirrored; `to_source` float32
    [t, 2, 3].
    """

    first: int
    next: int
    facts: tuple[Fact, ...]
    tiles: NDArray[np.uint8]
    batches: tuple[tuple[int, ...], ...]
    owners: NDArray[np.int32]
    origins: NDArray[np.int32]
    cores: NDArray[np.int32]
    extents: NDArray[np.int32]
    to_source: NDArray[np.float32]
    timings: tuple[StageTiming, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image on its way into a block: what was found out about it, and its tiles where it goes on to the model.

    `tiles` are uint8 [S, S, 3], one for each of the geometry's origins; `extents` (width, height) is what they show.
    """

    fact: Fact
    geometry: FieldGeometry | None = None
    tiles: tuple[NDArray[np.uint8], ...] = ()
    extents: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the rows say of one image. `probabilities` and `prediction_set` are empty where nothing was diagnosed."""

    status: Status
    reason: str | None
    label: str | None = None
    probabilities: tuple[float, ...] = ()
    prediction_set: tuple[str, ...] = ()
    ood: float | None = None


# --- from an image to tiles ------------------------------------------------------------------------------------------


def prepare_image(ordinal: int, image: Decoded, um_per_px: float | None, method: MethodSettings) -> Prepared:
    """Judges one decoded image, normalises it and cuts its tiles; refused and rejected ones have none."""
    if image.rgb is None:
        return Prepared(replace(refused(ordinal, image.reason or "unreadable"), sha256=image.sha256))
    quality = assess(image.rgb, method.quality)
    quality = replace(quality, flags=(*quality.flags, *image.remarks))
    geometry = field_geometry(image.source_width, image.source_height, um_per_px, method.segment)
    rejected = bool(quality.reasons)
    fact = Fact(
        ordinal=ordinal,
        status=Status.REJECTED if rejected else None,
        reason="; ".join(quality.reasons) or None,
        sha256=image.sha256,
        width=image.source_width,
        height=image.source_height,
        quality=quality,
        n_tiles=0 if rejected else len(geometry.origins),
        zarr_index=None,
    )
    if rejected:
        return Prepared(fact)
    normal = normalize(image.rgb, method.normalize)
    side = method.segment.field_px
    return Prepared(
        fact,
        geometry,
        tuple(tile_at(normal, origin, side) for origin in geometry.origins),
        tuple(extent(normal, origin, side) for origin in geometry.origins),
    )


def block_of(first: int, images: Sequence[Prepared], method: MethodSettings, seconds: float) -> Block:
    """Consecutive images, from ordinal `first` on, as a block; `seconds` is what preparing them took."""
    side = method.segment.field_px
    tiles = [tile for image in images for tile in image.tiles]
    placed = [(image.fact.ordinal, image.geometry) for image in images if image.geometry is not None]
    owners = np.array([ordinal for ordinal, geometry in placed for _ in geometry.origins], np.int32)
    origins = [origin for _, geometry in placed for origin in geometry.origins]
    cores = [core for _, geometry in placed for core in geometry.cores]
    affines = [affine for _, geometry in placed for affine in geometry.to_source()]
    extents = [shown for image in images for shown in image.extents]
    return Block(
        first=first,
        next=first + len(images),
        facts=tuple(image.fact for image in images),
        tiles=np.stack(tiles) if tiles else np.zeros((0, side, side, 3), np.uint8),
        batches=inference_batches(owners, method.features.field_batch),
        owners=owners,
        origins=np.array(origins, np.int32).reshape(-1, 2),
        cores=np.array(cores, np.int32).reshape(-1, 4),
        extents=np.array(extents, np.int32).reshape(-1, 2),
        to_source=np.array(affines, np.float32).reshape(-1, 2, 3),
        timings=(StageTiming("prepare", seconds, len(images)),),
    )


def inference_batches(owners: NDArray[np.int32], size: int) -> tuple[tuple[int, ...], ...]:
    """Tiles of each fixed-shape batch, -1 for a blank slot.

    Members of one tile sit at the slot that their ordinal gives them, so a missing neighbour leaves a blank and moves
    nobody. The tiles of a larger member fill batches of their own.
    """
    tiles_of: dict[int, list[int]] = {}
    for tile, owner in enumerate(owners.tolist()):
        tiles_of.setdefault(owner, []).append(tile)
    shared: dict[int, list[int]] = {}
    batches: list[tuple[int, ...]] = []
    for owner, tiles in tiles_of.items():
        if len(tiles) == 1:
            shared.setdefault(owner // size, [-1] * size)[owner % size] = tiles[0]
            continue
        for i in range(0, len(tiles), size):
            batches.append(tuple(tiles[i : i + size] + [-1] * (size - len(tiles[i : i + size]))))
    return (*(tuple(batch) for batch in shared.values()), *batches)


def refused(ordinal: int, reason: str) -> Fact:
    """What is known of a member that never became pixels."""
    return Fact(ordinal, Status.QUARANTINED, reason, None, None, None, None, 0, None)


def extent(rgb: NDArray[np.uint8], origin: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of what a tile shows of its scaled image."""
    return min(side, rgb.shape[1] - origin[0]), min(side, rgb.shape[0] - origin[1])


def tile_at(rgb: NDArray[np.uint8], origin: tuple[int, int], side: int) -> NDArray[np.uint8]:
    """One tile; beyond the image it is mirrored, as surroundings for the network, and nothing is measured there."""
    piece = rgb[origin[1] : origin[1] + side, origin[0] : origin[0] + side]
    h, w = piece.shape[:2]
    if (h, w) == (side, side):
        return piece
    return np.pad(piece, ((0, side - h), (0, side - w), (0, 0)), mode="symmetric")


# --- from tiles to cells ----------------------------------------------------------------------------------------------


def segment_tiles(
    model: Any, block: Block, settings: SegmentSettings, device: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint16], CellTable, NDArray[np.int64]]:
    """Masks and cells of a block: `semantic` uint8 [t, S, S], `cells` uint16 [t, S, S], the table, offsets [t + 1].

    `cells` holds the `cell_id`, which goes on over the tiles of one image.
    """
    n, side = len(block.tiles), settings.field_px
    semantic = np.zeros((n, side, side), np.uint8)
    cells = np.zeros((n, side, side), np.uint16)
    for batch in block.batches:
        images = _gather(block.tiles, batch)
        if model is not None and settings.enabled:
            found = segment_batch(model, images, device)
        else:
            found = np.stack([pseudo_semantic(image) for image in images])
        for slot, tile in enumerate(batch):
            if tile >= 0:
                semantic[tile] = found[slot]
    tables: list[CellTable] = []
    first_id: dict[int, int] = {}
    for t in range(n):
        owner = int(block.owners[t])
        x, y = block.origins[t].tolist()
        x0, y0, x1, y1 = block.cores[t].tolist()
        semantic[t], all_cells = single_cells(block.tiles[t], semantic[t], settings)
        width, height = block.extents[t].tolist()
        for plane in (semantic[t], all_cells):
            plane[height:], plane[:, width:] = 0, 0
        own = own_cells(all_cells, (x, y), (x0, y0, x1, y1))
        start = first_id.get(owner, 1)
        table = cell_table(semantic[t][:height, :width], own[:height, :width], block.to_source[t], start)
        if start + len(table) > np.iinfo(np.uint16).max:
            raise ShardError(f"member {owner} has more than {np.iinfo(np.uint16).max} cells; hand it over in pieces")
        cells[t] = np.where(own > 0, own + np.uint16(start - 1), 0)
        first_id[owner] = start + len(table)
        tables.append(table)
    return semantic, cells, concatenate(tables), np.cumsum([0, *(len(t) for t in tables)], dtype=np.int64)


def _gather(tiles: NDArray[np.uint8], batch: Sequence[int]) -> NDArray[np.uint8]:
    out = np.zeros((len(batch), *tiles.shape[1:]), np.uint8)
    for slot, tile in enumerate(batch):
        if tile >= 0:
            out[slot] = tiles[tile]
    return out


# --- from cells to features -------------------------------------------------------------------------------------------


def extract_tiles(
    hybrid: HybridCNNas,
    block: Block,
    cells: NDArray[np.uint16],
    table: CellTable,
    offsets: NDArray[np.int64],
    settings: FeatureSettings,
    device: str,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Hybrid features of a block's tiles, float32 [t, D], and of their cells, float32 [m, D]."""
    single = np.zeros((len(table), hybrid.num_features), np.float32)
    for places, crops, masks in _crops(block, cells, table, offsets, settings):
        single[places] = extract_padded(hybrid, crops, masks, settings.cell_batch, device)
    return field_means(single, offsets, table.cell_area_px.astype(np.float32)), single


def explain_tiles(
    hybrid: HybridCNNas,
    shown: Readout,
    block: Block,
    cells: NDArray[np.uint16],
    table: CellTable,
    offsets: NDArray[np.int64],
    settings: FeatureSettings,
    device: str,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float16]]:
    """What `extract_tiles` gives, and from the same pass the cells' activation maps, float16 [m, 4, g, g]."""
    single = np.zeros((len(table), hybrid.num_features), np.float32)
    maps = blank_maps(len(table), settings.cell_px)
    for places, crops, masks in _crops(block, cells, table, offsets, settings):
        single[places], maps[places] = explain_padded(hybrid, shown, crops, masks, settings.cell_batch, device)
    return field_means(single, offsets, table.cell_area_px.astype(np.float32)), single, maps


def _crops(
    block: Block,
    cells: NDArray[np.uint16],
    table: CellTable,
    offsets: NDArray[np.int64],
    settings: FeatureSettings,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]]:
    """Per inference batch of tiles: the rows of their cells, int64 [c], their crops and their masks."""
    centers = np.stack([table.field_x, table.field_y], axis=1).astype(np.float32)
    window, side = settings.cell_window_px, settings.cell_px
    for batch in block.batches:
        rows = [tile for tile in batch if tile >= 0]
        spans = [slice(offsets[t], offsets[t + 1]) for t in rows]
        crops = np.concatenate(
            [crop_cells(block.tiles[t], centers[own], window, side) for t, own in zip(rows, spans, strict=True)]
        )
        masks = np.concatenate(
            [
                crop_masks(cells[t], table.cell_id[own], centers[own], window, side)
                for t, own in zip(rows, spans, strict=True)
            ]
        )
        yield np.concatenate([np.arange(own.start, own.stop) for own in spans]), crops, masks


# --- rows ------------------------------------------------------------------------------------------------------------


def outcome(fact: Fact, verdict: Verdict | None) -> Outcome:
    """What became of an image: its verdict's answer or abstention, else what ingest and quality say."""
    if verdict is None:
        return Outcome(fact.status or Status.QUARANTINED, fact.reason)
    return Outcome(
        Status.ABSTAINED if verdict.abstained else Status.PREDICTED,
        verdict.abstained,
        CLASSES[int(np.argmax(verdict.probabilities))],
        tuple(float(p) for p in verdict.probabilities),
        tuple(c for c, inside in zip(CLASSES, verdict.prediction_set, strict=True) if inside),
        verdict.ood,
    )


def cell_rows(
    table: CellTable,
    offsets: NDArray[np.int64],
    keys: Sequence[str],
    verdicts: Sequence[Verdict],
    to_source: NDArray[np.float32],
    um_per_px: Sequence[float | None],
    run_id: str = "",
) -> pa.Table:
    """Rows of `cells/`, one per cell.

    Args:
        table: cells, grouped by tile.
        offsets: int64 [t + 1] into the table.
        keys: the image of each tile [t].
        verdicts: of each image, in the same order.
        to_source: float32 [t, 2, 3], from a mask's pixel to the source pixel.
        um_per_px: micrometres per source pixel of each tile's image [t], None where unknown.
        run_id: of the run that writes them; empty outside of a run.
    """
    counts = np.diff(offsets)
    scales = np.repeat(np.array([math.nan if s is None else s for s in um_per_px], np.float64), counts)
    affines = np.repeat(to_source, counts, axis=0)
    columns = {f.name: getattr(table, f.name) for f in fields(CellTable) if f.name in CELLS.names}
    for name in ("nucleus_area", "cell_area"):
        area = square_micrometres(columns[f"{name}_px"], affines, scales)
        columns[f"{name}_um2"] = pa.array(area, pa.float32(), mask=np.isnan(area))
    columns["run_id"] = pa.array([run_id] * int(counts.sum()), pa.string())
    columns["image_key"] = np.repeat(np.array(keys, object), counts)
    columns["attention"] = np.concatenate([v.attention for v in verdicts]) if verdicts else np.zeros(0, np.float32)
    columns["zarr_index"] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in CELLS], schema=CELLS)
