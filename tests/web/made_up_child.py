"""The engine's processes with made-up networks: they start at once, decode really, and make trouble on demand.

The first pixel of an image says what comes of it. `TEST_FOLDER` holds a file `seconds`, by which each image is slowed
down, and `once`, which an image leaves behind that kills its worker only where it is missing.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from leukoflow.apps.web.engine import child, inference
from leukoflow.apps.web.engine.frames import BundleCard, Hello, Setup
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import BundleError
from leukoflow.core.method import SegmentSettings
from leukoflow.runs.records import CLASSES, Status
from leukoflow.tasks.decoding.ingest import Decoder
from leukoflow.tasks.inference.single import STAGES, Examination, TileView

DIES, FOREVER, GREEDY, ONCE, NONSENSE, FAULTY = ((13, 37, blue) for blue in range(200, 206))
FOLDER = Path(os.environ.get("TEST_FOLDER", "/nowhere"))


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def load_models(name: str) -> Any:
    if name == "gone":
        raise BundleError("bundle gone is no longer there")
    spec = SimpleNamespace(method=SimpleNamespace(segment=SegmentSettings()))
    return SimpleNamespace(name=name, digest=digest(name), bundle=SimpleNamespace(spec=spec))


def prepare(setup: Setup, say: Any) -> Any:
    if "nothing" in setup.bundles:
        raise BundleError("no bundle 'nothing'")
    say(Hello(tuple(BundleCard(name, digest(name), name, CLASSES, (), 0.05) for name in setup.bundles)))
    return load_models(setup.bundles[0])


def examine(
    data: bytes, um_per_px: float | None, models: Any, limits: LimitSettings, decoder: Decoder,
    on_stage: Callable[[str], None],
) -> Examination:  # fmt: skip
    on_stage("decode")
    image = decoder.decode_one(data, um_per_px)
    tiles: tuple[TileView, ...] = ()
    if image.rgb is not None:
        on_stage("normalize")
        trouble(tuple(image.rgb[0, 0]))
        for stage in STAGES[2:]:
            on_stage(stage)
        plane = np.zeros(image.rgb.shape[:2])
        numbers = np.zeros(0, np.float32)
        tiles = (
            TileView(
                image.rgb, image.rgb, plane.astype(np.uint8), plane.astype(np.uint16), np.eye(2, 3, dtype=np.float32),
                numbers.astype(np.int32), numbers, numbers, np.zeros((0, 4, 4, 4), np.float16), 44,
            ),
        )  # fmt: skip
    found = image.rgb is not None
    return Examination(
        sha256=hashlib.sha256(data).hexdigest(), bundle=models.name, bundle_digest=models.digest,
        status=Status.PREDICTED if found else Status.QUARANTINED, reason=image.reason, label="Pre" if found else None,
        probabilities=(0.1, 0.1, 0.7, 0.1) if found else (), prediction_set=("Pre",) if found else (), ood=1.0,
        width_px=image.source_width, height_px=image.source_height, quality=None, remarks=image.remarks, cells=None,
        tiles=tiles, seconds=tuple((stage, 0.0) for stage in STAGES),
    )  # fmt: skip


def trouble(colour: tuple[Any, ...]) -> None:
    if (FOLDER / "seconds").is_file():
        time.sleep(float((FOLDER / "seconds").read_text()))
    if colour == DIES or (colour == ONCE and not (FOLDER / "once").exists()):
        (FOLDER / "once").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if colour == FOREVER:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
        while True:
            time.sleep(1)
    if colour == GREEDY:
        hoard = []
        while True:
            hoard.append(np.ones(1 << 24))
    if colour == NONSENSE:
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"\x80\x04cos\nsystem\n" * 100)
            except OSError:
                continue
    if colour == FAULTY:
        raise ValueError("a bug in the program")


child._prepare = prepare  # type: ignore[assignment]
inference._use_threads = lambda count: None
child.load_models = inference.load_models = load_models  # type: ignore[assignment]
inference.warm = lambda models: None  # type: ignore[assignment]
inference.examine = examine  # type: ignore[assignment]

if __name__ == "__main__":
    child.main()
