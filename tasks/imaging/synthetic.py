"""Seeded, plausible smear fields with their ground truth, for the demonstration and for tests; no real blood involved.

The picture follows Beer and Lambert: every object adds optical density to a bright, unevenly lit background. Red cells
are biconcave discs, white cells have a textured nucleus inside a rim of cytoplasm, and a slide's stain, focus and
burned-in scale bar are drawn once per slide, independently of its class. Size, nuclear shape and the nucleus' share of
the cell follow the class loosely, so that the classes differ by their cells and not by their photography.
"""

from __future__ import annotations

import csv
import shutil
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from leukoflow.core.errors import ConfigError
from leukoflow.core.method import SegmentSettings
from leukoflow.runs.records import CLASSES

MAX_CELLS = 12
"""White cells in one microscope field, at most."""
FIELDS_PER_SLIDE = 8

_BASE_SIDE = 224
_MAX_FIELD_SIDE = SegmentSettings().assumed_field_px  # a larger image is a mosaic of fields
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time, so that the archive's bytes depend on the arguments alone
_SITES = (("Site-A", "Scanner-1"), ("Site-B", "Scanner-2"))


@dataclass(frozen=True, slots=True)
class SampleField:
    """One rendered field. `rgb` uint8 [H, W, 3]; `semantic` uint8 [H, W] (0 background, 1 cytoplasm, 2 nucleus);
    `cells` uint16 [H, W] (0 background, then 1 to the number of white cells); `label` one of the four classes."""

    rgb: NDArray[np.uint8]
    semantic: NDArray[np.uint8]
    cells: NDArray[np.uint16]
    label: str

    @property
    def n_cells(self) -> int:
        """Number of white cells."""
        return int(self.cells.max(initial=0))


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """What `write_sample` wrote."""

    directory: Path
    archive: Path
    manifest: Path
    images: int
    slides: int
    cells: int


@dataclass(frozen=True, slots=True)
class _Morphology:
    """How the white cells of a class look: pixels of a 224 px field, and fractions of the cell's radius."""

    mean_count: float
    radius: float
    spread: float
    nucleus: float  # radius of the nucleus over the radius of the cell
    lobes: float  # relative amplitude of the nucleus' outline
    texture: float  # contrast of the chromatin
    pink: float  # 0 blue cytoplasm and violet nucleus, 1 rose


_MORPHOLOGY = {
    "Benign": _Morphology(4.0, 11.0, 1.8, 0.90, 0.03, 0.10, 0.10),
    "Early": _Morphology(4.5, 12.5, 1.6, 0.86, 0.06, 0.18, 0.20),
    "Pre": _Morphology(7.0, 14.5, 2.2, 0.82, 0.09, 0.26, 0.25),
    "Pro": _Morphology(5.0, 12.5, 1.4, 0.74, 0.05, 0.22, 0.65),
}


@dataclass(frozen=True, slots=True)
class Style:
    """What the fields of one slide share: light, stain and scanner. Optical densities per channel (R, G, B)."""

    light: NDArray[np.float32]
    red: NDArray[np.float32]
    blue_stain: NDArray[np.float32]
    rose_stain: NDArray[np.float32]
    red_cells: int
    red_radius: float
    pallor: float
    blur: float
    noise: float
    scale_bar: int
    jpeg_quality: int


def slide_style(rng: np.random.Generator) -> Style:
    """Draw how one slide was stained, lit and scanned."""
    tint = rng.normal(0, 1, 3)
    gain = rng.uniform(0.8, 1.2)
    return Style(
        light=np.array([249 + 2 * tint[0], 250 + 2 * tint[1], 244 + 5 * tint[2]], np.float32),
        red=(np.array([0.36, 0.31, 0.20]) * gain * rng.uniform(0.85, 1.15, 3)).astype(np.float32),
        blue_stain=(np.array([0.92, 1.15, 0.30]) * gain * rng.uniform(0.9, 1.1, 3)).astype(np.float32),
        rose_stain=(np.array([0.30, 0.95, 0.16]) * gain * rng.uniform(0.9, 1.1, 3)).astype(np.float32),
        red_cells=int(rng.integers(36, 97)),
        red_radius=rng.uniform(8.8, 9.9),
        pallor=rng.uniform(0.35, 0.85),
        blur=rng.uniform(0.35, 0.8),
        noise=rng.uniform(0.6, 2.0),
        scale_bar=int(rng.integers(0, 4)),
        jpeg_quality=int(rng.integers(88, 96)),
    )


