"""`report.html`: what became of a run, on one page that needs nothing else. Works on unfinished runs too.

Tables are streamed part by part and only the best candidates are kept, so memory does not grow with the run. Nothing
that comes from a source (keys, slide ids, reasons) reaches the page unescaped.
"""

from __future__ import annotations

import base64
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from leukoflow.core.codec import loads
from leukoflow.core.counts import count_of
from leukoflow.core.errors import StorageError
from leukoflow.core.method import SegmentSettings
from leukoflow.runs.progress import ProgressReader, RunBinding, RunProgress
from leukoflow.runs.records import (
    CLASSES,
    Marker,
    RunManifest,
    ShardReceipt,
    SourceKind,
    StageTiming,
    read_reason,
    read_reasons,
)
from leukoflow.storage.base import Storage
from leukoflow.tasks.imaging.cytoplasm import ratio_words
from leukoflow.tasks.intake.plan import read_summary
from leukoflow.tasks.report.page import LABEL_COLOURS as _LABEL_COLOURS
from leukoflow.tasks.report.page import POLICY as _POLICY
from leukoflow.tasks.report.page import STATUS_COLOURS as _STATUS_COLOURS
from leukoflow.tasks.report.page import bar as _bar
from leukoflow.tasks.report.page import dot as _dot
from leukoflow.tasks.report.page import moment as _moment
from leukoflow.tasks.report.page import number as _number
from leukoflow.tasks.report.page import probability, share
from leukoflow.tasks.report.page import seconds as _seconds
from leukoflow.tasks.report.page import style as _style
from leukoflow.tasks.report.page import table as _table
from leukoflow.tasks.report.page import text as _text
from leukoflow.tasks.report.page import tick as _tick
from leukoflow.tasks.review.field_view import Pixels, alpha_of, segment_settings
from leukoflow.tasks.review.wording import (
    BENIGN_BUT,
    MEAN_MALIGNANT,
    MEAN_MALIGNANT_NOTE,
    NO_ANSWER,
    RESEARCH_USE,
    Scale,
    answered_scale_note,
    class_name,
    mean_words,
    reason_words,
    scale_note,
    set_words,
)
from leukoflow.tasks.store.slides import patients_in_disagreement
from leukoflow.tasks.store.tables import shard_name, table_files

FIELDS_SHOWN = 12
"""Fields with outlines in each of the two galleries."""
BOXED = 3
"""Cells of a field that are boxed and may show their activation maps: those of highest attention."""
KEYS_SHOWN = 50
SLIDES_SHOWN, SLIDES_OPEN = 50, 15

_BINS = 15  # of the confidence histogram, from 0.25 (a guess among four) to 1
_SLIDES_KEPT = 200
_COLUMNS = (
    "image_key", "slide_id", "status", "reason", "label", "confidence", "prob_benign", "prob_early", "prob_pre",
    "prob_pro", "prediction_set", "n_cells", "shard", "zarr_index", "n_tiles", "um_per_px", "width_px", "height_px",
)  # fmt: skip
_FOR, _AGAINST = "#ffe11a", "#12c9ff"  # seen well on violet nuclei, and of no hue that outlines have
_STATUS_MEANING = {
    "predicted": "answered: a label with its confidence",
    "abstained": "no answer: the model does not know",
    "rejected": "quality too poor to classify",
    "quarantined": "could not be read",
}


@dataclass(slots=True)
class _Survey:
    """What one pass over the predictions keeps. `settings` say which picture's scale is a guess."""

    settings: SegmentSettings
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros((_BINS, 2), np.int64))  # predicted, abstained
    labels: Counter[str] = field(default_factory=Counter)  # of predicted fields
    without: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # status -> first (key, reason)
    suspicious: dict[str, list[tuple[float, str, dict[str, Any]]]] = field(default_factory=dict)  # slide -> heap
    uncertain: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)  # heap, least certain kept
    guessed: Counter[str] = field(default_factory=Counter)  # status -> without a scale, of another size than trained on


@dataclass(frozen=True, slots=True)
class _Totals:
    """The run's numbers, from its manifest or, while there is none, from what is committed."""

    run_id: str
    source_uri: str
    kind: SourceKind
    bundle: str
    bundle_digest: str
    device: str
    started_at: str
    finished_at: str | None
    members: int
    counts: tuple[tuple[str, int], ...]
    missing: int
    ignored: int
    truncated: str | None
    conflicts: int
    cells: int
    reasons: tuple[tuple[str, int], ...]
    timings: tuple[StageTiming, ...]
    slowest: tuple[tuple[str, float], ...]
    startup_seconds: float | None
    processing_seconds: float | None
    processed: int
    shards: int
    shard_size: int
    fingerprint: str
    software: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        return sum(count for _, count in self.counts)


