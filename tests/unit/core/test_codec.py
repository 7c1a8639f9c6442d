from __future__ import annotations

import json

import pytest

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import StorageError
from leukoflow.runs.progress import RunBinding
from leukoflow.runs.receipts import StageTiming
from leukoflow.runs.records import Marker, PartRef, Shard, ShardReceipt

RECEIPT = ShardReceipt(
    shard=Shard(3, 48, 16),
    predicted=9,
    abstained=4,
    rejected=2,
    quarantined=1,
    cells=77,
    labels=(5, 4, 3, 1),
    reasons=(("too few cells", 4), ("blurred: ümlaut", 2)),
    seconds=1.25,
    timings=(StageTiming("prepare", 0.5, 16),),
    resumed=("masks",),
)
MARKER = Marker(
    PartRef("predictions", "00003", "abc", "key", (("predictions/part-00003.parquet", 5, "00ff"),)), RECEIPT
)


def test_records_survive_the_way_through_json() -> None:
    assert loads(Marker, dumps(MARKER), "marker") == MARKER
    assert loads(Marker, dumps(Marker(MARKER.part)), "marker") == Marker(MARKER.part)
    assert RECEIPT.rows == 16


def test_the_same_record_gives_the_same_readable_bytes() -> None:
    data = dumps(MARKER)
    assert data == dumps(loads(Marker, data, "marker"))
    assert data.endswith(b"}\n")
    assert "ümlaut" in data.decode()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", dumps(MARKER)[:-20], dumps(MARKER).replace(b'"predicted": 9', b'"predicted": "nine"')],
)
def test_damaged_bytes_are_an_error_that_names_the_file(data: bytes) -> None:
    with pytest.raises(StorageError, match=r"markers/x\.json is damaged .* delete it and rerun"):
        loads(Marker, data, "markers/x.json")


def test_records_of_before_the_plan_was_bound_still_load() -> None:
    bound = RunBinding("a", "f", "s", 1, 1, 16, "pocket", "d", "cpu", "2026-01-01T00:00:00+00:00", "leukoflow run")
    old = {k: v for k, v in json.loads(dumps(bound)).items() if k != "plan_sha256"}
    assert loads(RunBinding, json.dumps(old).encode(), "run.json") == bound