def render_field(
    rng: np.random.Generator, label: str, side: int = _BASE_SIDE, style: Style | None = None
) -> SampleField:
    """Render one square field of `side` pixels. Without a `style` a slide of its own is drawn from `rng`.

    Up to 1,024 px the image shows one microscope field, however finely sampled; a larger one is a mosaic of such
    fields. The same generator state, label, side and style give the same pixels. Raises ConfigError for an unknown
    label and a side below 32 px.
    """
    if label not in _MORPHOLOGY:
        raise ConfigError(f"unknown label {label!r}: choose one of {', '.join(CLASSES)}")
    if side < 32:
        raise ConfigError(f"a side of {side} px is too small for a smear field: give at least 32")
    style = style or slide_style(rng)
    if side <= _MAX_FIELD_SIDE:
        field = _render_single(rng, label, side, style)
    else:
        field = _render_mosaic(rng, label, side, style)
    _burn_scale_bar(field.rgb, style.scale_bar)
    return field


def _render_single(rng: np.random.Generator, label: str, side: int, style: Style) -> SampleField:
    scale = side / _BASE_SIDE
    density = _red_cells(rng, style, side, scale)[..., None] * style.red
    _platelets(rng, density, style, side, scale)
    semantic = np.zeros((side, side), np.uint8)
    cells = np.zeros((side, side), np.uint16)
    _white_cells(rng, density, semantic, cells, _MORPHOLOGY[label], style, scale)

    sigma = style.blur * rng.uniform(0.8, 1.5) * scale
    cv2.GaussianBlur(density, (0, 0), sigma, dst=density)
    np.negative(density, out=density)
    image: NDArray[np.float32] = np.exp(density, out=density)
    image *= style.light
    image *= _illumination(rng, side)[..., None]
    grain = rng.standard_normal((side, side, 3), np.float32)
    grain *= style.noise
    image += grain
    return SampleField(np.clip(image, 0, 255).astype(np.uint8), semantic, cells, label)


def _render_mosaic(rng: np.random.Generator, label: str, side: int, style: Style) -> SampleField:
    """Make a large image from a few rendered fields, mirrored at random: fast, and bounded by the picture itself."""
    tile = _MAX_FIELD_SIDE
    pool = [_render_single(rng, label, tile, style) for _ in range(3)]
    rgb = np.empty((side, side, 3), np.uint8)
    semantic = np.zeros((side, side), np.uint8)
    cells = np.zeros((side, side), np.uint16)
    used = 0
    for y in range(0, side, tile):
        for x in range(0, side, tile):
            field = pool[rng.integers(len(pool))]
            flip_y, flip_x = (1 if f else -1 for f in rng.random(2) < 0.5)
            h, w = min(tile, side - y), min(tile, side - x)
            here = np.s_[y : y + h, x : x + w]
            rgb[here] = field.rgb[::flip_y, ::flip_x][:h, :w]
            semantic[here] = field.semantic[::flip_y, ::flip_x][:h, :w]
            part = field.cells[::flip_y, ::flip_x][:h, :w]
            ids, compact = np.unique(part, return_inverse=True)  # the image's edge may cut cells off
            first = 0 if ids[0] == 0 else 1
            compact = compact.reshape(part.shape) + first
            cells[here] = np.where(compact > 0, compact + used, 0)
            used += int(compact.max())
    return SampleField(rgb, semantic, cells, label)


def _illumination(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """Multiply the light: a slope and a vignette, float32 [side, side]."""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-0.03, 0.03, 2)
    vignette = rng.uniform(0.0, 0.06)
    x, y = axis[None, :], axis[:, None]
    light: NDArray[np.float64] = 1 + slope_x * x + slope_y * y - vignette * (x**2 + y**2)
    return light.astype(np.float32)


