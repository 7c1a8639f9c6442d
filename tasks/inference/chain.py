"""The one chain from tiles to diagnoses: segment, extract, classify.

The stages of a run, single images and evaluation all go through it, so what they say of an image is the same by
construction. Each step can be used alone; everything here is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from leukoflow.core.errors import ShardError
from leukoflow.core.method import FeatureSettings, SegmentSettings
from leukoflow.models.attention_classifier import AttentionClassifier
from leukoflow.models.attention_unet import segment_batch
from leukoflow.models.bundle import Bundle
from leukoflow.models.hybrid_cn_nas import HybridCNNas, Readout
from leukoflow.tasks.imaging.cells import Cells, CellTable, cell_table, concatenate, crop_cells, crop_masks
from leukoflow.tasks.imaging.classify import ROWS, ImageDiagnosis, diagnose, pool_tiles, readout
from leukoflow.tasks.imaging.extract import Features, blank_maps, explain_padded, extract_padded
from leukoflow.tasks.imaging.segment import own_cells, single_cells
from leukoflow.tasks.imaging.semantic import pseudo_semantic
from leukoflow.tasks.inference.blocks import Block, as_trained


@dataclass(frozen=True, slots=True)
class Networks:
    """A bundle with its networks, in evaluation mode on `device`.

    `segmenter` is None for a bundle that segments classically, `readout` where no activation maps are wanted.
    """

    bundle: Bundle
    segmenter: nn.Module | None
    hybrid: HybridCNNas
    classifier: AttentionClassifier
    readout: Readout | None
    device: str


@dataclass(frozen=True, slots=True)
class BlockDiagnosis:
    """All that the chain finds in a block of t tiles with m cells: `semantic` uint8 [t, S, S], `maps` [m, C, g, g]."""

    semantic: NDArray[np.uint8]
    cells: Cells
    features: Features
    maps: NDArray[np.float16]
    images: list[ImageDiagnosis]


def load_networks(bundle: Bundle, device: str = "cpu", explain: bool = True) -> Networks:
    """Load all networks of a bundle; with `explain`, what activation maps are read out with."""
    classifier = bundle.classifier(device)
    shown = readout(bundle, classifier, device) if explain else None
    return Networks(bundle, bundle.segmenter(device), bundle.hybrid(device), classifier, shown, device)


def diagnose_block(
    block: Block,
    networks: Networks,
    shape: Callable[[int, int], int] = as_trained,
    step: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> BlockDiagnosis:
    """Segment, extract and classify a block.

    Args:
        block: of tiles.
        networks: of one bundle.
        shape: gives the size of a network's batches from the number of cells, or of tiles, and the bundle's size.
        step: a context in which each of `segment`, `extract` and `classify` runs.

    Raises:
        ShardError: an image has more cells than can be numbered.
    """
    bundle, device = networks.bundle, networks.device
    method = bundle.spec.method
    with step("segment"):
        semantic, cells = segment_block(block, networks.segmenter, method.segment, device)
    with step("extract"):
        batch = shape(len(cells), method.features.cell_batch)
        settings = method.features.model_copy(update={"cell_batch": batch})
        features, maps = extract_block(block, cells, networks.hybrid, networks.readout, settings, device)
    with step("classify"):
        rows = shape(len(block.tiles), ROWS)
        images = classify_block(features, block.n_tiles, bundle, networks.classifier, device, rows)
    return BlockDiagnosis(semantic, cells, features, maps, images)


def segment_block(
    block: Block, segmenter: nn.Module | None, settings: SegmentSettings, device: str
) -> tuple[NDArray[np.uint8], Cells]:
    """Find the cells of a block: classes of pixels, uint8 [t, S, S], and cells.

    Raises:
        ShardError: an image has more cells than can be numbered.
    """
    n, side = len(block.tiles), settings.field_px
    semantic = np.zeros((n, side, side), np.uint8)
    labels = np.zeros((n, side, side), np.uint16)
    for batch in block.batches:
        images = _gather(block.tiles, batch)
        if segmenter is not None and settings.enabled:
            found = segment_batch(segmenter, images, device)
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
        labels[t] = np.where(own > 0, own + np.uint16(start - 1), 0)
        first_id[owner] = start + len(table)
        tables.append(table)
    offsets = np.cumsum([0, *(len(t) for t in tables)], dtype=np.int64)
    return semantic, Cells(labels, concatenate(tables), offsets)


def _gather(tiles: NDArray[np.uint8], batch: Sequence[int]) -> NDArray[np.uint8]:
    """Gather the tiles of a batch, uint8 [b, S, S, 3]; blank slots are black."""
    out = np.zeros((len(batch), *tiles.shape[1:]), np.uint8)
    for slot, tile in enumerate(batch):
        if tile >= 0:
            out[slot] = tiles[tile]
    return out


def extract_block(
    block: Block,
    cells: Cells,
    hybrid: HybridCNNas,
    readout: Readout | None,
    settings: FeatureSettings,
    device: str,
) -> tuple[Features, NDArray[np.float16]]:
    """Extract features of a block's tiles and cells and, in the same pass, activation maps float16 [m, C, g, g].

    Features are the same to the last bit with and without a readout; without one, C is 0.
    """
    found = np.zeros((len(cells), hybrid.num_features), np.float32)
    maps = blank_maps(len(cells), settings.cell_px, 0 if readout is None else len(readout.weight))
    for rows, crops, masks in _crops(block, cells, settings):
        if readout is None:
            found[rows] = extract_padded(hybrid, crops, masks, settings.cell_batch, device)
        else:
            found[rows], maps[rows] = explain_padded(hybrid, readout, crops, masks, settings.cell_batch, device)
    return Features.of_cells(found, cells.offsets, cells.area), maps


def _crops(
    block: Block, cells: Cells, settings: FeatureSettings
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield, per inference batch of tiles, the rows of their cells, int64 [c], their crops and their masks."""
    ids, centers = cells.table.cell_id, cells.centers
    window, side = settings.cell_window_px, settings.cell_px
    for batch in block.batches:
        own = [(tile, cells.rows(tile)) for tile in batch if tile >= 0]
        crops = [crop_cells(block.tiles[tile], centers[rows], window, side) for tile, rows in own]
        masks = [crop_masks(cells.labels[tile], ids[rows], centers[rows], window, side) for tile, rows in own]
        rows = np.concatenate([np.arange(span.start, span.stop) for _, span in own])
        yield rows, np.concatenate(crops), np.concatenate(masks)


def classify_block(
    features: Features,
    n_tiles: NDArray[np.int64],
    bundle: Bundle,
    classifier: AttentionClassifier,
    device: str,
    rows: int = ROWS,
) -> list[ImageDiagnosis]:
    """Diagnose images from their features.

    Args:
        features: of all tiles, image by image.
        n_tiles: int64 [k], the number of tiles of each image.
        bundle: statistics, selection and calibration.
        classifier: the bundle's.
        device: of the classifier.
        rows: tiles of a forward pass.
    """
    tiles = diagnose(bundle, classifier, features, device, rows)
    return pool_tiles(bundle, tiles, features.offsets, n_tiles)
