"""Training data: labels, grouped folds, and the prepared arrays that all training phases read."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from leukoflow.core.errors import ConfigError, SourceError
from leukoflow.core.geometry import field_geometry
from leukoflow.core.method import MethodSettings, Settings
from leukoflow.models.hybrid_cn_nas import BackboneSpec
from leukoflow.models.presets import Preset, preset
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.decoding.decode import check_image
from leukoflow.tasks.decoding.errors import RefusedError
from leukoflow.tasks.imaging.cells import cell_table, crop_cells
from leukoflow.tasks.imaging.normalize import normalize
from leukoflow.tasks.imaging.overlays import mask_overlays
from leukoflow.tasks.imaging.segment import watershed_cells
from leukoflow.tasks.imaging.semantic import pseudo_semantic

FIELDS_ZIP, FIELDS_CSV, MASKS_ZIP = "all_fields.zip", "all_fields.csv", "wbc_masks.zip"
BOXED_ZIP, BOXES_CSV = "bccd_fields.zip", "bccd_fields_boxes.csv"
HELD_OUT_EVERY = 5  # every fifth masked cell and boxed field is kept for evaluation
UNKNOWN = 255  # class of a pixel that neither a mask nor a box tells about
CORE_SHARE = 0.85  # of a box's axes: inside that ellipse a pixel belongs to the boxed cell
CACHE_PX = 64  # side of a cached window around a cell, larger than the crop so that it can be turned and shifted
MOSAIC_CELL_PX = 35.0  # width of a white cell in the training fields


class Budget(Settings):
    """Limits of one phase: it stops at `steps`, or anneals earlier so as to stop after `minutes`."""

    steps: int = Field(ge=1)
    minutes: float = Field(gt=0)


class TrainConfig(Settings):
    """Everything that decides a training run; stored in the work directory, which serves this configuration only."""

    preset: str = "pocket"
    seed: int = 0
    method: MethodSettings
    segmenter: Budget = Budget(steps=2800, minutes=30)
    convnext: Budget = Budget(steps=3600, minutes=40)
    nasnet: Budget = Budget(steps=3600, minutes=40)
    classifier_steps: int = Field(200, ge=1)  # of the attention; the evidence is fitted to its optimum
    weights: str | None = None  # "hub", a file or a directory of pretrained backbones, instead of distilling them
    teacher: str | None = None  # file with the weights of the network to distil from; None for the installed package's
    limit: int | None = Field(None, ge=40)  # only so many fields, for a smoke run

    def architecture(self) -> Preset:
        """Return the preset with this run's settings."""
        return preset(self.preset).model_copy(update={"method": self.method})

    def backbone(self, name: str) -> BackboneSpec:
        """Return the specification of one backbone by name."""
        return next(spec for spec in self.architecture().backbones if spec.name == name)


@dataclass(frozen=True, slots=True)
class Labels:
    """One entry per labelled field."""

    keys: tuple[str, ...]
    y: NDArray[np.int64]  # index into `classes`
    slide: tuple[str, ...]
    cluster: tuple[str, ...]
    digest: str  # over keys, labels and groups
    classes: tuple[str, ...] = CLASSES

    def __len__(self) -> int:
        """Number of fields."""
        return len(self.keys)

    def subset(self, rows: NDArray[np.int64]) -> Labels:
        """Return the given rows, with the whole table's digest."""
        pick = [int(i) for i in rows]
        return Labels(
            tuple(self.keys[i] for i in pick),
            self.y[rows],
            tuple(self.slide[i] for i in pick),
            tuple(self.cluster[i] for i in pick),
            self.digest,
            self.classes,
        )