@cache
def _disc(radius: int, pallor_percent: int) -> NDArray[np.float32]:
    """Compute the thickness of a biconcave disc of `radius` pixels: 1 at the rim's crest, thinner in the middle."""
    axis = np.arange(-radius - 1, radius + 2, dtype=np.float32) / radius
    r2 = axis[None, :] ** 2 + axis[:, None] ** 2
    edge = np.clip((1 - np.sqrt(r2)) * radius / 1.5, 0, 1)
    return (edge * (1 - pallor_percent / 100 * np.exp(-r2 / 0.18))).astype(np.float32)


def _red_cells(rng: np.random.Generator, style: Style, side: int, scale: float) -> NDArray[np.float32]:
    """Sum the thickness of the red cells, float32 [side, side]; overlaps are darker, as in a smear."""
    thickness = np.zeros((side, side), np.float32)
    n = int(style.red_cells * rng.uniform(0.7, 1.3))
    radii = np.maximum(2, np.rint(style.red_radius * scale * rng.uniform(0.85, 1.1, n))).astype(int)
    pallor = np.rint(np.clip(style.pallor + rng.normal(0, 0.08, n), 0, 0.95) * 10).astype(int) * 10
    weights = rng.uniform(0.8, 1.15, n)
    centres = rng.integers(-8, side + 8, (n, 2))
    for radius, pale, weight, (x, y) in zip(radii.tolist(), pallor.tolist(), weights, centres.tolist(), strict=True):
        disc = _disc(radius, pale)
        half = radius + 1
        x0, y0, x1, y1 = max(0, x - half), max(0, y - half), min(side, x + half + 1), min(side, y + half + 1)
        if x0 < x1 and y0 < y1:
            patch = disc[y0 - y + half : y1 - y + half, x0 - x + half : x1 - x + half]
            thickness[y0:y1, x0:x1] += patch * np.float32(weight)
    return thickness


def _platelets(rng: np.random.Generator, density: NDArray[np.float32], style: Style, side: int, scale: float) -> None:
    """Draw small violet specks: what a segmenter must not take for cells."""
    for x, y, r, weight in zip(
        *rng.integers(0, side, (2, n := int(rng.poisson(3)))).tolist(),
        rng.uniform(1.2, 2.2, n),
        rng.uniform(0.3, 0.6, n),
        strict=True,
    ):
        half = max(2, round(r * scale))
        disc = _disc(half, 0)[1:-1, 1:-1]
        x0, y0, x1, y1 = max(0, x - half), max(0, y - half), min(side, x + half + 1), min(side, y + half + 1)
        patch = disc[y0 - y + half : y1 - y + half, x0 - x + half : x1 - x + half]
        density[y0:y1, x0:x1] += (patch * np.float32(weight))[..., None] * style.blue_stain


def _white_cells(
    rng: np.random.Generator,
    density: NDArray[np.float32],
    semantic: NDArray[np.uint8],
    cells: NDArray[np.uint16],
    kind: _Morphology,
    style: Style,
    scale: float,
) -> None:
    """Draw up to `MAX_CELLS` white cells into the density and the two masks, all modified in place."""
    side = semantic.shape[0]
    wanted = int(min(MAX_CELLS, rng.poisson(kind.mean_count)))
    placed: list[tuple[float, float, float]] = []
    for _ in range(8 * wanted):
        if len(placed) == wanted:
            break
        radius = max(6.0, rng.normal(kind.radius, kind.spread)) * scale
        x, y = rng.uniform(0.3 * radius, side - 0.3 * radius, 2)
        if any((x - px) ** 2 + (y - py) ** 2 < (0.92 * (radius + pr)) ** 2 for px, py, pr in placed):
            continue
        if _white_cell(rng, density, semantic, cells, kind, style, (x, y, radius, scale), len(placed) + 1):
            placed.append((x, y, radius))


