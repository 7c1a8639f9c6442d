"""One field with its tiles and cells, from a run or from the bench, made ready for templates and exports."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import pyarrow as pa

from leukoflow.apps.web import drawing, words
from leukoflow.apps.web.drawing import Shape, Tile
from leukoflow.apps.web.jobs import Item
from leukoflow.apps.web.words import Cell, Subject
from leukoflow.core.counts import count_of
from leukoflow.core.errors import LeukoflowError
from leukoflow.runs.records import CLASSES, Status
from leukoflow.tasks.imaging import cytoplasm
from leukoflow.tasks.inference.single import Finding
from leukoflow.tasks.review import bundle_settings, field_view, reference_cells, worklist
from leukoflow.tasks.review.field_view import FieldView, ReferenceCell
from leukoflow.tasks.review.wording import SHADOW, Scale
from leukoflow.tasks.review.worklist import FieldLine, Frequency, RunTable

REFERENCES = 6
"""Cells of each class that are shown to compare with."""
_WINDOW = 64.0  # pixels of the tile around a cell, where no activation map says what the model sees
_HELD = 128 << 20  # bytes of views that are kept: a page asks for several pictures of one field


@dataclass(frozen=True, slots=True)
class Scene:
    """A tile with its outlines and cells. Paths and boxes are in the tile's pixels."""

    pictures: str  # address below which its pictures are
    view: str  # address of this fragment
    tile: int
    tiles: int
    width: int
    height: int
    label: str | None
    maps: bool
    gone: str  # why the pixels cannot be shown; empty where they can
    remarks: tuple[str, ...]
    nucleus: str
    cytoplasm: str
    shapes: tuple[Shape, ...]
    cells: tuple[Cell, ...]  # of this tile, by attention
    words: str  # what the picture shows, for those who do not see it
    um_per_px: float | None  # at the tile's scale

    @property
    def ratios(self) -> str:
        """In how many of its cells the nucleus-to-cell ratio was measured."""
        return cytoplasm.measured_words([c.nc_ratio for c in self.cells])

    def area(self, pixels: float) -> str:
        """An area of the mask, in square micrometres where the scale is known."""
        if self.um_per_px is None:
            return f"{pixels:.0f} px²"
        return f"{pixels * self.um_per_px**2:.0f} µm²"


# --- cells and scenes ------------------------------------------------------------------------------------------------


def cells_of(table: pa.Table | None, tiles: Sequence[Tile]) -> tuple[Cell, ...]:
    """All cells of a field by attention, the heaviest first; of those that no tile shows there is no box."""
    if table is None or not len(table):
        return ()
    place: dict[int, tuple[int, float, float, float]] = {}
    for t, tile in enumerate(tiles):
        window = float(tile.window_px) if tile.window_px > 1 else _WINDOW
        for cell_id, x, y in zip(tile.cell_ids.tolist(), tile.field_x.tolist(), tile.field_y.tolist(), strict=True):
            place[cell_id] = (t, x, y, window)
    rows = sorted(table.to_pylist(), key=lambda r: (-r["attention"], r["cell_id"]))
    top = rows[0]["attention"] or 1.0
    cells = []
    for rank, row in enumerate(rows, 1):
        t, x, y, window = place.get(row["cell_id"], (-1, 0.0, 0.0, _WINDOW))
        left, upper = round(x + 0.5 - window / 2, 1), round(y + 0.5 - window / 2, 1)
        cells.append(
            Cell(
                cell_id=row["cell_id"],
                rank=rank,
                tile=t,
                attention=row["attention"],
                weight=row["attention"] / top,
                nc_ratio=row["nc_ratio"],
                nucleus_area_px=row["nucleus_area_px"],
                cell_area_px=row["cell_area_px"],
                eccentricity=row["eccentricity"],
                touches_border=row["touches_border"],
                box=(left, upper, left + window, upper + window),
            )
        )
    return tuple(cells)


