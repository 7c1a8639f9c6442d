"""Pictures of the web application: layers of a field, its cells, plots, and what is exported.

Everything is drawn from arrays at the model's scale. Outlines are vectors, so that they stay sharp under zoom; what
covers an area (activation maps) is a transparent PNG. Every export says that it is for research use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from typing import Any, Protocol

import cv2
import numpy as np
from fpdf import FPDF
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from leukoflow.apps.web.words import Cell, Subject, prob, shown
from leukoflow.runs.records import CLASS_NAMES, CLASSES
from leukoflow.tasks.imaging.cytoplasm import measured, measured_words
from leukoflow.tasks.review.wording import (
    ATTENTION_NOTE,
    LEANING,
    NO_ANSWER,
    RESEARCH_USE,
    class_name,
    mean_words,
    set_words,
)
from leukoflow.tasks.review.worklist import TimelinePoint, WeekLine

NUCLEUS, CYTOPLASM = "#35d6ff", "#ffd23e"  # seen on violet nuclei as on pale ground
FOR, AGAINST = "#ffe11a", "#12c9ff"
LABEL_COLOURS = {"Benign": "#2f8579", "Early": "#b98a0f", "Pre": "#cf5f22", "Pro": "#ab3366"}
_STOPS = ((0x5C, 0x74, 0x96), (0xF0, 0xA2, 0x1E), (0xE0, 0x22, 0x35))
_STRONGEST = 217  # opacity of the strongest place of an activation map: the cell must be seen through it
_DRAWN = {0xD7: "x", 0xB5: "u", 0x2013: "-", 0x2026: "..."}  # letters that the built-in font of pictures lacks
_ENLARGED = 900  # pixels of the longer side of an exported picture, at least


class Tile(Protocol):
    """What is needed of `tasks.inference.single.TileView`, from the bench or from a run."""

    @property
    def original(self) -> NDArray[np.uint8]: ...  # noqa: D102
    @property
    def normalized(self) -> NDArray[np.uint8]: ...  # noqa: D102
    @property
    def semantic(self) -> NDArray[np.uint8]: ...  # noqa: D102
    @property
    def cells(self) -> NDArray[np.uint16]: ...  # noqa: D102
    @property
    def to_source(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def cell_ids(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def field_x(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def field_y(self) -> NDArray[np.float32]: ...  # noqa: D102
    @property
    def maps(self) -> NDArray[np.float16]: ...  # noqa: D102
    @property
    def window_px(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Shape:
    """A cell's outline: an SVG path in the tile's pixels, and the colour of its attention."""

    cell: Cell
    path: str
    colour: str


# --- layers ----------------------------------------------------------------------------------------------------------


def webp(rgb: NDArray[np.uint8]) -> bytes:
    """A picture for looking at, without loss. `rgb` uint8 [H, W, 3]."""
    sink = BytesIO()
    Image.fromarray(rgb).save(sink, "WEBP", lossless=True, method=1)
    return sink.getvalue()


def thumbnail(rgb: NDArray[np.uint8], side: int = 264) -> bytes:
    """A small picture for lists, with the loss that looking over them allows. `rgb` uint8 [H, W, 3]."""
    image = Image.fromarray(rgb)
    image.thumbnail((side, side))
    sink = BytesIO()
    image.save(sink, "WEBP", quality=82, method=2)
    return sink.getvalue()


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of uint8 [H, W, 3] or [H, W, 4]."""
    sink = BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=4)
    return sink.getvalue()


def attention_colour(weight: float) -> str:
    """Attention relative to the field's highest, from slate over amber to red."""
    position = min(max(weight, 0.0), 1.0) * 2
    low = min(1, int(position))
    share = position - low
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))


def outline(mask: NDArray[np.bool_], holes: bool = False) -> str:
    """SVG path of a mask's contours, in pixel coordinates. `mask` bool [H, W]; empty text for an empty mask."""
    mode = cv2.RETR_CCOMP if holes else cv2.RETR_EXTERNAL
    contours, _ = cv2.findContours(mask.astype(np.uint8), mode, cv2.CHAIN_APPROX_NONE)
    parts = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 0.6, True).reshape(-1, 2) + 0.5
        parts.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z")
    return "".join(parts)


