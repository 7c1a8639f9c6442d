"""What ingest found out, on its way through Parquet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leukoflow.cluster.code import code_digest
from leukoflow.core.config import LimitSettings
from leukoflow.runs.records import DIED, Quality, Shard, Source, SourceKind, Status
from leukoflow.tasks.store.commit import commit
from leukoflow.tasks.store.facts import Fact, known_culprits, read_facts, write_facts
from leukoflow.tasks.store.job import ShardJob

SHARD = Shard(1, 16, 16)


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    return ShardJob(
        root=str(tmp_path / "run"), run_id="run", source=Source("in.zip", SourceKind.ZIP, "i", 1), shard=SHARD,
        attempt="one", bundle="b", bundle_digest="d", device="cpu", code=code_digest(), limits=LimitSettings(),
        meta_columns=(),
    )  # fmt: skip


def test_facts_survive_the_way_through_parquet(job: ShardJob) -> None:
    quality = Quality(5.5, 0.8, 0.01, 0.2, 0.1, 1.2, 0.6, 0.4, ("a flag",), ("too dark: 0.1 < 0.25",))
    facts = [
        Fact(16, None, None, "ab", 640, 480, replace(quality, reasons=()), 4, 0),
        Fact(17, Status.REJECTED, "too dark: 0.1 < 0.25", "cd", 640, 480, quality, 0, None),
        Fact(18, Status.QUARANTINED, f"{DIED}: signal 9", None, None, None, None, 0, None),
        Fact(19, Status.QUARANTINED, "empty: 0 bytes", "ef", None, None, None, 0, None),
    ]
    write_facts(job, facts)
    roots = ["fields/part-00001.parquet"]
    commit(job, "masks", "m", roots)
    assert read_facts(job.root, SHARD) == facts
    assert known_culprits(job) == ((18, f"{DIED}: signal 9"),)
