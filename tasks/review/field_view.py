"""A field of a run again, as pictures: pixels from the source, masks and activation maps from what the run has stored.

The pixels are read through the disposable decoder and held against the digest that the run noted; where they are gone
or have changed, the view says so, and what is stored is shown alone.
"""

from __future__ import annotations

import atexit
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from leukoflow import models
from leukoflow.core.config import LimitSettings, RunConfig
from leukoflow.core.errors import LeukoflowError, NotFoundError, RequestError
from leukoflow.core.method import MethodSettings, SegmentSettings
from leukoflow.runs.records import CLASSES, Member, SourceKind, Status
from leukoflow.sources.members import open_reader
from leukoflow.storage.base import Storage
from leukoflow.tasks.decoding.ingest import Decoded, Decoder
from leukoflow.tasks.imaging.normalize import normalize
from leukoflow.tasks.inference.single import MAX_VIEWS, TileView
from leukoflow.tasks.intake.plan import read_shard, read_summary
from leukoflow.tasks.review.wording import reason_words
from leukoflow.tasks.review.worklist import RunTable, list_runs, open_run_table

DEFAULT_ALPHA = 0.05
ERASED = "the patient was erased from this run, and with the patient what was computed from the image"


@dataclass(frozen=True, slots=True)
class FieldView:
    """A field of a run as pictures.

    `pixels` is False where the tiles' `original` and `normalized` are blank, since the image cannot be had any more;
    `mapped` where `maps` are zeros for want of activation maps. `remarks` say in words what is absent and why.
    """

    ordinal: int
    tiles: tuple[TileView, ...]
    cells: pa.Table  # rows of leukoflow.runs.schema.CELLS, in the order of cell_id
    pixels: bool
    mapped: bool
    remarks: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class ReferenceCell:
    """A cell to compare with: from a field that the model was sure of. Nobody but the model has said what it is.

    `picture` uint8 [h, w, 3], at the model's scale.
    """

    run_key: str
    ordinal: int
    cell_id: int
    label: str
    confidence: float
    attention: float
    picture: NDArray[np.uint8]
    caption: str


# --- pixels ----------------------------------------------------------------------------------------------------------


class Pixels:
    """The images of a run again, through the disposable decoder; `note` says why where none can be had."""

    def __init__(self, storage: Storage, bundle: str, stack: ExitStack, decoder: Decoder | None = None) -> None:
        self.note = ""
        self._plan: pq.ParquetFile | None = None
        self._reader: Any = None
        self._decoder = decoder
        try:
            source = read_summary(stack.enter_context(storage.open("plan.parquet"))).source
            if source.kind is SourceKind.COMPRESSED_TAR:
                self.note = "The source is a compressed archive, which is not unpacked again: only masks are shown."
                return
            self._plan = pq.ParquetFile(stack.enter_context(storage.open("plan.parquet")))
            self._reader = stack.enter_context(open_reader(source))
            if decoder is None:
                self._decoder = stack.enter_context(Decoder(default_limits(), segment_settings(bundle)))
        except (LeukoflowError, OSError, pa.ArrowException) as error:
            self._reader = None
            self.note = f"The source can no longer be read, so only masks are shown ({error})."

    @property
    def there(self) -> bool:
        """Whether the source can be read at all."""
        return self._reader is not None

    def image(self, row: Mapping[str, Any]) -> tuple[Decoded | None, str]:
        """The decoded image of a row of the predictions; None with the reason where it cannot be had."""
        if self._reader is None or self._decoder is None:
            return None, self.note
        try:
            decoded = self._decoder.decode_one(self._reader.read(self._member(row)), row["um_per_px"])
        except (LeukoflowError, OSError) as error:
            return None, f"the image can no longer be read ({error}); only the mask is shown"
        if decoded.rgb is None:
            return None, f"the image can no longer be read ({decoded.reason}); only the mask is shown"
        known = row.get("member_sha256")
        if known is not None and decoded.sha256 != known:
            return None, "the image is not the one that the run saw: the source has changed; only the mask is shown"
        return decoded, ""

    def photo(
        self, row: Mapping[str, Any], shape: tuple[int, ...], affine: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8] | None, str]:
        """The pixels under a mask, uint8 [H, W, 3], white beyond the image; None with the reason."""
        decoded, remark = self.image(row)
        if decoded is None:
            return None, remark
        piece = cut(decoded, shape, affine)
        if piece is None:
            return None, "the image's scale no longer fits its mask; only the mask is shown"
        out = np.full((*shape[:2], 3), 255, np.uint8)
        out[: piece.shape[0], : piece.shape[1]] = piece
        return out, ""

    def _member(self, row: Mapping[str, Any]) -> Member:
        assert self._plan is not None
        for member in read_shard(self._plan, int(row["shard"])):
            if member.image_key == row["image_key"]:
                return member
        raise LeukoflowError("the plan does not list it")


