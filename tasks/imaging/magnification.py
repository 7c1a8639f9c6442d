"""Pool the red cells of many images into magnifications: how many pixels one is wide, image by image.

Images of one slide or folder share a magnification unless their red cells say otherwise, and so do the slides of a
source; where they do not agree, because a folder holds the pictures of two microscopes, each image goes where its own
red cells lie. Everything here is a pure function; neither the order of images nor their division into shards changes
anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from leukoflow.tasks.imaging.ruler import RED_CELL_UM

ENOUGH_CELLS = 12
"""Red cells below which images that belong together have no magnification of their own."""
FEW_CELLS = 3
"""Red cells below which one image says nothing about its magnification."""
SURE_CELLS = 5
"""Red cells of one image that outweigh what the images around it say."""
MANY_IMAGES = 8
"""Images with `TELLING_CELLS` red cells from which on the images are compared, below that all cells together."""
SOME_IMAGES = 4
"""Such images below which a slide or folder follows the rest of the source, unless one of them has `MANY_CELLS`."""
MANY_CELLS = 20
"""Red cells of one image that are believed whatever its neighbours say."""
TELLING_CELLS = 4

SAME = 0.22
"""Difference of the natural logarithms of two diameters below which they are of one magnification: a factor of 1.25.

Patients differ: of 44 fields of one microscope, many with abnormal red cells, nine tenths lie within 0.18."""
APART = 0.33
"""Difference above which they certainly are not: a factor of 1.4."""

_LOWEST, _STEP, _BINS = math.log(4.0), 0.02, 300  # of the histograms: logarithms of diameters from 4 to 1,600 px
_BLUR, _CELLS_BLUR = 2.5, 4.0  # deviations, in bins, with which histograms of images and of cells are smoothed
_FURTHER, _VALLEY = 0.05, 0.85  # height of a further peak as a share of the highest, and of the valley before it
_CAP = 12.0  # one image weighs no more than as many red cells
_BETWEEN_PATIENTS = 0.08  # deviation of the mean diameter from patient to patient, as a fraction
_BETWEEN_CELLS, _BETWEEN_CELLS_OF_ONE = 0.20, 0.30  # of measured diameters; what misleads within an image is shared


@dataclass(frozen=True, slots=True)
class Reading:
    """Red cells of one image.

    `diameters` float32 [n] in pixels; `cells` of them lie around the typical one, whose natural logarithm is `log_px`,
    NaN without any.
    """

    diameters: NDArray[np.float32]
    cells: int
    log_px: float


@dataclass(frozen=True, slots=True)
class Magnification:
    """How wide a red cell is in one image.

    `px` is the diameter in pixels, NaN where it cannot be known, and `doubt` says why then, in words for people.
    `cells` and `images` are what it was measured on. `sd` is the relative standard deviation of `px`.
    """

    px: float
    sd: float
    cells: int
    images: int
    doubt: str = ""

    @property
    def um_per_px(self) -> float:
        """Micrometres per pixel, NaN where it cannot be known."""
        return RED_CELL_UM / self.px


@dataclass(slots=True)
class _Pool:
    """Red cells of images that belong together: histograms of the logarithms of diameters.

    `counts` is of cells, `typical` of images, each at its typical diameter; `telling` counts these, and `most` is the
    largest number of cells in one of them.
    """

    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(_BINS))
    typical: NDArray[np.float64] = field(default_factory=lambda: np.zeros(_BINS))
    cells: int = 0
    images: int = 0
    telling: int = 0
    most: int = 0

    def add(self, reading: Reading) -> None:
        """Add the red cells of one image; large ones weigh more, as their area, since debris is small and many."""
        diameters = reading.diameters
        if not len(diameters):
            return
        weight = diameters.astype(np.float64) ** 2
        weight *= min(len(diameters), _CAP) / weight.sum()
        np.add.at(self.counts, _bins(np.log(diameters)), weight)
        self.cells += len(diameters)
        self.images += 1
        if reading.cells >= TELLING_CELLS:
            self.typical[_bins(np.array([reading.log_px]))] += 1.0
            self.telling += 1
            self.most = max(self.most, reading.cells)

    def join(self, other: _Pool) -> None:
        """Add the red cells of another pool."""
        self.counts += other.counts
        self.typical += other.typical
        self.cells += other.cells
        self.images += other.images
        self.telling += other.telling
        self.most = max(self.most, other.most)


@dataclass(frozen=True, slots=True)
class _Mode:
    """One magnification: logarithm of the diameter in pixels, the red cells near it, and of how many images."""

    log_px: float
    cells: int
    images: int

    def magnification(self) -> Magnification:
        between = _BETWEEN_CELLS if self.images > 1 else _BETWEEN_CELLS_OF_ONE
        sd = math.hypot(_BETWEEN_PATIENTS, between / math.sqrt(max(self.cells, 1)))
        return Magnification(math.exp(self.log_px), sd, self.cells, self.images)


def read_image(diameters: NDArray[np.float32]) -> Reading:
    """Sum up the red cells of one image, given their diameters in pixels, float32 [n].

    The typical one is where most of their area lies.
    """
    if not len(diameters):
        return Reading(diameters, 0, math.nan)
    logs, area = np.log(diameters.astype(np.float64)), diameters.astype(np.float64) ** 2
    density = np.exp(-0.5 * ((logs[:, None] - logs) / (_CELLS_BLUR * _STEP)) ** 2) @ area
    near = np.abs(logs - logs[density.argmax()]) < SAME
    return Reading(diameters, int(near.sum()), float(np.average(logs[near], weights=area[near])))


def magnify_alone(reading: Reading) -> Magnification:
    """Return the magnification of an image that stands alone."""
    if reading.cells < FEW_CELLS:
        return _unknown(f"{_counted(reading.cells)} in the image, {FEW_CELLS} are needed")
    return _Mode(reading.log_px, reading.cells, 1).magnification()


def magnify(readings: Iterable[Reading], groups: Sequence[str]) -> list[Magnification]:
    """Return the magnification of every image of a source.

    Args:
        readings: the red cells of each image; they are gone through once.
        groups: the slide or folder of each image.
    """
    pools: dict[str, _Pool] = {}
    typical: list[tuple[int, float]] = []
    for reading, group in zip(readings, groups, strict=True):
        pools.setdefault(group, _Pool()).add(reading)
        typical.append((reading.cells, reading.log_px))
    whole = _Pool()
    for pool in pools.values():
        whole.join(pool)
    common = _modes(whole) if whole.cells >= ENOUGH_CELLS else []
    near = {group: _candidates(pool, common) for group, pool in pools.items()}
    return [
        _choose(cells, log_px, near[group], pools[group].cells)
        for (cells, log_px), group in zip(typical, groups, strict=True)
    ]


def _candidates(pool: _Pool, common: Sequence[_Mode]) -> list[_Mode]:
    """Return the magnifications that images of a group may have: its own, as the whole source has them where it can."""
    if pool.cells < ENOUGH_CELLS or (common and pool.telling < SOME_IMAGES and pool.most < MANY_CELLS):
        return list(common)
    chosen: list[_Mode] = []
    for own in _modes(pool):
        shared = min(common, key=lambda mode: abs(mode.log_px - own.log_px), default=own)
        mode = shared if abs(shared.log_px - own.log_px) < SAME else own
        if mode not in chosen:
            chosen.append(mode)
    return chosen


def _choose(cells: int, log_px: float, near: Sequence[_Mode], around: int) -> Magnification:
    """Choose one image's magnification from those that it may have; one with many red cells may have its own."""
    if cells >= MANY_CELLS and all(abs(mode.log_px - log_px) > APART for mode in near):
        return _Mode(log_px, cells, 1).magnification()
    if not near:
        return _unknown(f"{_counted(around)} in the image and those of its slide or folder, {ENOUGH_CELLS} are needed")
    if len(near) == 1:
        if cells >= SURE_CELLS and abs(log_px - near[0].log_px) > APART:
            return _unknown(
                f"red cells are {math.exp(log_px):.0f} px wide in the image and "
                f"{math.exp(near[0].log_px):.0f} px in those of its slide or folder"
            )
        return near[0].magnification()
    own = [mode for mode in near if cells >= TELLING_CELLS and abs(mode.log_px - log_px) < SAME]
    if len(own) == 1:
        return own[0].magnification()
    sizes = " or ".join(f"{math.exp(mode.log_px):.0f}" for mode in sorted(near, key=lambda mode: mode.log_px))
    return _unknown(f"the images of its slide or folder have red cells of {sizes} px, and too few in it tell which")


