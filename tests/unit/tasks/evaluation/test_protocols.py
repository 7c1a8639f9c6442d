"""Folds: groups stay whole, no test field enters the fit, results are kept, the right cells are removed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from leukoflow.core.method import ClassifySettings, MethodSettings, SelectSettings
from leukoflow.tasks.evaluation.protocols import (
    FOLDS,
    WHOLE,
    Context,
    FoldJob,
    Protocol,
    Variant,
    load_table,
    run_baseline,
    run_fold,
    save_table,
    split,
    variant_features,
    variant_recipe,
)
from leukoflow.tasks.evaluation.results import ablation_table, baseline_summary, faithfulness, protocol_summary
from leukoflow.tasks.imaging.extract import Features, field_means
from leukoflow.tasks.training.classifier import Recipe, cross_fit, fit
from leukoflow.tasks.training.data import Labels, grouped_folds

COLUMNS = (("convnext", 4), ("nasnet", 6))
METHOD = MethodSettings(select=SelectSettings(k=8), classify=ClassifySettings(max_cells=8))
RECIPE = Recipe(METHOD, classifier_width=16, classifier_layers=1, steps=100, seed=0)


def _labels(clusters: int = 6, fields: int = 4) -> Labels:
    y = np.repeat(np.arange(4), clusters * fields)
    cluster = tuple(f"C{k}{c}" for k in range(4) for c in range(clusters) for _ in range(fields))
    slide = tuple(f"{c}{i % 2}" for i, c in enumerate(cluster))
    return Labels(tuple(f"f{i}" for i in range(len(y))), y, slide, cluster, "digest")


def _features(labels: Labels, cells: int = 6) -> Features:
    """Cells scattered around a centre of their class; only the first of each field carries it."""
    rng = np.random.default_rng(0)
    centres = 10 * np.eye(4, 10)
    n = len(labels)
    single = rng.normal(0, 0.5, (n * cells, 10))
    single[::cells] += centres[labels.y]
    single = single.astype(np.float32)
    offsets, area = np.arange(n + 1) * cells, np.ones(n * cells, np.float32)
    field = field_means(single, offsets, area)
    return Features(field, single, offsets, area)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    tmp_path = tmp_path_factory.mktemp("work")
    labels = _labels()
    save_table(tmp_path / "table_plain.npz", _features(labels))
    save_table(tmp_path / "table_untrained.npz", _features(labels))
    np.save(tmp_path / "baseline_histogram.npy", np.eye(4)[labels.y].astype(np.float32))
    return Context(tmp_path, labels, RECIPE, COLUMNS)


@pytest.mark.parametrize("protocol", ["slide", "cluster"])
def test_groups_stay_whole_and_every_field_is_tested_once(protocol: Protocol) -> None:
    labels = _labels()
    groups = np.array(labels.slide if protocol == "slide" else labels.cluster)
    folds = split(protocol, labels, 3)
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(len(labels)))
    assert len(split("random", labels, 0)) == FOLDS


def test_another_seed_deals_the_groups_again_and_spreads_classes() -> None:
    labels = _labels(clusters=7)
    groups = np.array(labels.cluster)
    deals = [grouped_folds(labels.y, groups, FOLDS, seed) for seed in (0, 0, 1)]
    tests = [[frozenset(groups[test]) for _, test in folds] for folds in deals]
    assert tests[0] == tests[1]
    assert set(tests[0]) != set(tests[2])
    for folds in deals:
        for train, test in folds:
            assert set(labels.y[test]) == set(labels.y[train]) == {0, 1, 2, 3}
            assert 16 <= len(test) <= 32


def test_a_field_of_the_test_part_cannot_reach_the_fit() -> None:
    labels = _labels()
    features = _features(labels)
    train, test = split("cluster", labels, 0)[0]
    poisoned = replace(features, cells=features.cells.copy(), field=features.field.copy())
    own = slice(int(features.offsets[test[0]]), int(features.offsets[test[0] + 1]))
    poisoned.cells[own], poisoned.field[test[0]] = 1e6, 1e6
    clean, other = (fit(RECIPE, f, labels, train) for f in (features, poisoned))
    np.testing.assert_array_equal(clean.statistics.mean, other.statistics.mean)
    np.testing.assert_array_equal(clean.statistics.ood_whitening, other.statistics.ood_whitening)
    np.testing.assert_array_equal(clean.selected, other.selected)
    for a, b in zip(clean.classifier.state_dict().values(), other.classifier.state_dict().values(), strict=True):
        assert a.equal(b)


def test_inner_folds_hold_whole_clusters_out(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = _labels()
    seen: list[set[str]] = []

    def spy(recipe: Recipe, features: Features, own: Labels, rows: np.ndarray, **rest: object) -> object:
        seen.append({own.cluster[int(i)] for i in rows})
        return fit(recipe, features, own, rows)

    monkeypatch.setattr("leukoflow.tasks.training.classifier.fit", spy)
    rows = np.arange(len(labels))
    unseen = cross_fit(replace(RECIPE, steps=5), _features(labels), labels, rows)
    everything = set(labels.cluster)
    missing = [everything - s for s in seen]
    assert sum(len(m) for m in missing) == len(everything)
    assert set().union(*missing) == everything
    assert unseen.logits.shape == (len(labels), 4)


@pytest.mark.slow
def test_a_fold_answers_and_is_kept(context: Context) -> None:
    job = FoldJob("cluster", 0, 0, WHOLE, calibrated=True)
    found = run_fold(context, job)
    y = context.labels.y[found.rows]
    assert (found.probabilities.argmax(1) == y).mean() > 0.8
    np.testing.assert_allclose(found.probabilities.sum(1), 1)
    assert found.sets[np.arange(len(y)), found.probabilities.argmax(1)].all()
    assert found.calibration.temperature > 0
    again = run_fold(replace(context, recipe=replace(RECIPE, seed=99)), job)  # the file answers
    np.testing.assert_array_equal(again.probabilities, found.probabilities)


@pytest.mark.slow
def test_attention_to_the_one_telling_cell_is_faithful(context: Context) -> None:
    results = [run_fold(context, FoldJob("cluster", 0, f, WHOLE, calibrated=True)) for f in range(FOLDS)]
    found = faithfulness(results)
    assert found["fields"] == len(context.labels)
    assert found["top"][0] > 2 * abs(found["random"][0])


@pytest.mark.slow
def test_summaries_of_folds_and_baselines(context: Context) -> None:
    results = [run_fold(context, FoldJob("cluster", 0, f, WHOLE, calibrated=True)) for f in range(FOLDS)]
    model = protocol_summary(context.labels, "cluster", results)
    assert model["fields"] == len(context.labels)
    assert len(model["fold_scores"]["accuracy"]) == FOLDS
    assert set(model["per_group"]) == set(context.labels.cluster)
    plain = baseline_summary(context.labels, "cluster", [run_baseline(context, "colour histogram", "cluster", 0)])
    assert plain["accuracy"] == 1.0  # the table holds the answer
    table = ablation_table(context.labels, [(WHOLE, results), (Variant("same", "the same again"), results)])
    assert table[0]["p_t"] is None
    assert (table[1]["difference"], table[1]["p_t"], table[1]["p_t_holm"]) == (0.0, 1.0, 1.0)


def test_variants_change_what_they_say(context: Context) -> None:
    alone = variant_features(context, Variant("n", "", backbone="nasnet"))
    np.testing.assert_array_equal(alone.cells, load_table(context.work, "plain").cells[:, 4:])
    assert not variant_recipe(RECIPE, Variant("a", "", attention=False)).method.classify.attention
    assert not variant_recipe(RECIPE, Variant("a", "", k=0)).method.select.enabled
    assert variant_recipe(RECIPE, Variant("a", "", k=5)).method.select.k == 5
