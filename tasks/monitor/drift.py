"""Drift: do tonight's fields look like those of the reference, and of last week? One population stability index each.

A run is summed up once as counts on fixed grids, by site, scanner and slide (`drift.json`), so that many nights can be
compared without reading a table twice, and so that nothing about single images is kept. A reference is the same
summary of one or more runs that somebody has looked at and found good.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leukoflow.core.errors import ConfigError, StorageError
from leukoflow.runs.layout import OutKey, RunKey, Stage
from leukoflow.runs.progress import now, read_manifest
from leukoflow.runs.records import CLASSES, RunManifest
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.imaging.cytoplasm import is_measured
from leukoflow.tasks.store.tables import shard_name, table_files

WATCH, ACT = 0.1, 0.25
"""Customary limits of the index: below the first nothing has changed, above the second the population is another."""

SCHEMA = 1
GRID = 200  # places of a quantity's grid; bins of the index are made of them
BINS = 10  # of the index: tenths of the reference
SMOOTHING = 0.5  # added to every bin, so that an empty one is no infinity (Jeffreys' prior)
DRAWS = 1000  # of slides that change sides at random
CHANCE = 0.01  # an index that chance reaches more often than this is no drift, however large
MIN_FIELDS, MIN_SLIDES = 40, 5
"""A group that has fewer fields or slides is not judged."""

_CLUSTERS = 64  # slides are drawn again as a whole; more of them than this share places
_BLOCK = 16  # neighbouring fields that count as one slide where nothing says which slide a field is of
_GROUPS = 40  # pairs of site and scanner that are kept apart

Level = Literal["few", "none", "watch", "act"]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Quantity:
    """One thing that may drift, with its grid. What is `of_image` does not depend on the bundle."""

    name: str
    title: str
    low: float
    high: float
    of_image: bool
    log: bool = False
    categories: tuple[str, ...] = ()

    @property
    def places(self) -> int:
        """Length of the grid."""
        return len(self.categories) or GRID

    def place(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Place on the grid of each value, int64 [n]; values beyond its ends belong to the outermost places."""
        if self.categories:
            return values.astype(np.int64)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        scaled = np.log(np.maximum(values, self.low)) if self.log else values
        return np.clip((scaled - low) / (high - low) * GRID, 0, GRID - 1).astype(np.int64)

    def edge(self, index: int) -> float:
        """Return the value at the lower end of a place."""
        if self.log:
            return float(self.low * (self.high / self.low) ** (index / GRID))
        return self.low + (self.high - self.low) * index / GRID


QUANTITIES = (
    Quantity("stain_red", "stain: red over green", 0.0, 3.0, True),
    Quantity("stain_blue", "stain: blue over green", 0.0, 2.0, True),
    Quantity("stain_density", "stain: density", 0.0, 2.0, True),
    Quantity("exposure", "lightness", 0.0, 1.0, True),
    Quantity("focus", "focus", 0.05, 5000.0, True, log=True),
    Quantity("foreground", "stained share of the field", 0.0, 1.0, True),
    Quantity("n_cells", "cells per field", -0.5, 199.5, False),
    Quantity("nucleus_area_px", "nucleus area", 20.0, 5000.0, False, log=True),
    Quantity("nc_ratio_measured", "nucleus to cell ratio, where cytoplasm is seen", 0.0, 1.0, False),
    Quantity("ood_score", "distance from the training fields", 0.1, 100.0, False, log=True),
    Quantity("confidence", "confidence", 0.25, 1.0, False),
    Quantity("label", "likeliest class, abstained fields included", 0.0, 4.0, False, categories=CLASSES),
)
_STARTS = np.cumsum([0, *(q.places for q in QUANTITIES)]).tolist()
_TOTAL = _STARTS[-1]


@dataclass(frozen=True, slots=True)
class Group:
    """Fields of one site and scanner. `counts` int64 [slides, all grids one after the other]."""

    site: str | None
    scanner: str | None
    counts: Counts