def read_labels(data_dir: Path, classes: tuple[str, ...] = CLASSES) -> Labels:
    """Read `all_fields.csv`, whose labels are of `classes`. Raises SourceError naming what is missing or unknown."""
    path = data_dir / FIELDS_CSV
    if not path.is_file():
        raise SourceError(f"no {FIELDS_CSV} in {data_dir}: point the data directory at the shared training data")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        missing = {"image_key", "label", "slide_id", "cluster_id"} - set(reader.fieldnames or ())
        if missing:
            raise SourceError(f"{path} lacks the columns {sorted(missing)}")
        table = list(reader)
    unknown = sorted({row["label"] or "empty" for row in table} - set(classes))
    if unknown:
        raise SourceError(f"{path} has labels {unknown}; known are {list(classes)}")
    columns = [[row[c] for row in table] for c in ("image_key", "label", "slide_id", "cluster_id")]
    y = np.array([classes.index(label) for label in columns[1]], np.int64)
    digest = hashlib.sha256(json.dumps(columns).encode()).hexdigest()
    return Labels(tuple(columns[0]), y, tuple(columns[2]), tuple(columns[3]), digest, classes)


def read_members(archive: Path, names: Sequence[str] | None) -> Iterator[NDArray[np.uint8]]:
    """Decode the RGB images of a zip, in the order of `names`, or all of them by name."""
    if not archive.is_file():
        raise SourceError(f"no {archive.name} in {archive.parent}: the data directory lacks training data")
    with zipfile.ZipFile(archive) as stored:
        for name in names if names is not None else sorted(n for n in stored.namelist() if not n.endswith("/")):
            try:
                data = stored.read(name)
            except KeyError as error:
                raise SourceError(f"{archive} has no member {name!r}") from error
            try:
                check_image(data)
            except RefusedError as refusal:
                raise SourceError(f"{archive}: {name!r} cannot be trained on: {refusal}") from None
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if image is None:
                raise SourceError(f"{archive}: {name!r} is not an image that can be decoded")
            yield np.asarray(image, np.uint8)


def masked_cell_names(archive: Path) -> list[str]:
    """List the names of the masks, sorted; the folder is the source."""
    if not archive.is_file():
        raise SourceError(f"no {archive.name} in {archive.parent}: the data directory lacks training data")
    with zipfile.ZipFile(archive) as stored:
        return sorted(n for n in stored.namelist() if n.endswith(".png"))


def read_masked_cells(archive: Path) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Read white cells with hand-drawn masks: (RGB, semantic), sorted by name. Masks: white nucleus, grey cytoplasm."""
    masks = masked_cell_names(archive)
    images = read_members(archive, [n.removesuffix(".png") + ".bmp" for n in masks])
    drawn = read_members(archive, masks)
    return [
        (image, np.digitize(mask[..., 0], (64, 192)).astype(np.uint8))
        for image, mask in zip(images, drawn, strict=True)
    ]


def mosaic(
    cells: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], side: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Tile one field of `side` px from single-cell images, each brought to the training fields' scale."""
    rgb, semantic = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
    y = 0
    while y < side:
        x, row = 0, side
        while x < side:
            image, mask = cells[int(rng.integers(len(cells)))]
            width = 2 * np.sqrt(max(1, int((mask > 0).sum())) / np.pi)
            scale = MOSAIC_CELL_PX * rng.uniform(0.8, 1.2) / max(width, 8.0)
            size = (max(16, round(image.shape[1] * scale)), max(16, round(image.shape[0] * scale)))
            image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
            mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
            h, w = min(size[1], side - y), min(size[0], side - x)
            rgb[y : y + h, x : x + w], semantic[y : y + h, x : x + w] = image[:h, :w], mask[:h, :w]
            x, row = x + w, min(row, h)
        y += row
    return rgb, semantic


@dataclass(frozen=True, slots=True)
class BoxedField:
    """A field with the boxes of its white cells, float32 [k, 4]: xmin, ymin, xmax, ymax in its pixels."""

    name: str
    rgb: NDArray[np.uint8]
    boxes: NDArray[np.float32]


