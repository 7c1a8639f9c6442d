"""Drift: the index against numbers worked out by hand, no false alarms, no missed ones, and summaries of runs."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import screen_here, small_bundle, smears, write_zip
from numpy.typing import NDArray

from leukoflow.core.errors import ConfigError, StorageError
from leukoflow.runs.progress import read_manifest
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.monitor.drift import (
    QUANTITIES,
    SMOOTHING,
    DriftFacts,
    compare,
    facts_bytes,
    facts_from,
    find_reference,
    level_of,
    merge_reference,
    permuted,
    psi,
    quantile_cuts,
    run_facts,
    stored_facts,
    summarize,
    worst,
)
from leukoflow.tasks.store.compact import compact_run


def test_the_index_is_what_a_pocket_calculator_says() -> None:
    """Counts 29.5 + 0.5 and so on, so that shares are 0.3 0.7 against 0.5 0.5: 0.2 ln(7/3) = 0.16946."""
    assert SMOOTHING == 0.5
    assert float(psi(np.array([29.5, 69.5]), np.array([49.5, 49.5]))) == pytest.approx(0.1694596, abs=1e-6)
    # 0.2 0.3 0.5 against 0.4 0.4 0.2: 0.2 ln 2 + 0.1 ln(4/3) + 0.3 ln(5/2) = 0.138629 + 0.028768 + 0.274887
    assert float(psi(np.array([19.5, 29.5, 49.5]), np.array([39.5, 39.5, 19.5]))) == pytest.approx(0.442285, abs=1e-6)
    # an empty bin: shares 10.5/11 and 0.5/11 change places, so that 10/11 ln 21 counts twice
    assert float(psi(np.array([10, 0]), np.array([0, 10]))) == pytest.approx(2 * (10 / 11) * np.log(21), rel=1e-9)
    assert float(psi(np.array([5, 5]), np.array([5, 5]))) == 0.0


def test_the_index_is_symmetric_and_works_row_by_row() -> None:
    a, b = np.array([[1, 2, 3], [4, 4, 4]]), np.array([[3, 2, 1], [4, 4, 4]])
    assert psi(a, b).tolist() == pytest.approx(psi(b, a).tolist())
    assert psi(a, b)[1] == 0.0


@pytest.mark.parametrize(
    ("counts", "cuts"),
    [
        ([1, 1, 1, 1], [1, 2, 3]),
        ([0, 2, 0, 2, 2, 2, 0], [2, 4, 5]),
        ([8, 1, 1, 0], [1]),  # half of all and more in one place: fewer bins, and none of them empty
        ([0, 7, 0], []),
        ([0, 0], []),
    ],
)
def test_bins_hold_about_the_same_share(counts: list[int], cuts: list[int]) -> None:
    found = quantile_cuts(np.array(counts), 4).tolist()
    assert found == cuts
    if sum(counts):
        assert all(np.add.reduceat(np.array(counts), [0, *found]))


def test_levels_are_the_stated_ones() -> None:
    assert [level_of(e, 0.001) for e in (0.09, 0.1, 0.24, 0.25)] == ["none", "watch", "watch", "act"]
    assert level_of(3.0, 0.02) == "none"


def slides(rng: np.random.Generator, k: int, n: int, shift: float) -> NDArray[np.int64]:
    """Fields of k slides whose lightness differs from slide to slide as much as within one; int64 [k, all grids]."""
    counts = np.zeros((k, sum(q.places for q in QUANTITIES)), np.int64)
    start = sum(q.places for q in QUANTITIES[:3])
    assert QUANTITIES[3].name == "exposure"
    values = 0.6 + 0.03 * (rng.normal(size=(k, 1)) + rng.normal(size=(k, n)) + shift)
    for row, places in zip(counts, QUANTITIES[3].place(values), strict=True):
        np.add.at(row, start + places, 1)
    return counts


def judged(rng: np.random.Generator, k: int, n: int, shift: float) -> tuple[str, float]:
    found = compare(slides(rng, k, n, shift), slides(rng, 24, 8, 0.0))
    drift = next(d for d in found if d.quantity == "exposure")
    assert drift.psi is not None
    return drift.level, drift.psi


def test_small_nights_do_not_cry_wolf() -> None:
    """The bare index would: it is above 0.1 on nearly all of these nights, though nothing has changed."""
    rng = np.random.default_rng(5)
    found = [judged(rng, 8, 8, 0.0) for _ in range(60)]
    assert sum(value >= 0.1 for _, value in found) > 45
    assert sum(level != "none" for level, _ in found) <= 2


def test_a_real_change_is_reported() -> None:
    rng = np.random.default_rng(6)
    assert sum(judged(rng, 12, 8, 2.5)[0] == "act" for _ in range(20)) >= 18


def test_too_few_slides_are_not_judged_and_say_so() -> None:
    rng = np.random.default_rng(7)
    found = compare(slides(rng, 4, 30, 3.0), slides(rng, 24, 8, 0.0))
    drift = next(d for d in found if d.quantity == "exposure")
    assert (drift.level, drift.psi, drift.fields, drift.slides) == ("few", None, 120, 4)
    assert worst(found) is None
    assert {d.quantity for d in compare(slides(rng, 4, 30, 3.0), slides(rng, 24, 8, 0.0), image_only=True)} == {
        "stain_red", "stain_blue", "stain_density", "exposure", "focus", "foreground"
    }  # fmt: skip


def test_slides_are_drawn_as_a_whole() -> None:
    """Two slides against two: of the six ways to choose, two give the index itself, the others nothing."""
    sample, reference = np.array([[50, 0], [50, 0]]), np.array([[0, 50], [0, 50]])
    drawn = permuted(sample, reference)
    own = float(psi(sample.sum(0), reference.sum(0)))
    assert set(np.round(drawn, 9)) == {0.0, round(own, 9)}
    assert np.isclose(drawn, own).mean() == pytest.approx(1 / 3, abs=0.06)


def test_places_on_a_grid() -> None:
    exposure = next(q for q in QUANTITIES if q.name == "exposure")
    assert exposure.place(np.array([-1.0, 0.0, 0.0049, 0.005, 0.5, 1.0, 7.0])).tolist() == [0, 0, 0, 1, 100, 199, 199]
    assert exposure.edge(100) == 0.5
    focus = next(q for q in QUANTITIES if q.name == "focus")
    assert focus.place(np.array([0.0, 0.05, 5000.0])).tolist() == [0, 0, 199]
    assert focus.edge(0) == 0.05
    assert focus.edge(200) == pytest.approx(5000.0)
    cells = next(q for q in QUANTITIES if q.name == "n_cells")
    assert cells.place(np.array([0.0, 1.0, 3.0, 500.0])).tolist() == [0, 1, 3, 199]


def fields(**columns: list[object]) -> pa.Table:
    n = len(next(iter(columns.values())))
    blank = {q.name: [None] * n for q in QUANTITIES} | {"slide_id": [None] * n, "site": [None] * n}
    blank |= {"scanner": [None] * n, "image_key": [f"f{i}.jpg" for i in range(n)]}
    types = {q.name: pa.float64() for q in QUANTITIES if not q.categories}
    return pa.table({k: pa.array(v, types.get(k, pa.string())) for k, v in (blank | columns).items()})


def test_fields_are_counted_by_site_scanner_and_slide() -> None:
    facts = summarize(
        [
            fields(
                site=["A", "A", "B"], slide_id=["1", "2", "3"], exposure=[0.5, 0.6, None], label=["Pro", None, "Pre"]
            ),
            fields(site=["A"], slide_id=["1"], exposure=[0.5]),
        ],
        ["night"],
        "digest",
    )
    assert [(g.site, len(g.counts)) for g in facts.groups] == [("A", 2), ("B", 1)]
    assert facts.counts("A").sum() == 4  # three of lightness, one label
    assert facts.counts().sum() == 5
    assert facts_from(facts_bytes(facts), "it").counts().tolist() == facts.counts().tolist()


def test_without_slides_neighbours_stand_for_one() -> None:
    facts = summarize([fields(exposure=[0.5] * 40)], ["night"], "digest")
    assert facts.groups[0].counts.sum(axis=1).tolist() == [16, 16, 8]
    foldered = fields(image_key=["a/1", "a/2", "b/1"], exposure=[0.5] * 3)
    assert summarize([foldered], ["night"], "digest").groups[0].counts.sum(axis=1).tolist() == [2, 1]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    bundle = small_bundle(folder / "bundle")
    made = smears(folder / "sample", 48, seed=4)
    keyed = {f"slide-{i % 6}/{i}.jpg": data for i, data in enumerate(made.values())}
    screen_here(write_zip(folder / "night.zip", keyed), folder / "out", "night", bundle)
    few = dict(list(keyed.items())[:16])
    screen_here(write_zip(folder / "few.zip", few), folder / "out", "few", bundle)
    return folder / "out"


def facts(out: Path, run: str) -> DriftFacts:
    manifest = read_manifest(open_storage(str(out / run)))
    assert manifest is not None
    return run_facts(str(out / run), run, manifest, manifest.bundle_digest)


def test_a_run_is_summed_up_from_its_tables(out: Path) -> None:
    found = facts(out, "night")
    counts = found.counts()
    assert len(counts) == 6
    sums, start = {}, 0
    for q in QUANTITIES:
        sums[q.name] = int(counts[:, start : start + q.places].sum())
        start += q.places
    manifest = read_manifest(open_storage(str(out / "night")))
    assert manifest is not None
    assert sums["focus"] == sums["stain_red"] == 48
    assert sums["label"] == sums["confidence"] == manifest.predicted + manifest.abstained
    assert 0 < sums["nucleus_area_px"] <= 48


def test_a_ratio_without_cytoplasm_is_in_no_average(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "night", tmp_path / "night")
    at = next(i for i, q in enumerate(QUANTITIES) if q.name == "nc_ratio_measured")
    start = sum(q.places for q in QUANTITIES[:at])
    places = slice(start, start + QUANTITIES[at].places)

    def counted(ratios: list[float]) -> list[int]:
        """Where the grid has the fields, once all cells of a field have these ratios in turn."""
        for path in sorted((tmp_path / "night" / "cells").iterdir()):
            rows, seen = pq.read_table(path).to_pylist(), Counter[str]()
            for row in rows:
                row["nc_ratio"] = ratios[seen[row["image_key"]] % len(ratios)]
                seen[row["image_key"]] += 1
            pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
        return np.flatnonzero(facts(tmp_path, "night").counts()[:, places].sum(0)).tolist()

    assert counted([1.0]) == []  # nothing was measured
    measured = int(QUANTITIES[at].place(np.array([0.6]))[0])
    assert counted([0.6, 1.0]) == [measured]


def test_a_summary_of_an_earlier_version_is_read_without_its_ratios(out: Path) -> None:
    found = facts(out, "night")
    body = json.loads(facts_bytes(found))
    body["grids"]["nc_ratio"] = body["grids"].pop("nc_ratio_measured")
    for group in body["groups"]:
        for slide in group["slides"]:
            slide.pop("nc_ratio_measured", None)
            slide["nc_ratio"] = [[199, 8]]
    read = facts_from(json.dumps(body).encode(), "old")
    sums = {d.quantity: d.fields for d in compare(read.counts(), found.counts())}
    assert sums["nc_ratio_measured"] == 0
    assert sums["focus"] == 48
    body["grids"]["focus"][0] = 1.0
    with pytest.raises(StorageError, match="another version"):
        facts_from(json.dumps(body).encode(), "other")


def test_a_compacted_and_an_unfinished_run_give_the_same_summary(out: Path) -> None:
    before = facts(out, "few")
    half = run_facts(str(out / "few"), "few", None, before.bundle_digest)
    assert np.array_equal(half.counts(), before.counts())
    compact_run(str(out / "few"), 1 << 28, lambda done, total: None)
    assert np.array_equal(facts(out, "few").counts(), before.counts())


def test_a_stored_summary_is_used_and_a_damaged_one_is_not(out: Path) -> None:
    manifest = read_manifest(open_storage(str(out / "night")))
    assert manifest is not None
    right = facts(out, "night")
    (out / "night" / "drift.json").write_bytes(facts_bytes(right)[:-9])
    assert np.array_equal(stored_facts(str(out / "night"), manifest).counts(), right.counts())
    (out / "night" / "drift.json").write_bytes(facts_bytes(DriftFacts(("night",), right.bundle_digest, "then", ())))
    assert stored_facts(str(out / "night"), manifest).groups == ()
    (out / "night" / "drift.json").unlink()


def test_the_reference_of_a_setting_of_the_bundle_of_the_folder_in_this_order(out: Path, tmp_path: Path) -> None:
    reference = merge_reference(str(out), ["night"])
    assert reference.runs == ("night",)
    assert find_reference(str(tmp_path / "out"), str(tmp_path / "bundle")) is None
    for place in ("out/_baseline", "bundle", "."):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "drift.json").write_bytes(facts_bytes(reference))
        setting = str(tmp_path / "drift.json") if place == "." else None
        found = find_reference(str(tmp_path / "out"), str(tmp_path / "bundle"), setting)
        assert found is not None
        assert found[1] == str(tmp_path / place / "drift.json").replace("/./", "/")
    with pytest.raises(ConfigError, match="does not exist"):
        find_reference(str(tmp_path / "out"), str(tmp_path / "bundle"), str(tmp_path / "nothing.json"))


def test_what_makes_no_reference_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="16 readable fields of 6 slides are too few"):
        merge_reference(str(out), ["few"])
    with pytest.raises(ConfigError, match="not a finished run"):
        merge_reference(str(out), ["nobody"])
    with pytest.raises(StorageError, match="damaged"):
        facts_from(b"{}", "it")
    other = facts_bytes(merge_reference(str(out), ["night"])).replace(b'"focus":[0.05', b'"focus":[0.06')
    with pytest.raises(StorageError, match="another version"):
        facts_from(other, "it")