@dataclass(frozen=True, slots=True)
class DriftFacts:
    """The summary of one run, or of several that make a reference."""

    runs: tuple[str, ...]
    bundle_digest: str
    made_at: str
    groups: tuple[Group, ...]

    def counts(self, site: str | None = None, scanner: str | None = None) -> Counts:
        """Return the counts of all fields, or of a site's, or of a scanner's."""
        chosen = [g.counts for g in self.groups if site in (None, g.site) and scanner in (None, g.scanner)]
        return np.concatenate([np.zeros((0, _TOTAL), np.int64), *chosen])


@dataclass(frozen=True, slots=True)
class Drift:
    """One quantity against its reference; the first three numbers are None where there are too few fields to judge.

    `excess` is the index less what chance gives on average, `chance` the probability that chance gives as much; both
    decide the level. `observed` and `expected` are shares of the bins between `cuts`.
    """

    quantity: str
    psi: float | None
    excess: float | None
    chance: float | None
    level: Level
    fields: int
    slides: int
    cuts: tuple[float, ...] = ()
    observed: tuple[float, ...] = ()
    expected: tuple[float, ...] = ()


# --- the index -------------------------------------------------------------------------------------------------------


def psi(observed: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the population stability index of counts [..., B]: sum of (o - e) ln(o / e) over shares o and e of bins.

    Half a field is added to every bin first.
    """
    o, e = np.asarray(observed, np.float64) + SMOOTHING, np.asarray(expected, np.float64) + SMOOTHING
    o, e = o / o.sum(-1, keepdims=True), e / e.sum(-1, keepdims=True)
    return np.asarray(((o - e) * np.log(o / e)).sum(-1), np.float64)


def quantile_cuts(counts: NDArray[np.int64], bins: int = BINS) -> NDArray[np.int64]:
    """Cut a grid so that each bin holds about the same share: places that begin a bin, without the first.

    Ties make fewer bins: no bin is empty.
    """
    reached = np.cumsum(counts)  # up to and including each place
    if not len(reached) or not reached[-1]:
        return np.zeros(0, np.int64)
    cuts: list[int] = []
    for k in range(1, bins):
        wanted = reached[-1] * k / bins
        after = int(np.searchsorted(reached, wanted))
        before = max(0, after - 1)
        # A cut after place i leaves reached[i] below it: take the nearer one.
        best = before if abs(reached[before] - wanted) < abs(reached[after] - wanted) else after
        below = reached[cuts[-1] - 1] if cuts else 0
        if below < reached[best] < reached[-1]:
            cuts.append(best + 1)
    return np.array(cuts, np.int64)


def permuted(sample: Counts, reference: Counts, seed: int = 0) -> NDArray[np.float64]:
    """Draw the index that chance alone would give, float64 [draws]: whole slides change sides at random.

    The index of two samples of one population is not 0 but grows as they shrink, and fields of a slide resemble each
    other, so that chance is larger than the number of fields suggests.

    Args:
        sample: counts int64 [slides, B].
        reference: counts int64 [slides, B] over the same bins.
        seed: of the draws, so that the same night always gives the same answer.
    """
    rng = np.random.default_rng(seed)
    both = np.concatenate([sample, reference]).astype(np.float64)
    taken = np.argsort(rng.random((DRAWS, len(both))), axis=1) < len(sample)
    drawn = taken @ both
    return psi(drawn, both.sum(0) - drawn)


def level_of(excess: float, chance: float) -> Level:
    """Decide what an index calls for, given what it exceeds chance by and how often chance reaches it."""
    if chance > CHANCE:
        return "none"
    return "act" if excess >= ACT else "watch" if excess >= WATCH else "none"


def compare(sample: Counts, reference: Counts, image_only: bool = False) -> tuple[Drift, ...]:
    """Compare every quantity of a sample with the reference; both int64 [slides, all grids].

    With `image_only` what depends on the bundle is left out: another bundle answers otherwise without any drift.
    """
    found = []
    for quantity, start, end in zip(QUANTITIES, _STARTS, _STARTS[1:], strict=False):
        if image_only and not quantity.of_image:
            continue
        mine, theirs = (c[:, start:end] for c in (sample, reference))
        mine, theirs = mine[mine.any(axis=1)], theirs[theirs.any(axis=1)]
        fields = int(mine.sum())
        few = min(fields, int(theirs.sum())) < MIN_FIELDS or min(len(mine), len(theirs)) < MIN_SLIDES
        if few:
            found.append(Drift(quantity.name, None, None, None, "few", fields, len(mine)))
            continue
        cuts = np.arange(1, quantity.places) if quantity.categories else quantile_cuts(theirs.sum(0))
        starts = np.concatenate([[0], cuts])
        mine, theirs = np.add.reduceat(mine, starts, axis=1), np.add.reduceat(theirs, starts, axis=1)
        value, drawn = float(psi(mine.sum(0), theirs.sum(0))), permuted(mine, theirs)
        excess, chance = value - float(drawn.mean()), (1 + int((drawn >= value).sum())) / (DRAWS + 1)
        found.append(
            Drift(
                quantity=quantity.name,
                psi=value,
                excess=excess,
                chance=chance,
                level=level_of(excess, chance),
                fields=fields,
                slides=len(mine),
                cuts=tuple(quantity.edge(int(i)) for i in cuts) if not quantity.categories else (),
                observed=_shares(mine.sum(0)),
                expected=_shares(theirs.sum(0)),
            )
        )
    return tuple(found)


def _shares(counts: NDArray[np.int64]) -> tuple[float, ...]:
    return tuple((counts / counts.sum()).tolist())


def worst(drifts: Iterable[Drift]) -> Drift | None:
    """Return the quantity that calls for most; None where nothing could be judged."""
    order = ("few", "none", "watch", "act")
    judged = [d for d in drifts if d.level != "few"]
    return max(judged, key=lambda d: (order.index(d.level), d.excess or 0.0), default=None)


def title_of(name: str) -> str:
    """Return a quantity's name for people."""
    return next(q.title for q in QUANTITIES if q.name == name)


# --- a run's summary -------------------------------------------------------------------------------------------------


def summarize(tables: Iterable[pa.Table], runs: Sequence[str], bundle_digest: str) -> DriftFacts:
    """Count the fields in `tables`: rows of the predictions with the columns that `facts_of` adds."""
    groups: dict[tuple[str | None, str | None], Counts] = {}
    slides: dict[str, int] = {}
    row = 0
    for table in tables:
        sites, scanners = table["site"].to_pylist(), table["scanner"].to_pylist()
        keys, slide_ids = table["image_key"].to_pylist(), table["slide_id"].to_pylist()
        n = len(table)
        cluster = np.empty(n, np.int64)
        for i in range(n):
            slide = slide_ids[i] or keys[i].rpartition("/")[0] or f"#{(row + i) // _BLOCK}"
            cluster[i] = slides.setdefault(slide, len(slides)) % _CLUSTERS
        row += n
        places = [_places(quantity, table) for quantity in QUANTITIES]
        pairs = list(zip(sites, scanners, strict=True))
        for pair in dict.fromkeys(pairs):
            known = pair if pair in groups or len(groups) < _GROUPS else (None, None)
            counts = groups.setdefault(known, np.zeros((_CLUSTERS, _TOTAL), np.int64))
            own = np.array([p == pair for p in pairs])
            for place, start in zip(places, _STARTS, strict=False):
                chosen = own & (place >= 0)
                np.add.at(counts, (cluster[chosen], start + place[chosen]), 1)
    return DriftFacts(
        tuple(runs),
        bundle_digest,
        now(),
        tuple(
            Group(site, scanner, counts[counts.any(axis=1)])
            for (site, scanner), counts in sorted(groups.items(), key=lambda g: (g[0][0] or "", g[0][1] or ""))
        ),
    )


def _places(quantity: Quantity, table: pa.Table) -> NDArray[np.int64]:
    """Place of every row on a quantity's grid, -1 where it has no value."""
    if quantity.categories:
        found = pc.index_in(table[quantity.name], value_set=pa.array(quantity.categories))
        return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)
    values = table[quantity.name].cast(pa.float64()).to_numpy()
    known = np.isfinite(values)
    out = np.full(len(values), -1, np.int64)
    out[known] = quantity.place(values[known])
    return out