def corner(affine: NDArray[np.float64]) -> tuple[int, int]:
    """Where a tile begins in its scaled image (x, y), from its affine map [2, 3] to source pixels."""
    x, y = (round((affine[i, 2] + 0.5) / affine[i, i] - 0.5) for i in (0, 1))
    return int(x), int(y)


def cut(
    decoded: Decoded, shape: tuple[int, ...], affine: NDArray[np.float64], picture: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8] | None:
    """What a tile shows of its image, or of a `picture` made of it, uint8 [h, w, 3]; None where the scales differ."""
    assert decoded.rgb is not None
    shown = decoded.rgb if picture is None else picture
    x, y = corner(affine)
    piece = shown[y : y + shape[0], x : x + shape[1]]
    if piece.size == 0 or abs(shown.shape[1] - decoded.source_width / affine[0, 0]) > 1:
        return None
    return piece


def default_limits() -> LimitSettings:
    """Limits of decoding as a run has them by default."""
    found: LimitSettings = RunConfig.model_fields["limits"].default
    return found


def segment_settings(bundle: str) -> SegmentSettings:
    """The geometry that a run used; where its bundle is not here, the defaults (a misfit is noticed and said)."""
    method = method_of(bundle)
    return SegmentSettings() if method is None else method.segment


@lru_cache(maxsize=16)
def alpha_of(bundle: str) -> float:
    """The miss rate that a bundle's prediction sets were built for; the default where the bundle is not here."""
    calibration = (bundle_document(bundle) or {}).get("calibration") or {}
    alpha = calibration.get("alpha", DEFAULT_ALPHA)
    return float(alpha) if isinstance(alpha, int | float) else DEFAULT_ALPHA


@lru_cache(maxsize=16)
def max_ood_of(bundle: str) -> float | None:
    """The distance above which a bundle abstains; None where the bundle is not here, or has no such limit."""
    limit = ((bundle_document(bundle) or {}).get("calibration") or {}).get("max_ood")
    return float(limit) if isinstance(limit, int | float) and limit < 1e9 else None


@lru_cache(maxsize=16)
def method_of(bundle: str) -> MethodSettings | None:
    """The settings of a bundle, by name or folder; None where it is not here. Its weights are not looked at."""
    document = bundle_document(bundle)
    if document is None:
        return None
    try:
        return MethodSettings.model_validate(document["method"])
    except (KeyError, ValueError):
        return None