def nucleus_path(tile: Tile) -> str:
    """Outlines of all nuclei."""
    return outline(tile.semantic == 2, holes=True)


def cytoplasm_path(tile: Tile) -> str:
    """Outlines of all cell bodies, nucleus and cytoplasm together."""
    return outline(tile.semantic > 0, holes=True)


def shapes(tile: Tile, cells: Sequence[Cell]) -> tuple[Shape, ...]:
    """Outlines of the tile's cells, faintest first, so that the heaviest lies on top."""
    known = {c.cell_id: c for c in cells}
    drawn = []
    for cell_id in np.unique(tile.cells):
        cell = known.get(int(cell_id))
        if cell is not None:
            drawn.append(Shape(cell, outline(tile.cells == cell_id), attention_colour(cell.weight)))
    return tuple(sorted(drawn, key=lambda s: -s.cell.rank))


def has_maps(tile: Tile) -> bool:
    """Whether activation maps are there to be drawn."""
    return tile.maps.size > 0 and tile.maps.shape[0] == tile.cell_ids.shape[0]


def activation(tile: Tile, label: str, attention: Mapping[int, float]) -> NDArray[np.float64]:
    """What each pixel adds to the logit of a class: maps of all cells times their attention. float64 [H, W]."""
    height, width = tile.cells.shape
    total = np.zeros((height, width), np.float64)
    k = CLASSES.index(label)
    for row, cell_id in enumerate(tile.cell_ids):
        values = np.nan_to_num(tile.maps[row, k].astype(np.float64)) * attention.get(int(cell_id), 0.0)
        side, grid = float(tile.window_px), values.shape[0]
        # Pixel centres of the tile to places of the grid: both count from the middle of their first square.
        scale = side / grid
        left = float(tile.field_x[row]) - side / 2 + scale / 2
        upper = float(tile.field_y[row]) - side / 2 + scale / 2
        x0, y0 = max(0, math.floor(left - scale)), max(0, math.floor(upper - scale))
        x1, y1 = min(width, math.ceil(left + side)), min(height, math.ceil(upper + side))
        if x0 >= x1 or y0 >= y1:
            continue
        affine = np.asarray([[scale, 0, left - x0], [0, scale, upper - y0]], np.float64)
        total[y0:y1, x0:x1] += cv2.warpAffine(values, affine, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR)
    return total