_FROM_PREDICTIONS = (
    "image_key", "slide_id", "site", "scanner", "label", "confidence", "ood_score", "n_cells",
)  # fmt: skip
_FROM_FIELDS = ("focus", "exposure", "foreground", "stain_red", "stain_blue", "stain_density")
_FROM_CELLS = ("nucleus_area_px", "nc_ratio_measured")


def facts_of(storage: Storage, predictions: str, shards: Iterable[int]) -> pa.Table:
    """Read one file of the predictions with what drift looks at: quality from `fields/`, averages of the cells."""
    rows = _read(storage, predictions, _FROM_PREDICTIONS)
    facts = pa.concat_tables(
        [_read(storage, RunKey.part(RunKey.FIELDS, shard_name(s)), ("foreground", *_FROM_FIELDS)) for s in shards]
    )
    if len(facts) != len(rows):
        raise StorageError(f"{storage.uri(predictions)} and its fields/ do not belong together; run `leukoflow verify`")
    for name in _FROM_FIELDS:
        rows = rows.append_column(name, facts[name])
    cells = _read(storage, RunKey.in_table(predictions, RunKey.CELLS), ("image_key", "nucleus_area_px", "nc_ratio"))
    ratios = cells["nc_ratio"].cast(pa.float64()).to_numpy()
    seen = pa.array(ratios, pa.float64(), mask=~is_measured(ratios))  # a mask without cytoplasm tells no ratio
    cells = cells.append_column("nc_ratio_measured", seen)
    means = cells.group_by("image_key").aggregate([(name, "mean") for name in _FROM_CELLS])
    at = pc.index_in(rows["image_key"], value_set=means["image_key"].combine_chunks())
    for name in _FROM_CELLS:
        rows = rows.append_column(name, means[f"{name}_mean"].take(at.combine_chunks()))
    return rows


