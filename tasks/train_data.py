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
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.model_selection import StratifiedGroupKFold

from leukoflow.errors import ConfigError, SourceError
from leukoflow.method import MethodSettings, Settings
from leukoflow.records import CLASSES
from models.bundle import Preset, preset
from models.hybrid_cn_nas import BackboneSpec
from tasks.normalize import fit_reference, mask_overlays, normalize
from tasks.segment import cell_table, crop_cells, pseudo_semantic, watershed_cells

FIELDS_ZIP, FIELDS_CSV, MASKS_ZIP = "all_fields.zip", "all_fields.csv", "wbc_masks.zip"
FOLDS = 5
FOLD_SEED = 0  # the assignment of clusters to folds is part of the protocol, not of a training run
MIN_CALIBRATION = 20  # fields of a class; fewer than 19 cannot give a 95 % conformal quantile
CACHE_PX = 56  # side of a cached window around a cell, larger than the crop so that it can be turned and shifted
MOSAIC_CELL_PX = 35.0  # width of a white cell in the training fields


class Budget(Settings):
    """Limits of one phase: it stops at `steps`, or anneals earlier so as to stop after `minutes`."""

    steps: int = Field(ge=1)
    minutes: float = Field(gt=0)


class TrainConfig(Settings):
    """Everything that decides a training run; stored in the work directory, which serves this configuration only."""

    preset: str = "pocket"
    seed: int = 0
    hold_out: int | None = Field(0, ge=0, lt=FOLDS)
    method: MethodSettings
    segmenter: Budget = Budget(steps=1200, minutes=12)
    convnext: Budget = Budget(steps=3600, minutes=48)
    nasnet: Budget = Budget(steps=2700, minutes=42)
    classifier_steps: int = Field(1500, ge=1)
    feature_copies: int = Field(2, ge=0)  # augmented copies of the training features for the classifier
    weights: str | None = None  # "hub", a file or a directory of pretrained backbones
    limit: int | None = Field(None, ge=40)  # only so many fields, for a smoke run

    def architecture(self) -> Preset:
        """The preset with this run's settings."""
        return preset(self.preset).model_copy(update={"method": self.method})

    def backbone(self, name: str) -> BackboneSpec:
        """Specification of one backbone by name."""
        return next(spec for spec in self.architecture().backbones if spec.name == name)


@dataclass(frozen=True, slots=True)
class Labels:
    """One entry per labelled field."""

    keys: tuple[str, ...]
    y: NDArray[np.int64]  # index into CLASSES
    slide: tuple[str, ...]
    cluster: tuple[str, ...]
    digest: str  # over keys, labels and groups

    def __len__(self) -> int:
        """Number of fields."""
        return len(self.keys)

    def subset(self, rows: NDArray[np.int64]) -> Labels:
        """The given rows, with the whole table's digest."""
        pick = [int(i) for i in rows]
        return Labels(
            tuple(self.keys[i] for i in pick),
            self.y[rows],
            tuple(self.slide[i] for i in pick),
            tuple(self.cluster[i] for i in pick),
            self.digest,
        )


@dataclass(frozen=True, slots=True)
class Split:
    """Row numbers by role. Clusters never straddle two roles."""

    train: NDArray[np.int64]
    calibration: NDArray[np.int64]
    held_out: NDArray[np.int64]


def read_labels(data_dir: Path) -> Labels:
    """Reads `all_fields.csv`. Raises SourceError naming what is missing or unknown."""
    path = data_dir / FIELDS_CSV
    if not path.is_file():
        raise SourceError(f"no {FIELDS_CSV} in {data_dir}: point the data directory at the shared training data")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        missing = {"image_key", "label", "slide_id", "cluster_id"} - set(reader.fieldnames or ())
        if missing:
            raise SourceError(f"{path} lacks the columns {sorted(missing)}")
        table = list(reader)
    unknown = sorted({row["label"] or "empty" for row in table} - set(CLASSES))
    if unknown:
        raise SourceError(f"{path} has labels {unknown}; known are {list(CLASSES)}")
    columns = [[row[c] for row in table] for c in ("image_key", "label", "slide_id", "cluster_id")]
    y = np.array([CLASSES.index(label) for label in columns[1]], np.int64)
    digest = hashlib.sha256(json.dumps(columns).encode()).hexdigest()
    return Labels(tuple(columns[0]), y, tuple(columns[2]), tuple(columns[3]), digest)


