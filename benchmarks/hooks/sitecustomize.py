"""Makes images cost nothing in every process that has this folder on its PYTHONPATH, for `bench_million.py`.

Replaced are reading and decoding, the two networks and the diagnosis. Planning, tasks, writing, markers, receipts,
publishing, report and verification are the real ones. In the flow, how long each shard took is noted in the file
`BENCH_TIMES`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.abc
import importlib.util
import os
import sys
import threading
import time
from typing import Any

SIDE = 8


def _stages(module: Any) -> None:
    import numpy as np

    from leukoflow.runs.receipts import StageTiming
    from leukoflow.tasks.imaging.cells import Cells, CellTable
    from leukoflow.tasks.imaging.classify import TileDiagnoses, pool_tiles
    from leukoflow.tasks.imaging.extract import Features
    from leukoflow.tasks.inference.blocks import inference_batches

    @functools.wraps(module.prepare)
    def prepare(job: Any, first: int) -> Any:
        started = time.perf_counter()
        with module.guarded(job, "prepare"):
            method = module.opened_bundle(job.bundle, job.bundle_digest).spec.method
            members = module.members_of(job)[first - job.shard.first :]
            n = len(members)
            owners = np.array([m.ordinal for m in members], np.int32)
            facts = tuple(
                module.Fact(
                    m.ordinal, None, None, hashlib.sha256(f"{m.identity}{m.ordinal}".encode()).hexdigest(),
                    224, 224, None, 1, None,
                )
                for m in members
            )  # fmt: skip
            return module.Block(
                first=first,
                next=first + n,
                facts=facts,
                tiles=np.zeros((n, SIDE, SIDE, 3), np.uint8),
                batches=inference_batches(owners, method.features.field_batch),
                owners=owners,
                origins=np.zeros((n, 2), np.int32),
                cores=np.tile(np.array([0, 0, SIDE, SIDE], np.int32), (n, 1)),
                extents=np.full((n, 2), SIDE, np.int32),
                to_source=np.zeros((n, 2, 3), np.float32),
                timings=(StageTiming("prepare", time.perf_counter() - started, n),),
            )

    def segment_block(block: Any, segmenter: Any, settings: Any, device: str) -> Any:
        n = len(block.tiles)
        kinds = {name: np.dtype(kind) for name, kind in _cells()}
        table = CellTable(**{name: np.ones(n, kind) for name, kind in kinds.items()})
        planes = np.zeros((n, SIDE, SIDE), np.uint8)
        return planes, Cells(planes.astype(np.uint16), table, np.arange(n + 1, dtype=np.int64))

    def _cells() -> list[tuple[str, Any]]:
        from leukoflow.tasks.imaging.cells import concatenate

        empty = concatenate([])
        return [(name, getattr(empty, name).dtype) for name in CellTable.__dataclass_fields__]

    def extract_block(block: Any, cells: Any, hybrid: Any, readout: Any, settings: Any, device: str) -> Any:
        n = len(cells)
        found = np.zeros((n, hybrid.num_features), np.float32)
        return Features(found, found, cells.offsets, cells.area), np.zeros((n, len(readout.weight), 1, 1), np.float16)

    def classify_block(features: Any, n_tiles: Any, bundle: Any, classifier: Any, device: str) -> Any:
        n = len(features.field)
        share = (np.arange(n) % 97 + 1.5) / 100
        probabilities = np.stack([1 - share, share / 2, share / 4, share / 4], axis=1)
        tiles = TileDiagnoses(probabilities, probabilities > 0.2, np.ones(n, np.float32), np.ones(n), (None,) * n)
        return pool_tiles(bundle, tiles, features.offsets, n_tiles)

    module.prepare, module.segment_block, module.extract_block, module.classify_block = (
        prepare, segment_block, extract_block, classify_block,
    )  # fmt: skip


def _shard_task(module: Any) -> None:
    if "BENCH_TIMES" not in os.environ:
        return
    attempt, task, lock = module._attempt, module.process_shard, threading.Lock()
    spent: dict[int, tuple[float, float]] = {}

    def timed(work: Any, shard: Any) -> Any:
        started = time.perf_counter()
        receipt = attempt(work, shard)
        if receipt is not None:
            spent[shard.ordinal] = (time.perf_counter() - started, receipt.seconds)
        return receipt

    class Timed:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def with_options(self, **options: Any) -> Any:
            return Timed(self.inner.with_options(**options))

        def submit(self, work: Any, shard: Any) -> Any:
            started = time.perf_counter()
            future = self.inner.submit(work, shard)

            def note(_: Any) -> None:
                whole = time.perf_counter() - started
                inside, stages = spent.pop(shard.ordinal, (0.0, 0.0))
                with lock, open(os.environ["BENCH_TIMES"], "a") as file:
                    file.write(f"{shard.ordinal},{time.time():.3f},{whole:.5f},{inside:.5f},{stages:.5f}\n")

            future.add_done_callback(note)
            return future

    module._attempt, module.process_shard = timed, Timed(task)
    sys.modules["leukoflow.cluster.cluster"].IN_FLIGHT_PER_WORKER = 1  # type: ignore[attr-defined]
    # so nobody waits behind another shard, and what is left beside the stages is overhead


def _preflight(module: Any) -> None:
    module.BYTES_PER_IMAGE = 8_000  # of images of 8 x 8 px: the disk that real ones would need is not there


HOOKS = {
    "leukoflow.tasks.inference.stages": _stages,
    "leukoflow.tasks.intake.preflight": _preflight,
    "leukoflow.flows.shard_task": _shard_task,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in HOOKS:
            return None
        hook = HOOKS.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