def _read(storage: Storage, key: str, columns: Sequence[str]) -> pa.Table:
    """Read columns of a file; those that an earlier version did not write are null."""
    data = storage.read(key)
    present = set(pq.read_schema(io.BytesIO(data)).names)
    wanted = list(dict.fromkeys(columns))
    table = pq.read_table(io.BytesIO(data), columns=[c for c in wanted if c in present])
    for name in wanted:
        if name not in present:
            table = table.append_column(name, pa.nulls(len(table), pa.float64()))
    return table.select(wanted)


def run_facts(root: str, run_id: str, manifest: RunManifest | None, bundle_digest: str) -> DriftFacts:
    """Summarise a run from its tables: all its shards, or those that are committed so far."""
    storage = open_storage(root)
    return summarize(_rows(storage, manifest), (run_id,), bundle_digest)


def _rows(storage: Storage, manifest: RunManifest | None) -> Iterator[pa.Table]:
    if manifest is not None:
        for file in table_files(manifest.parts, RunKey.PREDICTIONS):
            yield facts_of(storage, file.key, file.shards)
        return
    for name in storage.names(RunKey.markers(Stage.PREDICTIONS)):
        shard = RunKey.shard_of_json(name)
        try:
            yield facts_of(storage, RunKey.part(RunKey.PREDICTIONS, shard), (int(shard),))
        except FileNotFoundError:  # committed, but not moved to its place yet
            continue


def stored_facts(root: str, manifest: RunManifest) -> DriftFacts:
    """Return the summary of a finished run: the one it has left, or a new one where that is absent or another run's."""
    storage = open_storage(root)
    try:
        found = facts_from(storage.read(RunKey.DRIFT), storage.uri(RunKey.DRIFT))
        if found.runs == (manifest.run_id,) and found.bundle_digest == manifest.bundle_digest:
            return found
    except (FileNotFoundError, StorageError):
        pass
    return run_facts(root, manifest.run_id, manifest, manifest.bundle_digest)


# --- on disk ---------------------------------------------------------------------------------------------------------


