"""Training of a bundle: segmenter, two distilled backbones, features, then selection, classifier, calibration."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from leukoflow.core.errors import ConfigError
from leukoflow.core.method import MethodSettings
from leukoflow.models.presets import preset
from leukoflow.tasks.training.classifier import make_bundle
from leukoflow.tasks.training.data import Budget, TrainConfig, load_prepared, open_work
from leukoflow.tasks.training.phases import Phase, run_phase

SWITCHES = {
    "mask_overlays": ("normalize", "mask_overlays"),
    "reinhard": ("normalize", "reinhard"),
    "clahe": ("normalize", "clahe"),
    "multiscale": ("normalize", "multiscale"),
    "unet": ("segment", "enabled"),
    "convnext": ("features", "convnext"),
    "nasnet": ("features", "nasnet"),
    "select": ("select", "enabled"),
    "attention": ("classify", "attention"),
}
"""Parts that an ablation can leave out, and the setting that switches each."""

FULL_MINUTES = 60.0  # wall clock of network training on two cores for which the default steps are meant


def ablated(method: MethodSettings, without: Sequence[str]) -> MethodSettings:
    """Return the settings with the named parts switched off. Raises ConfigError for an unknown name."""
    for name in without:
        if name not in SWITCHES:
            raise ConfigError(f"cannot leave out {name!r}; choose from: {', '.join(SWITCHES)}")
        section, switch = SWITCHES[name]
        part = getattr(method, section).model_copy(update={switch: False})
        method = method.model_copy(update={section: part})
    return method


def train_config(
    preset_name: str = "pocket",
    seed: int = 0,
    minutes: float = FULL_MINUTES,
    without: Sequence[str] = (),
    weights: str | None = None,
    teacher: str | None = None,
    limit: int | None = None,
) -> TrainConfig:
    """Make the configuration of a training whose networks may take about `minutes` on two cores."""
    if minutes <= 0:
        raise ConfigError(f"training needs a positive number of minutes, got {minutes}")
    share = minutes / FULL_MINUTES
    default = TrainConfig(method=preset(preset_name).method)

    def budget(whole: Budget) -> Budget:
        return Budget(steps=max(1, round(whole.steps * share)), minutes=whole.minutes * share)

    return TrainConfig(
        preset=preset_name,
        seed=seed,
        method=ablated(default.method, without),
        segmenter=budget(default.segmenter),
        convnext=budget(default.convnext),
        nasnet=budget(default.nasnet),
        classifier_steps=max(1, round(default.classifier_steps * min(1.0, share))),
        weights=weights,
        teacher=teacher,
        limit=limit,
    )


@task(task_run_name="train {phase}", cache_policy=NO_CACHE, persist_result=False)
def train_phase(phase: Phase, config: TrainConfig, data_dir: Path, work_dir: Path, device: str, threads: int) -> None:
    """Train one phase in a process of its own, from its checkpoint where there is one.

    Two processes of one thread each get more from two cores than one process of two: these networks are small.
    """
    get_run_logger().info("%s: progress in %s", phase, work_dir / f"{phase}.log")
    if device != "cpu":
        run_phase(phase, config, data_dir, work_dir, device, threads)
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        child.submit(run_phase, phase, config, data_dir, work_dir, device, threads).result()


@task(task_run_name="train classifier and write bundle", cache_policy=NO_CACHE, persist_result=False)
def train_bundle(config: TrainConfig, data_dir: Path, work_dir: Path, out_dir: Path, name: str, command: str) -> str:
    """Fit selection, classifier and calibration, and write the bundle; return its digest."""
    threads = torch.get_num_threads()
    # So small a network gets slower with more, and sums in another order.
    torch.set_num_threads(1)
    try:
        bundle = make_bundle(config, load_prepared(config, data_dir, work_dir), work_dir, out_dir, name, command)
    finally:
        torch.set_num_threads(threads)
    return bundle.digest


@flow(
    name="leukoflow train",
    flow_run_name="train {preset_name}",
    task_runner=ThreadPoolTaskRunner(max_workers=2),  # type: ignore[arg-type]
    validate_parameters=False,
)
def train(
    data_dir: Path,
    out_dir: Path,
    work_dir: Path | None = None,
    preset_name: str = "pocket",
    seed: int = 0,
    minutes: float = FULL_MINUTES,
    without: Sequence[str] = (),
    weights: str | None = None,
    teacher: str | None = None,
    limit: int | None = None,
    threads: int = 2,
    device: str = "auto",
    name: str | None = None,
) -> str:
    """Train a bundle into `out_dir` and return its digest; the same call continues an interrupted training.

    Args:
        data_dir: folder with the labelled fields and masked cells.
        out_dir: where the bundle is written.
        work_dir: checkpoints and prepared arrays, bound to this configuration; default OUT_DIR.work.
        preset_name: `pocket` or `full`.
        seed: of every random draw.
        minutes: about how long the networks may train on two cores.
        without: parts left out (see SWITCHES), for ablation.
        weights: pretrained backbones: `hub`, a file or a directory; without them they are distilled.
        teacher: weight file of the network to distil from, instead of the installed package's.
        limit: use only so many fields, for a smoke run.
        threads: processor threads in all.
        device: `auto`, `cpu` or `cuda`.
        name: of the bundle; by default that of the directory.
    """
    data_dir, out_dir = Path(data_dir), Path(out_dir)  # a deployment's parameters are strings
    work_dir = Path(work_dir) if work_dir else out_dir.with_name(out_dir.name + ".work")
    config = train_config(preset_name, seed, minutes, without, weights, teacher, limit)
    open_work(config, work_dir)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    parallel = device == "cpu" and threads > 1
    each = max(1, threads // 2) if parallel else threads
    phase_task = train_phase.with_options(retries=1)
    futures: list[PrefectFuture[None]] = []

    def start(phase: Phase, *after: PrefectFuture[None]) -> PrefectFuture[None]:
        future = phase_task.submit(
            phase, config, data_dir, work_dir, device, each, wait_for=list(after), return_state=False
        )
        futures.append(future)
        if not parallel:
            future.wait()
        return future

    # The order of submission is that of execution, two at a time: the segmenter beside the teacher and then ConvNeXt.
    prepared = start("prepare")
    segmenter, teacher_maps = start("segmenter", prepared), start("teacher", prepared)
    convnext, nasnet = start("convnext", teacher_maps), start("nasnet", teacher_maps)
    cells = start("cells", segmenter)
    start("features_convnext", convnext, cells)
    start("features_nasnet", nasnet, cells)
    for future in futures:
        future.result()
    # Folders are this machine's business; the bundle's notes name given weights by their digests.
    asked = {"preset": preset_name, "seed": seed, "minutes": minutes, "without": list(without)}
    command = json.dumps(asked | ({"weights": "given"} if weights is not None else {}))
    return train_bundle(config, data_dir, work_dir, out_dir, name or out_dir.name, command)