def _scene(
    tiles: Sequence[Tile],
    cells: Sequence[Cell],
    tile: int | None,
    base: str,
    label: str | None,
    pixels: bool,
    mapped: bool,
    remarks: Sequence[str],
    um_per_px: float | None,
) -> Scene | None:
    """None where there is no picture at all. Without `tile`, the one with the cell of highest attention."""
    if not tiles:
        return None
    if tile is None:
        tile = next((c.tile for c in cells if c.tile >= 0), 0)
    tile = min(max(tile, 0), len(tiles) - 1)
    view = tiles[tile]
    mine = tuple(c for c in cells if c.tile == tile)
    height, width = view.cells.shape
    what = count_of(len(mine), "cell") if mine else "no cells"
    scale = float(view.to_source[0, 0])
    return Scene(
        pictures=base,
        view=f"{base}/view",
        tile=tile,
        tiles=len(tiles),
        width=width,
        height=height,
        label=label,
        maps=mapped and bool(mine) and drawing.has_maps(view),
        gone=""
        if pixels
        else "The pixels of this field cannot be shown: " + ("; ".join(remarks) or "they are gone") + ".",
        remarks=tuple(words.shown(r, 300) for r in remarks) if pixels else (),
        nucleus=drawing.nucleus_path(view),
        cytoplasm=drawing.cytoplasm_path(view),
        shapes=drawing.shapes(view, mine),
        cells=mine,
        words=f"Field of {width} by {height} pixels with {what} outlined",
        um_per_px=um_per_px * scale if um_per_px else None,
    )


# --- from a run ------------------------------------------------------------------------------------------------------


