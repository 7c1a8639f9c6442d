"""`report.html`: what became of a run, on one page that needs nothing else. Works on unfinished runs too."""

from __future__ import annotations

from contextlib import ExitStack

from leukoflow.core.errors import StorageError
from leukoflow.core.method import SegmentSettings
from leukoflow.runs.progress import ProgressReader, RunBinding, RunProgress
from leukoflow.runs.receipts import RunTotals, StageTiming
from leukoflow.runs.records import CLASSES, Marker, RunManifest, ShardReceipt, SourceKind, read_reason, read_reasons
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
    answered_scale_note,
    scale_note,
)

SLIDES_OPEN = 15
"""Slides that are shown without unfolding the others."""

_SECTIONS = (
    ("slides", "Slides by urgency"),
    ("suspicious", "Most suspicious field of each slide, then others"),
    ("uncertain", "Least certain fields, answered or not"),
    ("distributions", "Distributions"),
    ("unpredicted", "Members without a prediction"),
    ("timings", "Timings"),
    ("provenance", "Provenance"),
)
_STATUS_MEANING = {
    "predicted": "answered: a label with its confidence",
    "abstained": "no answer: the model does not know",
    "rejected": "quality too poor to classify",
    "quarantined": "could not be read",
}


def build_report(root: str, manifest: RunManifest | None) -> str:
    """Build the page for the run at `root` (a storage URI); without a manifest it is labelled as of an unfinished run.

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
    receipts = list(read_receipts(storage, committed_shards(storage)))
    totals = totals_of_manifest(manifest) if manifest else totals_of_receipts(storage, progress, receipts)
    shards = [r.shard.name for r in receipts]
    keys = part_keys(manifest, "predictions", shards).values()
    survey = survey_predictions(storage, keys, segment_settings(totals.bundle))
    ranking = "slides.parquet" if manifest else "partial/slides.parquet"
    slides, disagreements = read_slides(storage, ranking), read_disagreements(storage, ranking)
    with ExitStack() as stack:
        painter = Painter(storage, totals.bundle, part_keys(manifest, "cells", shards), stack)
        suspicious = [painter.figure(row) for row in most_suspicious(survey, slides)]
        uncertain = [painter.figure(row) for row in survey.least_certain]
        notes = painter.notes
    counts = dict(totals.counts)
    return render(
        "run.html",
        sections=_SECTIONS,
        totals=totals,
        counts=counts,
        status_meaning=_STATUS_MEANING,
        finished=manifest is not None,
        progress=progress,
        answered_note=answered_scale_note(survey.guessed["predicted"], counts["predicted"], survey.settings),
        abstained_note=scale_note(survey.guessed["abstained"], counts["abstained"], survey.settings),
        without=survey.without,
        slides=slides,
        slides_open=SLIDES_OPEN,
        slides_shown=SLIDES_SHOWN,
        disagreements=list(disagreements.items()),
        keys_shown=KEYS_SHOWN,
        suspicious=suspicious,
        uncertain=uncertain,
        notes=notes,
        labels=[(name, survey.labels[name]) for name in CLASSES],
        histogram=_histogram(survey),
        attention=[(attention_colour(weight), name) for weight, name in ((0.0, "low"), (0.5, "middle"), (1.0, "high"))],
        evidence={"for": FOR, "against": AGAINST},
        no_answer=NO_ANSWER,
        benign_but=BENIGN_BUT,
        mean_malignant=MEAN_MALIGNANT,
        mean_malignant_note=MEAN_MALIGNANT_NOTE[:1].lower() + MEAN_MALIGNANT_NOTE[1:],
        research_use=RESEARCH_USE,
    )


def _from_receipts(storage: Storage, progress: RunProgress, receipts: Sequence[ShardReceipt]) -> _Totals:
    binding = loads(RunBinding, storage.read("run.json"), storage.uri("run.json"))
    with storage.open("plan.parquet") as file:
        summary = read_summary(file)
    totals = RunTotals.of(receipts)
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
            ("predicted", progress.counts.predicted),
            ("abstained", progress.counts.abstained),
            ("rejected", progress.counts.rejected),
            ("quarantined", progress.counts.quarantined),
        ),
        missing=summary.missing,
        ignored=summary.ignored,
        truncated=summary.truncated,
        conflicts=0,
        cells=totals.counts.cells,
        reasons=read_reasons(totals.frequent_reasons),
        timings=totals.timings,
        slowest=totals.slowest,
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
    return charts.histogram(
        [
            charts.Series(name, colour_of(name), column)
            for name, column in zip(("predicted", "abstained"), survey.histogram.T.tolist(), strict=True)
        ],
        charts.Axis("highest probability", LOWEST, 1.0),
        (0.25, 0.5, 0.75, 1.0),
        "Fields by their highest probability",
    )