def activation_png(tile: Tile, label: str, attention: Mapping[int, float]) -> bytes:
    """The activation map of a class as a transparent picture: yellow speaks for it, blue against it.

    Its strength is relative to the tile's strongest place over all classes, so that classes can be compared.
    """
    maps = {name: activation(tile, name, attention) for name in CLASSES}
    top = max(float(np.abs(m).max(initial=0.0)) for m in maps.values()) or 1.0
    values = maps[label] / top
    colours = np.asarray([_rgb(AGAINST), _rgb(FOR)], np.uint8)
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = colours[(values > 0).astype(np.intp)]
    pixels[..., 3] = np.round(np.abs(values) * _STRONGEST)
    return png(pixels)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def crop(rgb: NDArray[np.uint8], box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    """What a box shows of a picture, uint8 [h, w, 3]; beyond its edge the edge is continued."""
    x0, y0, x1, y1 = (round(v) for v in box)
    pad = max(0, -x0, -y0, x1 - rgb.shape[1], y1 - rgb.shape[0])
    big = np.pad(rgb, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    return np.ascontiguousarray(big[y0 + pad : y1 + pad, x0 + pad : x1 + pad])


# --- bars and plots --------------------------------------------------------------------------------------------------


def shares(parts: Sequence[tuple[str, float]], whole: float = 1000.0) -> list[tuple[str, str, str]]:
    """(kind, x, width) of a stacked bar that is 1000 wide, for parts (kind, amount)."""
    total = sum(amount for _, amount in parts) or 1.0
    x, out = 0.0, []
    for kind, amount in parts:
        if amount <= 0:
            continue
        width = whole * amount / total
        out.append((kind, f"{x:.2f}", f"{max(width, 1.0):.2f}"))
        x += width
    return out


def hundred(right: int) -> list[tuple[str, str, str]]:
    """(x, y, kind) of 100 squares: `on` as many as of 100 fields were right."""
    return [(f"{i % 20 * 12.5:g}", f"{i // 20 * 10:g}", "on" if i < right else "") for i in range(100)]


def timeline_svg(points: Sequence[TimelinePoint]) -> Markup:
    """A patient's mean malignant probability over runs, with its interval; numbers stand in a table beside it."""
    width, height, left, right, top, foot = 1000, 300, 56, 24, 24, 46
    tall = height - top - foot

    def level(share: float) -> float:
        return top + (1 - share) * tall

    plot = _Plot(width, height, "course-title")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        plot.line("grid" if share else "axis", left, level(share), width - right, level(share))
        plot.text(f"{share:g}", left - 10, level(share) + 4, "end")
    xs = _places([p.at for p in points], left, width - left - right)
    segments: list[list[str]] = []
    for x, point in zip(xs, points, strict=True):
        if point.summary.interval is not None:
            low, high = (level(v) for v in point.summary.interval)
            plot.line("whisker", x, low, x, high)
            plot.line("whisker", x - 5, low, x + 5, low)
            plot.line("whisker", x - 5, high, x + 5, high)
        if point.summary.mean_malignant_probability is not None:
            if not segments or not point.same_bundle or point.same_images:
                segments.append([])  # another bundle is another measure, and the same images are no course: not joined
            segments[-1].append(f"{x:.1f} {level(point.summary.mean_malignant_probability):.1f}")
    plot.parts += [f'<path class="line" d="M{"L".join(s)}"/>' for s in segments if len(s) > 1]
    named = -math.inf
    for x, point in zip(xs, points, strict=True):
        share_, label = point.summary.mean_malignant_probability, point.summary.label
        if share_ is not None:
            kind = f"c-{label}" if label in CLASSES else ""
            plot.parts.append(f'<circle class="point {kind}" cx="{x:.1f}" cy="{level(share_):.1f}" r="7"/>')
            dx, anchor = (-12, "end") if x > width - 90 else (12, "start")
            plot.text(mean_words(share_), x + dx, level(share_) - 9, anchor, "strong")
        alone = [p.at[:10] for p in points].count(point.at[:10]) == 1
        if x - named >= (92 if alone else 140):  # else the dates would run into each other
            plot.text(point.at[:10] if alone else f"{point.at[:10]} {point.at[11:16]}", x, height - 22, "middle")
            named = x
    return plot.done()


def weeks_svg(weeks: Sequence[WeekLine]) -> Markup:
    """Decisions by week: accepted and corrected."""
    if not weeks:
        return Markup("")
    latest = weeks[-26:]
    width, height, left, foot, top = 1000, 220, 44, 34, 14
    tall, base = height - foot - top, float(height - foot)
    most = max(w.n for w in latest) or 1
    step = min(70.0, (width - left) / len(latest))
    plot = _Plot(width, height, "weeks-title")
    for share in (0.5, 1.0):
        plot.line("grid", left, top + (1 - share) * tall, width, top + (1 - share) * tall)
        plot.text(f"{most * share:g}", left - 8, top + (1 - share) * tall + 4, "end")
    for i, week in enumerate(latest):
        x, y = left + (i + 0.15) * step, base
        for amount, kind in ((week.accepted, "c-predicted"), (week.corrected, "c-rejected")):
            y -= amount / most * tall
            size = f'width="{0.7 * step:.1f}" height="{amount / most * tall:.1f}"'
            plot.parts.append(f'<rect class="f-bar {kind}" x="{x:.1f}" y="{y:.1f}" {size} rx="2"/>')
        if len(latest) <= 14 or i % 2 == 0:
            plot.text(week.week[-3:], x + 0.35 * step, height - 12, "middle")
    plot.line("axis", left, base, width, base)
    return plot.done()


class _Plot:
    """An SVG that grows; colours are the style sheet's, by class."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{title}">']

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(self, words: str, x: float, y: float, anchor: str, kind: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def done(self) -> Markup:
        """Safe as it is: what is foreign was escaped."""
        return Markup("".join(self.parts) + "</svg>")


def _places(times: Sequence[str], left: float, inner: float) -> list[float]:
    """Horizontal places in proportion to time; evenly where times cannot be read or are all the same."""
    try:
        stamps = [datetime.fromisoformat(t).timestamp() for t in times]
    except ValueError:
        stamps = [float(i) for i in range(len(times))]
    first, last = min(stamps, default=0.0), max(stamps, default=0.0)
    if last <= first:
        return [left + inner * (i + 1) / (len(times) + 1) for i in range(len(times))]
    margin = inner * 0.06
    return [left + margin + (inner - 2 * margin) * (s - first) / (last - first) for s in stamps]


# --- pictures for export ---------------------------------------------------------------------------------------------


def annotated(tile: Tile, cells: Sequence[Cell], layers: Sequence[str] = ("original", "attention")) -> Image.Image:
    """One picture with the layers drawn into it, enlarged so that outlines are fine. Layers as the pages name them."""
    base = tile.normalized if "normalized" in layers else tile.original
    height, width = base.shape[:2]
    factor = max(1, math.ceil(_ENLARGED / max(height, width)))
    big = np.asarray(cv2.resize(base, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC), np.uint8)
    for name, mask, colour in (
        ("cytoplasm", tile.semantic > 0, CYTOPLASM),
        ("nucleus", tile.semantic == 2, NUCLEUS),
    ):
        if name in layers:
            _stroke(big, mask, factor, colour, 2)
    if "attention" in layers:
        for shape in shapes(tile, cells):
            _stroke(big, tile.cells == shape.cell.cell_id, factor, shape.colour, 3)
    image = Image.fromarray(big)
    if "attention" in layers:
        pen = ImageDraw.Draw(image)
        font = ImageFont.load_default(21)
        for cell in cells:
            if cell.rank <= 3:
                ys, xs = np.nonzero(tile.cells == cell.cell_id)
                if not len(xs):
                    continue
                x, y = (xs.min() + xs.max()) / 2 * factor - 5, max(2.0, ys.min() * factor - 26.0)
                pen.text((x, y), str(cell.rank), font=font, fill="#ffffff", stroke_width=2, stroke_fill="#111111")
    return image


def _stroke(image: NDArray[np.uint8], mask: NDArray[np.bool_], factor: int, colour: str, width: int) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    scaled = [((c.astype(np.float64) + 0.5) * factor).round().astype(np.int32) for c in contours]
    cv2.polylines(image, scaled, True, _rgb(colour), width, cv2.LINE_AA)


def export_png(subject: Subject, tile: Tile | None, cells: Sequence[Cell], layers: Sequence[str]) -> bytes:
    """The annotated field above a caption: what it was called, how sure, by which bundle, and the notice."""
    picture = annotated(tile, cells, layers) if tile is not None else Image.new("RGB", (_ENLARGED, 60), "#e9e5dd")
    lines = [
        (shown(subject.title, 90), 22, "#1f2228"),
        (_headline(subject), 26, "#1f2228"),
        *((text, 18, "#1f2228") for text in _said(subject)),
        (_all_probabilities(subject), 18, "#1f2228"),
        (_provenance(subject), 15, "#5c616b"),
        (f"Outlines: cells, coloured by attention. {ATTENTION_NOTE}"
         if "attention" in layers else "", 15, "#5c616b"),
        (RESEARCH_USE, 15, "#9b241c"),
    ]  # fmt: skip
    wrapped = [
        (piece, size, ink)
        for text, size, ink in lines
        if text
        for piece in _wrap(text.translate(_DRAWN), size, picture.width - 48)
    ]
    tall = sum(size + 9 for _, size, _ in wrapped) + 36
    sheet = Image.new("RGB", (picture.width, picture.height + tall), "#fffefb")
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    y = picture.height + 16
    for text, size, ink in wrapped:
        pen.text((24, y), text, font=ImageFont.load_default(size), fill=ink)
        y += size + 9
    sink = BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _wrap(text: str, size: int, width: int) -> list[str]:
    font = ImageFont.load_default(size)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _headline(subject: Subject) -> str:
    if subject.status == "abstained":
        return NO_ANSWER
    if subject.label is None:
        return f"{subject.status.capitalize()}: {subject.why[0]}"
    return f"{class_name(subject.label)}, confidence {prob(subject.confidence or 0.0)}"


def _said(subject: Subject) -> tuple[str, ...]:
    """What stands below the headline: of an answer what its confidence and its set mean, else why there is none."""
    if subject.label is not None:
        return tuple(filter(None, (
            subject.shadow, subject.caution, subject.told.words if subject.told else "",
            set_words(subject.prediction_set, subject.alpha, subject.probabilities),
        )))  # fmt: skip
    if subject.status == "abstained":
        return tuple(filter(None, (subject.shadow, " ".join(filter(None, subject.why[:2])), LEANING)))
    return tuple(filter(None, (subject.shadow, subject.why[1])))


def _all_probabilities(subject: Subject) -> str:
    if not subject.probabilities:
        return ""
    each = ", ".join(f"{class_name(c)} {prob(p)}" for c, p in zip(CLASSES, subject.probabilities, strict=True))
    return f"Probabilities: {each}" if subject.label is not None else f"Probabilities, no answer: {each}"


def _provenance(subject: Subject) -> str:
    image = f", image SHA-256 {subject.sha256[:16]}" if subject.sha256 else ""
    return f"leukoflow, bundle {shown(subject.bundle, 60)} {subject.bundle_digest[:16]}{image}"


class _Pdf(FPDF):
    """A4 with the notice at the foot of every page."""

    def footer(self) -> None:
        """The notice and the page."""
        self.set_y(-18)
        self.set_font("Helvetica", "", 8)
        self.set_text_color(155, 36, 28)
        self.multi_cell(0, 3.8, RESEARCH_USE, align="L")
        self.set_text_color(92, 97, 107)
        self.cell(0, 4, f"{self.page_no()} of {{nb}}", align="R")


def export_pdf(subject: Subject, tile: Tile | None, cells: Sequence[Cell], by: str) -> bytes:
    """Two pages for the file: the answer with its picture, then the cells. `by` is who asked for it."""
    pdf = _Pdf("P", "mm", "A4")
    pdf.set_auto_page_break(True, 24)
    pdf.set_margins(18, 16, 18)
    pdf.set_title("leukoflow field report")
    pdf.set_creator("leukoflow")
    pdf.add_page()
    _line(pdf, "leukoflow field report", 9, (92, 97, 107))
    _line(pdf, subject.title, 15, style="B")
    _line(pdf, _headline(subject), 13, style="B")
    for text in _said(subject):
        _line(pdf, text, 10)
    pdf.ln(2)
    if tile is not None:
        sink = BytesIO()
        annotated(tile, cells).convert("RGB").save(sink, "JPEG", quality=92)
        side = 118.0
        height, width = tile.original.shape[:2]
        pdf.image(sink, w=side * min(1.0, width / height), h=side * min(1.0, height / width))
        _line(
            pdf, f"Cells outlined by attention, from slate (little) to red (most). {ATTENTION_NOTE}", 8, (92, 97, 107)
        )
    else:
        _line(pdf, "No picture of this image can be shown.", 10, (122, 79, 0))
    pdf.ln(2)
    if subject.probabilities and subject.label is None:
        _line(pdf, "Probabilities (no answer)", 9, (92, 97, 107))
    for name, probability in zip(CLASSES, subject.probabilities, strict=False):
        _probability(pdf, name, probability)
    pdf.ln(2)
    facts = [
        *((k, v) for k, v in subject.facts),
        ("Status", subject.status),
        ("Reason", subject.reason or "-"),
        ("Cells", str(subject.n_cells)),
        *subject.quality,
        ("Bundle", f"{subject.bundle} {subject.bundle_digest[:32]}"),
        ("Image SHA-256", subject.sha256 or "-"),
        ("Made", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by {by}"),
    ]
    for key, value in facts:
        pdf.set_font("Helvetica", "", 9)
        pdf.set_text_color(92, 97, 107)
        pdf.cell(48, 4.8, _latin(key))
        pdf.set_text_color(31, 34, 40)
        pdf.multi_cell(0, 4.8, _latin(shown(value, 160)), new_x="LMARGIN", new_y="NEXT")
    if cells:
        pdf.add_page()
        _line(pdf, "Cells by attention", 13, style="B")
        _line(pdf, f"Nucleus / cell area: {measured_words([c.nc_ratio for c in cells])}.", 9, (92, 97, 107))
        _cell_table(pdf, cells)
    return bytes(pdf.output())


def _line(pdf: FPDF, text: str, size: int, ink: tuple[int, int, int] = (31, 34, 40), style: str = "") -> None:
    pdf.set_font("Helvetica", style, size)
    pdf.set_text_color(*ink)
    pdf.multi_cell(0, size * 0.48, _latin(shown(text, 800)), new_x="LMARGIN", new_y="NEXT", align="L")


def _probability(pdf: FPDF, name: str, probability: float) -> None:
    pdf.set_font("Helvetica", "", 9)
    pdf.set_text_color(31, 34, 40)
    y = pdf.get_y()
    pdf.cell(28, 5, _latin(CLASS_NAMES[name]))
    pdf.set_fill_color(225, 220, 211)
    pdf.rect(48, y + 1.2, 90, 2.6, style="F")
    pdf.set_fill_color(*_rgb(LABEL_COLOURS[name]))
    pdf.rect(48, y + 1.2, max(0.2, 90 * probability), 2.6, style="F")
    pdf.set_xy(142, y)
    pdf.cell(16, 5, prob(probability), align="R", new_x="LMARGIN", new_y="NEXT")


def _cell_table(pdf: FPDF, cells: Sequence[Cell]) -> None:
    heads = ("rank", "cell", "attention", "nucleus / cell", "nucleus px", "cell px", "eccentricity", "at border")
    widths = (14, 14, 22, 26, 24, 22, 24, 22)
    pdf.set_font("Helvetica", "", 8)
    for row in (heads, *(
        (str(c.rank), str(c.cell_id), f"{c.attention:.4f}", _ratio(c), f"{c.nucleus_area_px:.0f}",
         f"{c.cell_area_px:.0f}", f"{c.eccentricity:.2f}", "yes" if c.touches_border else "") for c in cells
    )):  # fmt: skip
        for width, value in zip(widths, row, strict=True):
            pdf.cell(width, 4.6, value, border="B", align="R")
        pdf.ln()


def _ratio(cell: Cell) -> str:
    return "-" if measured(cell.nc_ratio) is None else f"{cell.nc_ratio:.2f}"


def _latin(text: str) -> str:
    """What the PDF's built-in fonts can show; other letters become question marks."""
    swapped = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2026: "..."})
    return swapped.encode("latin-1", "replace").decode("latin-1")


