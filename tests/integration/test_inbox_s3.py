"""An inbox and its ledger on an object store, behind a real S3 interface."""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path

import boto3
import pytest

from leukoflow.core.site import load_site
from leukoflow.runs.ledger import Ledger, encode, read_selection
from leukoflow.tasks.intake.inbox import judge, look, take

pytestmark = pytest.mark.integration
NIGHT = date(2026, 3, 1)


def test_an_inbox_on_an_object_store(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="lab")
    (tmp_path / "site.toml").write_text('name = "ward"\ninbox = "s3://lab/inbox"\nout = "s3://lab/out"\n[run]\n')
    site = load_site(tmp_path / "site.toml")
    for key in ("slide-a/1.jpg", "slide-a/2.jpg", "scan.zip"):
        client.put_object(Bucket="lab", Key=f"inbox/{key}", Body=b"image")
    ledger = Ledger(site.out, site.name)
    assert take(site, ledger, NIGHT, time.time()) is None
    head = take(site, ledger, NIGHT, time.time() + 1000)
    assert head is not None
    assert head.runs == ("ward-2026-03-01.scan", "ward-2026-03-01")
    assert take(site, Ledger(site.out, site.name), NIGHT, time.time() + 1000) is None
    selection = read_selection(ledger.uri(1), "ward-2026-03-01")
    assert selection.source(site.inbox).identity == selection.digest
    client.put_object(Bucket="lab", Key="inbox/slide-a/2.jpg", Body=b"replaced")
    (item,) = [i for i in look(site, ledger, time.time() + 1000).items if i.state != "taken"]
    assert (item.name, item.changed, item.supplement) == ("slide-a", 1, True)
    taken = Ledger(site.out, site.name).read()
    assert not ledger.storage.create("claims/00001.parquet", encode(taken.heads[0], selection.table))
    items, _ = judge([], taken, site.arrival, time.time())
    assert items == []
