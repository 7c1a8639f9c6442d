"""An S3 API, and a proxy before it that makes its answers late, cut, lost or wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from faults import Faults, FaultyProxy, moto_server, s3_account


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with moto_server() as url:
        boto3.client("s3", endpoint_url=url, **_keys(url)).create_bucket(Bucket="lab")
        yield url


def _keys(url: str) -> dict[str, str]:
    account = s3_account(url)
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    return {k: account[v] for k, v in names.items()} | {"region_name": "us-east-1"}


@pytest.fixture(scope="module")
def weather(upstream: str) -> Iterator[FaultyProxy]:
    """Pauses between retries are short, their number is the real one."""
    with pytest.MonkeyPatch.context() as patch, FaultyProxy(upstream) as proxy:
        patch.setattr("botocore.retryhandler.delay_exponential", lambda base, growth_factor, attempts: 0.01)
        yield proxy


@pytest.fixture
def proxy(weather: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """A store with weather, which is fair until the test says otherwise."""
    weather.faults, weather.down, weather.says = Faults(seconds=0.05), None, None
    weather.log.clear()
    for name, value in s3_account(weather.url).items():
        monkeypatch.setenv(name, value)
    return weather


@pytest.fixture(scope="module")
def direct(upstream: str) -> Any:
    """A client past the proxy and past our code."""
    return boto3.client("s3", endpoint_url=upstream, **_keys(upstream))