def export_json(subject: Subject, cells: Sequence[Cell], by: str) -> bytes:
    """Everything that is said about the field, for programs."""
    content: dict[str, Any] = {
        "notice": " ".join(filter(None, (subject.shadow, RESEARCH_USE))),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_by": by,
        "title": subject.title,
        "status": subject.status,
        "reason": subject.reason,
        "label": subject.label,
        "confidence": subject.confidence,
        "caution": subject.caution or None,
        "probabilities": dict(zip(CLASSES, subject.probabilities, strict=False)),
        "prediction_set": list(subject.prediction_set),
        "ood_score": subject.ood,
        "width_px": subject.width_px,
        "height_px": subject.height_px,
        "um_per_px": subject.um_per_px,
        "quality": dict(subject.quality),
        "remarks": list(subject.remarks),
        "bundle": subject.bundle,
        "bundle_digest": subject.bundle_digest,
        "member_sha256": subject.sha256,
        "cells": [
            {
                "cell_id": c.cell_id,
                "rank": c.rank,
                "attention": c.attention,
                "nc_ratio": measured(c.nc_ratio),  # null: the segmenter saw no cytoplasm
                "nucleus_area_px": c.nucleus_area_px,
                "cell_area_px": c.cell_area_px,
                "eccentricity": c.eccentricity,
                "touches_border": c.touches_border,
            }
            for c in cells
        ],
    }
    return json.dumps(content, ensure_ascii=False, indent=1).encode()