def facts_bytes(facts: DriftFacts) -> bytes:
    """Encode as JSON: per group and slide the occupied places of each grid."""
    groups = [
        {"site": g.site, "scanner": g.scanner, "slides": [_sparse(row) for row in g.counts]} for g in facts.groups
    ]
    body = {
        "schema_version": SCHEMA,
        "runs": facts.runs,
        "bundle_digest": facts.bundle_digest,
        "made_at": facts.made_at,
        "grids": _grids(),
        "groups": groups,
    }
    return (json.dumps(body, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def facts_from(data: bytes, what: str) -> DriftFacts:
    """Decode a summary. Raises StorageError naming `what` where the bytes are none, or one of another version."""
    try:
        body = json.loads(data)
        if body["schema_version"] != SCHEMA or not _same_grids(body["grids"]):
            raise StorageError(
                f"{what} was made by another version of leukoflow; make it again: leukoflow drift reference"
            )
        groups = tuple(Group(g["site"], g["scanner"], _dense(g["slides"])) for g in body["groups"])
        return DriftFacts(tuple(body["runs"]), body["bundle_digest"], body["made_at"], groups)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise StorageError(f"{what} is damaged ({type(error).__name__}); delete it and make it again") from None


def _same_grids(grids: dict[str, list[Any]]) -> bool:
    """Tell whether counts on these grids can be read.

    Earlier versions averaged N:C ratios that nobody had measured: theirs are left out, and not compared with ours.
    """
    ours = _grids()
    return grids in (ours, {"nc_ratio" if k == "nc_ratio_measured" else k: v for k, v in ours.items()})


def _grids() -> dict[str, list[Any]]:
    return {q.name: [q.low, q.high, q.places, q.log] for q in QUANTITIES}


def _sparse(row: NDArray[np.int64]) -> dict[str, list[list[int]]]:
    found = {}
    for quantity, start, end in zip(QUANTITIES, _STARTS, _STARTS[1:], strict=False):
        (places,) = np.nonzero(row[start:end])
        if len(places):
            found[quantity.name] = [[int(i), int(row[start + i])] for i in places]
    return found


def _dense(slides: Sequence[dict[str, list[list[int]]]]) -> Counts:
    counts = np.zeros((len(slides), _TOTAL), np.int64)
    starts = {q.name: start for q, start in zip(QUANTITIES, _STARTS, strict=False)}
    for row, slide in zip(counts, slides, strict=True):
        for name, pairs in slide.items():
            if name not in starts:  # see _same_grids
                continue
            for place, count in pairs:
                row[starts[name] + place] = count
    return counts


# --- the reference ---------------------------------------------------------------------------------------------------


def merge_reference(out: str, run_ids: Sequence[str]) -> DriftFacts:
    """Merge some finished runs of OUT into a reference.

    Raises ConfigError where a run is not finished, they had different bundles, or they are too small to compare with.
    """
    groups: list[Group] = []
    digests: dict[str, str] = {}
    for run_id in dict.fromkeys(run_ids):
        root = f"{out.rstrip('/')}/{run_id}"
        manifest = read_manifest(open_storage(root))
        if manifest is None:
            raise ConfigError(f"{root} is not a finished run; `leukoflow status {out}` lists them")
        digests[manifest.bundle_digest] = run_id
        groups += stored_facts(root, manifest).groups
    if len(digests) > 1:
        raise ConfigError(
            f"runs {', '.join(digests.values())} were made with different bundles; a reference needs runs of one bundle"
        )
    facts = DriftFacts(tuple(dict.fromkeys(run_ids)), next(iter(digests)), now(), tuple(groups))
    counts = facts.counts()
    fields, slides = int(counts[:, : QUANTITIES[0].places].sum()), int(counts.any(axis=1).sum())
    if fields < MIN_FIELDS or slides < MIN_SLIDES:
        raise ConfigError(
            f"{fields} readable fields of {slides} slides are too few for a reference ({MIN_FIELDS} of {MIN_SLIDES} at "
            "least, better some hundred of dozens); name more runs"
        )
    return facts


def find_reference(out: str, bundle_dir: str, setting: str | None = None) -> tuple[DriftFacts, str] | None:
    """Find the reference to compare with, and where it lies: the one a setting names, the bundle's, or that of OUT."""
    if setting is not None:
        folder, _, name = setting.rpartition("/")
        try:
            return facts_from(
                open_storage(folder or ("/" if setting.startswith("/") else ".")).read(name), setting
            ), setting
        except FileNotFoundError:
            raise ConfigError(
                f"drift reference {setting} does not exist; `leukoflow drift reference` makes one"
            ) from None
    for root, key in ((bundle_dir, RunKey.DRIFT), (out, OutKey.BASELINE)):
        storage = open_storage(root)
        try:
            return facts_from(storage.read(key), storage.uri(key)), storage.uri(key)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return None