def bundle_document(bundle: str) -> dict[str, Any] | None:
    """What `bundle.json` says, for people and pictures: found without torch where the bundle lies on this machine."""
    path = Path(bundle)
    if not bundle.startswith("s3://"):
        if not (path / "bundle.json").is_file() and path.name == bundle:
            path = Path(models.__file__).parent / "default" / path.name
        try:
            found = json.loads((path / "bundle.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None
    from leukoflow.models.fetch import read_remote

    try:
        found = json.loads(read_remote(bundle))
    except (LeukoflowError, ValueError):
        return None
    return found if isinstance(found, dict) else None


_decoders: dict[str, Decoder] = {}
_decoders_lock = threading.Lock()


def shared_decoder(bundle: str) -> Decoder:
    """A decoder that stays with this process, one for each geometry: starting its child costs more than an image."""
    settings = segment_settings(bundle)
    with _decoders_lock:
        key = settings.model_dump_json()
        if key not in _decoders:
            _decoders[key] = Decoder(default_limits(), settings)
            atexit.register(_decoders[key].close)
        return _decoders[key]


# --- a field ---------------------------------------------------------------------------------------------------------


def view(table: RunTable, ordinal: int, decoder: Decoder | None = None) -> FieldView:
    """A field of a run as pictures; what cannot be had is absent, and `remarks` say why.

    Raises NotFoundError where the run has no such field. Without a `decoder`, one that stays with the process is used.
    """
    row = table.stored_row(ordinal)
    cells = table.cells(ordinal)
    status = Status(row["status"])
    if status is Status.QUARANTINED:
        return FieldView(ordinal, (), cells, False, False, (" ".join(filter(None, reason_words(row["reason"])[:2])),))
    with ExitStack() as stack:
        bundle = table.bundle[0]
        pixels = Pixels(table.storage, bundle, stack, decoder or shared_decoder(bundle))
        decoded, remark = pixels.image(row)
        remarks = [remark] if remark else []
        if row["zarr_index"] is None or not row["n_tiles"]:
            return _without_masks(table, ordinal, row, cells, decoded, remarks)
        return _with_masks(table, ordinal, row, cells, decoded, remarks)


def _normal(table: RunTable, decoded: Decoded, remarks: list[str]) -> NDArray[np.uint8]:
    assert decoded.rgb is not None
    method = method_of(table.bundle[0])
    if method is None:
        remarks.append("the run's bundle is not on this machine, so the image is shown without normalisation")
        return decoded.rgb
    return normalize(decoded.rgb, method.normalize)


def _without_masks(
    table: RunTable, ordinal: int, row: dict[str, Any], cells: pa.Table, decoded: Decoded | None, remarks: list[str]
) -> FieldView:
    """A rejected field: its picture alone, or a corner of it where it is large."""
    remarks.append(f"nothing was segmented: {row['reason']}" if row["reason"] else "nothing was segmented")
    if decoded is None or decoded.rgb is None:
        return FieldView(ordinal, (), cells, False, False, tuple(remarks))
    normal = _normal(table, decoded, remarks)
    height, width = decoded.rgb.shape[:2]
    scale = decoded.source_width / width
    affine = np.array([[scale, 0, 0.5 * scale - 0.5], [0, scale, 0.5 * scale - 0.5]], np.float32)
    tile = TileView(
        original=decoded.rgb,
        normalized=normal,
        semantic=np.zeros((height, width), np.uint8),
        cells=np.zeros((height, width), np.uint16),
        to_source=affine,
        cell_ids=np.zeros(0, np.int32),
        field_x=np.zeros(0, np.float32),
        field_y=np.zeros(0, np.float32),
        maps=np.zeros((0, len(CLASSES), 1, 1), np.float16),
        window_px=1,
    )
    return FieldView(ordinal, (tile,), cells, True, False, tuple(remarks))


def _with_masks(
    table: RunTable, ordinal: int, row: dict[str, Any], cells: pa.Table, decoded: Decoded | None, remarks: list[str]
) -> FieldView:
    shard = row["shard"]
    try:
        masks: Any = zarr.open_group(table.storage.zarr(f"masks.zarr/{shard}", read_only=True), mode="r", zarr_format=3)
        names = list(masks["cell_table"].attrs["columns"])
        first, count = int(row["zarr_index"]), int(row["n_tiles"])
        chosen = _chosen(cells, first, count)
        if len(chosen) < count:
            remarks.append(f"{len(chosen)} of {count} tiles are shown, those with most attention")
        normal = None if decoded is None else _normal(table, decoded, remarks)
        maps = _maps(table.storage, shard)
        tiles = [_tile(masks, names, i, decoded, normal, maps) for i in chosen]
    except (KeyError, ValueError, OSError, LeukoflowError) as error:
        remarks.append(f"the masks cannot be read ({type(error).__name__}); `leukoflow verify` says what to do")
        return FieldView(ordinal, (), cells, False, False, tuple(remarks))
    fits = decoded is not None and all(fit for _, fit in tiles)
    if decoded is not None and not fits:
        remarks.append("the image's scale no longer fits its mask; only the mask is shown")
    shown = tuple(tile for tile, _ in tiles)
    if len(cells) and not any(tile.semantic.any() for tile in shown):
        remarks.append(ERASED)
    if maps is None:
        remarks.append(
            "there are no activation maps: features were taken over from a run with another classifier, or the maps "
            "were lost; a new run without --reuse makes them"
        )
    return FieldView(ordinal, shown, cells, fits, maps is not None, tuple(remarks))


def _chosen(cells: pa.Table, first: int, count: int) -> list[int]:
    """Tiles that become pictures, in order: all, or those with most attention."""
    if count <= MAX_VIEWS:
        return list(range(first, first + count))
    places = cells["zarr_index"].to_numpy() - first
    weight = np.bincount(places, weights=cells["attention"].to_numpy().astype(np.float64), minlength=count)
    return sorted(first + int(i) for i in np.argsort(-weight, kind="stable")[:MAX_VIEWS])


def _maps(storage: Storage, shard: str) -> Any | None:
    """The array of a shard's activation maps; None where it has none."""
    try:
        storage.read(f"markers/activations/{shard}.json")  # without it, what lies there means nothing
        group: Any = zarr.open_group(storage.zarr(f"activations.zarr/{shard}", read_only=True), mode="r", zarr_format=3)
        maps = group["maps"]
        return maps if list(maps.attrs["classes"]) == list(CLASSES) else None
    except Exception:  # maps are an extra: a field is shown without them
        return None


def _tile(
    masks: Any,
    names: list[str],
    place: int,
    decoded: Decoded | None,
    normal: NDArray[np.uint8] | None,
    maps: Any | None,
) -> tuple[TileView, bool]:
    """One tile, and whether its pixels are there."""
    semantic = np.asarray(masks["semantic"][place], np.uint8)
    labels = np.asarray(masks["cells"][place], np.uint16)
    affine = np.asarray(masks["to_source"][place], np.float32)
    begin, end = np.asarray(masks["cell_offsets"][place : place + 2]).tolist()
    measured = np.asarray(masks["cell_table"][begin:end], np.float32)
    ids, xs, ys = (measured[:, names.index(n)] for n in ("cell_id", "field_x", "field_y"))
    original = normalized = None
    exact = affine.astype(np.float64)
    if decoded is not None:
        original = cut(decoded, semantic.shape, exact)
        normalized = cut(decoded, semantic.shape, exact, normal)
    if original is None or normalized is None:
        blank = np.full((*semantic.shape, 3), 255, np.uint8)
        original = normalized = blank
        fits = False
    else:
        fits = True
    height, width = original.shape[:2]
    window, values = 1, np.zeros((len(ids), len(CLASSES), 1, 1), np.float16)
    if maps is not None:
        window = int(maps.attrs["window_px"])
        values = np.nan_to_num(np.asarray(maps[begin:end], np.float16))
    tile = TileView(
        original=np.ascontiguousarray(original),
        normalized=np.ascontiguousarray(normalized),
        semantic=semantic[:height, :width],
        cells=labels[:height, :width],
        to_source=affine,
        cell_ids=ids.astype(np.int32),
        field_x=xs,
        field_y=ys,
        maps=values,
        window_px=window,
    )
    return tile, fits


# --- cells to compare with -------------------------------------------------------------------------------------------

REFERENCE_CONFIDENCE = 0.9
REFERENCE_PX = 72
_TRIES = 4  # fields that are looked at for one cell, since pixels may be gone
CAPTION = (
    "{label}, as the model sees it: the cell that weighed most in a field it was sure of ({confidence:.0%}). No expert "
    "has confirmed it."
)
CONFIRMED = "{label}: the cell that weighed most in a field that a reviewer has labelled so."


def reference_cells(out: str, run_key: str, label: str, n: int = 6) -> tuple[ReferenceCell, ...]:
    """Cells of a class to hold others against: from this run, or the latest finished one that has some.

    They are the cells of highest attention in fields that were predicted confidently, each of another slide as far as
    there are, fields that a reviewer has labelled so first. Fewer than `n`, or none, where there are no more. Raises
    RequestError for a label that there is not, RunNotFoundError.
    """
    if label not in CLASSES or not 1 <= n <= 24:
        raise RequestError(f"reference cells are of one of {', '.join(CLASSES)}, 1 to 24 of them")
    found = _references(open_run_table(out, run_key), label, n)
    if found:
        return found
    for line in list_runs(out):
        if line.run_key == run_key or line.state != "finished" or line.shadow_of is not None:
            continue
        try:
            found = _references(open_run_table(out, line.run_key), label, n)
        except LeukoflowError:
            continue
        if found:
            return found
    return ()


_kept: OrderedDict[tuple[str, ...], tuple[ReferenceCell, ...]] = OrderedDict()
_KEPT = 64


def _references(table: RunTable, label: str, n: int) -> tuple[ReferenceCell, ...]:
    about = (table.out, table.run_key, table.stamp, table.reviews.verdicts.head, label, str(n))
    if about in _kept:
        return _kept[about]
    decoder = shared_decoder(table.bundle[0])
    found: list[ReferenceCell] = []
    with ExitStack() as stack:
        pixels = Pixels(table.storage, table.bundle[0], stack, decoder)
        if not pixels.there:
            return ()
        for ordinal, confirmed in _candidates(table, label, n * _TRIES):
            cell = _reference(table, pixels, ordinal, label, confirmed)
            if cell is not None:
                found.append(cell)
            if len(found) == n:
                break
    _kept[about] = tuple(found)
    while len(_kept) > _KEPT:
        _kept.popitem(last=False)
    return tuple(found)


def _candidates(table: RunTable, label: str, n: int) -> list[tuple[int, bool]]:
    """Ordinals of fields, and whether a reviewer has labelled them so."""
    frame = table.frame
    place = CLASSES.index(label)
    said = {
        target[1]: s.decision.said
        for target, s in table.reviews.standings.items()
        if target[0] == "image" and s.decision is not None
    }
    confirmed = [key for key, what in said.items() if what == label]
    rows: list[tuple[int, bool]] = []
    if confirmed:
        places = pc.index_in(pa.array(confirmed, pa.string()), frame.keys.combine_chunks()).to_pylist()
        rows += [(int(r), True) for r in sorted(p for p in places if p is not None) if frame.diagnosed[r]]
    sure = frame.predicted & (frame.label == place) & (frame.p.max(1, initial=0.0) >= REFERENCE_CONFIDENCE)
    sure &= (frame.cells > 0) & ~table.reviews.reviewed
    candidates = np.flatnonzero(sure)
    ordered = candidates[np.argsort(-frame.p[candidates, place], kind="stable")]
    _, firsts = np.unique(frame.slide[ordered], return_index=True)
    each = np.zeros(len(ordered), np.bool_)
    each[firsts] = True
    rows += [(int(r), False) for r in np.concatenate([ordered[each], ordered[~each]])[:n]]
    return [(int(frame.ordinals[r]), known) for r, known in rows[:n]]


def _reference(table: RunTable, pixels: Pixels, ordinal: int, label: str, confirmed: bool) -> ReferenceCell | None:
    try:
        row, cells = table.stored_row(ordinal), table.cells(ordinal)
    except NotFoundError:
        return None
    decoded, _ = pixels.image(row)
    if decoded is None or decoded.rgb is None or not len(cells):
        return None
    inside = np.flatnonzero(~np.asarray(cells["touches_border"].to_numpy(zero_copy_only=False), np.bool_))
    attention = cells["attention"].to_numpy()
    pool = inside if len(inside) else np.arange(len(cells))
    best = int(pool[np.argmax(attention[pool])])
    scale = decoded.rgb.shape[1] / decoded.source_width
    x = (cells["centroid_x_px"][best].as_py() + 0.5) * scale - 0.5
    y = (cells["centroid_y_px"][best].as_py() + 0.5) * scale - 0.5
    half = REFERENCE_PX // 2
    padded = cv2.copyMakeBorder(decoded.rgb, half, half, half, half, cv2.BORDER_REFLECT_101)
    left, top = round(x), round(y)
    picture = np.ascontiguousarray(padded[top : top + REFERENCE_PX, left : left + REFERENCE_PX], dtype=np.uint8)
    confidence = float(row["confidence"])
    return ReferenceCell(
        run_key=table.run_key,
        ordinal=ordinal,
        cell_id=int(cells["cell_id"][best].as_py()),
        label=label,
        confidence=confidence,
        attention=float(attention[best]),
        picture=picture,
        caption=(CONFIRMED if confirmed else CAPTION).format(label=label, confidence=confidence),
    )