class _Views:
    """Views of fields that were looked at last; whoever asks for one that is being made waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, ...], Future[FieldView]] = OrderedDict()

    def get(self, key: tuple[str, ...], make: Callable[[], FieldView]) -> FieldView:
        with self._lock:
            future = self._kept.get(key)
            mine = future is None
            if future is None:
                future = self._kept[key] = Future()
            self._kept.move_to_end(key)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
            self._shrink()
        return future.result()

    def _shrink(self) -> None:
        with self._lock:
            done = [(k, f) for k, f in self._kept.items() if f.done() and f.exception() is None]
            total = sum(_weight(f.result()) for _, f in done)
            for key, future in done[:-1]:
                if total <= _HELD:
                    break
                total -= _weight(future.result())
                self._kept.pop(key, None)


def _weight(view: FieldView) -> int:
    return sum(
        a.nbytes for t in view.tiles for a in (t.original, t.normalized, t.semantic, t.cells, t.maps)
    )  # fmt: skip


_views = _Views()


def field_of(table: RunTable, ordinal: int) -> FieldView:
    """The pictures of a field of a run. Raises NotFoundError."""
    key = (table.out, table.run_key, table.stamp, str(ordinal))
    return _views.get(key, lambda: field_view.view(table, ordinal))


def field_tiles(table: RunTable, ordinal: int) -> tuple[tuple[Tile, ...], tuple[Cell, ...], FieldView]:
    """Tiles and cells of a field of a run. Raises NotFoundError."""
    view = field_of(table, ordinal)
    return view.tiles, cells_of(view.cells, view.tiles), view


def of_field(table: RunTable, ordinal: int, tile: int | None, base: str) -> Scene | None:
    """A field of a run as a scene; None where there is nothing to draw. Raises NotFoundError."""
    tiles, cells, view = field_tiles(table, ordinal)
    line = table.field(ordinal)
    scale = line.details.um_per_px if line.details else None
    return _scene(tiles, cells, tile, base, line.label, view.pixels, view.mapped, view.remarks, scale)


def of_line(table: RunTable, line: FieldLine) -> Subject:
    """What is said of a field of a run."""
    d, bundle = line.details, table.bundle[0]
    assert d is not None
    quality = []
    if d.focus is not None:
        quality.append(("Focus", f"{d.focus:.1f}"))
    if d.exposure is not None:
        quality.append(("Mean lightness", f"{d.exposure:.2f}"))
    facts = [("Slide", line.slide_title), ("Patient", line.patient), ("Site", line.site), ("Scanner", line.scanner)]
    return Subject(
        title=words.shown(line.image_key),
        status=str(line.status),
        reason=line.reason,
        label=line.label,
        probabilities=line.probabilities,
        prediction_set=line.prediction_set,
        ood=line.ood,
        width_px=d.width_px,
        height_px=d.height_px,
        um_per_px=d.um_per_px,
        n_cells=line.n_cells,
        quality=tuple(quality),
        remarks=tuple(words.shown(f, 200) for f in d.quality_flags),
        bundle=words.bundle_name(bundle),
        bundle_digest=d.bundle_digest,
        sha256=d.member_sha256,
        facts=tuple((k, words.shown(v, 120)) for k, v in facts if v),
        settings=bundle_settings.segment_settings(bundle),
        alpha=bundle_settings.alpha_of(bundle),
        max_ood=bundle_settings.max_ood_of(bundle),
        told=frequency(bundle, line.label, line.confidence, line.status),
        shadow=SHADOW if table.shadow_of is not None else "",
    )


def frequency(bundle: str, label: str | None, confidence: float | None, status: str) -> Frequency | None:
    """What the confidence of an answer means; None where there is no answer."""
    if label is None or confidence is None or status != Status.PREDICTED:
        return None
    document = bundle_settings.bundle_document(bundle) or {}
    return worklist.frequency(document.get("metrics") or {}, label, confidence)


def told_of(item: Item) -> Frequency | None:
    """What the confidence of an answer of the bench means; None where there is no answer."""
    f: Finding = item.finding
    if f.label is None or not f.probabilities:
        return None
    return frequency(f.bundle, f.label, float(f.probabilities[CLASSES.index(f.label)]), f.status)


def caution_of(item: Item) -> str:
    """What stands before an answer of the bench that may rest on a wrong size; empty otherwise."""
    f: Finding = item.finding
    return Scale(f.width_px, f.height_px, item.um_per_px, bundle_settings.segment_settings(f.bundle)).caution


def references(out: str) -> tuple[tuple[str, tuple[ReferenceCell, ...]], ...]:
    """Cells of each class from the newest finished run that has some; empty without runs."""
    latest = next((r for r in worklist.list_runs(out) if r.state == "finished" and r.shadow_of is None), None)
    if latest is None:
        return ()
    found = []
    for label in CLASSES:
        try:
            found.append((label, reference_cells.reference_cells(out, latest.run_key, label, REFERENCES)))
        except LeukoflowError:
            found.append((label, ()))
    return tuple(found)


# --- from the bench --------------------------------------------------------------------------------------------------


def of_finding(finding: Finding, tile: int, base: str, um_per_px: float | None = None) -> Scene | None:
    """An answer of the bench as a scene; None where the image could not be decoded."""
    cells = cells_of(finding.cells, finding.tiles)
    mapped = bool(finding.probabilities)
    label = finding.label if finding.status == Status.PREDICTED else None
    return _scene(finding.tiles, cells, tile, base, label, True, mapped, (), um_per_px)


def why_of(item: Item) -> tuple[str, str, str]:
    """Why an image of the bench has no answer: what, the likeliest cause with the remedy, and what was measured."""
    f: Finding = item.finding
    scale = Scale(f.width_px, f.height_px, item.um_per_px, bundle_settings.segment_settings(f.bundle))
    return words.reason_words(f.reason, scale, "bench", f.remarks)


def of_item(item: Item) -> Subject:
    """What is said of an image of the bench."""
    f: Finding = item.finding
    answered = f.status == Status.PREDICTED
    return Subject(
        title=words.shown(item.name),
        status=str(f.status),
        reason=f.reason,
        label=f.label if answered else None,
        probabilities=tuple(float(p) for p in f.probabilities),
        prediction_set=f.prediction_set if answered else (),
        ood=f.ood,
        width_px=f.width_px or None,
        height_px=f.height_px or None,
        um_per_px=item.um_per_px,
        n_cells=0 if f.cells is None else len(f.cells),
        quality=words.quality_words(f.quality),
        remarks=tuple(words.shown(r, 200) for r in f.remarks),
        bundle=words.bundle_name(f.bundle),
        bundle_digest=f.bundle_digest,
        sha256=f.sha256,
        facts=(("File", f"{words.number(item.size)} bytes"),),
        settings=bundle_settings.segment_settings(f.bundle),
        alpha=bundle_settings.alpha_of(f.bundle),
        max_ood=bundle_settings.max_ood_of(f.bundle),
        told=told_of(item),
        where="bench",
    )
