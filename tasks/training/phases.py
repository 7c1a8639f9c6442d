"""The phases of training by name, so that each can run in a process of its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, get_args

import cv2
import torch

from leukoflow.tasks.training.backbone import make_targets, train_backbone
from leukoflow.tasks.training.data import TrainConfig, load_prepared, prepare
from leukoflow.tasks.training.features import backbone_features, find_cells
from leukoflow.tasks.training.segmenter import train_segmenter

Phase = Literal[
    "prepare", "teacher", "segmenter", "convnext", "nasnet", "cells", "features_convnext", "features_nasnet"
]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In an order that respects what each needs."""
logger = logging.getLogger(__name__)


def run_phase(phase: Phase, config: TrainConfig, data_dir: Path, work: Path, device: str, threads: int) -> None:
    """Run one phase of network training to its end, from its checkpoint if there is one.

    Meant for a process of its own: it sets the number of threads of torch and OpenCV.
    """
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    work.mkdir(parents=True, exist_ok=True)
    if phase == "prepare":
        prepare(config, data_dir, work)
        return
    data = load_prepared(config, data_dir, work)
    log = (work / f"{phase}.log").open("a", encoding="utf-8")

    def write(line: str) -> None:
        logger.info(line)
        print(line, file=log, flush=True)

    with log:
        match phase:
            case "segmenter" if config.method.segment.enabled:
                train_segmenter(config, data, work, device, write)
            case "teacher":
                make_targets(config, data, work, device, write)
            case "cells":
                find_cells(config, data, work, device, write)
            case "convnext" | "nasnet" if getattr(config.method.features, phase):
                train_backbone(config, data, work, phase, device, write)
            case "features_convnext" if config.method.features.convnext:
                backbone_features(config, data, work, "convnext", device, write)
            case "features_nasnet" if config.method.features.nasnet:
                backbone_features(config, data, work, "nasnet", device, write)
            case _:
                write(f"{phase}: switched off")
