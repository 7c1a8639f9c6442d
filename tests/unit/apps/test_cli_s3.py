"""What the command line says where an object store is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from faults import FaultyProxy, failure, moto_server, s3_account
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.apps.doctor import check_storage

pytestmark = pytest.mark.slow  # a server of moto, behind a proxy


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with moto_server() as url, FaultyProxy(url) as proxy:
        for name, value in s3_account(proxy.url).items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="lab")
        yield proxy


def said(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "s3://lab/data", "--out", "b"),
        ("train", "data", "--out", "s3://lab/b"),
        ("evaluate", "pocket", "data", "--out", "s3://lab/e"),
        ("evaluate", "pocket", "s3://lab/data", "--out", "e"),
        ("sample", "s3://lab/demo"),
        ("diff", "a", "b", "--csv", "s3://lab/c.csv"),
        ("run", "x.zip", "--out", "out", "--config", "s3://lab/c.toml"),
    ],
)
def test_what_must_be_local_says_so(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, words = said(*arguments)
    assert code == 1
    assert "must be on the local disk" in words
    assert list(tmp_path.iterdir()) == []


def test_every_command_names_the_trouble(proxy: FaultyProxy) -> None:
    code, words = said("evaluate", "s3://lab/b", "data", "--out", "e")
    assert (code, "--no-record" in words) == (1, True)
    proxy.says = lambda request: failure("ExpiredToken", 400)
    for arguments in (
        ("status", "s3://lab/out"),
        ("status", "s3://lab/out", "night"),
        ("report", "s3://lab/out", "night"),
        ("verify", "s3://lab/out"),
        ("diff", "s3://lab/out/a", "s3://lab/out/b"),
        ("compact", "s3://lab/out", "night"),
        ("retention", "s3://lab/out", "--keep-days", "1"),
        ("erase", "s3://lab/out", "--patient", "p_" + 32 * "0"),
        ("run", "x.zip", "--out", "s3://lab/out"),
        ("run", "s3://lab/x.zip", "--out", "out"),
    ):
        code, words = said(*arguments)
        assert "the credentials have expired (ExpiredToken); renew them" in words, arguments
        assert "Traceback" not in words
        assert code == (2 if arguments[1].endswith("x.zip") and arguments[1].startswith("s3") else 1), arguments


def test_the_doctor_looks_at_the_store(proxy: FaultyProxy) -> None:
    assert [(c.name, c.verdict) for c in check_storage("s3://lab/out")] == [("storage", "ok"), ("store", "ok")]
    proxy.says = lambda request: failure("AccessDenied", 403) if "uploads" in request.query else None
    assert [(c.name, c.verdict) for c in check_storage("s3://lab/out")][-1] == ("uploads", "warn")
    proxy.says = lambda request: failure("AccessDenied", 403) if request.header("x-amz-copy-source") else None
    check = list(check_storage("s3://lab/out"))[-1]
    assert (check.name, check.verdict) == ("store", "fail")
    assert "access denied" in check.found
    assert "rights on bucket lab" in check.remedy
    proxy.says = None
    [check] = check_storage("s3://nowhere/out")
    assert (check.verdict, "does not exist" in check.found, "create it" in check.remedy) == ("fail", True, True)
