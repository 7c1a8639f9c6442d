"""Evaluation without leakage: protocols beside baselines, ablations, probes, robustness, masks, foreign blood."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from leukoflow.core.errors import ConfigError
from leukoflow.models.bundle import Bundle, load_bundle, write_spec
from leukoflow.tasks.evaluation.jobs import (
    PROBES,
    SEGMENT_PARTS,
    Setting,
    baseline,
    fold,
    make_baselines,
    make_classes,
    make_table,
    measure_foreign,
    measure_segmentation,
    opened,
    probe,
    probe_rows,
)
from leukoflow.tasks.evaluation.probes import DEGRADATIONS
from leukoflow.tasks.evaluation.protocols import (
    ABLATIONS,
    BASELINES,
    FOLDS,
    PROTOCOLS,
    SELECTED,
    WHOLE,
    FoldJob,
    Protocol,
    Variant,
)
from leukoflow.tasks.evaluation.results import (
    ablation_table,
    accuracies,
    baseline_summary,
    faithfulness,
    grouped_difference,
    headline,
    paired,
    protocol_summary,
)
from leukoflow.tasks.report.evaluation_report import render
from leukoflow.tasks.training.data import Labels, read_labels

FOLD_STEPS = 100  # of the attention in a fold: the shorter recipe


@task(task_run_name="{what}", cache_policy=NO_CACHE, persist_result=False)
def together(what: str, pool: ProcessPoolExecutor, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run calls in the pool's processes; results in their order."""
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
    """Cross-validate the recipe of a bundle, measure the bundle, write `evaluation.json` and `evaluation.html`.

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
    labels = read_labels(data_dir, measured.spec.classes)
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
            "classes": {name: int((labels.y == k).sum()) for k, name in enumerate(labels.classes)},
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
    """Refuse a work folder with results of another bundle, data or recipe."""
    path, mine = work / "evaluation.json", {"bundle": bundle.digest, "data": labels.digest, "steps": steps}
    if path.is_file() and json.loads(path.read_text("utf-8")) != mine:
        raise ConfigError(f"{work} holds results of another bundle, data or recipe: give a new folder, or remove it")
    path.write_text(json.dumps(mine), "utf-8")


def _ablations(setting: Setting, labels: Labels, pool: ProcessPoolExecutor, repeats: int) -> dict[str, Any]:
    """Run ablations and the curve over the number of selected columns, on the cluster-grouped folds."""
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
    """Run the shortcut probes, the untouched fields first."""
    y = labels.y[probe_rows(labels)]
    found = together("shortcut probes", pool, [partial(probe, setting, name) for name, _ in PROBES])
    right = [float((p.argmax(1) == y).mean()) for p, _ in found]
    return [
        {"name": name, "what": what, "accuracy": accuracy, "baseline": right[0] if i else None, "fields": len(y)}
        for i, ((name, what), accuracy) in enumerate(zip(PROBES, right, strict=True))
    ]


def _robustness(setting: Setting, labels: Labels, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Measure accuracy and share answered under each damage."""
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
