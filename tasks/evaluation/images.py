"""Take images in memory through the chain of a run, without a run."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.core.geometry import field_geometry
from leukoflow.models.bundle import Bundle
from leukoflow.tasks.imaging.cells import CellTable
from leukoflow.tasks.imaging.classify import ImageDiagnosis
from leukoflow.tasks.imaging.extract import Features
from leukoflow.tasks.inference.blocks import Block, prepare_block, tile_image
from leukoflow.tasks.inference.chain import diagnose_block, extract_block, load_networks, segment_block
from leukoflow.tasks.store.facts import Fact
from leukoflow.tasks.training.data import scaled_to_field


def diagnose_images(
    bundle: Bundle, images: Sequence[NDArray[np.uint8]], device: str = "cpu", chunk: int = 64
) -> list[ImageDiagnosis]:
    """Diagnose RGB images uint8 [H, W, 3] of any size, by the chain of a run.

    The quality stage is left out: what it would reject is judged here too.
    """
    networks = load_networks(bundle, device, explain=False)
    blocks = (image_block(images[start : start + chunk], bundle) for start in range(0, len(images), chunk))
    return [image for block in blocks for image in diagnose_block(block, networks).images]


def image_features(
    bundle: Bundle, images: Sequence[NDArray[np.uint8]], device: str = "cpu", chunk: int = 64
) -> Features:
    """Extract features of RGB images that are one field each, by the chain of a run."""
    segmenter, hybrid, method = bundle.segmenter(device), bundle.hybrid(device), bundle.spec.method
    parts: list[Features] = []
    for start in range(0, len(images), chunk):
        block = image_block(images[start : start + chunk], bundle)
        _, cells = segment_block(block, segmenter, method.segment, device)
        parts.append(extract_block(block, cells, hybrid, None, method.features, device)[0])
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    return Features(
        np.concatenate([part.field for part in parts]),
        np.concatenate([part.cells for part in parts]),
        np.cumsum([0, *counts]),
        np.concatenate([part.area for part in parts]),
    )


def image_block(images: Sequence[NDArray[np.uint8]], bundle: Bundle) -> Block:
    """Bring images to the model's scale, normalise and tile them."""
    method = bundle.spec.method
    prepared = []
    for i, image in enumerate(images):
        height, width = image.shape[:2]
        geometry = field_geometry(width, height, None, method.segment)
        fact = Fact(i, None, None, None, width, height, None, len(geometry.origins), None)
        prepared.append(tile_image(fact, scaled_to_field(image, method), geometry, method))
    return prepare_block(prepared, method)


def masks_of(bundle: Bundle, image: NDArray[np.uint8], device: str = "cpu") -> tuple[NDArray[np.uint8], CellTable]:
    """Segment an image that is one field: classes of pixels at its own size, uint8 [H, W], and its cells."""
    block = image_block([image], bundle)
    semantic, cells = segment_block(block, bundle.segmenter(device), bundle.spec.method.segment, device)
    geometry = field_geometry(image.shape[1], image.shape[0], None, bundle.spec.method.segment)
    own = semantic[0][: geometry.height, : geometry.width]
    back = cv2.resize(own, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(back, np.uint8), cells.table