def read_boxed_fields(data_dir: Path) -> list[BoxedField]:
    """Read another source's fields with boxes of white cells, by name. Raises SourceError naming what is missing."""
    path = data_dir / BOXES_CSV
    if not path.is_file():
        raise SourceError(f"no {BOXES_CSV} in {data_dir}: the data directory lacks training data")
    boxes: dict[str, list[list[float]]] = {}
    with path.open(newline="", encoding="utf-8-sig") as stream:
        for row in csv.DictReader(stream):
            own = boxes.setdefault(row["image_key"], [])
            if row["cell_type"] == "WBC":
                own.append([float(row[c]) for c in ("xmin_px", "ymin_px", "xmax_px", "ymax_px")])
    names = sorted(boxes)
    images = read_members(data_dir / BOXED_ZIP, names)
    return [
        BoxedField(name, image, np.array(boxes[name], np.float32).reshape(-1, 4))
        for name, image in zip(names, images, strict=True)
    ]


def scaled_to_field(rgb: NDArray[np.uint8], method: MethodSettings) -> NDArray[np.uint8]:
    """Resize an image of unknown scale as a run does, to fit the field, uint8 [h, w, 3]."""
    geometry = field_geometry(rgb.shape[1], rgb.shape[0], None, method.segment)
    if rgb.shape[:2] == (geometry.height, geometry.width):
        return rgb
    way = cv2.INTER_AREA if geometry.width < rgb.shape[1] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(rgb, (geometry.width, geometry.height), interpolation=way), np.uint8)


