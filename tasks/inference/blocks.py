"""Turn images into blocks: judge, normalise and tile them, and say which tiles share a batch of the network.

Everything here is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from leukoflow.core.geometry import FieldGeometry, field_geometry
from leukoflow.core.method import MethodSettings
from leukoflow.runs.receipts import StageTiming
from leukoflow.runs.records import Status
from leukoflow.tasks.decoding.ingest import Decoded
from leukoflow.tasks.imaging.normalize import normalize
from leukoflow.tasks.imaging.quality import assess
from leukoflow.tasks.store.facts import Fact


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

    @property
    def n_tiles(self) -> NDArray[np.int64]:
        """Number of tiles of each image that goes on to the model, int64 [k]."""
        return np.array([fact.n_tiles for fact in self.facts if fact.n_tiles], np.int64)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image on its way into a block: what was found out about it, and its tiles where it goes on to the model.

    `tiles` are uint8 [S, S, 3], one for each of the geometry's origins; `extents` (width, height) is what they show.
    """

    fact: Fact
    geometry: FieldGeometry | None = None
    tiles: tuple[NDArray[np.uint8], ...] = ()
    extents: tuple[tuple[int, int], ...] = ()


def prepare_image(ordinal: int, image: Decoded, um_per_px: float | None, method: MethodSettings) -> Prepared:
    """Judge one decoded image, normalise it and cut its tiles; refused and rejected ones have none."""
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
    return tile_image(fact, image.rgb, geometry, method)


def tile_image(fact: Fact, rgb: NDArray[np.uint8], geometry: FieldGeometry, method: MethodSettings) -> Prepared:
    """Normalise an image, uint8 [H, W, 3] at the model's scale, and cut its tiles."""
    normal = normalize(rgb, method.normalize)
    side = method.segment.field_px
    return Prepared(
        fact,
        geometry,
        tuple(tile_at(normal, origin, side) for origin in geometry.origins),
        tuple(extent(normal, origin, side) for origin in geometry.origins),
    )


def as_trained(count: int, most: int) -> int:
    """Return the size of a network's batches for `count` tiles or cells: the bundle's own, however few there are."""
    return most


def prepare_block(
    images: Sequence[Prepared],
    method: MethodSettings,
    first: int = 0,
    seconds: float = 0.0,
    shape: Callable[[int, int], int] = as_trained,
) -> Block:
    """Gather consecutive images in a block.

    Args:
        images: in the order of their ordinals.
        method: of the bundle.
        first: ordinal of the first image.
        seconds: what preparing them took.
        shape: gives the size of the segmenter's batches from the number of tiles and the bundle's size.
    """
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
        batches=inference_batches(owners, shape(len(tiles), method.features.field_batch)),
        owners=owners,
        origins=np.array(origins, np.int32).reshape(-1, 2),
        cores=np.array(cores, np.int32).reshape(-1, 4),
        extents=np.array(extents, np.int32).reshape(-1, 2),
        to_source=np.array(affines, np.float32).reshape(-1, 2, 3),
        timings=(StageTiming("prepare", seconds, len(images)),),
    )


def inference_batches(owners: NDArray[np.int32], size: int) -> tuple[tuple[int, ...], ...]:
    """Assign tiles to batches of a fixed shape, -1 for a blank slot.

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
    """Return what is known of a member that never became pixels."""
    return Fact(ordinal, Status.QUARANTINED, reason, None, None, None, None, 0, None)


def extent(rgb: NDArray[np.uint8], origin: tuple[int, int], side: int) -> tuple[int, int]:
    """Return width and height of what a tile shows of its scaled image."""
    return min(side, rgb.shape[1] - origin[0]), min(side, rgb.shape[0] - origin[1])


def tile_at(rgb: NDArray[np.uint8], origin: tuple[int, int], side: int) -> NDArray[np.uint8]:
    """Cut one tile; beyond the image it is mirrored, as surroundings for the network, and nothing is measured there."""
    piece = rgb[origin[1] : origin[1] + side, origin[0] : origin[0] + side]
    h, w = piece.shape[:2]
    if (h, w) == (side, side):
        return piece
    return np.pad(piece, ((0, side - h), (0, side - w), (0, 0)), mode="symmetric")
