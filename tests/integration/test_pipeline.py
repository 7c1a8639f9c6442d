"""A worker with a GPU only computes on it: images are prepared by the others, ahead of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import on_workers
import pytest
from harness import until

from leukoflow.cluster.cluster import Cluster, open_cluster
from leukoflow.core.config import ClusterSettings
from leukoflow.flows import shard_task
from leukoflow.runs.records import Shard

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
SHARDS = 8


def went(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, float, float]]]:
    """Address, begin and end of each stage of all shards, which go through the run's own chain."""
    for name in ("prepare", "next_of", "segment", "written_by", "extract", "classify"):
        monkeypatch.setattr(shard_task, name, getattr(on_workers, name))

    def one(ordinal: int) -> Any:
        shard = Shard(ordinal, ordinal * 64, 64)
        job: Any = SimpleNamespace(root=str(folder), shard=shard, attempt="a", device="cuda")
        return shard_task.run_chain(cluster, job, ())

    with ThreadPoolExecutor(cluster.in_flight) as pool:
        assert len(list(pool.map(one, range(SHARDS)))) == SHARDS
    found: dict[str, list[tuple[str, float, float]]] = {}
    for file in sorted(folder.iterdir()):
        stage, _, address, began, ended = file.read_text().split()
        found.setdefault(stage, []).append((address, float(began), float(ended)))
    return found


def test_gpus_compute_and_the_others_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leukoflow.cluster.workers.visible_gpus", lambda: ["0"])
    with open_cluster(ClusterSettings(workers=1), gpu=True) as cluster:
        cluster.prepare_workers(partial(on_workers.nap, 0.0))
        (gpu,), (cpu,) = cluster.crew.gpu, cluster.crew.cpu
        first = tmp_path / "first"
        first.mkdir()
        stages = went(cluster, first, monkeypatch)
        assert {stage: {address for address, _, _ in found} for stage, found in stages.items()} == {
            "prepare": {cpu}, "segment": {gpu}, "extract": {gpu}, "classify": {gpu},
        }  # fmt: skip
        # While the GPU works on one shard, the next ones are prepared.
        busy = [(began, ended) for stage in ("segment", "extract") for _, began, ended in stages[stage]]
        beside = [e for _, b, e in stages["prepare"] if any(b < ended and e > began for began, ended in busy)]
        assert len(beside) >= SHARDS // 2

        # Without helpers the GPU's worker does everything, rather than wait for ever.
        cluster.client.retire_workers([cpu], close_workers=True)
        until(lambda: cluster.crew.cpu == (), 60, "the helper is gone")
        alone = tmp_path / "alone"
        alone.mkdir()
        assert {address for found in went(cluster, alone, monkeypatch).values() for address, _, _ in found} == {gpu}