def build_report(root: str, manifest: RunManifest | None) -> str:
    """The page for the run at `root` (a storage URI); without a manifest it is labelled as that of an unfinished run.

    Shows the pixels of about two dozen fields, read again from the source through the disposable decoder; where a
    field cannot be read any more, its mask is shown alone. Raises StorageError when there is no run at `root`, or none
    that has got as far as a plan.
    """
    reader = ProgressReader(root)
    storage = reader.storage
    progress = reader.read()
    if not reader.binding().is_planned:
        raise StorageError(
            f"run {progress.run_id} ended, or waits, before its source was planned, so there is nothing to report; "
            "`leukoflow status OUT RUN_ID` says why, and which command takes it up again"
        )
    receipts = list(_receipts(storage, _committed(storage)))
    totals = _from_manifest(storage, manifest) if manifest else _from_receipts(storage, progress, receipts)
    shards = [r.shard.name for r in receipts]
    keys = _part_keys(manifest, "predictions", shards).values()
    survey = _survey(storage, keys, segment_settings(totals.bundle))
    ranking = "slides.parquet" if manifest else "partial/slides.parquet"
    slides, split = _slides(storage, ranking), _disagreements(storage, ranking)
    with ExitStack() as stack:
        painter = _Painter(storage, totals, _part_keys(manifest, "cells", shards), stack)
        suspicious = [painter.card(row) for row in _most_suspicious(survey, slides)]
        uncertain = [painter.card(row) for _, _, row in sorted(survey.uncertain, key=lambda c: (-c[0], c[1]))]
        notes = painter.notes
    return _page(totals, manifest is not None, progress, survey, slides, split, suspicious, uncertain, notes)


# --- gathering -------------------------------------------------------------------------------------------------------


def _committed(storage: Storage) -> list[str]:
    return [name.removesuffix(".json") for name in storage.names("markers/predictions")]


def _receipts(storage: Storage, shards: Iterable[str]) -> Iterator[ShardReceipt]:
    for shard in shards:
        try:
            marker = loads(Marker, storage.read(f"markers/predictions/{shard}.json"), f"marker of shard {shard}")
        except FileNotFoundError:
            continue  # taken back meanwhile, since a part was altered
        if marker.receipt is not None:
            yield marker.receipt


def _from_manifest(storage: Storage, m: RunManifest) -> _Totals:
    return _Totals(
        run_id=m.run_id,
        source_uri=m.source.uri,
        kind=m.source.kind,
        bundle=m.bundle,
        bundle_digest=m.bundle_digest,
        device=m.device,
        started_at=m.started_at,
        finished_at=m.finished_at,
        members=m.members,
        counts=(
            ("predicted", m.predicted),
            ("abstained", m.abstained),
            ("rejected", m.rejected),
            ("quarantined", m.quarantined),
        ),
        missing=m.missing,
        ignored=m.ignored,
        truncated=m.source_truncated,
        conflicts=m.conflicts,
        cells=m.cells,
        reasons=read_reasons(m.reasons),
        timings=m.timings,
        slowest=m.slowest,
        startup_seconds=m.startup_seconds,
        processing_seconds=m.processing_seconds,
        processed=m.processed,
        shards=-(-m.members // m.shard_size),
        shard_size=m.shard_size,
        fingerprint=m.fingerprint,
        software=m.software,
        notes=m.notes,
    )


def _from_receipts(storage: Storage, progress: RunProgress, receipts: Sequence[ShardReceipt]) -> _Totals:
    binding = loads(RunBinding, storage.read("run.json"), storage.uri("run.json"))
    with storage.open("plan.parquet") as file:
        summary = read_summary(file)
    reasons: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    images: Counter[str] = Counter()
    for receipt in receipts:
        reasons.update(dict(receipt.reasons))
        for timing in receipt.timings:
            seconds[timing.stage] += timing.seconds  # type: ignore[assignment]
            images[timing.stage] += timing.images
    slowest = heapq.nlargest(10, ((r.shard.name, r.seconds) for r in receipts), key=lambda s: s[1])
    return _Totals(
        run_id=binding.run_id,
        source_uri=binding.source_uri,
        kind=summary.source.kind,
        bundle=binding.bundle,
        bundle_digest=binding.bundle_digest,
        device=binding.device,
        started_at=binding.started_at,
        finished_at=None,
        members=binding.members,
        counts=(
            ("predicted", progress.predicted),
            ("abstained", progress.abstained),
            ("rejected", progress.rejected),
            ("quarantined", progress.quarantined),
        ),
        missing=summary.missing,
        ignored=summary.ignored,
        truncated=summary.truncated,
        conflicts=0,
        cells=sum(r.cells for r in receipts),
        reasons=read_reasons(reasons.most_common(50)),
        timings=tuple(StageTiming(stage, float(seconds[stage]), images[stage]) for stage in seconds),
        slowest=tuple(slowest),
        startup_seconds=None,
        processing_seconds=None,
        processed=0,
        shards=binding.shards,
        shard_size=binding.shard_size,
        fingerprint=binding.fingerprint,
        software=(),
        notes=summary.remarks,
    )


def _part_keys(manifest: RunManifest | None, folder: str, shards: Iterable[str]) -> dict[str, str]:
    """The file that holds each shard's rows of a table: one of its own, or a merged one."""
    keys = {shard: f"{folder}/part-{shard}.parquet" for shard in shards}
    for file in table_files(manifest.parts if manifest else (), folder):
        keys |= {shard_name(ordinal): file.key for ordinal in file.shards}
    return keys


def _survey(storage: Storage, keys: Iterable[str], settings: SegmentSettings) -> _Survey:
    """One pass over the predictions of the committed shards."""
    survey = _Survey(settings)
    for key in dict.fromkeys(keys):
        try:
            with storage.open(key) as file:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=1024, columns=list(_COLUMNS)):
                    for row in batch.to_pylist():
                        _take(survey, row)
        except FileNotFoundError:
            continue  # committed, but not moved to its place yet
    return survey


