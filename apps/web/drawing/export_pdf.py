"""Export of a field as a report of two pages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from fpdf import FPDF
from fpdf.fonts import TTFFont

from leukoflow.apps.web.drawing.captions import headline, statements
from leukoflow.apps.web.drawing.export_png import annotated
from leukoflow.apps.web.drawing.layers import Tile, rgb_of
from leukoflow.apps.web.words import Cell, Subject, prob
from leukoflow.runs.records import CLASS_NAMES, CLASSES
from leukoflow.tasks.imaging.cytoplasm import measured, measured_words
from leukoflow.tasks.report.numbers import shown
from leukoflow.tasks.report.palette import COLOURS
from leukoflow.tasks.review.wording import ATTENTION_NOTE, RESEARCH_USE

_FONTS = {
    "": Path(__file__).parent / "fonts" / "Geist-Regular.ttf",
    "B": Path(__file__).parent / "fonts" / "Geist-Bold.ttf",
}
_SPACES = {0x2009: " ", 0x202F: " "}  # narrow ones, which the font lacks


class _Pdf(FPDF):
    """A4 with the notice at the foot of every page, in a font with Latin, Vietnamese and Cyrillic letters."""

    def __init__(self) -> None:
        super().__init__("P", "mm", "A4")
        for style, path in _FONTS.items():
            self.add_font("Geist", style, path)
        font = self.fonts["geist"]
        assert isinstance(font, TTFFont)
        self._letters = frozenset(font.cmap)

    def printable(self, text: str) -> str:
        """Replace the letters that the font lacks with question marks."""
        return "".join(c if ord(c) in self._letters else "?" for c in text.translate(_SPACES))

    def footer(self) -> None:
        """Print the notice and the page number."""
        self.set_y(-18)
        self.set_font("Geist", "", 8)
        self.set_text_color(155, 36, 28)
        self.multi_cell(0, 3.8, RESEARCH_USE, align="L")
        self.set_text_color(92, 97, 107)
        self.cell(0, 4, f"{self.page_no()} of {{nb}}", align="R")


def export_pdf(subject: Subject, tile: Tile | None, cells: Sequence[Cell], by: str) -> bytes:
    """Return a PDF of two pages: the answer with its picture, then the cells. `by` is who exports it."""
    pdf = _Pdf()
    pdf.set_auto_page_break(True, 24)
    pdf.set_margins(18, 16, 18)
    pdf.set_title("leukoflow field report")
    pdf.set_creator("leukoflow")
    pdf.add_page()
    _line(pdf, "leukoflow field report", 9, (92, 97, 107))
    _line(pdf, subject.title, 15, style="B")
    _line(pdf, headline(subject), 13, style="B")
    for text in statements(subject):
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
        ("Exported", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by {by}"),
    ]
    for key, value in facts:
        pdf.set_font("Geist", "", 9)
        pdf.set_text_color(92, 97, 107)
        pdf.cell(48, 4.8, pdf.printable(key))
        pdf.set_text_color(31, 34, 40)
        pdf.multi_cell(0, 4.8, pdf.printable(shown(value, 160)), new_x="LMARGIN", new_y="NEXT")
    if cells:
        pdf.add_page()
        _line(pdf, "Cells by attention", 13, style="B")
        _line(pdf, f"Nucleus / cell area: {measured_words([c.nc_ratio for c in cells])}.", 9, (92, 97, 107))
        _cell_table(pdf, cells)
    return bytes(pdf.output())


def _line(pdf: _Pdf, text: str, size: int, ink: tuple[int, int, int] = (31, 34, 40), style: str = "") -> None:
    pdf.set_font("Geist", style, size)
    pdf.set_text_color(*ink)
    pdf.multi_cell(0, size * 0.48, pdf.printable(shown(text, 800)), new_x="LMARGIN", new_y="NEXT", align="L")


def _probability(pdf: _Pdf, name: str, probability: float) -> None:
    pdf.set_font("Geist", "", 9)
    pdf.set_text_color(31, 34, 40)
    y = pdf.get_y()
    pdf.cell(28, 5, pdf.printable(CLASS_NAMES[name]))
    pdf.set_fill_color(225, 220, 211)
    pdf.rect(48, y + 1.2, 90, 2.6, style="F")
    pdf.set_fill_color(*rgb_of(COLOURS[name.lower()][0]))
    pdf.rect(48, y + 1.2, max(0.2, 90 * probability), 2.6, style="F")
    pdf.set_xy(142, y)
    pdf.cell(16, 5, prob(probability), align="R", new_x="LMARGIN", new_y="NEXT")


def _cell_table(pdf: _Pdf, cells: Sequence[Cell]) -> None:
    heads = ("rank", "cell", "attention", "nucleus / cell", "nucleus px", "cell px", "eccentricity", "at border")
    widths = (14, 14, 22, 26, 24, 22, 24, 22)
    pdf.set_font("Geist", "", 8)
    for row in (heads, *(
        (str(c.rank), str(c.cell_id), f"{c.attention:.4f}", _ratio(c), f"{c.nucleus_area_px:.0f}",
         f"{c.cell_area_px:.0f}", f"{c.eccentricity:.2f}", "yes" if c.touches_border else "") for c in cells
    )):  # fmt: skip
        for width, value in zip(widths, row, strict=True):
            pdf.cell(width, 4.6, value, border="B", align="R")
        pdf.ln()


def _ratio(cell: Cell) -> str:
    return "-" if measured(cell.nc_ratio) is None else f"{cell.nc_ratio:.2f}"
