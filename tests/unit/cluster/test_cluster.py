"""What is said of a cluster whose workers are gone."""

from __future__ import annotations

import re

import pytest

from leukoflow.cluster.cluster import _remedy
from leukoflow.core.config import ClusterSettings


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("local", "run the same command again"),
        ("slurm", r"squeue --me.*cluster.slurm.walltime \(08:00:00\)"),
        ("kubernetes", "kubectl get pods"),
        ("tcp://gpu1:8786", "`dask worker tcp://gpu1:8786 --nthreads 1 --resources GPU=1`"),
    ],
)
def test_lost_workers_come_back_in_the_way_they_came(address: str, words: str) -> None:
    assert re.search(words, _remedy(ClusterSettings(address=address), gpu=True))