def cluster_folds(labels: Labels) -> dict[str, int]:
    """Fold 0..4 of each cluster: grouped by cluster, stratified by class, the same for every run."""
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=FOLD_SEED)
    folds: dict[str, int] = {}
    for fold, (_, rows) in enumerate(splitter.split(np.zeros(len(labels)), labels.y, np.array(labels.cluster))):
        folds |= {labels.cluster[int(i)]: fold for i in rows}
    return folds


def split_labels(labels: Labels, hold_out: int | None) -> Split:
    """Held-out fold, calibration clusters and training clusters.

    Calibration takes, per class, the smallest of the remaining clusters that has enough fields: temperature and
    thresholds must come from photographs that no network has seen, and large clusters are needed for training.
    """
    folds = cluster_folds(labels)
    cluster = np.array(labels.cluster)
    held = np.array([folds[c] == hold_out for c in labels.cluster], np.bool_)
    calibration = np.zeros(len(labels), np.bool_)
    for k, name in enumerate(CLASSES):
        names, counts = np.unique(cluster[~held & (labels.y == k)], return_counts=True)
        enough = counts >= MIN_CALIBRATION
        if enough.sum() < 2:
            raise ConfigError(
                f"class {name} has {len(names)} clusters outside fold {hold_out}, {enough.sum()} of them with at least "
                f"{MIN_CALIBRATION} fields; two are needed, one to train on and one to calibrate on: add data"
            )
        calibration |= cluster == names[enough][np.argmin(counts[enough])]
    calibration &= ~held
    return Split(np.flatnonzero(~held & ~calibration), np.flatnonzero(calibration), np.flatnonzero(held))


def read_members(archive: Path, names: Sequence[str] | None) -> Iterator[NDArray[np.uint8]]:
    """Decoded RGB images of a zip, in the order of `names`, or all of them by name."""
    if not archive.is_file():
        raise SourceError(f"no {archive.name} in {archive.parent}: the data directory lacks training data")
    with zipfile.ZipFile(archive) as stored:
        for name in names if names is not None else sorted(n for n in stored.namelist() if not n.endswith("/")):
            try:
                data = stored.read(name)
            except KeyError as error:
                raise SourceError(f"{archive} has no member {name!r}") from error
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if image is None:
                raise SourceError(f"{archive}: {name!r} is not an image that can be decoded")
            yield np.asarray(image, np.uint8)


def read_masked_cells(archive: Path) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """White cells with hand-drawn masks: (RGB, semantic), sorted by name. Masks: white nucleus, grey cytoplasm."""
    if not archive.is_file():
        raise SourceError(f"no {archive.name} in {archive.parent}: the data directory lacks training data")
    with zipfile.ZipFile(archive) as stored:
        masks = sorted(n for n in stored.namelist() if n.endswith(".png"))
    images = read_members(archive, [n.removesuffix(".png") + ".bmp" for n in masks])
    drawn = read_members(archive, masks)
    return [
        (image, np.digitize(mask[..., 0], (64, 192)).astype(np.uint8))
        for image, mask in zip(images, drawn, strict=True)
    ]


def mosaic(
    cells: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], side: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One field of `side` px tiled from single-cell images, each brought to the training fields' scale."""
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
            mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST), np.uint8)
            h, w = min(size[1], side - y), min(size[0], side - x)
            rgb[y : y + h, x : x + w], semantic[y : y + h, x : x + w] = image[:h, :w], mask[:h, :w]
            x, row = x + w, min(row, h)
        y += row
    return rgb, semantic


@dataclass(frozen=True, slots=True)
class Prepared:
    """Memory-mapped arrays of the work directory; n fields, m cells found classically, c mosaics."""

    labels: Labels
    split: Split
    method: MethodSettings
    fields: NDArray[np.uint8]  # [n, field_px, field_px, 3], normalised
    pseudo: NDArray[np.uint8]  # [n, field_px, field_px]
    windows: NDArray[np.uint8]  # [m, CACHE_PX, CACHE_PX, 3], of the normalised fields
    offsets: NDArray[np.int64]  # [n + 1], cells of each field
    mosaics: NDArray[np.uint8]  # [c, field_px, field_px, 4]: normalised RGB and semantic class
    mosaics_held_out: NDArray[np.uint8]