def _white_cell(
    rng: np.random.Generator,
    density: NDArray[np.float32],
    semantic: NDArray[np.uint8],
    cells: NDArray[np.uint16],
    kind: _Morphology,
    style: Style,
    place: tuple[float, float, float, float],
    cell_id: int,
) -> bool:
    """Draw one cell at `place` (x, y, radius, pixels per pixel of a 224 px field); false if no pixel shows it."""
    x, y, radius, scale = place
    side = semantic.shape[0]
    half = int(radius * 1.25) + 2
    x0, y0 = max(0, int(x) - half), max(0, int(y) - half)
    x1, y1 = min(side, int(x) + half + 1), min(side, int(y) + half + 1)
    shape = (y1 - y0, x1 - x0)
    here = np.s_[y0:y1, x0:x1]

    share = float(np.clip(rng.normal(kind.nucleus, 0.04), 0.55, 0.95))
    drift = rng.uniform(-0.6, 0.6, 2) * (1 - share) * radius
    body = _blob(rng, shape, x - x0, y - y0, radius, 0.035)
    nucleus = _blob(rng, shape, x - x0 + drift[0], y - y0 + drift[1], radius * share, kind.lobes)
    free = cells[here] == 0  # a neighbour that was there first stays in front
    body[~free] = 0
    np.minimum(nucleus, body, out=nucleus)

    inside, core = body >= 128, nucleus >= 128
    if not core.any():
        return False
    cells[here][inside] = cell_id
    semantic[here][inside] = 1
    semantic[here][core] = 2

    pink = float(np.clip(rng.normal(kind.pink, 0.08), 0, 1))
    stain = (1 - pink) * style.blue_stain + pink * style.rose_stain
    grain = cv2.resize(
        rng.standard_normal((max(2, int(shape[0] / (2.2 * scale))), max(2, int(shape[1] / (2.2 * scale)))), np.float32),
        (shape[1], shape[0]),
        interpolation=cv2.INTER_CUBIC,
    )
    alpha = body.astype(np.float32) / 255
    chromatin = nucleus.astype(np.float32) / 255 * (1 + np.float32(kind.texture) * grain)
    rim = np.float32(rng.uniform(0.38, 0.5))
    amount = rim * alpha * (1 + np.float32(0.06) * grain) + (np.float32(rng.uniform(0.85, 1.05)) - rim) * chromatin
    patch = density[here]
    patch *= (1 - np.float32(0.92) * alpha)[..., None]
    patch += np.maximum(amount, 0)[..., None] * stain.astype(np.float32)
    return True


_ANGLES = np.linspace(0, 2 * np.pi, 48, endpoint=False)


def _blob(
    rng: np.random.Generator, shape: tuple[int, int], x: float, y: float, radius: float, amplitude: float
) -> NDArray[np.uint8]:
    """Draw an anti-aliased, slightly irregular ellipse, uint8 0 to 255 of `shape`."""
    outline = np.ones_like(_ANGLES)
    sizes, phases = rng.normal(0, amplitude, 4), rng.uniform(0, 2 * np.pi, 4)
    for harmonic, (size, phase) in enumerate(zip(sizes, phases, strict=True), start=2):
        outline += size * np.cos(harmonic * _ANGLES + phase)
    outline = radius * np.clip(outline, 0.6, 1.2)
    points = np.stack([x + outline * np.cos(_ANGLES), y + outline * np.sin(_ANGLES)], axis=1)
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.rint(points * 16).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
    return mask


def _burn_scale_bar(rgb: NDArray[np.uint8], kind: int) -> None:
    """Burn one of three common annotations into the bottom right corner, in place; 0 burns none."""
    side = rgb.shape[0]
    unit = min(side, _MAX_FIELD_SIDE) / _BASE_SIDE
    font, thick = cv2.FONT_HERSHEY_SIMPLEX, max(1, round(unit))

    def at(dx: float, dy: float) -> tuple[int, int]:
        return round(side - dx * unit), round(side - dy * unit)

    if kind == 1:  # white box, black bar with end marks, large text
        cv2.rectangle(rgb, at(34, 18), (side, side), (255, 255, 255), -1)
        cv2.line(rgb, at(31, 5), at(3, 5), (0, 0, 0), thick)
        for dx in (31, 3):
            cv2.line(rgb, at(dx, 8), at(dx, 2), (0, 0, 0), thick)
        cv2.putText(rgb, "200 px", at(32, 10), font, 0.28 * unit, (0, 0, 0), thick, cv2.LINE_AA)
    elif kind == 2:  # small white box, tiny black text over a thin bar
        cv2.rectangle(rgb, at(30, 18), at(6, 6), (255, 255, 255), -1)
        cv2.putText(rgb, "100 px", at(28, 11), font, 0.18 * unit, (20, 20, 20), thick, cv2.LINE_AA)
        cv2.line(rgb, at(27, 8), at(10, 8), (20, 20, 20), thick)
    elif kind == 3:  # red text without a box
        cv2.putText(rgb, "100 px", at(28, 10), font, 0.20 * unit, (225, 40, 50), thick, cv2.LINE_AA)