def _modes(pool: _Pool) -> list[_Mode]:
    """Find the magnifications in a histogram, the most frequent first.

    A further peak counts where it has a share of the highest one's height, lies behind a valley and some images tell of
    it: else it would be blasts, clumps or platelets.
    """
    if not pool.counts.any():
        return []
    many = pool.telling >= MANY_IMAGES
    shown, blur = (pool.typical, _BLUR) if many else (pool.counts, _CELLS_BLUR)
    reach = int(4 * blur)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / blur) ** 2)
    smooth = np.convolve(shown, kernel, mode="same")
    rising = np.diff(smooth, prepend=-1.0) > 0
    falling = np.diff(smooth, append=-1.0) <= 0
    peaks = sorted(np.flatnonzero(rising & falling).tolist(), key=lambda i: -smooth[i])
    kept: list[int] = []
    width = int(SAME / _STEP)
    for peak in peaks:
        if smooth[peak] < _FURTHER * smooth[peaks[0]]:
            break
        apart = all(
            abs(peak - other) * _STEP > SAME
            and smooth[min(peak, other) : max(peak, other) + 1].min() < _VALLEY * smooth[peak]
            for other in kept
        )
        told = many and pool.typical[max(0, peak - width) : peak + width + 1].sum() >= SOME_IMAGES
        if apart and (told or not kept):
            kept.append(peak)
    total = pool.counts.sum()
    found = []
    for peak in kept:
        near = slice(max(0, peak - width), peak + width + 1)
        weights = pool.counts[near]
        middle = float(np.arange(_BINS)[near] @ weights / weights.sum()) + 0.5
        part = weights.sum() / total
        found.append(_Mode(_LOWEST + _STEP * middle, round(part * pool.cells), max(1, round(part * pool.images))))
    return found


def _bins(logs: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.clip(((logs - _LOWEST) / _STEP).astype(np.int64), 0, _BINS - 1)


def _unknown(doubt: str) -> Magnification:
    return Magnification(math.nan, math.nan, 0, 0, doubt)


def _counted(cells: int) -> str:
    return f"{cells} round red cell{'' if cells == 1 else 's'}"