def _take(survey: _Survey, row: dict[str, Any]) -> None:
    status, key = row["status"], row["image_key"]
    if status != "predicted":
        listed = survey.without.setdefault(status, [])
        if len(listed) < KEYS_SHOWN:
            listed.append((key, read_reason(row["reason"]) or ""))
    if status in ("predicted", "abstained"):
        guessed = Scale(row["width_px"], row["height_px"], row["um_per_px"], survey.settings).guessed
        survey.guessed[status] += guessed
    if row["label"] is None:
        return
    place = min(_BINS - 1, max(0, int((row["confidence"] - 0.25) / 0.75 * _BINS)))
    survey.histogram[place, 0 if status == "predicted" else 1] += 1
    if status == "predicted":
        survey.labels[row["label"]] += 1
    if row["zarr_index"] is None:
        return
    _keep(survey.uncertain, (-row["confidence"], key, row), FIELDS_SHOWN)
    if status != "predicted":
        return
    malignant = row["prob_early"] + row["prob_pre"] + row["prob_pro"]
    _keep(survey.suspicious.setdefault(_slide_of(row), []), (malignant, key, row), FIELDS_SHOWN)
    if len(survey.suspicious) > 2 * _SLIDES_KEPT:
        best = heapq.nlargest(_SLIDES_KEPT, survey.suspicious.items(), key=lambda item: max(c[0] for c in item[1]))
        survey.suspicious = dict(best)


def _keep(heap: list[tuple[float, str, dict[str, Any]]], item: tuple[float, str, dict[str, Any]], size: int) -> None:
    """Keeps the `size` items of highest score; the key decides ties, and is unique, so rows are never compared."""
    if len(heap) < size:
        heapq.heappush(heap, item)
    elif item[:2] > heap[0][:2]:
        heapq.heapreplace(heap, item)


def _slide_of(row: dict[str, Any]) -> str:
    return row["slide_id"] or row["image_key"].rpartition("/")[0] or "."


def _slides(storage: Storage, key: str) -> list[dict[str, Any]]:
    """The most urgent slides of a ranking; of an unfinished run, of what it handed over at its deadline, if it did."""
    try:
        with storage.open(key) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=SLIDES_SHOWN):
                return list(batch.to_pylist())
    except FileNotFoundError:
        pass
    return []