def write_sample(directory: str | Path, images: int, seed: int = 0, side: int = _BASE_SIDE) -> SampleSummary:
    """Render `images` fields of `side` pixels and write them, field by field, below `directory`:

    - `smears.zip` and, with the same bytes, `fields/field-00000.jpg`, ...;
    - `truth/semantic/` (uint8) and `truth/cells/` (uint16), one PNG per field, and `truth.csv`;
    - `manifest.csv`: slide, site, scanner and micrometres per pixel, fit for `--manifest`.

    The bytes depend on the arguments alone, and a larger `images` only appends. Files of an earlier sample in the same
    place are replaced; raises ConfigError where the directory holds anything else, or an argument is out of range.
    """
    directory = Path(directory)
    if images < 1:
        raise ConfigError(f"cannot render {images} images: give at least 1")
    _clear(directory)
    for folder in ("fields", "truth/semantic", "truth/cells"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    um_per_px = round(SegmentSettings().um_per_px * _BASE_SIDE / min(side, _MAX_FIELD_SIDE), 6)
    slides: dict[int, tuple[str, Style]] = {}
    total_cells = 0
    with (
        zipfile.ZipFile(directory / "smears.zip", "w", zipfile.ZIP_STORED) as archive,
        (directory / "truth.csv").open("w", newline="", encoding="utf-8") as truth_file,
        (directory / "manifest.csv").open("w", newline="", encoding="utf-8") as manifest_file,
    ):
        truth = csv.writer(truth_file, lineterminator="\n")
        truth.writerow(["image_key", "label", "n_cells", "slide_id", "um_per_px"])
        manifest = csv.writer(manifest_file, lineterminator="\n")
        manifest.writerow(["image_key", "slide_id", "site", "scanner", "um_per_px"])
        for i in range(images):
            slide = slide_of(i)
            if slide not in slides:
                slides[slide] = f"slide-{slide:04d}", slide_style(np.random.default_rng([seed, 1, slide]))
            slide_id, style = slides[slide]
            field = render_field(np.random.default_rng([seed, 0, i]), CLASSES[slide % len(CLASSES)], side, style)
            total_cells += field.n_cells
            name = f"field-{i:05d}"
            data = _jpeg(field.rgb, style.jpeg_quality)
            (directory / "fields" / f"{name}.jpg").write_bytes(data)
            archive.writestr(zipfile.ZipInfo(f"{name}.jpg", _EPOCH), data)
            (directory / "truth/semantic" / f"{name}.png").write_bytes(_png(field.semantic))
            (directory / "truth/cells" / f"{name}.png").write_bytes(_png(field.cells))
            truth.writerow([f"{name}.jpg", field.label, field.n_cells, slide_id, um_per_px])
            manifest.writerow([f"{name}.jpg", slide_id, *_SITES[slide // 2 % 2], um_per_px])
    return SampleSummary(
        directory, directory / "smears.zip", directory / "manifest.csv", images, len(slides), total_cells
    )


def slide_of(index: int) -> int:
    """Return the slide of field `index`: four slides, one of each class, take turns up to `FIELDS_PER_SLIDE`."""
    block = len(CLASSES) * FIELDS_PER_SLIDE
    return index // block * len(CLASSES) + index % len(CLASSES)


def _clear(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory: name a new or empty one")
    ours = {"smears.zip", "fields", "truth", "truth.csv", "manifest.csv"}
    names = {p.name for p in directory.iterdir()}
    if names - ours or (names and "truth.csv" not in names):
        raise ConfigError(f"{directory} holds other files: name a new or empty directory for the sample")
    shutil.rmtree(directory / "fields", ignore_errors=True)
    shutil.rmtree(directory / "truth", ignore_errors=True)


def _jpeg(rgb: NDArray[np.uint8], quality: int) -> bytes:
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return data.tobytes()


def _png(mask: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    ok, data = cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    assert ok
    return data.tobytes()
