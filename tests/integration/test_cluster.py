"""Workers are ours: bounded threads, our environment, one GPU each; what is missing is an error, not a hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from leukoflow.cluster import code_digest, cores, open_cluster
from leukoflow.config import ClusterSettings
from leukoflow.errors import ClusterError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def surroundings() -> tuple[int, str | None, str]:
    """Compute threads, visible GPUs, and the environment as the kernel has it from the process's start."""
    import torch

    born_with = Path("/proc/self/environ").read_text() if Path("/proc/self/environ").exists() else ""
    return torch.get_num_threads(), os.environ.get("CUDA_VISIBLE_DEVICES"), born_with


def test_a_gpu_has_a_process_of_its_own_and_threads_are_shared_out() -> None:
    with open_cluster(ClusterSettings(workers=1), gpus=1) as client:
        infos = client.scheduler_info(n_workers=-1)["workers"]
        assert sorted(info["resources"].get("GPU", 0) for info in infos.values()) == [0, 1]
        assert {info["nthreads"] for info in infos.values()} == {1}
        _, gpu, _ = client.submit(surroundings, resources={"GPU": 1}).result(timeout=60)
        assert gpu == "0"
        found = client.run(surroundings)
        assert {threads for threads, _, _ in found.values()} == {max(1, cores() // 2)}
        assert {gpus for _, gpus, _ in found.values()} == {"0", ""}
        for _, _, born_with in found.values():
            if born_with:
                assert "MALLOC_TRIM_THRESHOLD_=268435456" in born_with
        assert set(client.run(code_digest).values()) == {code_digest()}


def test_an_address_where_nobody_answers_is_an_error_with_the_remedy() -> None:
    settings = ClusterSettings(address="tcp://127.0.0.1:9", wait_seconds=2)
    with pytest.raises(ClusterError, match="start one with `dask scheduler`"), open_cluster(settings):
        pass


def test_a_gpu_that_no_worker_offers_is_an_error_after_a_short_wait() -> None:
    with open_cluster(ClusterSettings(workers=1)) as client:
        settings = ClusterSettings(address=client.scheduler.address, wait_seconds=1)
        with pytest.raises(ClusterError, match="no worker offers the resource GPU"), open_cluster(settings, gpus=1):
            pass
