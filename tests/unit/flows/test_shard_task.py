"""What is said of a shard that fails: another attempt only where there is one, and no words of Prefect."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect.states import Failed

from leukoflow.core.errors import ClusterError, ShardError
from leukoflow.flows.shard_task import cause_of_death, is_worth_a_retry, reason_of_failure
from leukoflow.runs.records import Shard
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.store.job import ShardJob, attempt_prefix

SHARD = Shard(7, 112, 16)


def test_another_attempt_is_promised_only_where_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "leukoflow"):
        assert not is_worth_a_retry(None, None, Failed(data=ClusterError("all workers are gone")))
        assert not caplog.messages
        assert is_worth_a_retry(None, None, Failed(data=ShardError("shard 00007: its worker process died")))
    assert caplog.messages == ["shard 00007: its worker process died; the shard is tried again"]


def test_the_reason_is_recorded_without_what_prefect_puts_before_it(tmp_path: Any) -> None:
    prefix = "Task run encountered an exception "
    failed = Failed(message=f"{prefix}ShardError: shard 00007: x", data=ShardError("shard 00007: x"))
    assert reason_of_failure(failed) == "shard 00007: x"
    failed = Failed(message=f"{prefix}ZeroDivisionError", data=ZeroDivisionError())
    assert reason_of_failure(failed) == "ZeroDivisionError"
    storage, job = open_storage(str(tmp_path)), cast(ShardJob, SimpleNamespace(shard=SHARD, attempt="a"))
    assert cause_of_death(storage, job) == "its worker process died (out of memory, killed, or a poisonous image)"
    storage.write(f"{attempt_prefix(SHARD, 'a')}/timeout.json", json.dumps({"message": "segment hangs"}).encode())
    assert cause_of_death(storage, job) == "segment hangs; its worker was ended"
