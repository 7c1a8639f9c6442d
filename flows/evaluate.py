"""Evaluation without leakage: protocols beside baselines, ablations, probes, robustness, masks, foreign blood."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from leukoflow.core.errors import ConfigError
from leukoflow.models.bundle import Bundle, load_bundle, write_spec
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.evaluation.evaluate import (
    cluster_bootstrap,
    corner_features,
    diagnose_images,
    full_summary,
    histogram_features,
    image_features,
    masks_of,
    point_metrics,
    segmentation_metrics,
    summary,
)
from leukoflow.tasks.evaluation.feature_tables import alternative_table, classes_of, plain_table
from leukoflow.tasks.evaluation.probes import DEGRADATIONS, cells_only, colours_of, moved_bar, painted_out, pasted_bar
from leukoflow.tasks.evaluation.protocols import (
    ABLATIONS,
    BASELINES,
    FOLDS,
    PROTOCOLS,
    REMOVED,
    SELECTED,
    WHOLE,
    Context,
    FoldJob,
    FoldResult,
    Protocol,
    Variant,
    load_table,
    run_baseline,
    run_fold,
    save_table,
    split,
)
from leukoflow.tasks.evaluation.statistics import corrected_resampled_t, effect_size, holm, wilcoxon_p
from leukoflow.tasks.imaging.classify import decide, forward, ood_scores, softmax
from leukoflow.tasks.imaging.normalize import mask_overlays
from leukoflow.tasks.report.evaluation_report import render
from leukoflow.tasks.training.classifier import Fitted, Recipe, fit
from leukoflow.tasks.training.data import FIELDS_ZIP, Labels, read_labels, read_members

FOREIGN_ZIP = "healthy_other_source.zip"
SMALLEST_GROUP = 30  # fields of a cluster that may count as the worst
PROBE_EVERY = 12  # every so many fields are changed on purpose
SEGMENT_PARTS = 4
FOLD_STEPS = 100  # of the attention in a fold: the shorter recipe


@dataclass(frozen=True, slots=True)
class Setting:
    """What every task of an evaluation shares; small enough to travel."""

    bundle: str
    data_dir: Path
    work: Path
    steps: int


@lru_cache(maxsize=1)
def opened(setting: Setting) -> tuple[Bundle, Context]:
    """The bundle and the context of its folds, once per process."""
    torch.set_num_threads(1)
    bundle = load_bundle(setting.bundle)
    spec = bundle.spec
    recipe = Recipe(spec.method, spec.classifier.width, spec.classifier.layers, setting.steps, spec.training.seed)
    columns = tuple((b.name, b.num_features) for b in spec.backbones)
    return bundle, Context(setting.work, read_labels(setting.data_dir), recipe, columns)


def _fields(setting: Setting, labels: Labels) -> list[NDArray[np.uint8]]:
    return list(read_members(setting.data_dir / FIELDS_ZIP, labels.keys))


# --- what runs in the worker processes -------------------------------------------------------------------------------


def make_classes(setting: Setting, part: int) -> None:
    """Segments one of `SEGMENT_PARTS` parts of all fields, unless that has been done."""
    path = setting.work / f"classes_{part}.npy"
    if path.is_file():
        return
    bundle, context = opened(setting)
    keys = np.array_split(np.array(context.labels.keys, object), SEGMENT_PARTS)[part]
    found = classes_of(bundle, list(read_members(setting.data_dir / FIELDS_ZIP, list(keys))))
    temporary = path.with_suffix(".part.npy")
    np.save(temporary, found)
    temporary.rename(path)


def make_table(setting: Setting, name: str) -> None:
    """One table of features of all fields, unless it is there."""
    path = setting.work / f"table_{name}.npz"
    if path.is_file():
        return
    bundle, context = opened(setting)
    images = _fields(setting, context.labels)
    classes = np.concatenate([np.load(setting.work / f"classes_{part}.npy") for part in range(SEGMENT_PARTS)])
    if name == "plain":
        save_table(path, plain_table(bundle, images, classes))
    else:
        save_table(path, alternative_table(bundle, images, classes, name))


def make_baselines(setting: Setting) -> None:
    """Tables of the baselines that know no cells."""
    _, context = opened(setting)
    images = _fields(setting, context.labels)
    for name, function in (("histogram", histogram_features), ("corner", corner_features)):
        np.save(setting.work / f"baseline_{name}.npy", np.stack([function(image) for image in images]))


def fold(setting: Setting, job: FoldJob) -> FoldResult:
    """One fold."""
    return run_fold(opened(setting)[1], job)


def baseline(setting: Setting, name: str, protocol: Protocol, repeat: int) -> NDArray[np.float64]:
    """One baseline under one protocol."""
    return run_baseline(opened(setting)[1], name, protocol, repeat)


def probe_rows(labels: Labels) -> NDArray[np.int64]:
    """Fields that the probes change: a fixed twelfth."""
    return np.arange(0, len(labels), PROBE_EVERY)


PROBES = (
    ("untouched", "the same fields as they are"),
    ("scale bar removed", "burned-in bar and text painted over before the run"),
    ("scale bar moved", "moved to the top left corner"),
    ("scale bar of another class", "replaced by the bar of a field of another class"),
    ("colours of another class", "mean and deviation of Lab taken from a field of another class"),
    ("cells only", "everything but white cells in one colour"),
    ("cells painted out", "white cells replaced by their surroundings; an answer is forced"),
)


def changed(setting: Setting, name: str, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """The probes' fields after the change that `name` tells."""
    bundle, context = opened(setting)
    labels = context.labels
    rows = probe_rows(labels)
    for degradation in DEGRADATIONS:
        if name == f"{degradation.kind} {degradation.severity}":
            return [degradation.apply(images[i]) for i in rows]
    rng = np.random.default_rng(0)
    donors = [int(rng.choice(np.flatnonzero(labels.y != labels.y[i]))) for i in rows]
    match name:
        case "untouched":
            return [images[i] for i in rows]
        case "scale bar removed":
            return [mask_overlays(images[i])[0] for i in rows]
        case "scale bar moved":
            return [moved_bar(images[i]) for i in rows]
        case "scale bar of another class":
            return [pasted_bar(images[i], images[d]) for i, d in zip(rows, donors, strict=True)]
        case "colours of another class":
            return [colours_of(images[i], images[d]) for i, d in zip(rows, donors, strict=True)]
        case "cells only":
            return [cells_only(images[i], masks_of(bundle, images[i])[0] > 0) for i in rows]
        case "cells painted out":
            return [painted_out(images[i], masks_of(bundle, images[i])[0] > 0) for i in rows]
    raise ConfigError(f"no probe named {name!r}")


