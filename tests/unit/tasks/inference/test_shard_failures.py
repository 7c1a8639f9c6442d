"""What is said of a shard that fails: another attempt only where there is one, and no words of Prefect."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect.states import Failed

from leukoflow.cluster.cluster import _remedy
from leukoflow.core.config import ClusterSettings
from leukoflow.core.errors import ClusterError, ShardError, StorageError
from leukoflow.flows import run as nightly
from leukoflow.flows.run import _obituary, _why, _with_spool, _worth_a_retry
from leukoflow.runs.records import Shard, Source, SourceKind
from leukoflow.storage.base import Storage
from leukoflow.tasks.store.job import ShardJob, attempt_prefix

SHARD = Shard(7, 112, 16)


def test_another_attempt_is_promised_only_where_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "leukoflow"):
        assert not _worth_a_retry(None, None, Failed(data=ClusterError("all workers are gone")))
        assert not caplog.messages
        assert _worth_a_retry(None, None, Failed(data=ShardError("shard 00007: its worker process died")))
    assert caplog.messages == ["shard 00007: its worker process died; the shard is tried again"]


def test_the_reason_is_recorded_without_what_prefect_puts_before_it(tmp_path: Any) -> None:
    prefix = "Task run encountered an exception "
    assert _why(Failed(message=f"{prefix}ShardError: shard 00007: x", data=ShardError("shard 00007: x"))) == (
        "shard 00007: x"
    )
    assert _why(Failed(message=f"{prefix}ZeroDivisionError", data=ZeroDivisionError())) == "ZeroDivisionError"
    storage, job = Storage(str(tmp_path)), cast(ShardJob, SimpleNamespace(shard=SHARD, attempt="a"))
    assert _obituary(storage, job) == "its worker process died (out of memory, killed, or a poisonous image)"
    storage.write(f"{attempt_prefix(SHARD, 'a')}/timeout.json", json.dumps({"message": "segment hangs"}).encode())
    assert _obituary(storage, job) == "segment hangs; its worker was ended"


def test_a_disk_that_is_full_while_a_tar_is_unpacked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def spool(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nightly, "spool", spool)
    run = SimpleNamespace(
        root="/out/night",
        source=Source("night.tar.gz", SourceKind.COMPRESSED_TAR, "1-2", 10),
        binding=SimpleNamespace(command="leukoflow rerun /out night"),
    )
    with pytest.raises(StorageError, match=r"disk that holds /out/night is full.*again: leukoflow rerun /out night"):
        list(_with_spool(cast(Any, SimpleNamespace(run=run)), iter([SHARD])))


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