def _most_suspicious(survey: _Survey, slides: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best field of each slide, slides by urgency; then their second best, until there are enough."""
    ranks = {s["slide_id"]: s["rank"] for s in slides}
    ordered = sorted(
        (sorted(heap, key=lambda c: (-c[0], c[1])) for heap in survey.suspicious.values()),
        key=lambda fields: (ranks.get(_slide_of(fields[0][2]), math.inf), -fields[0][0], fields[0][1]),
    )
    chosen: list[dict[str, Any]] = []
    for depth in range(FIELDS_SHOWN):
        chosen += [fields[depth][2] for fields in ordered if len(fields) > depth]
        if len(chosen) >= FIELDS_SHOWN:
            break
    return chosen[:FIELDS_SHOWN]


# --- fields with their cells -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Card:
    """One field of a gallery: its row, the drawing (SVG), a remark about it, and whether its maps are stored.

    `settings` and `alpha` are the bundle's: how it takes a picture of unknown scale, and how often its sets may miss.
    """

    row: dict[str, Any]
    drawing: str
    remark: str
    settings: SegmentSettings
    alpha: float
    mapped: bool = False


@dataclass(frozen=True, slots=True)
class _Heat:
    """A cell's activation map of the field's label, times the cell's attention: what each position adds to the logit.

    `values` float64 [g, g] covers a square window of the mask, `side` pixels wide, with its corner at `x`, `y`.
    """

    x: float
    y: float
    side: int
    values: NDArray[np.float64]


class _Painter:
    """Draws single fields: pixels from the source where they can be had, outlines from the masks."""

    def __init__(self, storage: Storage, totals: _Totals, cells: Mapping[str, str], stack: ExitStack) -> None:
        self.storage = storage
        self._cell_files = cells
        self._pixels = Pixels(storage, totals.bundle, stack)
        self._settings, self._alpha = segment_settings(totals.bundle), alpha_of(totals.bundle)
        self.notes: list[str] = [self._pixels.note] if self._pixels.note else []

    def card(self, row: dict[str, Any]) -> _Card:
        """The drawing of the field of one row of the predictions. Failures become a remark, never an exception."""
        try:
            cells = self._cells(row)
            tile = self._tile(row, cells)
            group: Any = zarr.open_group(self.storage.zarr(f"masks.zarr/{row['shard']}", read_only=True), mode="r")
            labels = np.asarray(group["cells"][tile], np.uint16)
            affine = np.asarray(group["to_source"][tile], np.float64)
        except Exception as error:
            return _Card(row, "", f"its mask cannot be read ({type(error).__name__})", self._settings, self._alpha)
        photo, remark = None, ""
        if self._pixels.there:
            photo, remark = self._pixels.photo(row, labels.shape, affine)
        if row["n_tiles"] > 1:
            part = (
                f"tile {tile - row['zarr_index'] + 1} of {row['n_tiles']}, the one with the cell of highest attention"
            )
            remark = f"{part}; {remark}" if remark else part
        mine = {c["cell_id"]: c for c in cells if c["zarr_index"] == tile}
        heats = self._heats(row, tile, group, mine)
        drawing = _drawing(photo, labels, mine, heats or ())
        return _Card(row, drawing, remark, self._settings, self._alpha, heats is not None)

    def _heats(
        self, row: dict[str, Any], tile: int, masks: Any, cells: dict[int, dict[str, Any]]
    ) -> list[_Heat] | None:
        """The activation maps of a tile's heaviest cells, from storage alone; None where there are none to be had."""
        try:
            self.storage.read(f"markers/activations/{row['shard']}.json")  # without it, what lies there means nothing
            group: Any = zarr.open_group(
                self.storage.zarr(f"activations.zarr/{row['shard']}", read_only=True), mode="r"
            )
            maps = group["maps"]
            window, label = int(maps.attrs["window_px"]), list(maps.attrs["classes"]).index(row["label"])
            first, end = np.asarray(masks["cell_offsets"][tile : tile + 2]).tolist()
            measured = np.asarray(masks["cell_table"][first:end], np.float64)
            names = list(masks["cell_table"].attrs["columns"])
            ids, xs, ys = (measured[:, names.index(name)] for name in ("cell_id", "field_x", "field_y"))
            heats = []
            for cell in _heaviest(cells):
                (place,) = np.flatnonzero(ids == cell["cell_id"])
                values = np.nan_to_num(np.asarray(maps[first + place, label], np.float64)) * cell["attention"]
                corner = 0.5 - window / 2  # a pixel's centre lies half a pixel from its edge
                heats.append(_Heat(xs[place] + corner, ys[place] + corner, window, values))
        except Exception:  # maps are an extra: a field is shown without them
            return None
        return heats

    def _cells(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        columns = ["image_key", "cell_id", "attention", "nc_ratio", "cell_area_px", "zarr_index"]
        with self.storage.open(self._cell_files[row["shard"]]) as file:
            table = pq.read_table(file, columns=columns, filters=[("image_key", "=", row["image_key"])])
        return list(table.to_pylist())

    def _tile(self, row: dict[str, Any], cells: Sequence[dict[str, Any]]) -> int:
        """Row in the shard's masks; of a tiled field the tile that holds the cell of highest attention."""
        if row["n_tiles"] > 1 and cells:
            return int(max(cells, key=lambda c: (c["attention"], -c["cell_id"]))["zarr_index"])
        return int(row["zarr_index"])


def _heaviest(cells: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of highest attention, the first one first."""
    return sorted(cells.values(), key=lambda c: (-c["attention"], c["cell_id"]))[:BOXED]


def _drawing(
    photo: NDArray[np.uint8] | None,
    labels: NDArray[np.uint16],
    cells: dict[int, dict[str, Any]],
    heats: Sequence[_Heat] = (),
) -> str:
    """An SVG: the field, each cell's outline in the colour of its attention, and boxes at the three that weigh most.

    Their activation maps lie between the two, hidden until the page's switch shows them.
    """
    height, width = labels.shape
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" preserveAspectRatio="xMidYMid meet">']
    if photo is not None:
        ok, data = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
        assert ok
        encoded = base64.b64encode(data.tobytes()).decode()
        parts.append(f'<image width="{width}" height="{height}" href="data:image/jpeg;base64,{encoded}"/>')
    else:
        parts.append(f'<rect class="nophoto" width="{width}" height="{height}"/>')
    top = max((c["attention"] for c in cells.values()), default=0.0) or 1.0
    parts += _heat_layers(heats)
    for cell_id in [int(i) for i in np.unique(labels) if i]:
        cell = cells.get(cell_id)
        weight = cell["attention"] / top if cell else 0.0
        title = f"cell {cell_id}"
        if cell:
            title += f": attention {cell['attention']:.3f}, nucleus / cell area {ratio_words(cell['nc_ratio'])}"
        fill = "none" if photo is not None else _colour(weight) + "55"
        parts.append(
            f'<path d="{_outline(labels == cell_id)}" fill="{fill}" stroke="{_colour(weight)}" '
            f'stroke-width="{1.0 + 1.2 * weight:.1f}"><title>{title}</title></path>'
        )
    for rank, cell in enumerate(_heaviest(cells), 1):
        ys, xs = np.nonzero(labels == cell["cell_id"])
        if not len(xs):
            continue
        x0, y0, x1, y1 = int(xs.min()) - 2, int(ys.min()) - 2, int(xs.max()) + 3, int(ys.max()) + 3
        above = y0 >= 12
        parts.append(
            f'<rect class="box" x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}"/>'
            f'<text x="{max(1, min(x0, width - 10))}" y="{y0 - 2 if above else min(height - 2, y1 + 9)}">{rank}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _heat_layers(heats: Sequence[_Heat]) -> list[str]:
    """Translucent images, one per cell; their strength is relative to the field's strongest position."""
    top = max((float(np.abs(h.values).max()) for h in heats), default=0.0)
    if not top:
        return []
    layers = []
    for heat in heats:
        encoded = base64.b64encode(_heat_png(heat.values / top)).decode()
        layers.append(
            f'<image class="heat" x="{heat.x:.2f}" y="{heat.y:.2f}" width="{heat.side}" height="{heat.side}" '
            f'href="data:image/png;base64,{encoded}"/>'
        )
    return layers


def _heat_png(values: NDArray[np.float64]) -> bytes:
    """A PNG with one pixel per position; the browser smooths it. `values` [g, g] in -1..1; opacity is their size."""
    colours = [[int(c[i : i + 2], 16) for i in (5, 3, 1)] for c in (_AGAINST, _FOR)]  # OpenCV wants blue first
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.asarray(colours, np.uint8)[(values > 0).astype(np.intp)]
    pixels[..., 3] = np.round(np.abs(values) * 217)  # at most 85 %: the cell must be seen through it
    ok, data = cv2.imencode(".png", pixels)
    assert ok
    return data.tobytes()


def _outline(mask: NDArray[np.bool_]) -> str:
    """SVG path of a mask's outer contours, in pixel coordinates."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    path = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 0.7, True).reshape(-1, 2) + 0.5
        path.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z")
    return "".join(path)


def _colour(weight: float) -> str:
    """Attention relative to the field's highest, from slate over amber to red; seen well on violet and on white."""
    stops = ((0x47, 0x5A, 0x73), (0xE8, 0x9A, 0x1C), (0xD4, 0x1F, 0x2D))
    position = min(max(weight, 0.0), 1.0) * 2
    low, high = stops[min(1, int(position))], stops[min(1, int(position)) + 1]
    share = position - min(1, int(position))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


# --- the page --------------------------------------------------------------------------------------------------------


def _page(
    t: _Totals,
    finished: bool,
    progress: RunProgress,
    survey: _Survey,
    slides: Sequence[dict[str, Any]],
    split: Mapping[str, str],
    suspicious: Sequence[_Card],
    uncertain: Sequence[_Card],
    notes: Sequence[str],
) -> str:
    sections: list[tuple[str, str, Callable[[], str]]] = [
        ("slides", "Slides by urgency", lambda: _slides_section(slides, finished, split)),
        (
            "suspicious",
            "Most suspicious field of each slide, then others",
            lambda: _gallery("suspicious", suspicious, notes, "No field was predicted."),
        ),
        (
            "uncertain",
            "Least certain fields, answered or not",
            lambda: _gallery("uncertain", uncertain, (), "No field was classified."),
        ),
        ("distributions", "Distributions", lambda: _distributions(t, survey)),
        ("unpredicted", "Members without a prediction", lambda: _unpredicted(t, survey)),
        ("timings", "Timings", lambda: _timings(t)),
        ("provenance", "Provenance", lambda: _provenance(t)),
    ]
    contents = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{build()}</section>' for name, title, build in sections)
    state = "finished" if finished else progress.state
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_text(t.run_id)} · leukoflow</title><style>{_style()}</style></head><body>"
        f'<header><p class="brand">leukoflow <span>run report</span></p><h1>{_text(t.run_id)} '
        f'<span class="state {state}">{state}</span></h1><p class="quiet">{_text(t.source_uri)}</p></header>'
        f"<main>{_verdict(t, finished, progress, survey)}{_tiles(t)}<nav>{contents}</nav>{body}</main>"
        f"<footer>{_text(RESEARCH_USE, 400)}</footer></body></html>"
    )


def _verdict(t: _Totals, finished: bool, progress: RunProgress, survey: _Survey) -> str:
    sums = " + ".join(f"{_number(n)} {name}" for name, n in t.counts)
    if not finished:
        left = t.members - t.done
        text = (
            f"<b>Not a final result: the run is {progress.state}.</b> {_number(t.done)} of {_number(t.members)} "
            f"members are accounted for so far ({sums}), {_number(left)} are not."
        )
        if progress.state != "running":
            text += f" To continue: <code>{_text(progress.command, 400)}</code>"
        kind = "open"
    elif t.done == t.members:
        text = f"<b>Reconciled.</b> Each of the {_number(t.members)} members has exactly one row: {sums}."
        kind = "good"
    else:
        text = f"<b>The totals do not balance:</b> {sums} make {_number(t.done)}, not {_number(t.members)} members."
        kind = "bad"
    more = []
    if note := answered_scale_note(survey.guessed["predicted"], dict(t.counts)["predicted"], survey.settings):
        more.append(f"<b>{_text(note, 400)}.</b>")
    if t.missing:
        listed = "image that the manifest lists was" if t.missing == 1 else "images that the manifest lists were"
        named = "it" if t.missing == 1 else "them"
        more.append(f"{_number(t.missing)} {listed} not in the source; missing.parquet names {named}.")
    if t.truncated:
        more.append(f"The source is incomplete: {_text(t.truncated, 400)}.")
    if t.conflicts:
        more.append(
            f"{_number(t.conflicts)} row{'s show' if t.conflicts != 1 else ' shows'} identical images under different "
            "patients (duplicates.parquet): "
            "resolve this mix-up before acting on any result."
        )
    if progress.shadow_of is not None:
        more.insert(0, f"<b>A shadow run of {_text(progress.shadow_of)}, not the night's result:</b> a candidate "
                       "bundle was given the same images; do not act on this page.")  # fmt: skip
    if progress.failed_shards and not finished:
        more += [f"Shard {_text(shard)} failed: {_text(why, 400)}" for shard, why in progress.failed_shards[:10]]
    warnings = "".join(f'<p class="verdict warn">{line}</p>' for line in more)
    return f'<p class="verdict {kind}">{text}</p>{warnings}'


def _tiles(t: _Totals) -> str:
    tiles = "".join(
        f'<div class="tile">{_dot(_STATUS_COLOURS[name])}{name}'
        f"<b>{_number(n)}</b><small>{_share(n, t.members)} · {_STATUS_MEANING[name]}</small></div>"
        for name, n in t.counts
    )
    bar = "".join(
        f'<i style="width:{100 * n / max(1, t.members):.3f}%;background:{_STATUS_COLOURS[name]}" title="{name}"></i>'
        for name, n in t.counts
        if n
    )
    return f'<div class="tiles">{tiles}</div><div class="stack">{bar}</div>'


def _unranked(slides: Sequence[dict[str, Any]]) -> str:
    whole = sum(s["n_images"] == s["n_planned"] for s in slides)
    return f"{_number(whole)} of the {_number(len(slides))} slides shown are complete."


def _disagreements(storage: Storage, key: str) -> dict[str, str]:
    """Patients whose slides have different labels, over all slides of a ranking."""
    try:
        with storage.open(key) as file:
            table = pq.read_table(file, columns=["patient_id", "slide_id", "label", "n_predicted"])
    except FileNotFoundError:
        return {}
    return patients_in_disagreement(table.to_pylist())


def _disagreement_note(found: Mapping[str, str]) -> str:
    if not found:
        return ""
    rows = [(_text(patient[:12]), _text(remark, 500)) for patient, remark in list(found.items())[:KEYS_SHOWN]]
    count = "The slides of 1 patient do" if len(found) == 1 else f"The slides of {_number(len(found))} patients do"
    more = f'<p class="quiet">The first {KEYS_SHOWN}; slides.parquet has all.</p>' if len(found) > KEYS_SHOWN else ""
    return (
        f'<p class="verdict warn"><b>{count} not agree on the class.</b></p><details><summary>Which, and how'
        f"</summary>{_table((('patient', 'key'), ('', '')), rows)}{more}</details>"
    )


def _slides_section(slides: Sequence[dict[str, Any]], finished: bool, split: Mapping[str, str]) -> str:
    if not finished and not slides:
        return '<p class="quiet">Slides are ranked when the run has finished, or at its deadline.</p>'
    head = (
        ("#", "n"), ("slide", "key"), ("site", ""), ("first patient", "key"), ("urgency", "n"), ("", "chart"),
        ("likeliest class", ""), ("mean malignant probability", "n"), ("fields above ½", "n"), ("predicted", "n"),
        ("abst.", "n"), ("rej.", "n"), ("quar.", "n"), ("cells", "n"), ("most suspicious field", "key"),
    )  # fmt: skip
    rows = [
        (
            str(s["rank"]),
            _text(s["slide_id"], 60),
            _text(s["site"] or "–", 40),
            _text((s["patient_id"] or "–")[:12]),
            _probability(s["urgency"]) if s["label"] else "–",
            _bar(s["urgency"], "var(--accent)") if s["label"] else "",
            _slide_label(s),
            mean_words(s["malignant_score"]),
            _number(s["n_malignant"]),
            f"{_number(s['n_predicted'])} of {_number(s.get('n_planned', s['n_images']))}",
            _number(s["n_abstained"]),
            _number(s["n_rejected"]),
            _number(s["n_quarantined"]),
            _number(s["n_cells"]),
            _text(s["top_image_key"] or "–", 60),
        )
        for s in slides
    ]
    more = (
        f'<p class="quiet">The {SLIDES_SHOWN} most urgent ones; all are in slides.parquet.</p>'
        if len(slides) == SLIDES_SHOWN
        else ""
    )
    grouped = any(s["grouping"] == "folder" for s in slides)
    note = (
        '<p class="quiet">Where the manifest names no slide, the images of one folder count as a slide.</p>'
        if grouped
        else ""
    )
    if any(s["patient_id"] for s in slides):
        note += (
            '<p class="quiet">Where fields of several patients are on a slide, only the first patient is named; the '
            "web application shows which slides these are.</p>"
        )
    explained = (
        '<p class="quiet">Urgency is a priority, not a probability: the expected share of malignant fields; with few '
        "predicted fields it stays near one half, so that a slide with little to go by is not taken for a healthy "
        "one. The likeliest class is the "
        "one of highest mean probability; where that is Benign although the three malignant classes together are "
        f"likelier, the table says so. {MEAN_MALIGNANT}: {MEAN_MALIGNANT_NOTE[:1].lower()}{MEAN_MALIGNANT_NOTE[1:]} "
        "Beside it, the answered fields in which that probability is above one half.</p>"
    )
    first, rest = rows[:SLIDES_OPEN], rows[SLIDES_OPEN:]
    folded = f"<details><summary>{len(rest)} more</summary>{_table(head, rest)}</details>" if rest else ""
    if not finished:
        explained = (
            '<p class="verdict warn"><b>A partial ranking</b> of the images that were done at the deadline: the order '
            f"will change, and a slide that is absent here has no image done. {_unranked(slides)}</p>" + explained
        )
    return explained + note + _disagreement_note(split) + _table(head, first, "No slide.") + folded + more


def _probability(value: float) -> str:
    return _text(probability(value))


def _share(part: float, whole: float) -> str:
    return _text(share(part, whole))


def _slide_label(slide: Mapping[str, Any]) -> str:
    """A slide's likeliest class, with a remark where Benign is that although malignant is likelier than not."""
    shown = _label(slide["label"])
    if slide["label"] == "Benign" and (slide["malignant_score"] or 0.0) > 0.5:
        shown += f" <small>{BENIGN_BUT} {_probability(slide['malignant_score'])}</small>"
    return shown


def _label(label: str | None) -> str:
    if label is None:
        return "–"
    return f'<span class="tag">{_dot(_LABEL_COLOURS.get(label, "#888"))}{_text(class_name(label))}</span>'


def _gallery(name: str, cards: Sequence[_Card], notes: Sequence[str], empty: str) -> str:
    if not cards:
        return f'<p class="quiet">{empty}</p>'
    scale = "".join(
        f"{_dot(_colour(weight))}{name} " for weight, name in ((0.0, "low"), (0.5, "middle"), (1.0, "high"))
    )
    lead = (
        f'<p class="quiet">Outlines: cells as segmented, coloured by attention within the field: {scale}. The three '
        "cells that weighed most are boxed and numbered. Hover over an outline for its numbers.</p>"
    )
    lead += "".join(f'<p class="verdict warn">{_text(note, 400)}</p>' for note in notes)
    lead += _heat_switch(name, cards)
    return lead + '<div class="gallery">' + "".join(map(_figure, cards)) + "</div>"


def _heat_switch(name: str, cards: Sequence[_Card]) -> str:
    """What shows the activation maps of a gallery (a checkbox that the style sheet looks at), and who has none."""
    bare = sum(not card.mapped for card in cards)
    switch = note = ""
    if bare < len(cards):
        switch = (
            f'<input class="show" type="checkbox" id="{name}-heat"><label for="{name}-heat">Activation maps</label>'
            '<p class="quiet heatkey">What each place in the boxed cells adds to the evidence for the likeliest class '
            f"of the field, times the cell's attention: {_dot(_FOR)}for it {_dot(_AGAINST)}against it. The strongest "
            "place of each field has the full colour.</p>"
        )
    if bare:
        who = f"{bare} of these {len(cards)} fields have" if switch else "These fields have"
        note = (
            f'<p class="quiet">{who} no activation maps. Maps are made together with features: where features were '
            "taken over from a run with another classifier, or maps were lost, a new run without --reuse makes them."
            "</p>"
        )
    return switch + note


_PROBABILITIES = ("prob_benign", "prob_early", "prob_pre", "prob_pro")


def _figure(card: _Card) -> str:
    row = card.row
    bars = "".join(
        f'<tr><td>{class_name(name)}</td><td class="chart">{_bar(row[column], _LABEL_COLOURS[name])}</td>'
        f'<td class="n">{_probability(row[column])}</td></tr>'
        for name, column in zip(CLASSES, _PROBABILITIES, strict=True)
    )
    lines = [f'<p class="key">{_text(row["image_key"], 80)}</p>']
    if row["slide_id"]:
        lines.append(f'<p class="quiet">slide {_text(row["slide_id"], 60)}</p>')
    scale = Scale(row["width_px"], row["height_px"], row["um_per_px"], card.settings)
    if row["status"] == "predicted":
        if scale.caution:
            lines.append(f'<p class="verdict warn">{scale.caution}</p>')
        confidence = _probability(row["confidence"])
        lines.append(f'<p class="said">{_label(row["label"])} <span class="n">{confidence}</span></p>')
        lines.append(f"<table>{bars}</table>")
        said = set_words(row["prediction_set"] or (), card.alpha, [row[column] for column in _PROBABILITIES])
        lines.append(f'<p class="quiet">{_text(said, 500)}</p>')
    else:
        what, remedy, measured = reason_words(row["reason"], scale)
        more = f" Measured: {_text(measured)}." if measured else ""
        lines.append(
            f'<p class="said">{NO_ANSWER}</p><p class="quiet"><b>{_text(what)}</b> {_text(remedy, 600)}{more}</p>'
        )
        lines.append(f"<details><summary>Probabilities, which are no answer</summary><table>{bars}</table></details>")
    n_cells = row["n_cells"] or 0
    lines.append(f'<p class="quiet">{count_of(n_cells, "cell")}</p>')
    if card.remark:
        lines.append(f'<p class="quiet">{_text(card.remark, 300)}</p>')
    drawing = card.drawing or '<div class="nodrawing">no drawing</div>'
    return f"<figure>{drawing}<figcaption>{''.join(lines)}</figcaption></figure>"


def _distributions(t: _Totals, survey: _Survey) -> str:
    counts = [survey.labels[name] for name in CLASSES]
    total = sum(counts)
    labels = _table(
        (("label", ""), ("fields", "n"), ("share", "n"), ("", "chart")),
        [
            (_label(name), _number(n), _share(n, total), _bar(n / max(1, *counts), _LABEL_COLOURS[name]))
            for name, n in zip(CLASSES, counts, strict=True)
        ],
    )
    abstained = dict(t.counts)["abstained"]
    apart = f" Fields that were abstained from, {_number(abstained)}, have no label here." if abstained else ""
    return (
        f'<div class="two"><div><h3>Labels</h3><p class="quiet">Of the {_number(total)} predicted fields.{apart}</p>'
        f"{labels}"
        f'<p class="quiet">{_number(t.cells)} cells were found.</p></div>'
        f'<div><h3>Highest probability</h3><p class="quiet">{_dot(_STATUS_COLOURS["predicted"])}predicted '
        f"{_dot(_STATUS_COLOURS['abstained'])}abstained</p>"
        f"{_histogram(survey.histogram)}</div></div>"
    )


def _histogram(counts: NDArray[np.int64]) -> str:
    """Stacked columns: fields by their highest probability, which is a confidence only where there is an answer."""
    width, height, foot, side = 460, 170, 22, 44
    top = int(counts.sum(axis=1).max(initial=0))
    if not top:
        return '<p class="quiet">No field was classified.</p>'
    step = (width - side) / _BINS
    parts = [f'<svg class="plot" viewBox="0 0 {width} {height + foot}" role="img">']
    for part in (0.5, 1.0):
        y = height - part * (height - 14)
        parts.append(f'<line x1="{side}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{side - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(top * part)}</text>')
    for i, (predicted, abstained) in enumerate(counts.tolist()):
        low, high = 0.25 + 0.75 * i / _BINS, 0.25 + 0.75 * (i + 1) / _BINS
        base = float(height)
        for n, name in ((predicted, "predicted"), (abstained, "abstained")):
            tall = n / top * (height - 14)
            base -= tall
            parts.append(
                f'<rect x="{side + i * step + 1:.1f}" y="{base:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" '
                f'fill="{_STATUS_COLOURS[name]}"><title>{low:.2f} to {high:.2f}: {n} {name}</title></rect>'
            )
    parts.append(f'<line class="axis" x1="{side}" x2="{width}" y1="{height}" y2="{height}"/>')
    for value in (0.25, 0.5, 0.75, 1.0):
        x = side + (value - 0.25) / 0.75 * (width - side)
        anchor = "end" if value == 1.0 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height + 16}" text-anchor="{anchor}">{value:g}</text>')
    return "".join(parts) + "</svg>"