@lru_cache(maxsize=FOLDS)
def fitted_fold(setting: Setting, number: int) -> Fitted:
    """The model of a cluster-grouped fold again: a function of its rows and the seed."""
    _, context = opened(setting)
    train, _ = split("cluster", context.labels, 0)[number]
    return fit(context.recipe, load_table(setting.work, "plain"), context.labels, train)


def probe(setting: Setting, name: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Answers to changed fields by models that saw neither the field nor its cluster.

    Returns:
        Probabilities [n, 4] of all fields in `probe_rows`, the answer being forced, and whether it would be given.
    """
    bundle, context = opened(setting)
    path = setting.work / "folds" / f"probe_{name.replace(' ', '_')}.npz"
    if path.is_file():
        with np.load(path) as stored:
            return stored["probabilities"], stored["answered"]
    rows = probe_rows(context.labels)
    features = image_features(bundle, changed(setting, name, _fields(setting, context.labels)))
    probabilities, answered = np.zeros((len(rows), len(CLASSES))), np.zeros(len(rows), np.bool_)
    for number, (_, test) in enumerate(split("cluster", context.labels, 0)):
        known = run_fold(context, FoldJob("cluster", 0, number, WHOLE, calibrated=True))
        fitted = fitted_fold(setting, number)
        mine = np.flatnonzero(np.isin(rows, test))
        packed = fitted.tokens(features, mine)
        found = softmax(forward(fitted.classifier, packed)[0], known.calibration.temperature)
        reasons = decide(
            known.calibration, found, ood_scores(packed, fitted.statistics), np.diff(features.offsets)[mine]
        )[1]
        probabilities[mine], answered[mine] = found, [r is None for r in reasons]
    np.savez(path, probabilities=probabilities, answered=answered)
    return probabilities, answered


def measure_segmentation(setting: Setting) -> dict[str, float]:
    """Masks and boxes that were held out."""
    return segmentation_metrics(opened(setting)[0], setting.data_dir)


def measure_foreign(setting: Setting) -> dict[str, Any]:
    """What the shipped bundle says of healthy blood from another laboratory."""
    path = setting.data_dir / FOREIGN_ZIP
    if not path.is_file():
        return {}
    verdicts = diagnose_images(opened(setting)[0], list(read_members(path, None)), chunk=16)
    kinds = [(v.abstained or "answered").split(":")[0] for v in verdicts]
    labels = [CLASSES[int(v.probabilities.argmax())] for v in verdicts if v.abstained is None]
    harmless = sum(v.abstained is not None or int(v.probabilities.argmax()) == 0 for v in verdicts)
    return {
        "images": len(verdicts),
        "abstained_or_benign": harmless / len(verdicts),
        "outcomes": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "labels_of_answered": {name: labels.count(name) for name in CLASSES},
        "median_distance": float(np.median([v.ood for v in verdicts])),
    }


# --- putting results together ----------------------------------------------------------------------------------------


def groups_of(labels: Labels, protocol: Protocol) -> tuple[str, ...]:
    """What is drawn with replacement for intervals: clusters, slides, or single fields."""
    return {"cluster": labels.cluster, "slide": labels.slide, "random": labels.keys}[protocol]


def protocol_summary(labels: Labels, protocol: Protocol, results: Sequence[FoldResult]) -> dict[str, Any]:
    """All repeats of a protocol pooled. Every field counts once per repeat."""
    rows = np.concatenate([r.rows for r in results])
    names = labels.cluster if protocol == "random" else groups_of(labels, protocol)
    out = full_summary(
        np.concatenate([r.probabilities for r in results]),
        np.concatenate([r.sets for r in results]),
        np.concatenate([r.reasons for r in results]).tolist(),
        labels.y[rows],
        [names[int(i)] for i in rows],
        SMALLEST_GROUP * len(results) // FOLDS,
    )
    scores = [point_metrics(r.probabilities, labels.y[r.rows]) for r in results]
    return out | {"fold_scores": {key: [s[key] for s in scores] for key in ("accuracy", "macro_f1")}}


def baseline_summary(labels: Labels, protocol: Protocol, found: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """A baseline's repeats pooled, and its score in each fold."""
    names = labels.cluster if protocol == "random" else groups_of(labels, protocol)
    out = summary(
        np.concatenate(found), np.tile(labels.y, len(found)), list(names) * len(found), SMALLEST_GROUP * len(found)
    )
    scores = [
        point_metrics(p[test], labels.y[test])
        for repeat, p in enumerate(found)
        for _, test in split(protocol, labels, repeat)
    ]
    return out | {"fold_scores": {key: [s[key] for s in scores] for key in ("accuracy", "macro_f1")}}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean difference of paired fold scores, theirs less ours, and how likely chance alone would give it."""
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
    """95 % interval of the accuracy, theirs less ours, from drawing whole groups with replacement.

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
    """Accuracy of each fold."""
    return [float((r.probabilities.argmax(1) == labels.y[r.rows]).mean()) for r in results]


def ablation_table(labels: Labels, found: Sequence[tuple[Variant, Sequence[FoldResult]]]) -> list[dict[str, Any]]:
    """Each variant beside the first, the whole method; p-values of the t-test adjusted after Holm."""
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
    """Mean loss of the answered class' probability when attended, or random, cells are taken away."""
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
    """What goes into `bundle.json`: the protocols without curves and folds, masks, foreign blood and probes.

    Reliability stays, a row for each tenth of confidence: people are told what a confidence has meant.
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


# --- the flow --------------------------------------------------------------------------------------------------------


@task(task_run_name="{what}", cache_policy=NO_CACHE, persist_result=False)
def together(what: str, pool: ProcessPoolExecutor, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs calls in the pool's processes; results in their order."""
    found = [future.result() for future in [pool.submit(call) for call in calls]]
    get_run_logger().info("%s: done", what)
    return found


@flow(
    name="leukoflow evaluate",
    flow_run_name="evaluate {bundle}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]
    validate_parameters=False,
)
def evaluate(
    bundle: str | Path,
    data_dir: Path,
    out: Path,
    work: Path | None = None,
    protocols: Sequence[Protocol] = PROTOCOLS,
    repeats: int = 4,
    ablations: bool = True,
    probes: bool = True,
    robustness: bool = True,
    steps: int = FOLD_STEPS,
    threads: int = 2,
    record: bool = True,
) -> dict[str, Any]:
    """Cross-validates the recipe of a bundle, measures the bundle, writes `evaluation.json` and `evaluation.html`.

    Args:
        bundle: directory or name.
        data_dir: folder with the labelled fields.
        out: folder of the two files.
        work: folder of intermediate results, with which an interrupted evaluation goes on; default OUT.work.
        protocols: which to run.
        repeats: of the cluster-grouped folds; five fold scores each. The other protocols run once.
        ablations: leave out each part in turn, over the same cluster-grouped folds.
        probes: change fields on purpose, to see what the answer rests on.
        robustness: damage fields, to see how much it bears.
        steps: of the classifier in each fold.
        threads: worker processes.
        record: put the figures into `bundle.json`; its digest does not change.
    """
    data_dir, out = Path(data_dir), Path(out)  # a deployment's parameters are strings
    measured = load_bundle(bundle)
    labels = read_labels(data_dir)
    work = Path(work) if work else out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    _bind(work, measured, labels, steps)
    setting = Setting(str(bundle), data_dir, work, steps)
    tables = ["plain", "untrained", *sorted({v.table for v in ABLATIONS if v.table != "plain"} if ablations else ())]
    result: dict[str, Any] = {
        "schema_version": 2,
        "bundle": {"name": measured.spec.name, "digest": measured.digest},
        "data": {
            "digest": labels.digest,
            "fields": len(labels),
            "classes": {name: int((labels.y == k).sum()) for k, name in enumerate(CLASSES)},
            "slides": len(set(labels.slide)),
            "clusters": len(set(labels.cluster)),
        },
        "recipe": {
            "text": "Segmenter and backbones are the bundle's: they were trained without class labels, on these fields "
            "among others. z-score, selection, classifier, temperature, conformal thresholds and out-of-distribution "
            "statistics are fitted inside every fold.",
            "classifier_steps": steps,
            "seed": measured.spec.training.seed,
        },
        "protocols": {},
        "comparison": {},
    }
    with ProcessPoolExecutor(threads, multiprocessing.get_context("spawn")) as pool:
        together("segmentation of all fields", pool, [partial(make_classes, setting, p) for p in range(SEGMENT_PARTS)])
        calls = [partial(make_table, setting, name) for name in tables]
        together("features of all fields", pool, [*calls, partial(make_baselines, setting)])
        for protocol in protocols:
            times = repeats if protocol == "cluster" else 1
            jobs = [FoldJob(protocol, r, f, WHOLE, calibrated=True) for r in range(times) for f in range(FOLDS)]
            folds = together(f"{protocol}: {len(jobs)} folds", pool, [partial(fold, setting, job) for job in jobs])
            models, answers = {"leukoflow": protocol_summary(labels, protocol, folds)}, {}
            for name in BASELINES:
                found = together(
                    f"{protocol}: {name}", pool, [partial(baseline, setting, name, protocol, r) for r in range(times)]
                )
                models[name], answers[name] = baseline_summary(labels, protocol, found), found
            result["protocols"][protocol] = {"repeats": times, "folds": FOLDS, "models": models}
            ours, theirs = (models[m]["fold_scores"]["accuracy"] for m in ("leukoflow", "colour histogram"))
            result["comparison"][protocol] = {
                "against": "colour histogram",
                "scores": len(ours),
                **paired(ours, theirs),
                "interval_95": grouped_difference(labels, protocol, folds, answers["colour histogram"]),
            }
            if protocol == "cluster":
                result["explanations"] = faithfulness(folds)
        if ablations:
            result |= _ablations(setting, labels, pool, repeats)
        if probes and "cluster" in protocols:
            result["probes"] = _probes(setting, labels, pool)
        if robustness and "cluster" in protocols:
            result["robustness"] = _robustness(setting, labels, pool)
        found = together(
            "masks, boxes and foreign blood",
            pool,
            [partial(measure_segmentation, setting), partial(measure_foreign, setting)],
        )
        result["segmentation"], result["foreign"] = found
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (out / "evaluation.html").write_text(render(result), "utf-8")
    if record:
        write_spec(measured.path, measured.spec.model_copy(update={"metrics": headline(result)}))
    return result


def _bind(work: Path, bundle: Bundle, labels: Labels, steps: int) -> None:
    """Refuses a work folder with results of another bundle, data or recipe."""
    path, mine = work / "evaluation.json", {"bundle": bundle.digest, "data": labels.digest, "steps": steps}
    if path.is_file() and json.loads(path.read_text("utf-8")) != mine:
        raise ConfigError(f"{work} holds results of another bundle, data or recipe: give a new folder, or remove it")
    path.write_text(json.dumps(mine), "utf-8")


def _ablations(setting: Setting, labels: Labels, pool: ProcessPoolExecutor, repeats: int) -> dict[str, Any]:
    """Ablations and the curve over the number of selected columns, on the cluster-grouped folds."""
    curve = [Variant(f"{k or 'all'} columns", "", k=k) for k in SELECTED]
    found = []
    for variant in (WHOLE, *ABLATIONS, *curve):
        jobs = [FoldJob("cluster", r, f, variant, calibrated=False) for r in range(repeats) for f in range(FOLDS)]
        calls = [partial(fold, setting, job) for job in jobs]
        found.append((variant, together(f"ablation: {variant.name}", pool, calls)))
    total = sum(width for _, width in opened(setting)[1].columns)
    scores = [accuracies(labels, results) for _, results in found[-len(curve) :]]
    return {
        "ablations": ablation_table(labels, found[: -len(curve)]),
        "select_k": [
            {"k": v.k or total, "scores": s, "mean": float(np.mean(s))} for v, s in zip(curve, scores, strict=True)
        ],
    }


def _probes(setting: Setting, labels: Labels, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Shortcut probes, the untouched fields first."""
    y = labels.y[probe_rows(labels)]
    found = together("shortcut probes", pool, [partial(probe, setting, name) for name, _ in PROBES])
    right = [float((p.argmax(1) == y).mean()) for p, _ in found]
    return [
        {"name": name, "what": what, "accuracy": accuracy, "baseline": right[0] if i else None, "fields": len(y)}
        for i, ((name, what), accuracy) in enumerate(zip(PROBES, right, strict=True))
    ]


def _robustness(setting: Setting, labels: Labels, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Accuracy and share answered under each damage."""
    y = labels.y[probe_rows(labels)]
    damaged = together("robustness", pool, [partial(probe, setting, f"{d.kind} {d.severity}") for d in DEGRADATIONS])
    return [
        {
            "kind": d.kind,
            "severity": d.severity,
            "value": d.value,
            "accuracy": float((p.argmax(1) == y).mean()),
            "answered": float(answered.mean()),
        }
        for d, (p, answered) in zip(DEGRADATIONS, damaged, strict=True)
    ]