def padded(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Mirror [h, w, ...] at its right and lower edge up to `side`, as a run pads its tiles."""
    beyond = [(0, side - image.shape[0]), (0, side - image.shape[1])] + [(0, 0)] * (image.ndim - 2)
    return np.pad(image, beyond, mode="symmetric")


def boxed_classes(rgb: NDArray[np.uint8], boxes: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the classes that boxes vouch for: uint8 [H, W] with `UNKNOWN` where they leave it open.

    Outside of every box there is no white cell. In a box, the darker part by Otsu on green is nucleus; what else lies
    well inside the inscribed ellipse is cytoplasm; the rest of the box is open.
    """
    out = np.zeros(rgb.shape[:2], np.uint8)
    green = cv2.GaussianBlur(np.ascontiguousarray(rgb[..., 1]), (0, 0), 1.0)
    for box in boxes:
        x0, y0, x1, y1 = (int(v) for v in (np.floor(box[:2]).tolist() + np.ceil(box[2:]).tolist()))
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, rgb.shape[1]), min(y1, rgb.shape[0])
        if x1 - x0 < 8 or y1 - y0 < 8:
            continue
        patch = np.ascontiguousarray(green[y0:y1, x0:x1])
        cut, _ = cv2.threshold(patch, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        dark = np.asarray(patch <= cut)
        ys, xs = np.mgrid[0 : y1 - y0, 0 : x1 - x0]
        reach = ((xs + 0.5) / (x1 - x0) - 0.5) ** 2 + ((ys + 0.5) / (y1 - y0) - 0.5) ** 2
        target = out[y0:y1, x0:x1]
        target[:] = UNKNOWN
        core = reach < (CORE_SHARE / 2) ** 2
        target[core] = 1
        target[dark & (reach < 0.25)] = 2
    return out


def segmentation_sources(data_dir: Path, method: MethodSettings, role: Literal["train", "held_out"]) -> dict[str, Any]:
    """Return normalised fields with classes, uint8 [n, S, S, 4]: of hand-drawn masks and of boxes (`boxed`).

    Masks of images smaller than the field are `drawn_small`, of others `drawn_large`: the sources differ in number and
    in stain, and each shall have its share of the training.
    """
    side, training = method.segment.field_px, role == "train"
    drawn = [
        (rgb, mask)
        for i, (rgb, mask) in enumerate(read_masked_cells(data_dir / MASKS_ZIP))
        if bool(i % HELD_OUT_EVERY) == training
    ]
    boxed = [
        (field.rgb, boxed_classes(field.rgb, field.boxes))
        for i, field in enumerate(read_boxed_fields(data_dir))
        if bool(i % HELD_OUT_EVERY) == training
    ]
    out: dict[str, Any] = {}
    small = [pair for pair in drawn if max(pair[0].shape[:2]) < side]
    large = [pair for pair in drawn if max(pair[0].shape[:2]) >= side]
    for name, pairs in (("drawn_small", small), ("drawn_large", large), ("boxed", boxed)):
        stacked = np.empty((len(pairs), side, side, 4), np.uint8)
        for target, (rgb, classes) in zip(stacked, pairs, strict=True):
            field = normalize(scaled_to_field(rgb, method), method.normalize)
            size = (field.shape[1], field.shape[0])
            scaled = np.asarray(cv2.resize(classes, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
            target[..., :3], target[..., 3] = padded(field, side), padded(scaled, side)
        out[name] = stacked
    return out


@dataclass(frozen=True, slots=True)
class Prepared:
    """Memory-mapped arrays of the work directory; n fields, m cells found classically, c mosaics."""

    labels: Labels
    method: MethodSettings
    fields: NDArray[np.uint8]  # [n, field_px, field_px, 3], normalised
    pseudo: NDArray[np.uint8]  # [n, field_px, field_px]
    windows: NDArray[np.uint8]  # [m, CACHE_PX, CACHE_PX, 3], of the normalised fields
    offsets: NDArray[np.int64]  # [n + 1], cells of each field
    mosaics: NDArray[np.uint8]  # [c, field_px, field_px, 4]: normalised RGB and semantic class
    drawn_small: NDArray[np.uint8]  # likewise, single cells with hand-drawn masks as large as a run sees them
    drawn_large: NDArray[np.uint8]  # likewise, of images that had to be reduced
    boxed: NDArray[np.uint8]  # likewise, fields with boxed white cells; UNKNOWN where boxes do not tell


def prepare(config: TrainConfig, data_dir: Path, work: Path) -> None:
    """Normalise all fields, label pixels classically, cache windows around cells. Fits nothing."""
    done = work / "prepare.json"
    if done.is_file():
        return
    labels = read_labels(data_dir)
    if config.limit is not None:
        rng = np.random.default_rng(config.seed)
        labels = labels.subset(np.sort(rng.permutation(len(labels))[: config.limit]))
    side = config.method.segment.field_px
    raw = np.empty((len(labels), side, side, 3), np.uint8)
    for i, image in enumerate(read_members(data_dir / FIELDS_ZIP, labels.keys)):
        scaled = np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
        raw[i] = mask_overlays(scaled)[0] if config.method.normalize.mask_overlays else scaled
    settings = config.method.normalize.model_copy(update={"mask_overlays": False})
    fields = np.lib.format.open_memmap(work / "fields.npy", "w+", np.uint8, raw.shape)
    pseudo = np.lib.format.open_memmap(work / "pseudo.npy", "w+", np.uint8, raw.shape[:3])
    windows, offsets = [], np.zeros(len(labels) + 1, np.int64)
    for i, image in enumerate(raw):
        fields[i] = normalize(image, settings)
        pseudo[i] = pseudo_semantic(image)
        cells = watershed_cells(pseudo[i], config.method.segment)
        table = cell_table(pseudo[i], cells, np.eye(2, 3, dtype=np.float32))
        centres = np.rint(np.stack([table.field_x, table.field_y], 1)).astype(np.float32)
        windows.append(crop_cells(fields[i], centres, CACHE_PX, CACHE_PX))
        offsets[i + 1] = offsets[i] + len(table)
    np.save(work / "windows.npy", np.concatenate(windows))
    np.save(work / "offsets.npy", offsets)
    method = config.method
    np.save(work / "mosaics.npy", mosaics(read_masked_cells(data_dir / MASKS_ZIP), config.seed, method))
    for name, stacked in segmentation_sources(data_dir, method, "train").items():
        np.save(work / f"{name}.npy", stacked)
    document = {"keys": labels.keys, "data_digest": labels.digest, "method": method.model_dump(mode="json")}
    write_json(done, document)


def mosaics(
    cells: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], seed: int, method: MethodSettings
) -> NDArray[np.uint8]:
    """Return normalised mosaics and their classes, uint8 [96, S, S, 4], of the masked cells that are not held out."""
    chosen = [cell for i, cell in enumerate(cells) if i % HELD_OUT_EVERY]
    rng = np.random.default_rng((seed, 0))
    settings = method.normalize.model_copy(update={"mask_overlays": False})
    side = method.segment.field_px
    out = np.empty((96, side, side, 4), np.uint8)
    for image in out:
        rgb, image[..., 3] = mosaic(chosen, side, rng)
        image[..., :3] = normalize(rgb, settings)
    return out


def load_prepared(config: TrainConfig, data_dir: Path, work: Path) -> Prepared:
    """Open what `prepare` left; refuse data that has changed since."""
    document = json.loads((work / "prepare.json").read_text("utf-8"))
    labels = read_labels(data_dir)
    if labels.digest != document["data_digest"]:
        raise ConfigError(f"the labels in {data_dir} changed since {work} was prepared: use a new work directory")
    where = {key: i for i, key in enumerate(labels.keys)}
    labels = labels.subset(np.array([where[key] for key in document["keys"]], np.int64))
    arrays = {
        name: np.load(work / f"{name}.npy", mmap_mode="r")
        for name in ("fields", "pseudo", "windows", "offsets", "mosaics", "drawn_small", "drawn_large", "boxed")
    }
    method = MethodSettings.model_validate(document["method"])
    return Prepared(labels, method, **arrays)


def open_work(config: TrainConfig, work: Path) -> None:
    """Bind a work directory to a configuration, so that a rerun continues and a different run cannot mix with it."""
    work.mkdir(parents=True, exist_ok=True)
    path, document = work / "config.json", config.model_dump(mode="json")
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        changed = sorted(k for k in document if before.get(k) != document[k])
        if changed:
            raise ConfigError(
                f"{work} belongs to a training run with another {', '.join(changed)}: give a new work directory, or "
                "repeat that run's options to continue it"
            )
    else:
        write_json(path, document)


def write_json(path: Path, document: object) -> None:
    """Write JSON atomically."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(document, indent=1), "utf-8")
    os.replace(temporary, path)


def balanced_weights(labels: Labels, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return sampling weights of `rows`: every class alike, and within it clusters by the square root of their size."""
    _, group, sizes = np.unique([labels.cluster[int(i)] for i in rows], return_inverse=True, return_counts=True)
    weight = 1 / np.sqrt(sizes[group])
    weight /= np.bincount(labels.y[rows], weight)[labels.y[rows]]
    out: NDArray[np.float64] = weight / weight.sum()
    return out


def grouped_folds(
    y: NDArray[np.int64], groups: NDArray[np.str_], folds: int, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return training and test rows of folds that keep groups whole and spread each class; another seed, another deal.

    Groups are dealt in random order, each to the fold that has fewest fields of its class, among those to the one with
    fewest fields. scikit-learn's StratifiedGroupKFold deals by size, so its repeats are nearly the same when groups
    are few.
    """
    rng = np.random.default_rng(seed)
    names, group = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), int(y.max()) + 1), np.int64)
    np.add.at(counts, (group, y), 1)
    held = np.zeros((folds, counts.shape[1]), np.int64)
    fold = np.empty(len(names), np.int64)
    for g in rng.permutation(len(names)):
        own = held[:, counts[g] > 0].sum(1)
        candidates = np.flatnonzero(own == own.min())
        total = held[candidates].sum(1)
        best = candidates[total == total.min()]
        fold[g] = best[int(rng.integers(len(best)))]
        held[fold[g]] += counts[g]
    place = fold[group]
    return [(np.flatnonzero(place != f), np.flatnonzero(place == f)) for f in range(folds)]
