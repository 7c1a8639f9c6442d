"""Put the results of folds, baselines and ablations together: pooled metrics, comparisons, the headline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leukoflow.tasks.evaluation.metrics import cluster_bootstrap, full_summary, point_metrics, summary
from leukoflow.tasks.evaluation.protocols import FOLDS, REMOVED, FoldResult, Protocol, Variant, split
from leukoflow.tasks.evaluation.statistics import corrected_resampled_t, effect_size, holm, wilcoxon_p
from leukoflow.tasks.training.data import Labels

SMALLEST_GROUP = 30  # fields of a cluster that may count as the worst


def groups_of(labels: Labels, protocol: Protocol) -> tuple[str, ...]:
    """Return what is drawn with replacement for intervals: clusters, slides, or single fields."""
    return {"cluster": labels.cluster, "slide": labels.slide, "random": labels.keys}[protocol]


def protocol_summary(labels: Labels, protocol: Protocol, results: Sequence[FoldResult]) -> dict[str, Any]:
    """Pool all repeats of a protocol. Every field counts once per repeat."""
    rows = np.concatenate([r.rows for r in results])
    names = labels.cluster if protocol == "random" else groups_of(labels, protocol)
    out = full_summary(
        np.concatenate([r.probabilities for r in results]),
        np.concatenate([r.sets for r in results]),
        np.concatenate([r.reasons for r in results]).tolist(),
        labels.y[rows],
        [names[int(i)] for i in rows],
        SMALLEST_GROUP * len(results) // FOLDS,
        labels.classes,
    )
    scores = [point_metrics(r.probabilities, labels.y[r.rows]) for r in results]
    return out | {"fold_scores": {key: [s[key] for s in scores] for key in ("accuracy", "macro_f1")}}


def baseline_summary(labels: Labels, protocol: Protocol, found: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """Pool a baseline's repeats, and score each fold."""
    names = labels.cluster if protocol == "random" else groups_of(labels, protocol)
    out = summary(
        np.concatenate(found),
        np.tile(labels.y, len(found)),
        list(names) * len(found),
        SMALLEST_GROUP * len(found),
        labels.classes,
    )
    scores = [
        point_metrics(p[test], labels.y[test])
        for repeat, p in enumerate(found)
        for _, test in split(protocol, labels, repeat)
    ]
    return out | {"fold_scores": {key: [s[key] for s in scores] for key in ("accuracy", "macro_f1")}}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the mean difference of paired fold scores, theirs less ours, and how likely chance alone would give it."""
    difference = np.asarray(theirs, np.float64) - np.asarray(ours, np.float64)
    return {
        "difference": float(difference.mean()),
        "p_t": corrected_resampled_t(difference, 1 / (FOLDS - 1))[1],
        "p_wilcoxon": wilcoxon_p(difference),
        "effect_size": effect_size(difference),
    }


def grouped_difference(
    labels: Labels, protocol: Protocol, results: Sequence[FoldResult], theirs: Sequence[NDArray[np.float64]]
) -> tuple[float, float]:
    """Return the 95 % interval of the accuracy, theirs less ours, from drawing whole groups with replacement.

    Paired: a drawn group brings both answers to its fields. What varies is which photographs there are, not which
    folds they were dealt to.
    """
    ours = np.zeros(len(labels))
    for r in results:
        ours[r.rows] += r.probabilities.argmax(1) == labels.y[r.rows]
    other = np.sum([p.argmax(1) == labels.y for p in theirs], axis=0)
    difference = (other - ours) / len(theirs)
    found = cluster_bootstrap(lambda rows: {"difference": float(difference[rows].mean())}, groups_of(labels, protocol))
    return found["difference"]


def accuracies(labels: Labels, results: Sequence[FoldResult]) -> list[float]:
    """Return the accuracy of each fold."""
    return [float((r.probabilities.argmax(1) == labels.y[r.rows]).mean()) for r in results]


def ablation_table(labels: Labels, found: Sequence[tuple[Variant, Sequence[FoldResult]]]) -> list[dict[str, Any]]:
    """Compare each variant with the first, the whole method; p-values of the t-test adjusted after Holm."""
    whole = accuracies(labels, found[0][1])
    rows: list[dict[str, Any]] = []
    for variant, results in found:
        scores = accuracies(labels, results)
        compared = (
            paired(whole, scores)
            if variant is not found[0][0]
            else dict.fromkeys(("difference", "p_t", "p_wilcoxon", "effect_size"))
        )
        mean = float(np.mean(scores))
        rows.append({"name": variant.name, "what": variant.what, "scores": scores, "mean": mean, **compared})
    adjusted = [None, *holm([row["p_t"] for row in rows[1:]])]
    return [{**row, "p_t_holm": p} for row, p in zip(rows, adjusted, strict=True)]


def faithfulness(results: Sequence[FoldResult]) -> dict[str, Any]:
    """Return the mean loss of the answered class' probability when attended, or random, cells are taken away."""
    before = np.concatenate([r.before for r in results])
    after = np.concatenate([r.removed for r in results])
    known = np.isfinite(after[:, 0, 0])
    loss = before[known, None, None] - after[known]
    return {
        "fields": int(known.sum()),
        "removed": list(REMOVED),
        "top": loss[:, 0].mean(0).tolist() if known.any() else [],
        "random": loss[:, 1].mean(0).tolist() if known.any() else [],
    }


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """Choose what goes into `bundle.json`: the protocols without curves and folds, masks, foreign blood and probes.

    Reliability stays, a row for each tenth of confidence: people see what a confidence has meant.
    """
    left_out = {"risk_coverage", "fold_scores"}
    protocols = {
        name: {
            "repeats": p["repeats"],
            "models": {m: {k: v for k, v in row.items() if k not in left_out} for m, row in p["models"].items()},
        }
        for name, p in result["protocols"].items()
    }
    keep = ("recipe", "comparison", "probes", "explanations", "segmentation", "foreign")
    chosen = {key: result[key] for key in keep if key in result}
    return {"bundle_digest": result["bundle"]["digest"], "protocols": protocols, **chosen}