def _unpredicted(t: _Totals, survey: _Survey) -> str:
    out = [
        "<h3>Reasons</h3>",
        _table((("reason", ""), ("members", "n")), [(_text(r), _number(n)) for r, n in t.reasons]),
    ]
    counts = dict(t.counts)
    if note := scale_note(survey.guessed["abstained"], counts["abstained"], survey.settings):
        out.append(f'<p class="verdict warn">{_text(note, 600)}.</p>')
    for status in ("quarantined", "rejected", "abstained"):
        listed = survey.without.get(status, [])
        if not listed:
            continue
        more = counts[status] - len(listed)
        note = f'<p class="quiet">and {_number(more)} more, all in predictions/</p>' if more > 0 else ""
        table = _table((("image", "key"), ("reason", "")), [(_text(k, 100), _text(r, 300)) for k, r in listed])
        is_open = " open" if status == "quarantined" else ""
        out.append(f"<details{is_open}><summary>{status}: {_number(counts[status])}</summary>{table}{note}</details>")
    return "".join(out)


def _timings(t: _Totals) -> str:
    total = sum(s.seconds for s in t.timings) or 1.0
    stages = _table(
        (("stage", ""), ("worker time", "n"), ("images", "n"), ("per image", "n"), ("share", "n"), ("", "chart")),
        [
            (
                _text(s.stage),
                _seconds(s.seconds),
                _number(s.images),
                f"{_number(1000 * s.seconds / max(1, s.images), 1)} ms",
                _share(s.seconds, total),
                _bar(s.seconds / total, "var(--accent)"),
            )
            for s in t.timings
        ],
        "No shard is done yet.",
    )
    pace = ""
    if t.processing_seconds and t.startup_seconds is not None:
        pace = (
            f"<p>{_number(t.processed)} members in {_seconds(t.processing_seconds)}, "
            f"<b>{t.processed / t.processing_seconds:.1f} per second</b>, after {_seconds(t.startup_seconds)} of "
            'start-up. <span class="quiet">Stages reused from an earlier session are not counted.</span></p>'
        )
    slowest = _table(
        (("slowest shards", "key"), ("worker time", "n")),
        [(_text(name), _seconds(seconds)) for name, seconds in t.slowest],
    )
    return f'{pace}<div class="two"><div>{stages}</div><div>{slowest}</div></div>'


def _provenance(t: _Totals) -> str:
    facts = [
        ("source", _text(t.source_uri, 300)),
        ("kind", _text(t.kind)),
        ("bundle", f"{_text(t.bundle)} · {_text(t.bundle_digest)}"),
        ("device", _text(t.device)),
        ("fingerprint", _text(t.fingerprint)),
        ("shards", f"{_number(t.shards)} of up to {_number(t.shard_size)} images"),
        ("started", _moment(t.started_at)),
        ("finished", _moment(t.finished_at) if t.finished_at else "–"),
        (
            "ignored",
            f"{_number(t.ignored)} {'entry whose name is' if t.ignored == 1 else 'entries whose names are'} not that "
            "of an image (folders, files of the operating system)",
        ),
        *(("note", _text(note, 400)) for note in t.notes),
        *((_text(name), _text(version)) for name, version in t.software),
    ]
    return _table((("", ""), ("", "key")), facts)