def prepare(config: TrainConfig, data_dir: Path, work: Path) -> None:
    """Normalises all fields with a reference fitted on training fields, labels pixels classically, caches windows."""
    done = work / "prepare.json"
    if done.is_file():
        return
    labels = read_labels(data_dir)
    if config.limit is not None:
        rng = np.random.default_rng(config.seed)
        labels = labels.subset(np.sort(rng.permutation(len(labels))[: config.limit]))
    split = split_labels(labels, config.hold_out)
    side = config.method.segment.field_px
    raw = np.empty((len(labels), side, side, 3), np.uint8)
    for i, image in enumerate(read_members(data_dir / FIELDS_ZIP, labels.keys)):
        scaled = np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
        raw[i] = mask_overlays(scaled)[0] if config.method.normalize.mask_overlays else scaled
    mean, std = fit_reference(raw[i] for i in split.train)
    reference = config.method.normalize.model_copy(update={"reference_mean": mean, "reference_std": std})
    without_masking = reference.model_copy(update={"mask_overlays": False})
    fields = np.lib.format.open_memmap(work / "fields.npy", "w+", np.uint8, raw.shape)
    pseudo = np.lib.format.open_memmap(work / "pseudo.npy", "w+", np.uint8, raw.shape[:3])
    windows, offsets = [], np.zeros(len(labels) + 1, np.int64)
    for i, image in enumerate(raw):
        fields[i] = normalize(image, without_masking)
        pseudo[i] = pseudo_semantic(image)
        cells = watershed_cells(pseudo[i], config.method.segment)
        table = cell_table(pseudo[i], cells, np.eye(2, 3, dtype=np.float32))
        centres = np.rint(np.stack([table.field_x, table.field_y], 1)).astype(np.float32)
        windows.append(crop_cells(fields[i], centres, CACHE_PX, CACHE_PX))
        offsets[i + 1] = offsets[i] + len(table)
    np.save(work / "windows.npy", np.concatenate(windows))
    np.save(work / "offsets.npy", offsets)
    method = config.method.model_copy(update={"normalize": reference})
    drawn = read_masked_cells(data_dir / MASKS_ZIP)
    np.save(work / "mosaics.npy", mosaics(drawn, "train", config.seed, method))
    np.save(work / "mosaics_held_out.npy", mosaics(drawn, "held_out", config.seed, method))
    document = {"keys": labels.keys, "data_digest": labels.digest, "method": method.model_dump(mode="json")}
    write_json(done, document)


def mosaics(
    cells: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    role: Literal["train", "held_out"],
    seed: int,
    method: MethodSettings,
) -> NDArray[np.uint8]:
    """Normalised mosaics and their classes, uint8 [c, S, S, 4], of four fifths of the cells or of the last fifth."""
    training = role == "train"
    chosen = [cell for i, cell in enumerate(cells) if bool(i % 5) == training]
    rng = np.random.default_rng((seed, 0 if training else 1))
    settings = method.normalize.model_copy(update={"mask_overlays": False})
    side = method.segment.field_px
    out = np.empty((96 if training else 16, side, side, 4), np.uint8)
    for image in out:
        rgb, image[..., 3] = mosaic(chosen, side, rng)
        image[..., :3] = normalize(rgb, settings)
    return out


def load_prepared(config: TrainConfig, data_dir: Path, work: Path) -> Prepared:
    """Opens what `prepare` left; refuses data that has changed since."""
    document = json.loads((work / "prepare.json").read_text("utf-8"))
    labels = read_labels(data_dir)
    if labels.digest != document["data_digest"]:
        raise ConfigError(f"the labels in {data_dir} changed since {work} was prepared: use a new work directory")
    where = {key: i for i, key in enumerate(labels.keys)}
    labels = labels.subset(np.array([where[key] for key in document["keys"]], np.int64))
    arrays = {
        name: np.load(work / f"{name}.npy", mmap_mode="r")
        for name in ("fields", "pseudo", "windows", "offsets", "mosaics", "mosaics_held_out")
    }
    method = MethodSettings.model_validate(document["method"])
    return Prepared(labels, split_labels(labels, config.hold_out), method, **arrays)


def open_work(config: TrainConfig, work: Path) -> None:
    """Binds a work directory to a configuration, so that a rerun continues and a different run cannot mix with it."""
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
    """Writes JSON atomically."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(document, indent=1), "utf-8")
    os.replace(temporary, path)


def balanced_weights(labels: Labels, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sampling weights of `rows`: every class alike, and within it clusters by the square root of their size."""
    _, group, sizes = np.unique([labels.cluster[int(i)] for i in rows], return_inverse=True, return_counts=True)
    weight = 1 / np.sqrt(sizes[group])
    weight /= np.bincount(labels.y[rows], weight)[labels.y[rows]]
    out: NDArray[np.float64] = weight / weight.sum()
    return out
